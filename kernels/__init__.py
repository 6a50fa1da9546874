"""Grouped low-rank matmul: definition, backends, dispatch."""

from molora.kernels.backends import BACKENDS as BACKENDS
from molora.kernels.backends import Backend as Backend
from molora.kernels.dispatch import Layer as Layer
from molora.kernels.dispatch import form_of as form_of
from molora.kernels.dispatch import lowrank_mixture as lowrank_mixture
from molora.kernels.frozen_linear import call_frozen as call_frozen
from molora.kernels.reference import reference as reference
from molora.kernels.router_logits import router_logits as router_logits
from molora.kernels.shared_shrink import expand as expand
from molora.kernels.shared_shrink import shrink as shrink
from molora.kernels.topk import can_route as can_route
from molora.kernels.topk import topk_route as topk_route
