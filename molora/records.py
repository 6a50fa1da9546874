"""Records of routing: a trace on request, and running sums during training.

Shape legend
    B rows   S positions   T = B * S tokens   E experts
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from molora.context import ForwardContext
    from molora.routers.base import Routing


@dataclass
class SiteRecord:
    """What one site did during ``record_routing``: sums, and tokens when asked.

    Attributes:
        tokens: Real tokens seen, by task ("" when no tasks were given).
        gate_sum: Sum of gates over real tokens, [E] float64 by task.
        chosen_sum: How often each expert was chosen, [E] float64 by task.
        gates: With ``keep_tokens``, the gates [B, S, E] of every forward.
        masks: With ``keep_tokens``, the token mask [B, S] of every forward, or None.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    gate_sum: dict[str, Tensor] = field(default_factory=dict)
    chosen_sum: dict[str, Tensor] = field(default_factory=dict)
    gates: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)


@dataclass
class RoutingTrace:
    """Who was chosen, where: filled while ``molora.record_routing`` is active.

    Attributes:
        keep_tokens: Keep the gates of every token, not only sums.
        sites: Record per routed module path, in model order.
    """

    keep_tokens: bool = True
    sites: dict[str, SiteRecord] = field(default_factory=dict)

    def add(
        self,
        site: str,
        routing: "Routing",
        context: "ForwardContext",
        shape: Sequence[int],
        weight_T: Tensor | None,
    ) -> None:
        """File one site's routing of one forward; weights are 1 at real tokens."""
        record = self.sites.setdefault(site, SiteRecord())
        gates_TE = routing.gates.detach().float().cpu()
        chosen_TE = routing.assigned().cpu()
        rows = shape[0] if len(shape) == 3 else context.rows or 1
        if gates_TE.shape[0] % rows:
            # a flat input that is not all positions of all rows
            rows = 1
        gates_BSE = gates_TE.reshape(rows, -1, gates_TE.shape[-1])
        chosen_BSE = chosen_TE.reshape(gates_BSE.shape)
        mask_BS = None if weight_T is None else weight_T.bool().cpu().reshape(rows, -1)
        tasks = context.row_tasks(rows) or ("",) * rows
        for task in dict.fromkeys(tasks):
            picked = torch.tensor([t == task for t in tasks])
            real = picked[:, None].expand(gates_BSE.shape[:2])
            if mask_BS is not None:
                real = real & mask_BS
            record.tokens[task] = record.tokens.get(task, 0) + int(real.sum())
            for sums, values in (
                (record.gate_sum, gates_BSE),
                (record.chosen_sum, chosen_BSE),
            ):
                sums[task] = sums.get(task, 0) + values[real].double().sum(0)
        if self.keep_tokens:
            record.gates.append(gates_BSE)
            record.masks.append(mask_BS)


@dataclass
class SiteStats:
    """Running sums of one site's routing in training; stays on the device.

    Attributes:
        tokens: Real tokens, a scalar tensor; exact up to 2^24 between two resets.
        gate_sum_E: Sum of gates over real tokens.
        chosen_sum_E: How often each expert was chosen.
        balance: Unweighted value of each objective, summed over forwards.
        forwards: How many forwards were added.
    """

    tokens: Tensor
    gate_sum_E: Tensor
    chosen_sum_E: Tensor
    balance: dict[str, Tensor] = field(default_factory=dict)
    forwards: int = 0

    @classmethod
    def empty(cls, num_experts: int, device: torch.device) -> "SiteStats":
        """All zeros."""
        zeros = torch.zeros(num_experts, device=device)
        return cls(torch.zeros((), device=device), zeros, zeros.clone())

    @torch.no_grad()
    def add(
        self,
        routing: "Routing",
        weight_T: Tensor | None,
        balance: dict[str, Tensor],
    ) -> None:
        """Add one forward; weights are 1 at real tokens. No host synchronisation."""
        gates_TE = routing.gates.detach()
        chosen_TE = routing.assigned()
        if weight_T is None:
            self.tokens += gates_TE.shape[0]
            self.gate_sum_E += gates_TE.sum(0)
            self.chosen_sum_E += chosen_TE.sum(0)
        else:
            weight_T = weight_T.to(gates_TE.dtype)
            self.tokens += weight_T.sum()
            self.gate_sum_E += weight_T @ gates_TE
            self.chosen_sum_E += weight_T @ chosen_TE
        for name, value in balance.items():
            self.balance[name] = self.balance.get(name, 0) + value.detach()
        self.forwards += 1
