"""Visible-infrared person re-identification as a timm plugin: importing it registers the models."""

from .augment import Augment as Augment
from .augment import ChannelRandomErasing as ChannelRandomErasing
from .augment import PadCropFlip as PadCropFlip
from .augment import RandomChannelCombination as RandomChannelCombination
from .config import TrainConfig as TrainConfig
from .datasets import create_dataset as create_dataset
from .datasets import split_identities as split_identities
from .evaluate import evaluate as evaluate
from .evaluate import evaluate_features as evaluate_features
from .features import Extraction as Extraction
from .features import embed as embed
from .hub import load_model as load_model
from .hub import save_model_folder as save_model_folder
from .hub import save_run as save_run
from .layers import GeneralizedMeanPool as GeneralizedMeanPool
from .losses import MutualLearningLoss as MutualLearningLoss
from .losses import WeightedRegularizedTriplet as WeightedRegularizedTriplet
from .metrics import RankMetrics as RankMetrics
from .metrics import rank_metrics as rank_metrics
from .models import BranchOutput as BranchOutput
from .models import DualStreamResNet as DualStreamResNet
from .protocols import Trial as Trial
from .protocols import protocol_trials as protocol_trials
from .protocols import protocols_of as protocols_of
from .publish import check_model as check_model
from .publish import push_folder as push_folder
from .records import Dataset as Dataset
from .records import Records as Records
from .report import Report as Report
from .reranking import ReRanking as ReRanking
from .retrieval import nearest as nearest
from .retrieval import rank_list_picture as rank_list_picture
from .sampler import IdentityModalitySampler as IdentityModalitySampler
from .task import ViReIDTask as ViReIDTask
from .train import TrainResult as TrainResult
from .train import train as train

__version__ = '0.1.0'
