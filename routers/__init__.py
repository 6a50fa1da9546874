"""Routers and balance objectives."""

from molora.routers.adamole import AdaMoLERouter as AdaMoLERouter
from molora.routers.adapter import AdapterRouter as AdapterRouter
from molora.routers.arrow import ArrowRouter as ArrowRouter
from molora.routers.balance import OBJECTIVES as OBJECTIVES
from molora.routers.base import ROUTERS as ROUTERS
from molora.routers.base import Routing as Routing
from molora.routers.domain import DomainLoss as DomainLoss
from molora.routers.dynmole import DynMoLERouter as DynMoLERouter
from molora.routers.entropy import EntropyObjective as EntropyObjective
from molora.routers.gjs import GJSDivergence as GJSDivergence
from molora.routers.hmora import HMoRARouter as HMoRARouter
from molora.routers.importance import ImportanceBalance as ImportanceBalance
from molora.routers.lambda_penalty import LambdaPenalty as LambdaPenalty
from molora.routers.ldmole import LDMoLERouter as LDMoLERouter
from molora.routers.localized import LocalizedBalance as LocalizedBalance
from molora.routers.moelora import MOELoRARouter as MOELoRARouter
from molora.routers.none import NoRouter as NoRouter
from molora.routers.phatgoose import PHATGOOSERouter as PHATGOOSERouter
from molora.routers.selection_bias import SelectionBias as SelectionBias
from molora.routers.sigmoid import SigmoidRouter as SigmoidRouter
from molora.routers.soft import SoftRouter as SoftRouter
from molora.routers.threshold import ThresholdRouter as ThresholdRouter
from molora.routers.topk import TopKRouter as TopKRouter
from molora.routers.topp import TopPRouter as TopPRouter
from molora.routers.xlora import XLoRARouter as XLoRARouter
