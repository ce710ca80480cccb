"""The training task: the network's branches and the paper's losses behind timm's task interface."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask
from timm.utils import distribute_bn, unwrap_model
from torch import distributed
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..constants import DIST_BN
from ..distributed import gather, process
from ..loss.identity import identity_losses
from ..loss.mutual_learning import MutualLearningLoss
from ..loss.triplet import WeightedRegularizedTriplet
from ..models.dual_stream import BranchOutput, DualStreamResNet

_logger = logging.getLogger(__name__)


class JoinedTriplet(NamedTuple):
    """The part of one batch in a triplet loss that compares across several batches.

    Attributes:
        value: The loss over all of them, a scalar.
        gradient: Its gradient with respect to the features of this batch, times the number of batches, since the
            batches' gradients are averaged afterwards; [2 B, D].
    """

    value: torch.Tensor
    gradient: torch.Tensor


class _KnownLoss(torch.autograd.Function):
    """A loss that was computed elsewhere, with its gradient, made a function of the features that it belongs to."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


class BranchForward(nn.Module):
    """Makes `forward_branches` the forward of the module that DDP wraps: gradients would not be averaged around it."""

    def __init__(self, model: DualStreamResNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, visible: torch.Tensor, infrared: torch.Tensor) -> BranchOutput:
        return self.model.forward_branches(visible, infrared)


