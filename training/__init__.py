"""Trainer, task mixtures and evaluation."""

from molora.training.arguments import MoloraTrainingSettings as MoloraTrainingSettings
from molora.training.arguments import build_arguments as build_arguments
from molora.training.data import Collator as Collator
from molora.training.data import DataConfig as DataConfig
from molora.training.data import MixtureSampler as MixtureSampler
from molora.training.data import TaskConfig as TaskConfig
from molora.training.data import TaskMixture as TaskMixture
from molora.training.data import build_eval_sets as build_eval_sets
from molora.training.data import build_mixture as build_mixture
from molora.training.evaluation import TaskResult as TaskResult
from molora.training.evaluation import evaluate as evaluate
from molora.training.monitor import RoutingMonitor as RoutingMonitor
from molora.training.trainer import MoloraTrainer as MoloraTrainer
from molora.training.trainer import MoloraTrainerMixin as MoloraTrainerMixin
