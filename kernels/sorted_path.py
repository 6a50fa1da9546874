"""Grouped low-rank matmul over (token, expert) pairs sorted by expert.

Only the experts that a token uses are computed, so the cost follows K, the experts per
token, and not E. With P pairs (t, e) whose gate is not zero, ordered by expert:

    z_p  = A_e x_t                      [P, r]    grouped matmul
    y[t] = base[t] + sum_p gate_p scale_e z_p Bt_e    [T, O]

and backward with h_p = Bt_e dy_t in the same order:

    dgate_p = scale_e h_p . z_p         dz_p = gate_p scale_e h_p
    dBt_e = sum_p (gate_p scale_e z_p)^T dy_t      dA_e = sum_p dz_p^T x_t
    dx[t] = sum_p dz_p A_e

The gather of x costs as much as several ranks, so the concatenated form wins for few
experts; cost_model.py says where. For CPUs: P is a number that only the host knows.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
    P pairs in use
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from molora.kernels.gradients import Gradients, Needs
from molora.kernels.torch_path import added, cast, cat, dtype_of, keep_mask


def why_not(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int | None,
) -> list[str]:
    """Reasons against this form."""
    reasons = []
    if gates is None:
        reasons.append("one expert: nothing to sort")
    if x.device.type != "cpu":
        reasons.append(f"tensors on {x.device.type}: it waits for the host, CPU only")
    return reasons + unfit(dtype_of(x, A), A.shape[1], A.shape[2], Bt.shape[2])


def unfit(dtype: torch.dtype, rank: int, wide_in: int, wide_out: int) -> list[str]:
    """Reasons that lie in the sizes and the dtype of the products."""
    reasons = []
    if not hasattr(F, "grouped_mm"):
        reasons.append(f"torch {torch.__version__} has no grouped matmul")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"computes in {dtype}: the grouped matmul has 16 and 32 bits")
    step = 16 // dtype.itemsize
    sizes = {"r": rank, "I": wide_in, "O": wide_out}
    uneven = [f"{name}={size}" for name, size in sizes.items() if size % step]
    if uneven:
        reasons.append(f"{', '.join(uneven)}: rows must be multiples of 16 bytes")
    return reasons


class _Pairs(NamedTuple):
    """Pairs with a gate that is not zero, by expert, then by token."""

    expert_P: Tensor
    token_P: Tensor
    ends_E: Tensor
    """Where the pairs of each expert end, int32."""

    @classmethod
    def of(cls, gates_TE: Tensor) -> "_Pairs":
        expert_P, token_P = gates_TE.detach().t().nonzero().unbind(1)
        counts_E = torch.bincount(expert_P, minlength=gates_TE.shape[1])
        return cls(expert_P, token_P, counts_E.cumsum(0).int())

    def weight(self, gates_TE: Tensor, scale: float | Tensor) -> Tensor:
        """Gate times scale of each pair, [P, 1]."""
        gate_P = gates_TE[self.token_P, self.expert_P]
        return (gate_P * self.scale(scale)).unsqueeze(1)

    def scale(self, scale: float | Tensor) -> float | Tensor:
        """Scale of each pair."""
        return scale if isinstance(scale, float) else scale[self.expert_P]


def forward(
    x_TI: Tensor,
    base_TO: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    gates_TE: Tensor | None,
    scale: float | Tensor,
    top_k: int | None,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Result and z of the pairs; arguments as in ``lowrank_mixture``."""
    assert gates_TE is not None
    dtype = dtype_of(x_TI, A)
    pairs = _Pairs.of(gates_TE)
    z_Pr = _shrink(_dropped(x_TI, dtype, dropout, seed), A, pairs, dtype)
    zg_Pr = cast(z_Pr * pairs.weight(gates_TE, scale), dtype)
    tokens = x_TI.shape[0]
    if base_TO is None:
        base_TO = x_TI.new_zeros(tokens, Bt.shape[-1])
    sum_dtype = torch.promote_types(base_TO.dtype, dtype)
    if Bt.shape[0] == 1:
        zg_Tr = zg_Pr.new_zeros(tokens, zg_Pr.shape[1])
        zg_Tr.index_add_(0, pairs.token_P, zg_Pr)
        y_TO = torch.addmm(
            cast(base_TO, sum_dtype), cast(zg_Tr, sum_dtype), cat(Bt, sum_dtype)
        )
    else:
        update_PO = F.grouped_mm(zg_Pr, cast(Bt, dtype), offs=pairs.ends_E)
        y_TO = cast(base_TO, sum_dtype).index_add(
            0, pairs.token_P, cast(update_PO, sum_dtype)
        )
    return cast(y_TO, base_TO.dtype), z_Pr


def backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    z_Pr: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates_TE: Tensor | None,
    scale: float | Tensor,
    top_k: int | None,
    dropout: float,
    seed: int,
    needs: Needs,
    onto: Tensor | None = None,
) -> Gradients:
    """Gradients of x, A, Bt and the gates, those that are needed."""
    assert gates_TE is not None
    dtype = z_Pr.dtype
    pairs = _Pairs.of(gates_TE)
    weight_P1 = pairs.weight(gates_TE, scale)
    dy_PO = cast(dy_TO, dtype).index_select(0, pairs.token_P)
    dx_TI = dA = dBt = dgates_TE = None
    if needs.Bt:
        dBt = _weight_gradient(cast(z_Pr * weight_P1, dtype), dy_PO, Bt, pairs)
    if not (needs.gates or needs.A or needs.x):
        return Gradients(None, None, dBt, None)
    h_Pr = _to_rank(dy_PO, Bt, pairs, dtype)
    if needs.gates:
        dgate_P = (h_Pr.to(gates_TE.dtype) * z_Pr).sum(1) * pairs.scale(scale)
        # a gate that is zero was not in the sum; selection is not differentiated
        dgates_TE = torch.zeros_like(gates_TE)
        dgates_TE[pairs.token_P, pairs.expert_P] = dgate_P.to(gates_TE.dtype)
    dz_Pr = cast(h_Pr * weight_P1, dtype)
    if needs.A:
        x_PI = _dropped(x_TI, dtype, dropout, seed).index_select(0, pairs.token_P)
        dA = _weight_gradient(dz_Pr, x_PI, A, pairs)
    if needs.x:
        dx_TI = _spread(dz_Pr, A, pairs, dtype, x_TI.shape[0])
        if dropout:
            dx_TI *= keep_mask(dx_TI, dropout, seed)
        dx_TI = cast(added(dx_TI, onto), x_TI.dtype)
    return Gradients(dx_TI, dA, dBt, dgates_TE)


def _dropped(x_TI: Tensor, dtype: torch.dtype, dropout: float, seed: int) -> Tensor:
    x_TI = cast(x_TI, dtype)
    return x_TI * keep_mask(x_TI, dropout, seed) if dropout else x_TI


def _shrink(x_TI: Tensor, A: Tensor, pairs: _Pairs, dtype: torch.dtype) -> Tensor:
    """A_e x_t of every pair, [P, r]; once per token where A is shared."""
    if A.shape[0] == 1:
        return F.linear(x_TI, cat(A, dtype)).index_select(0, pairs.token_P)
    return _to_rank(x_TI.index_select(0, pairs.token_P), A, pairs, dtype)


def _to_rank(
    wide_PW: Tensor, factor: Tensor, pairs: _Pairs, dtype: torch.dtype
) -> Tensor:
    """Product of each pair's row with its expert's factor [r, W], transposed."""
    if factor.shape[0] == 1:
        return F.linear(wide_PW, cat(factor, dtype))
    return F.grouped_mm(wide_PW, cast(factor, dtype).mT, offs=pairs.ends_E)


def _spread(
    dz_Pr: Tensor, A: Tensor, pairs: _Pairs, dtype: torch.dtype, tokens: int
) -> Tensor:
    """sum_p dz_p A_e per token, [T, I]; in rank space first where A is shared."""
    if A.shape[0] == 1:
        dz_Tr = dz_Pr.new_zeros(tokens, dz_Pr.shape[1])
        return dz_Tr.index_add_(0, pairs.token_P, dz_Pr) @ cat(A, dtype)
    dx_PI = F.grouped_mm(dz_Pr, cast(A, dtype), offs=pairs.ends_E)
    return dx_PI.new_zeros(tokens, A.shape[2]).index_add_(0, pairs.token_P, dx_PI)


def _weight_gradient(
    rank_Pr: Tensor, wide_PW: Tensor, factor: Tensor, pairs: _Pairs
) -> Tensor:
    """sum_p rank_p^T wide_p per expert, in the shape and dtype of the factor."""
    if factor.shape[0] == 1:
        return (rank_Pr.t() @ wide_PW).to(factor.dtype).unsqueeze(0)
    product = F.grouped_mm(rank_Pr.t(), wide_PW, offs=pairs.ends_E)
    return product.to(factor.dtype)
