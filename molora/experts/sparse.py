"""Sparse experts: a few entries of the weight, at fixed places, are trained.

    Delta W_e[i, j] = v_e where (i, j) is one of the n places of the expert, else 0

The values start at zero, the scale is 1. Places:

    density        every entry with this probability by itself (Random Masking, Xu and
                   Zhang 2024, arXiv:2405.02596); n is drawn once for all experts of a
                   layer, and given n all masks are equally likely
    density, exact int(density O I) of them (RoSA, Nikdan et al. 2024, arXiv:2401.04679)
    r              r (I + O) of them, as many values as a LoRA of rank r has (SHiRA,
                   Bhardwaj et al. 2024, arXiv:2406.13175)

They are the first n of a permutation of the entries, as in PEFT's SHiRA, and are saved
with the values. ``set_mask`` puts others in their place, as the recipe ``rosa`` of
training does, which chooses them by gradients. All products are sparse: the gradient of
the values is computed at their places alone, and no [O, I] is formed.

Shape legend: see base.py; n values of one expert, N its tokens.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Literal, Self

import pydantic
import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.experts.gated_sum import none, rows_of
from molora.experts.peft_form import PeftForm


@EXPERTS.register("sparse", paper="arXiv:2405.02596")
class SparseExperts(AbstractExperts):
    """E sparse updates at fixed places (Random Masking, SHiRA, RoSA's sparse part).

    Limitations: without the recipe ``rosa`` the places stay random. An update has full
    rank in general, so collapse to a LoRA is an approximation. Half precision is
    computed in float32. Drawing the places holds a permutation of all O I entries for a
    moment.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the places, unless random_seed is set.

    Raises:
        WrapError: The layer has no place, or not as many as are asked for.
    """

    class Config(ExpertsConfig):
        """Settings of sparse experts."""

        kind: Literal["sparse"] = "sparse"
        """Registered name."""
        density: float | None = pydantic.Field(default=None, gt=0, le=1)
        """Share of the entries that is trained."""
        exact: bool = False
        """Train exactly int(density O I) entries, not a random number."""
        r: int | None = pydantic.Field(default=None, ge=1)
        """Train r (I + O) entries; in place of density."""
        random_seed: int | None = pydantic.Field(default=None, ge=0)
        """Seed of the places of expert 0, the next ones count on, for all layers alike
        as in PEFT's SHiRA; null draws them with the model."""

        @pydantic.model_validator(mode="after")
        def _says_how_many(self) -> Self:
            if (self.density is None) == (self.r is None):
                raise ValueError("density: set it or r, one of the two")
            if self.exact and self.density is None:
                raise ValueError("exact: r always trains exactly r (I + O) entries")
            return self

    adds = True
    peft_type = "SHIRA"
    indices: Tensor
    """[E, n] int32, i * I + j of every place, in ascending order."""

    def __init__(
        self,
        config: Config,
        *,
        in_features: int,
        out_features: int,
        generator: torch.Generator,
    ):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.in_features, self.out_features = in_features, out_features
        count = self._number(generator)
        entries = in_features * out_features
        indices = torch.empty(config.num_experts, count, dtype=torch.int32)
        for expert in range(config.num_experts):
            if config.random_seed is not None:
                generator = torch.Generator().manual_seed(config.random_seed + expert)
            chosen = torch.randperm(entries, generator=generator)[:count]
            indices[expert] = chosen.sort().values
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(torch.zeros(config.num_experts, count))

    def _number(self, generator: torch.Generator) -> int:
        """How many entries each expert trains."""
        config, wide, out = self.config, self.in_features, self.out_features
        entries = wide * out
        where = f"a layer from {wide} to {out} features, which has {entries} entries"
        if config.r is not None:
            count = config.r * (wide + out)
            if count > entries:
                raise WrapError(
                    f"experts.r={config.r}: r (I + O) = {count} is too many for "
                    f"{where}; r up to {entries // (wide + out)} works"
                )
            return count
        assert config.density is not None
        if config.exact:
            count = int(config.density * entries)
        else:
            if config.random_seed is not None:
                generator = torch.Generator().manual_seed(config.random_seed)
            law = torch.tensor([entries, config.density], dtype=torch.float64)
            count = int(torch.binomial(law[0], law[1], generator=generator))
        if count == 0:
            raise WrapError(
                f"experts.density={config.density}: leaves nothing to train in "
                f"{where}; densities well above {1 / entries:.2g} work"
            )
        return count

    @torch.no_grad()
    def set_mask(self, expert: int, indices: Tensor) -> None:
        """Train other entries of an expert; its values become zero.

        Args:
            expert: Its number.
            indices: [n] places i * I + j, as many as before, in any order; for example
                ``score.flatten().topk(n).indices``.

        Raises:
            WrapError: No such expert, or places that are none, double or not as many.
        """
        if expert not in range(self.num_experts):
            raise WrapError(f"set_mask: no expert {expert} among {self.num_experts}")
        had = self.indices.shape[1]
        chosen = indices.sort().values
        if chosen.shape != (had,) or bool((chosen[1:] == chosen[:-1]).any()):
            raise WrapError(
                f"set_mask: an expert has {had} places, each once; got "
                f"{indices.unique().numel()} in a tensor {tuple(indices.shape)}"
            )
        entries = self.in_features * self.out_features
        if int(chosen[0]) < 0 or int(chosen[-1]) >= entries:
            raise WrapError(
                f"set_mask: places are 0 to {entries - 1}; got {int(chosen[0])} to "
                f"{int(chosen[-1])}"
            )
        self.indices[expert] = chosen.to(self.indices)
        self.values[expert] = 0

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        update: Tensor = self._update(x, gates, top_k is not None)
        return (base + update).to(base.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update(self, x: Tensor, gates: Tensor | None, sparse: bool) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            update: Tensor = _SparseSum.apply(  # type: ignore[no-untyped-call]
                x, gates, self.values, self.indices, self.out_features, sparse
            )
        return update

    @torch.no_grad()
    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class."""
        values = self.values[expert]
        wide = torch.promote_types(values.dtype, torch.float32)
        delta_OI = values.new_zeros(weight.shape, dtype=wide)
        delta_OI.view(-1)[self.indices[expert].long()] = values.to(wide)
        return delta_OI

    def count(self) -> int:
        """See base class."""
        return self.values.numel()

    def to_peft(self, expert: int) -> PeftForm:
        """See base class.

        Raises:
            WrapError: The number of values is none that PEFT has.
        """
        count, side = self.values.shape[1], self.in_features + self.out_features
        if count % side:
            raise WrapError(
                f"PEFT's SHiRA trains r (I + O) = r {side} entries of a layer; these "
                f"experts train {count}, so set r in place of density"
            )
        flat = self.indices[expert]
        places = torch.stack([flat // self.in_features, flat % self.in_features])
        values = self.values[expert].detach().clone()
        mine = {"shira_weight": values, "shira_indices": places}
        return PeftForm("SHIRA", {"r": count // side}, mine)

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class."""
        if set(tensors) != {"shira_weight", "shira_indices"}:
            found = ", ".join(sorted(tensors))
            raise WrapError(f"SHiRA is shira_weight and shira_indices, not {found}")
        block = {"kind": "sparse", "r": int(settings["r"])}
        rows, columns = tensors["shira_indices"].long()
        flat, order = (rows * in_features + columns).sort()
        values = tensors["shira_weight"][order]
        return block, {"values": values[None], "indices": flat[None].int()}


class _SparseSum(torch.autograd.Function):
    """sum_e g_e S_e x; keeps x, gates, values and places."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor | None,
        values: Tensor,
        indices: Tensor,
        out_features: int,
        sparse: bool,
    ) -> Tensor:
        ctx.out_features, ctx.sparse = out_features, sparse
        ctx.save_for_backward(x, gates, values, indices)
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros(len(x), out_features, dtype=wide)
        for e in range(len(values)):
            rows = rows_of(gates, e, sparse)
            if none(rows):
                continue
            x_NI = x[rows].to(wide)
            S_OI = _matrix(values[e].to(wide), indices[e], out_features, x.shape[1])
            part_NO = (S_OI @ x_NI.t()).t()
            if gates is not None:
                part_NO = gates[rows, e].unsqueeze(1).to(wide) * part_NO
            total[rows] += part_NO
        return total.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, values, indices = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        dx_TI = torch.zeros_like(x, dtype=wide)
        d_gates = None if gates is None else torch.zeros_like(gates)
        d_values = torch.zeros_like(values)
        for e in range(len(values)):
            rows = rows_of(gates, e, ctx.sparse)
            if none(rows):
                continue
            x_NI, dy_NO = x[rows].to(wide), grad[rows].to(wide)
            S_OI = _matrix(values[e].to(wide), indices[e], grad.shape[1], x.shape[1])
            if d_gates is not None:
                if ctx.needs_input_grad[1]:
                    part_NO = (S_OI @ x_NI.t()).t()
                    d_gates[rows, e] = (part_NO * dy_NO).sum(1).to(gates.dtype)
                dy_NO = gates[rows, e].unsqueeze(1).to(wide) * dy_NO
            if ctx.needs_input_grad[0]:
                dx_TI[rows] += (_transposed(S_OI) @ dy_NO.t()).t()
            if ctx.needs_input_grad[2]:
                at = torch.sparse.sampled_addmm(S_OI, dy_NO.t(), x_NI, beta=0.0)
                d_values[e] = at.values()
        return dx_TI.to(x.dtype), d_gates, d_values, None, None, None


def _transposed(S_OI: Tensor) -> Tensor:
    """The same by columns, which multiplies faster than a product from the left."""
    rows, columns = S_OI.shape
    starts, at = S_OI.crow_indices(), S_OI.col_indices()
    row_of = torch.repeat_interleave(starts.diff())
    places, order = (at * rows + row_of).sort()
    return _matrix(S_OI.values()[order], places, columns, rows)


def _matrix(values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    """One expert as a sparse matrix by rows."""
    starts = torch.arange(rows + 1, device=places.device) * columns
    with warnings.catch_warnings():
        # torch calls its sparse layout a beta
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        return torch.sparse_csr_tensor(
            torch.searchsorted(places.long(), starts),
            places.long() % columns,
            values,
            (rows, columns),
            check_invariants=False,
        )
