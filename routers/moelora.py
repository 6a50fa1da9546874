"""MOELoRA: gates by the task of the row alone, through a learned embedding.

    g = p = softmax(R v[task] / temperature)     v [N, H] embeddings, R [E, H]

Reference: Liu et al. 2023 (MOELoRA), arXiv:2310.18339, section 4.3.
Shape legend: see base.py; B rows, N tasks, H embedding size.
"""

from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from molora.kernels import router_logits
from molora.routers.base import ROUTERS
from molora.routers.soft import SoftRouter


@ROUTERS.register("moelora", paper="arXiv:2310.18339")
class MOELoRARouter(SoftRouter):
    """All experts, weighted by a learned embedding of the row's task.

    All tokens of a row have the same gates, so one task collapses exactly. The authors
    give each expert rank r / E and scale alpha / r: divide both r and lora_alpha by E.

    Limitations: every row needs a task (``molora.tasks``), one of those listed.

    Args:
        config: Settings.
        in_features: N.
        num_experts: E.
        site: Module path of the target layer, for messages.
        generator: Source of the initial weights.
    """

    class Config(SoftRouter.Config):
        """Settings of MOELoRA."""

        input: Literal["task"] = "task"
        """It reads the task of the row, nothing else."""
        tasks: list[str] = pydantic.Field(min_length=1)
        """Names of the tasks."""
        embedding_size: int = pydantic.Field(default=64, ge=1)
        """H, width of a task's embedding."""

    def __init__(
        self,
        config: Config,
        *,
        in_features: int,
        num_experts: int,
        site: str,
        generator: torch.Generator,
    ):
        super().__init__(
            config,
            in_features=config.embedding_size,
            num_experts=num_experts,
            site=site,
            generator=generator,
        )
        self.in_features = in_features
        self.embedding = nn.Parameter(torch.empty(in_features, config.embedding_size))
        with torch.no_grad():
            self.embedding.normal_(generator=generator)

    def scores(self, x: Tensor) -> Tensor:
        """See base class; x is one-hot, [B, N]."""
        v_BH = router_logits(x, self.embedding.t())
        return router_logits(v_BH, self.gate.weight)
