"""The low-rank algebra of collapse.

Of low-rank families nothing is ever [O, I]. The update of another linear family is
taken apart by an SVD, one expert at a time, and keeps the singular values above the
noise of float32: a family of full rank has factors as large as the weight for every
expert.

A static update of rank r is kept as its two factors. Its singular values come from the
QR of both factors and the SVD of the small core between them:

    B^T = Q_b R_b    A^T = Q_a R_a    B^T A = Q_b (R_b R_a^T) Q_a^T

Shape legend (this folder)
    T tokens   E experts   I in features   O out features   r rank of one adapter
    R sum of the ranks of the experts
    Q rows of B: R, or the rank of one expert where all experts share B
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from molora.context import ForwardContext
from molora.errors import WrapError
from molora.experts import BilinearExperts, LoRAExperts
from molora.layer import MoloraLinear
from molora.prompt import Prompt

_NOISE = 1e-6
"""Singular values of a dense update below this part of the largest are noise."""


class LowRank(NamedTuple):
    """The static update Bt^T A."""

    A_rI: Tensor
    """Down projection, float64."""
    Bt_rO: Tensor
    """Transposed up projection with every scale folded in, float64."""

    @property
    def rank(self) -> int:
        """Number of rows of each factor."""
        return self.A_rI.shape[0]


@dataclass(frozen=True)
class SiteFactors:
    """The experts of one site, stacked along the rank.

    Attributes:
        path: Module path of the site.
        A_RI: A of every expert, float64; repeated where the experts share it.
        Bt_QO: Transposed B of every expert, float64; once where the experts share it.
        expert_R: Expert that each row of A belongs to.
        fold_R: Row of Bt that each row of A feeds.
        scale_E: Scale of each expert, float64.
        even_E: Mean gates of a router that prefers nobody: its total weight at the zero
            input, spread evenly over the experts; float64.
        shared_A: Whether several experts share one A.
    """

    path: str
    A_RI: Tensor
    Bt_QO: Tensor
    expert_R: Tensor
    fold_R: Tensor
    scale_E: Tensor
    even_E: Tensor
    shared_A: bool

    @classmethod
    @torch.no_grad()
    def of(cls, site: MoloraLinear) -> "SiteFactors":
        """Read the factors of a site.

        Raises:
            WrapError: The update of an expert is no linear map, or shifts the bias.
        """
        experts = site.experts
        if not isinstance(experts, BilinearExperts):
            return cls._of_dense(site)
        factors = experts.factors()
        A, Bt = factors[0].detach(), factors[1].detach()
        count, device = experts.num_experts, A.device
        # padding rows are cut off; other families have none
        ranks = [A.shape[1]] * count
        if isinstance(experts, LoRAExperts):
            ranks = experts.ranks
        rows = [torch.arange(rank, device=device) for rank in ranks]
        if Bt.shape[0] < count:
            Bt_QO, fold_R = Bt[0], torch.cat(rows)
        else:
            Bt_QO = torch.cat([Bt[e, row] for e, row in enumerate(rows)])
            fold_R = torch.arange(sum(ranks), device=device)
        return cls(
            path=site.path,
            A_RI=torch.cat([A[e % len(A), r] for e, r in enumerate(rows)]).double(),
            Bt_QO=Bt_QO.double(),
            expert_R=torch.arange(count, device=device).repeat_interleave(
                torch.tensor(ranks, device=device)
            ),
            fold_R=fold_R,
            scale_E=torch.tensor(experts.scales(), dtype=torch.float64, device=device),
            even_E=even_gates(site, A),
            shared_A=A.shape[0] < count,
        )

    @classmethod
    def _of_dense(cls, site: MoloraLinear) -> "SiteFactors":
        """Factors of experts that have none, from their dense updates."""
        experts, weight_OI = site.experts, site.experts.frozen_weight()
        _check_linear(site)
        wide_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
        A, Bt = [], []
        for expert in range(experts.num_experts):
            delta_OI = experts.delta_weight(expert, wide_OI).double()
            u, s, vt = torch.linalg.svd(delta_OI, full_matrices=False)
            kept = max(1, int((s > _NOISE * s[0]).sum()))
            A.append(vt[:kept])
            Bt.append(s[:kept].unsqueeze(1) * u[:, :kept].t())
        count, device = experts.num_experts, weight_OI.device
        ranks = torch.tensor([len(rows) for rows in A], device=device)
        A_RI = torch.cat(A)
        return cls(
            path=site.path,
            A_RI=A_RI,
            Bt_QO=torch.cat(Bt),
            expert_R=torch.arange(count, device=device).repeat_interleave(ranks),
            fold_R=torch.arange(len(A_RI), device=device),
            scale_E=torch.ones(count, dtype=torch.float64, device=device),
            even_E=even_gates(site, wide_OI),
            shared_A=False,
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.scale_E.shape[0]

    @property
    def total_rank(self) -> int:
        """R."""
        return self.A_RI.shape[0]

    def gated(self, x_TI: Tensor, gates_TE: Tensor) -> Tensor:
        """Gated rank vectors zg with update(x) = zg Bt, [T, Q]."""
        return self._fold((x_TI @ self.A_RI.t()) * self._rows(gates_TE), dim=1)

    def mixed(self, weights_E: Tensor) -> Tensor:
        """P [Q, I] such that sum_e weights_e * delta_e = Bt^T P."""
        return self._fold(self._rows(weights_E).unsqueeze(1) * self.A_RI, dim=0)

    def combine(self, weights_E: Tensor) -> LowRank:
        """sum_e weights_e * delta_e, exactly, at the least rank sharing allows."""
        if self.Bt_QO.shape[0] < self.total_rank:
            return LowRank(self.mixed(weights_E), self.Bt_QO)
        Bt_RO = self._rows(weights_E).unsqueeze(1) * self.Bt_QO
        if not self.shared_A:
            return LowRank(self.A_RI, Bt_RO)
        Bt_rO = Bt_RO.view(self.num_experts, -1, Bt_RO.shape[1]).sum(0)
        return LowRank(self.A_RI[: Bt_rO.shape[0]], Bt_rO)

    def expert(self, index: int) -> LowRank:
        """The update of one expert, at its own rank."""
        mine_R = self.expert_R == index
        Bt_rO = self.Bt_QO[self.fold_R[mine_R]] * self.scale_E[index]
        return LowRank(self.A_RI[mine_R], Bt_rO)

    def _rows(self, weights: Tensor) -> Tensor:
        """Weight and scale of the expert of each row, [..., R]."""
        return (weights.double() * self.scale_E)[..., self.expert_R]

    def _fold(self, values: Tensor, dim: int) -> Tensor:
        """Sum the rows of A that feed one row of Bt."""
        rows = self.Bt_QO.shape[0]
        if rows == self.total_rank:
            return values
        shape = list(values.shape)
        shape[dim] = rows
        folded: Tensor = values.new_zeros(shape).index_add_(dim, self.fold_R, values)
        return folded


def _check_linear(site: MoloraLinear) -> None:
    """Refuse experts that no low-rank adapter can stand for."""
    experts, name = site.experts, type(site.experts).__name__
    kept = "Deploy the mixture itself (save_pretrained, molora.load)"
    if not experts.linear:
        raise WrapError(
            f"site {site.path!r}: {name} pass a nonlinearity, so no single update "
            f"equals a mixture of them. {kept}"
        )
    bias_O = experts.frozen_weight().new_ones(site.out_features)
    if experts.delta_bias(0, bias_O) is not None:
        raise WrapError(
            f"site {site.path!r}: {name} change the bias of the layer as well, which a "
            f"low-rank adapter cannot hold. {kept}; with one expert molora.merge is "
            "exact"
        )


def even_gates(site: MoloraLinear, A: Tensor) -> Tensor:
    """Mean gates of a router that prefers nobody; A gives dtype and device."""
    count = site.experts.num_experts
    router = site.decider
    if router is None:
        return torch.ones(1, dtype=torch.float64, device=A.device)
    zero_1I = A.new_zeros(1, router.in_features)
    # one row of a task that the router knows; which one makes no difference to the sum
    tasks = router.known_tasks(router.config)[:1] or None
    context = ForwardContext(tasks=tasks, rows=1, prompt=Prompt(None, None, "one row"))
    total: Tensor = router(zero_1I, context).gates.sum().double()
    return (total / count).expand(count)


def truncate(
    delta: LowRank, rank: int | None = None, energy: float | None = None
) -> LowRank:
    """Best approximation of lower rank in the Frobenius norm (Eckart and Young 1936).

    Args:
        delta: The update.
        rank: Rank of the result, at most; None keeps what the factors can hold.
        energy: Instead of a rank: keep the fewest singular values whose squares sum to
            at least this share of all squares.

    Returns:
        The update with its singular values split evenly between both factors. Its rank
        is the smallest of rank, r, I and O, and at least 1.
    """
    qa_Ir, ra = torch.linalg.qr(delta.A_rI.t())
    qb_Or, rb = torch.linalg.qr(delta.Bt_rO.t())
    u, s, vt = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    # the core is at most [min(r, O), min(r, I)]
    kept = min(s.shape[0], rank or s.shape[0])
    if energy is not None:
        kept = _rank_for(s, energy)
    root_r1 = s[:kept].sqrt().unsqueeze(1)
    return LowRank(
        root_r1 * (vt[:kept] @ qa_Ir.t()), root_r1 * (qb_Or @ u[:, :kept]).t()
    )


def _rank_for(s: Tensor, energy: float) -> int:
    """Fewest leading singular values that hold this share of the squares."""
    squares = s.square()
    held = squares.cumsum(0)
    # rounding must not ask for one value more than there is
    enough = held >= energy * squares.sum() * (1 - 1e-12)
    return int(enough.int().argmax()) + 1


def norm(delta: LowRank) -> float:
    """Frobenius norm of the update."""
    ra = torch.linalg.qr(delta.A_rI.t(), mode="r").R
    rb = torch.linalg.qr(delta.Bt_rO.t(), mode="r").R
    return float((rb @ ra.t()).norm())


def minus(a: LowRank, b: LowRank) -> LowRank:
    """The update a - b."""
    return LowRank(torch.cat([a.A_rI, b.A_rI]), torch.cat([a.Bt_rO, -b.Bt_rO]))


def ratio(part: float, whole: float) -> float | None:
    """Divide part by whole; 0 when both are 0, None when only the whole is."""
    if whole == 0:
        return 0.0 if part == 0 else None
    return part / whole
