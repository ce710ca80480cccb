"""Visible-infrared person re-identification as a timm plugin: importing it registers the models.

Only the models are imported here. Every other public name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .cli.startup import interrupt_ends_command
from .version import __version__, check_timm

with interrupt_ends_command():
    check_timm()
    importlib.import_module('.models.dual_stream', __name__)
    importlib.import_module('.models.backbone', __name__)
    importlib.import_module('.models.zero_padding', __name__)
    importlib.import_module('.models.parts', __name__)
    from .models.branches import BranchOutput

if TYPE_CHECKING:  # for editors and type checkers
    from .data.augment import ChannelRandomErasing as ChannelRandomErasing
    from .data.augment import RandomChannelCombination as RandomChannelCombination
    from .data.readers import create_dataset as create_dataset
    from .data.records import Dataset as Dataset
    from .data.records import Records as Records
    from .data.sampler import IdentityModalitySampler as IdentityModalitySampler
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.features import embed as embed
    from .evaluation.metrics import rank_metrics as rank_metrics
    from .evaluation.protocols import protocol_trials as protocol_trials
    from .evaluation.protocols import protocols_of as protocols_of
    from .evaluation.report import Report as Report
    from .evaluation.reranking import ReRanking as ReRanking
    from .hub.folder import load_model as load_model
    from .hub.folder import save_model_folder as save_model_folder
    from .layers.power_mean import GeneralizedMeanPool as GeneralizedMeanPool
    from .loss.mutual_learning import MutualLearningLoss as MutualLearningLoss
    from .loss.triplet import WeightedRegularizedTriplet as WeightedRegularizedTriplet
    from .retrieval.gallery import Gallery as Gallery
    from .retrieval.search import nearest as nearest
    from .training.config import TrainConfig as TrainConfig
    from .training.loop import train as train
    from .training.task import ViReIDTask as ViReIDTask

_MODULE_OF = {
    'ChannelRandomErasing': 'data.augment',
    'Dataset': 'data.records',
    'Gallery': 'retrieval.gallery',
    'GeneralizedMeanPool': 'layers.power_mean',
    'IdentityModalitySampler': 'data.sampler',
    'MutualLearningLoss': 'loss.mutual_learning',
    'RandomChannelCombination': 'data.augment',
    'ReRanking': 'evaluation.reranking',
    'Records': 'data.records',
    'Report': 'evaluation.report',
    'TrainConfig': 'training.config',
    'ViReIDTask': 'training.task',
    'WeightedRegularizedTriplet': 'loss.triplet',
    'create_dataset': 'data.readers',
    'embed': 'evaluation.features',
    'evaluate': 'evaluation.evaluate',
    'load_model': 'hub.folder',
    'nearest': 'retrieval.search',
    'protocol_trials': 'evaluation.protocols',
    'protocols_of': 'evaluation.protocols',
    'rank_metrics': 'evaluation.metrics',
    'save_model_folder': 'hub.folder',
    'train': 'training.loop',
}

__all__ = ['BranchOutput', '__version__', *_MODULE_OF]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(importlib.import_module(f'.{_MODULE_OF[name]}', __name__), name)
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