class ViReIDTask(TrainingTask):
    """Identity loss per branch + mutual learning + weighted regularised triplet (eq. 13 of the paper)."""

    def __init__(
        self,
        model: DualStreamResNet,
        id_branches: Sequence[str] | None = None,
        mutual: str = 'joint-to-both',
        global_weight: float = 0.6,
        fusion_weight: float = 1.8,
        triplet_weight: float = 1.0,
        smoothing: float = 0.0,
        gather_features: bool = False,
        device: torch.device | None = None,
        verbose: bool = True,
    ) -> None:
        """Set up the losses.

        Args:
            model: A network with a classifier.
            id_branches: Branches with an identity loss (L_id of table 3); all of the model's when None.
            mutual: Which pairs learn from each other (table 4); without effect on a model of one branch.
            global_weight: theta_1 of eq. 9.
            fusion_weight: theta_2 of eq. 10.
            triplet_weight: Weight of WRT on the features before BN.
            smoothing: Label smoothing of the identity losses.
            gather_features: Whether the triplet loss compares the images of all processes.
            device: Where the model is.
            verbose: As in timm.

        Raises:
            ValueError: A model without classifier, or a branch that it does not have.
        """
        super().__init__(device=device, verbose=verbose)
        if model.num_classes < 1:
            raise ValueError('training needs a classifier: create the model with num_classes >= 1')
        unknown = sorted(set(id_branches or ()) - set(model.branches))
        if unknown:
            raise ValueError(f'the model has no branch {unknown[0]!r}; it has {", ".join(model.branches)}')
        self.trainable_module = BranchForward(model)
        self.id_branches = tuple(id_branches) if id_branches is not None else model.branches
        self.retrieval_branch = model.branches[-1]
        self.smoothing = smoothing
        self.triplet_weight = triplet_weight
        self.gather_features = gather_features
        self._batch_size: int | None = None  # of all processes, once they have compared theirs
        mode = mutual if len(model.branches) > 1 else 'none'
        self.mutual_learning = MutualLearningLoss(mode, global_weight, fusion_weight)
        self.triplet = WeightedRegularizedTriplet()

    def convert_sync_batchnorm(self) -> None:
        """Let batch norm see the batches of all processes; before averaging, compiling and `prepare_distributed`.

        Names and values of the weights stay. Nothing happens in a process that computes alone.

        Raises:
            ValueError: Several processes on the CPU, where torch has no such batch norm.
        """
        if process()[1] == 1:
            return
        if self.device.type == 'cpu':
            raise ValueError(
                'synchronised batch norm (--sync-bn) needs a GPU for each process: leave it out on the CPU'
            )
        convert_sync_batchnorm(self.trainable_module)  # replaces the modules in place

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'ViReIDTask':
        """Average gradients over the processes, if there are several; to be called last, after `compile`.

        Parameters that no loss reaches are frozen: the processes would wait for their gradients forever. After
        `compile`, torch's setting `torch._dynamo.config.optimize_ddp` is switched off for this process.

        Args:
            device_ids: As in timm; the task's own device if it is a GPU.
            ddp_kwargs: Further arguments of DistributedDataParallel.
        """
        if process()[1] == 1:
            return self
        self._freeze_unreached()
        if unwrap_model(self.trainable_module) is not self.trainable_module:
            # A graph that was compiled stays whole: torch 2.5 cannot divide one with functions of our own among the
            # buckets that are exchanged, and ends with an error.
            torch._dynamo.config.optimize_ddp = False
        if device_ids is None and self.device.type != 'cpu':
            device_ids = [self.device]
        # The gradients live in the buffers that are exchanged: no second copy of them.
        ddp_kwargs = {'gradient_as_bucket_view': True, **ddp_kwargs}
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        self._settle_buffers()
        return self

    def _freeze_unreached(self) -> None:
        model = self.get_eval_model()
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        with self._trial(model.forward_branches) as loss:
            gradients = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
        unreached = [name for name, gradient in zip(parameters, gradients) if gradient is None]
        for name in unreached:
            parameters[name].requires_grad_(False)
        if unreached:
            modules = sorted({name.split('.')[0] for name in unreached})
            _logger.info(f'No loss reaches {len(unreached)} parameters ({", ".join(modules)}): they are not trained')

    def _settle_buffers(self) -> None:
        """Let DistributedDataParallel arrange its buffers now, which it does after its first backward pass.

        The arrangement decides in which order gradients are added up. A resumed run would otherwise begin with another
        one than the run that was not interrupted has at that step, and go on to weights that differ in the last digit.
        """
        parallel = self.trainable_module
        compiled = parallel.module
        parallel.module = unwrap_model(compiled)  # nothing is compiled for the trial's small images
        with self._trial(parallel) as loss:
            loss.backward()
        parallel.module = compiled
        parallel.zero_grad()

    @contextmanager
    def _trial(self, forward: Callable[[torch.Tensor, torch.Tensor], BranchOutput]) -> Iterator[torch.Tensor]:
        """The loss of four small black images, without a trace in dropout's draws and batch norm's statistics."""
        model = self.get_eval_model()
        images = torch.zeros(2, model.in_chans, 32, 32, device=self.device, dtype=next(model.parameters()).dtype)
        labels = torch.zeros(4, dtype=torch.int64, device=self.device)
        with torch.random.fork_rng([self.device] if self.device.type == 'cuda' else []), _unrecorded(model):
            yield sum(self._terms(forward(images, images), labels, None).values())

    def share_running_statistics(self, dist_bn: str = 'reduce') -> None:
        """Make the running statistics of batch norm the same in all processes, as before evaluating and saving.

        Args:
            dist_bn: As timm's flag: `reduce` takes the mean over the processes, `broadcast` those of process 0.

        Raises:
            ValueError: Neither of these.
        """
        if dist_bn not in DIST_BN:
            raise ValueError(f'unknown dist_bn {dist_bn!r}; expected one of {", ".join(DIST_BN)}')
        count = process()[1]
        if count == 1:
            return
        distribute_bn(self.get_eval_model(), count, reduce=dist_bn == 'reduce')
        if self.has_ema():
            # Always those of process 0: what the others have averaged is in no checkpoint, so a mean over it would
            # differ in a run that was resumed.
            distribute_bn(self.get_eval_model(ema=True), count, reduce=False)

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the training forward; evaluation uses the network as it is."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The network itself, without the wrappers around it."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return unwrap_model(module).model if module is not None else None

    def cache_features(self, input: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The features that `forward` compares, [2 B, D], without gradients and without a trace in the network.

        Batch norm takes the batch's own statistics, as in training, but does not record them.

        Args:
            input: As for `forward`.
        """
        module = self.trainable_module
        module = module.module if isinstance(module, DistributedDataParallel) else module
        kind = self.device.type
        # Without autocast's memory of converted weights: what it takes up here has no gradient, and `forward` within
        # the same block would go on with that.
        uncached = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        with torch.no_grad(), _unrecorded(module), uncached:
            return module(*input).features

    def join_triplet(
        self,
        features: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
    ) -> list[JoinedTriplet]:
        """The triplet loss across several batches, without holding their activations (GradCache, arXiv:2101.06983).

        `forward` with the part of each batch, and the mean over the batches of the losses (over processes too with
        `gather_features`), give the gradients of the joined batch's triplet loss: the batches' features are constants
        for each other, and every batch adds the gradient that belongs to its own.

        Args:
            features: Those of each batch from `cache_features`, [2 B, D] each.
            labels: Their class labels, [2 B] each.

        Returns:
            The part of each batch.

        Raises:
            ValueError: Batches of different sizes, here or among the processes.
        """
        sizes = {len(batch) for batch in features}
        if len(sizes) != 1:
            raise ValueError(f'a joined triplet loss needs batches of one size, got {sorted(sizes)} rows')
        rows, identities, count, first = torch.cat(list(features)).detach(), torch.cat(list(labels)), len(features), 0
        own = len(rows)
        if self._gathers:
            self._check_batch_size(len(features[0]))
            number, processes = process()
            rows, identities, count, first = (
                gather(rows).flatten(0, 1),
                gather(identities).flatten(),
                count * processes,
                number * own,
            )
        with torch.enable_grad():
            rows.requires_grad_()
            value = self.triplet(rows, identities)
            (gradient,) = torch.autograd.grad(value, rows)
        parts = (gradient[first : first + own] * count).split(len(features[0]))
        return [JoinedTriplet(value.detach(), part) for part in parts]

    def forward(
        self,
        input: tuple[torch.Tensor, torch.Tensor],
        target: torch.Tensor,
        *,
        joined: JoinedTriplet | None = None,
    ) -> dict[str, torch.Tensor]:
        """Forward pass of both modalities and all losses.

        Args:
            input: Normalised visible [B, 3, H, W] and infrared [B, 3, H, W] images.
            target: Class labels of the visible rows, then of the infrared ones, [2 B].
            joined: This batch's part of a triplet loss across several batches; over the batch itself if None.

        Returns:
            `loss`, its terms `id_<branch>`, `mutual` and `triplet` as they enter the sum, and `output`, the logits
            of the branch that retrieval uses, [2 B, C].
        """
        branches = self.trainable_module(*input)
        if joined is None and self._gathers:
            (joined,) = self.join_triplet([branches.features], [target])
        terms = self._terms(branches, target, joined)
        return {'loss': sum(terms.values()), **terms, 'output': branches.logits[self.retrieval_branch]}

    def _terms(
        self,
        branches: BranchOutput,
        target: torch.Tensor,
        joined: JoinedTriplet | None,
    ) -> dict[str, torch.Tensor]:
        """The losses by name, as they enter the sum."""
        features, logits = branches
        terms = {
            f'id_{branch}': value
            for branch, value in identity_losses(logits, target, self.smoothing, self.id_branches).items()
        }
        if self.mutual_learning.mode != 'none':
            terms['mutual'] = self.mutual_learning(logits)
        if self.triplet_weight:
            triplet = self.triplet(features, target) if joined is None else _KnownLoss.apply(features, *joined)
            terms['triplet'] = self.triplet_weight * triplet
        return terms

    @property
    def _gathers(self) -> bool:
        return self.gather_features and self.triplet_weight != 0 and process()[1] > 1

    def _check_batch_size(self, size: int) -> None:
        """One size in all processes, or features would be mixed up: compared once, and here from then on."""
        if self._batch_size is None:
            sizes = [0] * process()[1]
            distributed.all_gather_object(sizes, size)
            if len(set(sizes)) != 1:
                raise ValueError(f'gathering features needs batches of one size in all processes, got {sizes} rows')
            self._batch_size = size
        if size != self._batch_size:
            raise ValueError(
                f'gathering features needs batches of one size throughout: {self._batch_size} rows so far, now {size}'
            )


@contextmanager
def _unrecorded(module: nn.Module) -> Iterator[None]:
    """Leave running statistics of batch norm alone, though batches are normalised as in training."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
