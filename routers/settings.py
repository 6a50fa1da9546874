"""Settings that routers share; those of one router stand in its file."""

from typing import Literal, Self

import pydantic

from molora.schema import Schema


class RouterConfig(Schema):
    """Settings of every router."""

    kind: str
    """Registered name."""
    scope: Literal["site", "block", "model"] = "site"
    """What shares one routing: every target layer routes for itself; the layers of one
    module (an attention, an FFN) follow their first; or all follow the first."""
    input: Literal["token", "sequence", "task"] = "token"
    """What the router reads: the token's input to the target layer; its mean over the
    prompt of the row; or the task of the row, one-hot."""
    mix: Literal["layer", "block"] = "layer"
    """What is mixed: the updates of each layer, or with scope block the outputs of
    whole FFNs, in which each expert passes the nonlinearity by itself (MixLoRA)."""
    tasks: list[str] = []
    """With input: task, the names of the tasks."""

    @pydantic.model_validator(mode="after")
    def _blocks_are_shared(self) -> Self:
        if self.mix == "block" and self.scope != "block":
            raise ValueError(
                f"mix: block has no meaning with scope: {self.scope}, since the layers "
                "of an FFN must agree on its experts; set scope: block"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _tasks_are_read(self) -> Self:
        if (self.input == "task") != bool(self.tasks):
            told = "names no task" if self.input == "task" else "has no effect"
            raise ValueError(f"tasks: {told} with input: {self.input}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks: a name is listed twice: {self.tasks}")
        return self


class GateConfig(RouterConfig):
    """Settings of routers with a linear gate."""

    temperature: float = pydantic.Field(default=1.0, gt=0)
    """Divides the logits; above 1 flattens the gates."""
    noise: float = pydantic.Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise on the logits, in training only."""
    init_range: float = pydantic.Field(default=0.02, ge=0)
    """Standard deviation of the gate's initial weights; small means near uniform."""
    expert_dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Probability that a token cannot see an expert, in training only; the others share
    its gate, and one expert always stays."""
    capacity: float | None = pydantic.Field(default=None, ge=1)
    """Multiple of the mean load that an expert serves, in training only; what goes
    beyond is left to the base alone. None sets no limit."""
