"""The training task: the network's branches and the paper's losses behind timm's task interface."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask
from timm.utils import distribute_bn, unwrap_model
from torch import distributed
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..constants import DIST_BN
from ..distributed import gather, rank_and_world_size
from ..loss.by_name import PAPER_LOSSES, FeatureLosses, check_losses
from ..loss.identity import identity_losses
from ..loss.mutual_learning import MutualLearningLoss
from ..loss.prototype import PrototypeContrast
from ..models.branches import BranchOutput, DualStream
from .joined_triplet import JoinedTriplet, join_triplets

_logger = logging.getLogger(__name__)


class BranchForward(nn.Module):
    """Make `forward_branches` the forward of the module that DDP wraps: around DDP, gradients are not averaged."""

    def __init__(self, model: DualStream) -> None:
        super().__init__()
        self.model = model

    def forward(self, visible: torch.Tensor, infrared: torch.Tensor) -> BranchOutput:
        return self.model.forward_branches(visible, infrared)


class ViReIDTask(TrainingTask):
    """Identity loss per branch + mutual learning + losses on features, which are the triplet of eq. 13 or others."""

    def __init__(
        self,
        model: DualStream,
        id_branches: Sequence[str] | None = None,
        mutual: str = 'joint-to-both',
        global_weight: float = 0.6,
        fusion_weight: float = 1.8,
        mutual_constant: str = 'teacher',
        loss: Mapping[str, float] = PAPER_LOSSES,
        smoothing: float = 0.0,
        gather_features: bool = False,
        device: torch.device | None = None,
        verbose: bool = True,
    ) -> None:
        """Create the losses.

        Args:
            model: A network with a classifier.
            id_branches: Branches with an identity loss (L_id of table 3); None for all branches of the model.
            mutual: Which pairs learn from each other (table 4); ignored by a model without a joint branch.
            global_weight: theta_1 of eq. 9.
            fusion_weight: theta_2 of eq. 10.
            mutual_constant: Which branch of a pair gets no gradient, see `MutualLearningLoss`.
            loss: Weights of losses on the features before BN, by name (`vireid_timm.loss.by_name.LOSSES`).
            smoothing: Label smoothing of the identity losses.
            gather_features: Whether these losses compare the images of all ranks.
            device: Where the model is.
            verbose: As in timm.

        Raises:
            ValueError: A model without a classifier, a branch that it does not have, or a loss that does not exist.
        """
        super().__init__(device=device, verbose=verbose)
        check_losses(loss)
        if model.num_classes < 1:
            raise ValueError('training needs a classifier: create the model with num_classes >= 1')
        unknown = sorted(set(id_branches or ()) - set(model.branches))
        if unknown:
            raise ValueError(f'the model has no branch {unknown[0]!r}; it has {", ".join(model.branches)}')
        self.trainable_module = BranchForward(model)
        self.id_branches = tuple(id_branches) if id_branches is not None else model.branches
        self.retrieval_branch = model.branches[-1]
        self.smoothing = smoothing
        self.gather_features = gather_features
        self._batch_size: int | None = None  # of all ranks, once they have compared theirs
        mode = mutual if 'joint' in model.branches else 'none'
        self.mutual_learning = MutualLearningLoss(mode, global_weight, fusion_weight, mutual_constant)
        self.feature_losses = FeatureLosses({name: weight for name, weight in loss.items() if name != 'prototype'})
        self.prototype_weight = loss.get('prototype', 0.0)
        self.prototype = None
        if self.prototype_weight:
            self.prototype = PrototypeContrast(model.num_classes, model.num_features).to(self.device)

    def convert_sync_batchnorm(self) -> None:
        """Let batch norm see the batches of all ranks; call it before averaging, compiling and `prepare_distributed`.

        Names and values of the weights stay. Does nothing on a single rank.

        Raises:
            ValueError: Several ranks on the CPU, where torch has no such batch norm.
        """
        if rank_and_world_size()[1] == 1:
            return
        if self.device.type == 'cpu':
            raise ValueError('synchronised batch norm (--sync-bn) needs a GPU for each rank: leave it out on the CPU')
        convert_sync_batchnorm(self.trainable_module)  # replaces the modules in place

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'ViReIDTask':
        """Wrap the network in DistributedDataParallel if there are several ranks; call it last, after `compile`.

        Freezes parameters that no loss reaches: ranks would wait for their gradients forever. After `compile`, it sets
        `torch._dynamo.config.optimize_ddp` to False for this process.

        Args:
            device_ids: As in timm; the task's own device if it is a GPU.
            ddp_kwargs: Further arguments of DistributedDataParallel.
        """
        if rank_and_world_size()[1] == 1:
            return self
        self._freeze_unreached()
        if unwrap_model(self.trainable_module) is not self.trainable_module:
            # Keep the compiled graph whole: torch 2.5 fails to split one with custom autograd functions by buckets.
            torch._dynamo.config.optimize_ddp = False
        if device_ids is None and self.device.type != 'cpu':
            device_ids = [self.device]
        # The gradients live in the buffers that are exchanged, without a second copy.
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
        """Let DistributedDataParallel arrange its buffers now: it does so after its first backward pass.

        The arrangement decides the order in which gradients are added up. A resumed run would otherwise start with
        another one than an uninterrupted run has at that step, and its weights would differ in the last digit.
        """
        parallel = self.trainable_module
        compiled = parallel.module
        parallel.module = unwrap_model(compiled)  # compile nothing for the trial's small images
        with self._trial(parallel) as loss:
            loss.backward()
        parallel.module = compiled
        parallel.zero_grad()

    @contextmanager
    def _trial(self, forward: Callable[[torch.Tensor, torch.Tensor], BranchOutput]) -> Iterator[torch.Tensor]:
        """Yield the loss of four small black images; dropout's draws and batch norm's statistics stay as they are."""
        model = self.get_eval_model()
        size = getattr(model.stem, 'only_size', None) or (32, 32)
        images = torch.zeros(2, model.in_chans, *size, device=self.device, dtype=next(model.parameters()).dtype)
        labels = torch.zeros(4, dtype=torch.int64, device=self.device)
        with torch.random.fork_rng([self.device] if self.device.type == 'cuda' else []), _unrecorded(model):
            yield sum(self._terms(forward(images, images), labels, infrared_rows(images, images), None).values())

    def share_running_statistics(self, dist_bn: str = 'reduce') -> None:
        """Make the running statistics of batch norm equal on all ranks, before evaluating and saving. Collective.

        Args:
            dist_bn: As timm's flag: `reduce` takes the mean over the ranks, `broadcast` rank 0's.

        Raises:
            ValueError: Neither of these.
        """
        if dist_bn not in DIST_BN:
            raise ValueError(f'unknown dist_bn {dist_bn!r}; expected one of {", ".join(DIST_BN)}')
        count = rank_and_world_size()[1]
        if count == 1:
            return
        distribute_bn(self.get_eval_model(), count, reduce=dist_bn == 'reduce')
        if self.has_ema():
            # Always rank 0's: no checkpoint holds the others' averages, so a mean would differ in a resumed run.
            distribute_bn(self.get_eval_model(ema=True), count, reduce=False)

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the training forward; evaluation uses the network as it is."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the network itself, without the wrappers around it."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return unwrap_model(module).model if module is not None else None

    def cache_features(self, input: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the features that `forward` compares, [2 B, D], without gradients; the network stays as it is.

        Batch norm takes the batch's own statistics, as in training, but does not record them.

        Args:
            input: As for `forward`.
        """
        module = self.trainable_module
        module = module.module if isinstance(module, DistributedDataParallel) else module
        kind = self.device.type
        # Without autocast's cache of converted weights: those cached here have no gradient, and `forward` within the
        # same block would use them.
        uncached = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        with torch.no_grad(), _unrecorded(module), uncached:
            return module(*input).features

    def join_triplet(
        self,
        features: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
        infrared: torch.Tensor,
    ) -> list[dict[str, JoinedTriplet]]:
        """Compute the losses on features over several batches, see `joined_triplet.py`.

        `forward` with the part of each batch, averaged over the batches (and with `gather_features` over the ranks),
        gives the gradients of the joined batch's losses.

        Args:
            features: Those of each batch from `cache_features`, [N, D] each.
            labels: Their class labels, [N] each.
            infrared: Which rows of a batch are of infrared images, [N] bool.

        Returns:
            The part of each batch in each loss, by name.

        Raises:
            ValueError: Batches of different sizes, here or among the ranks.
        """
        sizes = {len(batch) for batch in features}
        if len(sizes) != 1:
            raise ValueError(f'a joined triplet loss needs batches of one size, got {sorted(sizes)} rows')
        if self._gathers:
            self._check_batch_size(len(features[0]))
        return join_triplets(self.feature_losses, features, labels, infrared, across_ranks=self._gathers)

    def forward(
        self,
        input: tuple[torch.Tensor, torch.Tensor],
        target: torch.Tensor,
        *,
        joined: Mapping[str, JoinedTriplet] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run both modalities through the network and compute all losses.

        Args:
            input: Normalised visible and infrared images, [B, 3, H, W] each; their numbers may differ.
            target: Class labels of the visible rows, then of the infrared ones, [N].
            joined: This batch's part of the losses over several batches; None for losses over the batch alone.

        Returns:
            `loss`, its terms `id_<branch>`, `mutual` and those of `loss` by name, all with their weights, and `output`,
            the logits of the branch that retrieval uses, [N, C].
        """
        branches, infrared = self.trainable_module(*input), infrared_rows(*input)
        if joined is None and self._gathers:
            (joined,) = self.join_triplet([branches.features], [target], infrared)
        terms = self._terms(branches, target, infrared, joined)
        if self.prototype is not None and self.training:
            self._update_prototypes(branches.features.detach(), target)
        return {'loss': sum(terms.values()), **terms, 'output': branches.logits[self.retrieval_branch]}

    def _terms(
        self,
        branches: BranchOutput,
        target: torch.Tensor,
        infrared: torch.Tensor,
        joined: Mapping[str, JoinedTriplet] | None,
    ) -> dict[str, torch.Tensor]:
        """Return the loss terms by name, with their weights (eq. 13)."""
        features, logits = branches
        terms = {
            f'id_{branch}': value
            for branch, value in identity_losses(logits, target, self.smoothing, self.id_branches).items()
        }
        if self.mutual_learning.mode != 'none':
            terms['mutual'] = self.mutual_learning(logits)
        if joined is None:
            terms.update(self.feature_losses(features, target, infrared))
        else:
            terms.update({name: part.loss(features) for name, part in joined.items()})
        if self.prototype is not None:
            # Of this batch alone: the prototypes stand for all others.
            terms['prototype'] = self.prototype_weight * self.prototype(features, target)
        return terms

    def _update_prototypes(self, features: torch.Tensor, target: torch.Tensor) -> None:
        """Move the prototypes by the batches of all ranks, so that they stay the same on each. Collective."""
        if rank_and_world_size()[1] > 1:
            self._check_batch_size(len(features))
            features, target = gather(features).flatten(0, 1), gather(target).flatten()
        self.prototype.update(features, target)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return what a checkpoint holds besides the network: the prototypes."""
        return {} if self.prototype is None or ema else self.prototype.state_dict()

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load what `get_task_state` returned; without it the prototypes start anew."""
        if self.prototype is None or ema:
            return
        if state:
            self.prototype.load_state_dict(state, strict)
        else:
            _logger.info('The run had no prototypes: they start anew')

    @property
    def _gathers(self) -> bool:
        return self.gather_features and bool(self.feature_losses.weights) and rank_and_world_size()[1] > 1

    def _check_batch_size(self, size: int) -> None:
        """Check that all ranks have batches of one size: once by an exchange, then against that size."""
        if self._batch_size is None:
            sizes = [0] * rank_and_world_size()[1]
            distributed.all_gather_object(sizes, size)
            if len(set(sizes)) != 1:
                raise ValueError(f'gathering features needs batches of one size on all ranks, got {sizes} rows')
            self._batch_size = size
        if size != self._batch_size:
            raise ValueError(
                f'gathering features needs batches of one size throughout: {self._batch_size} rows so far, now {size}'
            )


def infrared_rows(visible: torch.Tensor, infrared: torch.Tensor) -> torch.Tensor:
    """Return which rows of a batch's features are of infrared images: those after the visible ones, [N] bool."""
    return torch.arange(len(visible) + len(infrared), device=infrared.device) >= len(visible)


@contextmanager
def _unrecorded(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norm as they are; batches are normalised as in training."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
