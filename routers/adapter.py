"""A given adapter for each row: no choice is made, the rows say what they use.

    y_b = W x_b + s_a B_a A_a x_b    a the adapter of row b; "base" rows get W x_b alone

Many LoRAs served in one batch (Chen et al. 2023, Punica, arXiv:2310.18547; Sheng et al.
2023, S-LoRA, arXiv:2311.03285), and several trained in one forward, each on its own
rows (Ye et al. 2023, mLoRA, arXiv:2312.02515).

Shape legend: see base.py; B rows, S positions.
"""

import functools
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor

from molora.context import ForwardContext
from molora.errors import RoutingError
from molora.routers.base import ROUTERS, AbstractRouter, RouterConfig, Routing


@ROUTERS.register("adapter", paper="arXiv:2310.18547")
class AdapterRouter(AbstractRouter):
    """The adapter that each row names, with gate 1; "base" names none.

    The names of the rows are given by ``molora.tasks``, or by the trainer, whose tasks
    they are. A row equals that row run alone with its adapter.

    Limitations: two adapters at least; nothing is learned, so nothing can be balanced.
    """

    BASE: ClassVar[str] = "base"
    """Name of the rows that use no adapter."""
    has_probs = False

    class Config(RouterConfig):
        """Settings of rows that name their adapter."""

        adapters: list[str]
        """Name of each expert, in their order; rows called base use none."""

        @pydantic.field_validator("adapters")
        @classmethod
        def _are_names(cls, value: list[str]) -> list[str]:
            twice = sorted({name for name in value if value.count(name) > 1})
            if twice:
                raise ValueError(f"names must differ; used twice: {twice}")
            if AdapterRouter.BASE in value or "" in value:
                raise ValueError("a name is empty, or 'base', which means no adapter")
            return value

    config: Config

    def __init__(self, config: Config, **rest: Any):
        super().__init__(config, **rest)
        self.adapters = tuple(config.adapters)
        self.known = frozenset([*self.adapters, self.BASE])

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        if config.input != "token":
            return (
                f"router.input={config.input!r} has no effect: router.kind 'adapter' "
                "reads the names of the rows alone; drop it"
            )
        if num_experts == 1 and len(config.adapters) > 1:
            return (
                "num_experts=1: the rows of every adapter would use this one expert; "
                f"set num_experts to {len(config.adapters)}, one for each of "
                "router.adapters, or add the layers to exclude_modules"
            )
        if len(config.adapters) != num_experts:
            return (
                f"router.adapters names {len(config.adapters)} adapters for "
                f"num_experts={num_experts}; name each expert once"
            )
        return super().check(config, num_experts)

    @classmethod
    def known_tasks(cls, config: RouterConfig) -> tuple[str, ...]:
        """See base class; without "base", which trains nothing."""
        assert isinstance(config, cls.Config)
        return tuple(config.adapters)

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """See base class.

        Raises:
            RoutingError: The name of a row is missing or unknown.
        """
        rows = context.token_rows(x.shape, self.site)
        if rows.tasks is None or not self.known.issuperset(rows.tasks):
            unknown = sorted(set(rows.tasks or ()) - self.known)
            what = f"no adapter is called {unknown}" if unknown else "none is named"
            raise RoutingError(
                f"site {self.site!r}: every row needs the name of its adapter, and "
                f"{what}; run inside molora.tasks(model, [...]) with names of "
                f"{[*self.adapters, self.BASE]}"
            )
        # a graph keeps nothing outside itself
        compiling = torch.compiler.is_compiling()
        one_hot = _one_hot.__wrapped__ if compiling else _one_hot
        gates_TE = one_hot(
            rows.tasks,
            self.adapters,
            x.shape[0] // rows.num_rows,
            torch.promote_types(x.dtype, torch.float32),
            x.device,
            not compiling and torch.is_inference_mode_enabled(),
        )
        return Routing(gates_TE, gates_TE, gates_TE, top_k=1)


@functools.lru_cache(8)
def _one_hot(
    names: tuple[str, ...],
    adapters: tuple[str, ...],
    positions: int,
    dtype: torch.dtype,
    device: torch.device,
    inference: bool,
) -> Tensor:
    """1 at the adapter of each token, [B * S, E]; the sites of a forward share it.

    Args:
        names: Adapter of each row, or "base".
        adapters: Name of each expert.
        positions: S.
        dtype: Of the result.
        device: Of the result.
        inference: Whether this is inference mode, whose tensors no backward may read.
    """
    gates_BE = torch.tensor([[float(a == n) for a in adapters] for n in names])
    gates_TE = gates_BE.repeat_interleave(positions, 0)
    return gates_TE.to(device=device, dtype=dtype)
