"""The training task: the network's branches and the paper's losses behind timm's task interface."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model

from .losses import MutualLearningLoss, WeightedRegularizedTriplet, identity_losses
from .models import BranchOutput, DualStreamResNet


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
        mode = mutual if len(model.branches) > 1 else 'none'
        self.mutual_learning = MutualLearningLoss(mode, global_weight, fusion_weight)
        self.triplet = WeightedRegularizedTriplet()

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'ViReIDTask':
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the training forward; evaluation uses the network as it is."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The network itself, without the wrappers around it."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return unwrap_model(module).model if module is not None else None

    def forward(self, input: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Forward pass of both modalities and all losses.

        Args:
            input: Normalised visible [B, 3, H, W] and infrared [B, 3, H, W] pictures.
            target: Class labels of the visible rows, then of the infrared ones, [2 B].

        Returns:
            `loss`, its terms `id_<branch>`, `mutual` and `triplet` as they enter the sum, and `output`, the logits
            of the branch that retrieval uses, [2 B, C].
        """
        features, logits = self.trainable_module(*input)
        terms = {
            f'id_{branch}': value
            for branch, value in identity_losses(logits, target, self.smoothing, self.id_branches).items()
        }
        if self.mutual_learning.mode != 'none':
            terms['mutual'] = self.mutual_learning(logits)
        if self.triplet_weight:
            terms['triplet'] = self.triplet_weight * self.triplet(features, target)
        return {'loss': sum(terms.values()), **terms, 'output': logits[self.retrieval_branch]}
