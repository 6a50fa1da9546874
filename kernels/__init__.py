"""Grouped low-rank matmul: definition, torch form, dispatch."""

from molora.kernels.dispatch import BACKENDS as BACKENDS
from molora.kernels.dispatch import Backend as Backend
from molora.kernels.dispatch import lowrank_mixture as lowrank_mixture
from molora.kernels.reference import reference as reference
from molora.kernels.torch_path import router_logits as router_logits
