"""Routers and balance objectives."""

from molora.routers.balance import OBJECTIVES as OBJECTIVES
from molora.routers.base import ROUTERS as ROUTERS
from molora.routers.base import Routing as Routing
from molora.routers.none import NoRouter as NoRouter
from molora.routers.soft import SoftRouter as SoftRouter
from molora.routers.topk import TopKRouter as TopKRouter
