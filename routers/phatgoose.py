"""PHATGOOSE: experts chosen by how well their gate vectors match the token.

    z_e = LN(x) . LN(v_e) / sqrt(I)          LN without parameters, eps 1e-5
    p = softmax(z / temperature);  the K largest divided by their sum + 1e-6

The vectors v_e are learned after the experts, each on the data of its own: sigmoid.py.

Reference: Muqeeth et al. 2024 (PHATGOOSE), arXiv:2402.05859, section 3.
Shape legend: see base.py.
"""

import math

import pydantic
import torch
from torch import Tensor
from torch.nn import functional as F

from molora.kernels import router_logits
from molora.routers.base import ROUTERS
from molora.routers.topk import TopKRouter


@ROUTERS.register("phatgoose", paper="arXiv:2402.05859")
class PHATGOOSERouter(TopKRouter):
    """The K experts whose gate vectors match the token best, both normalised.

    Limitations: gates sum to slightly less than 1, as in the authors' code. The vectors
    of the paper come from router ``sigmoid``, which keeps them in the same
    ``gate.weight``; trained as it stands this is top-k by a normalised dot product.
    """

    epsilon = 1e-6

    class Config(TopKRouter.Config):
        """Settings of PHATGOOSE."""

        init_range: float = pydantic.Field(default=1e-4, ge=0)
        """Standard deviation of the initial vectors; far below the square root of eps,
        so that gates are near uniform."""

    def scores(self, x: Tensor) -> Tensor:
        """See base class."""
        wide = x.shape[-1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x_TI = F.layer_norm(x.to(dtype), (wide,))
            v_EI = F.layer_norm(self.gate.weight.to(dtype), (wide,))
            return router_logits(x_TI, v_EI) / math.sqrt(wide)
