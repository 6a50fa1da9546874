"""SuperLoRA experts: the weights of one layer or many, folded to tensors of low rank.

The weights of the layers of a scope stand one after the other, row by row, S entries in
all, which are cut into G groups of N = ceil(S / G). Each group is the beginning of a
tensor of M axes that is written as

    s C x_1 A_1 x_2 A_2 ... x_M A_M    C [r, ..., r], A_m [n_m, r]    s = alpha / r

and a layer reads the slice that is its own. ``fold`` says what the sides n_m are:

    square    all the same, the smallest n with n^M >= N
    weight    those of the weights themselves: the layers of the group, where it has
              several (all of one shape), then O as the product of the first half of
              the axes that are left, and I as that of the others

M > 2 is LoRTA. With fold: weight, M = 2 and a diagonal core of ones it is LoRA; over
the layers of a type, M = 3 and a trained core, LoTR. A_M is zero at the start, the
other factors and the core are uniform as Kaiming has it with a = sqrt(5). A group has
r sum_m n_m + r^M parameters, without r^M for a diagonal core.

The first layer of a scope, in the order of the model, owns the tensors. A slice whose
entries are a matrix along the axes of the tensor runs as two factors of it (tucker.py);
of another one the rows of the first axis that it touches are formed (dense_sum.py).

With ``projection`` a group of N entries is F x for a folded tensor x of only
ceil(projection_ratio N), with one fixed random F (projection.py) for all groups;
``shuffle`` permutes the entries of a group.

Reference: Chen et al. 2024, arXiv:2403.11887, sections 3 and 4. Kronecker splits (LoKr,
LoNKr) are family ``lokr``.

Shape legend: see base.py; G groups, M axes, n sides.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts import tucker
from molora.experts.base import EXPERTS, AbstractExperts
from molora.experts.dense_sum import dense_sum
from molora.experts.factors import Place
from molora.experts.projection import FixedProjection
from molora.experts.superlora_config import SuperLoRAConfig
from molora.kernels import lowrank_mixture


@EXPERTS.register("superlora", paper="arXiv:2403.11887")
class SuperLoRAExperts(AbstractExperts):
    """E updates that are slices of folded Tucker tensors (SuperLoRA, LoRTA).

    Limitations: with fold: square the update of one expert at a time is formed as
    [O, I], once forward and once backward, also for every token that is decoded,
    because a slice of such a tensor seldom has factors along the sides of the weight:
    a step takes about six times that of LoRA's layer. fold: weight has the factors, at
    1 to 1.4 times LoRA's, and keeps them for backward ([E, r^m, I + O] for a dense
    core). With projection or shuffle every layer forms the groups that it reads whole.
    Adding a target layer to a wide scope moves the slices of the others.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        places: Where the tensors of a scope wider than the site are kept.

    Raises:
        WrapError: More groups than entries, layers of different shapes under
            fold: weight, a random projection larger than the weights, or a scope that
            this layer is not part of.
    """

    Config = SuperLoRAConfig
    adds = True

    def __init__(
        self,
        config: SuperLoRAConfig,
        *,
        in_features: int,
        out_features: int,
        generator: torch.Generator,
        places: Mapping[str, Place] | None = None,
    ):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.scale = config.alpha / config.r
        self.shape = (out_features, in_features)
        self.places = dict(places or {})
        self.projection: FixedProjection | None = None
        own = math.prod(self.shape)
        place = Place("", None, own, generator)
        if config.scope != "site":
            if "groups" not in self.places:
                raise WrapError(
                    f"experts.scope={config.scope}: a part of a sum or a grown bank is "
                    "not joined with other layers; set scope: site"
                )
            place = self.places["groups"]
        entries, G = place.features, config.groups
        if entries < G:
            raise WrapError(
                f"experts.groups={G}: a layer from {in_features} to {out_features} "
                f"features and those of its scope have {entries} entries; groups up to "
                f"{entries} work"
            )
        self.size = self.folded = -(-entries // G)
        if config.projection_ratio is not None:
            self.folded = math.ceil(config.projection_ratio * self.size)
        if config.projection == "random" and self.folded * self.size > entries:
            least = math.ceil((config.projection_ratio or 1) ** 0.5 * entries**0.5) + 1
            raise WrapError(
                f"experts.projection: random holds a matrix [{self.size}, "
                f"{self.folded}], more than the {entries} entries themselves; set "
                f"projection: fastfood, or groups: {least} or more"
            )
        self.sides = self._sides(entries)
        self.names = [f"A{m}" for m in range(1, config.order + 1)]
        if config.core == "dense":
            self.names.append("core")
        self.parts = _parts(place.start, own, self.size)
        self.split = self._split()
        # in a dict: the owner is no part of this module
        self._owners: dict[str, SuperLoRAExperts] = {}
        if place.owner is None:
            self._make(place.generator)
            return
        path, owner = place.owner
        assert isinstance(owner, SuperLoRAExperts)
        self._owners["groups"] = owner
        if config.fold == "weight" and owner.shape != self.shape:
            raise WrapError(_other_shape(f"layer {path!r} of its scope", owner.shape))

    def _sides(self, entries: int) -> list[int]:
        """n_1 to n_M."""
        config, own, M = self.config, math.prod(self.shape), self.config.order
        if config.fold == "square":
            return [tucker.side(self.folded, M)] * M
        layers, surplus = divmod(entries, own * config.groups)
        if surplus and entries % own == 0:
            raise WrapError(
                f"experts.groups={config.groups}: fold: weight needs groups of whole "
                f"layers, and the {entries // own} layers of this scope cannot be "
                "divided so; groups 1, or a divisor of their number, works"
            )
        if surplus:
            raise WrapError(_other_shape("another layer of its scope"))
        first = [layers] if layers > 1 else []
        axes = M - len(first)
        if axes < 2:
            raise WrapError(
                f"experts.order={M}: fold: weight has one axis for the {layers} layers "
                "of a group and at least two for their sides; set order: 3 or more"
            )
        out = tucker.divided(self.shape[0], axes // 2)
        return [*first, *out, *tucker.divided(self.shape[1], axes - axes // 2)]

    def _split(self) -> tucker.Split | None:
        """How the update is a product of two factors, where that saves something."""
        first, end, start, _ = self.parts[0]
        fixed = self.config.projection is not None or self.config.shuffle
        if fixed or len(self.parts) > 1 or end - first > 1:
            return None
        split = tucker.split(self.sides, start, *self.shape)
        if split is None:
            return None
        axes = len(self.sides) - len(split.rows)
        power = 1
        if self.config.core == "dense":
            power = min(split.out, axes - split.out)
        rank = self.config.r**power
        return split if rank * sum(self.shape) < math.prod(self.shape) else None

    def _make(self, generator: torch.Generator) -> None:
        """Make the tensors of all groups."""
        E, G, r = self.num_experts, self.config.groups, self.config.r
        last = self.names[self.config.order - 1]
        shapes = [[side, r] for side in self.sides] + [[r] * self.config.order]
        for name, shape in zip(self.names, shapes, strict=False):
            values = torch.zeros(E, G, *shape)
            if name != last:
                values.uniform_(-(r**-0.5), r**-0.5, generator=generator)
            self.register_parameter(name, nn.Parameter(values))
        config = self.config
        if config.projection is not None or config.shuffle:
            kind, seed = config.projection, config.projection_prng_key or 0
            sizes = (self.folded, self.size)
            self.projection = FixedProjection(kind, config.shuffle, *sizes, seed)

    def sources(self) -> list[Tensor]:
        """See base class; those of the layer that owns the tensors."""
        owners = [owner.sources() for owner in self._owners.values()]
        return [*super().sources(), *(part for found in owners for part in found)]

    def _values(self) -> list[Tensor]:
        """Tensors of all groups, each [E, G, ...], in the order of the names."""
        owner = self._owners.get("groups", self)
        return [getattr(owner, name) for name in self.names]

    def _tensor(self, values: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Factors and core."""
        M = self.config.order
        return values[:M], values[M] if len(values) > M else None

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        if self.split is None:
            values, wide = self._values(), self.shape[0]
            update = dense_sum(self._weight, x, values, gates, wide, top_k)
            return (base + update).to(base.dtype)
        with torch.autocast(x.device.type, enabled=False):
            one = [values[:, self.parts[0][0]] for values in self._values()]
            A, Bt = tucker.matrices(*self._tensor(one), self.split)
        Bt = Bt[..., : self.shape[0]]
        return lowrank_mixture(x, A, Bt, gates, self.scale, base, top_k=top_k)

    def _weight(self, *values: Tensor) -> Tensor:
        """Update [O, I] of one expert from its tensors."""
        rest, found = math.prod(self.sides[1:]), []
        fixed = self._owners.get("groups", self).projection
        for first, end, start, stop in self.parts:
            factors, core = self._tensor([v[first:end] for v in values])
            if fixed is not None:
                slab = tucker.rows(factors, core, 0, self.sides[0]).flatten(1)
                slab = fixed(slab[:, : self.folded])
                found.append(slab[:, start:stop].flatten())
                continue
            row = start // rest
            slab = tucker.rows(factors, core, row, -(-stop // rest)).flatten(1)
            found.append(slab[:, start - row * rest : stop - row * rest].flatten())
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return self.scale * whole.view(self.shape)

    @torch.no_grad()
    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class."""
        values = [value[expert] for value in self._values()]
        wide = torch.promote_types(values[0].dtype, torch.float32)
        return self._weight(*[value.to(wide) for value in values])

    def count(self) -> int:
        """See base class; tensors that layers share count where they are owned."""
        return sum(parameter.numel() for parameter in self.parameters())


def _parts(start: int, entries: int, size: int) -> list[tuple[int, int, int, int]]:
    """What a layer reads: (first group, end group, start, stop) within each of them."""
    found, end = [], start + entries
    while start < end:
        group, within = divmod(start, size)
        if within == 0 and end - start >= size:
            found.append((group, end // size, 0, size))
            start = end // size * size
        else:
            stop = min(size, within + end - start)
            found.append((group, group + 1, within, stop))
            start += stop - within
    return found


def _other_shape(who: str, shape: tuple[int, int] | None = None) -> str:
    has = f"is [{shape[0]}, {shape[1]}]" if shape else "has another shape"
    return (
        f"experts.fold=weight: {who} {has}; the layers of a group must be alike: use "
        "scope: type, or fold: square"
    )
