"""What every tensor of a bilinear family can be: shared, frozen, seeded, masked.

``shared`` says who reads the same tensor:

    experts   all experts of one layer
    layer     all target layers of one layer of the model
    type      the target layers of one place in every layer (LoTR)
    model     all target layers (VeRA)

and a scope wider than the layer holds for its experts too. The first target layer of a
group, in the order of the model, owns the tensor, as wide as the widest layer asks; the
others hold a reference to the owner and read the leading columns. So a state dict, an
optimizer and a checkpoint see each tensor once.

``trainability`` says what may change it:

    frozen    drawn once, saved, never trained (LoRA-FA, LoRI)
    seeded    drawn from projection_prng_key, not saved, drawn again (VeRA); another
              version of torch may draw other values
    masked    the entries of a fixed mask train, the others stay zero (LoRI)

Shape legend: see base.py.
"""

import abc
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import AbstractExperts, BilinearExperts
from molora.experts.factor_config import FactorConfig

Draw = Callable[[Tensor, torch.Generator], object]
"""Fills a tensor with its initial values."""


class Place(NamedTuple):
    """Where a tensor that is not a layer's own is kept and drawn from."""

    path: str
    """The layer that reads it."""
    owner: tuple[str, AbstractExperts] | None
    """The layer that keeps it, if it is another one."""
    features: int
    """Largest I or O of the layers that share it, or all entries of their weights."""
    generator: torch.Generator
    """Source of its initial values."""
    start: int = 0
    """Where the entries of the layer that reads it begin."""


class FactorExperts(BilinearExperts):
    """Bilinear experts whose tensors can be shared and kept from training.

    A family calls ``add`` for every tensor in ``build``, and reads ``value`` in
    ``factors``.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        places: Of the tensors that layers share or that are seeded, by name.
    """

    config: FactorConfig
    A: Tensor
    """[E or 1, r, I], at the layer that owns it."""
    Bt: Tensor
    """[E or 1, r, O], likewise."""

    def __init__(
        self,
        config: FactorConfig,
        *,
        in_features: int,
        out_features: int,
        generator: torch.Generator,
        places: Mapping[str, Place] | None = None,
    ):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.lora_dropout = config.lora_dropout
        self.places = dict(places or {})
        self._sizes = {"in": in_features, "out": out_features}
        self._generator = generator
        self._widths: dict[str, int] = {}
        # in a dict: the owner is no part of this module
        self._owners: dict[str, FactorExperts] = {}
        self.build(in_features, out_features)

    @abc.abstractmethod
    def build(self, in_features: int, out_features: int) -> None:
        """Make the tensors of this layer, with ``add``, and what goes with them.

        Args:
            in_features: I.
            out_features: O.

        Raises:
            WrapError: Sizes that the family cannot take.
        """

    def features(self, name: str) -> int:
        """I or O of the widest layer that reads a tensor."""
        if name in self.places:
            return self.places[name].features
        return self._sizes[self.config.TENSORS[name]]

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        draw: Draw | None = None,
        whole: int | None = None,
    ) -> None:
        """Make a tensor [E or 1, *shape], or take that of the layer that owns it.

        Args:
            name: Its name in the settings.
            shape: What one expert of this layer reads.
            draw: Fills it with initial values; None is zeros.
            whole: Last size that is stored; None is that of the widest layer.

        Raises:
            WrapError: The owner's tensor has another shape.
        """
        config, place = self.config, self.places.get(name)
        stack = 1 if name in config.scopes() else self.num_experts
        self._widths[name] = shape[-1]
        if whole is None:
            whole = shape[-1]
            if config.TENSORS[name] != "rank":
                whole = self.features(name)
        size = (stack, *shape[:-1], whole)
        if place is not None and place.owner is not None:
            self._owners[name] = _checked(name, size, place)
            return
        values = torch.zeros(size)
        generator = self._generator
        if place is not None:
            generator = place.generator
        elif config.trainability.get(name) == "seeded":
            key = config.projection_prng_key or 0
            generator = torch.Generator().manual_seed(key)
        if draw is not None:
            draw(values, generator)
        self._keep(name, values, generator)

    def _keep(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        """Store a tensor as its trainability asks."""
        attribute, kind = _attribute(name), self.config.trainability.get(name)
        if kind == "seeded":
            self.register_buffer(attribute, values, persistent=False)
            return
        setattr(self, attribute, nn.Parameter(values))
        if kind == "frozen":
            self.frozen = (*self.frozen, attribute)
        if kind == "masked":
            mask = torch.ones(values.shape, dtype=torch.bool)
            if self.config.density is not None:
                kept = max(1, round(self.config.density * mask.numel()))
                order = torch.randperm(mask.numel(), generator=generator)
                mask.view(-1)[order[kept:]] = False
            self.register_buffer(f"mask_{attribute}", mask)

    def whole(self, name: str) -> Tensor:
        """A tensor that this layer owns, as wide as it is stored, under its mask."""
        values: Tensor = getattr(self, _attribute(name))
        if self.config.trainability.get(name) != "masked":
            return values
        masked: Tensor = values * getattr(self, f"mask_{_attribute(name)}")
        return masked

    def value(self, name: str) -> Tensor:
        """A tensor as this layer reads it, [E or 1, ...]."""
        whole = self._owners.get(name, self).whole(name)
        width = self._widths[name]
        return whole if whole.shape[-1] == width else whole[..., :width]

    def plain_scale(self) -> float | None:
        """Scale of all experts, where ``A`` and ``Bt`` as they stand are the factors.

        Returns:
            None: the factors are more than these two parameters.
        """
        return None

    def is_plain(self, name: str) -> bool:
        """Whether a tensor is a parameter of this layer, read as it stands."""
        attribute = _attribute(name)
        held = attribute in self._parameters and name not in self.masked()
        return held and getattr(self, attribute).shape[-1] == self._widths[name]

    def sources(self) -> list[Tensor]:
        """See base class; tensors of other layers too."""
        owners = [owner.sources() for owner in self._owners.values()]
        return [*super().sources(), *(part for found in owners for part in found)]

    def masked(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Parameter and mask of every masked tensor that this layer owns."""
        kinds = self.config.trainability
        return {
            name: (
                getattr(self, _attribute(name)),
                getattr(self, f"mask_{_attribute(name)}"),
            )
            for name in self.config.TENSORS
            if kinds.get(name) == "masked" and name not in self._owners
        }

    def count(self) -> int:
        """See base class; a tensor that layers share counts where it is owned."""
        kinds = self.config.trainability
        masks = sum(int(mask.sum()) for _, mask in self.masked().values())
        return masks + sum(
            self._size(name)
            for name in self._widths
            if name not in self._owners and name not in kinds
        )

    def _size(self, name: str) -> int:
        """Number of values of a tensor that this layer owns."""
        return self.whole(name).numel()


def uniform(fan_in: int, gain: float = 1.0) -> Draw:
    """U(-b, b) with b = gain / sqrt(fan_in); gain 1 is Kaiming with a = sqrt(5)."""
    bound = float(gain / fan_in**0.5)

    def draw(values: Tensor, generator: torch.Generator) -> object:
        return values.uniform_(-bound, bound, generator=generator)

    return draw


def normal(std: float) -> Draw:
    """N(0, std^2)."""

    def draw(values: Tensor, generator: torch.Generator) -> object:
        return values.normal_(0, std, generator=generator)

    return draw


def with_middle(A: Tensor, Bt: Tensor, diagonal_Er: Tensor) -> tuple[Tensor, Tensor]:
    """Fold diag(d_e) between B and A into the factor that costs least.

    A factor that the experts share stays shared if the other one is not; if both are, A
    stays shared.

    Args:
        A: [E or 1, r, I].
        Bt: [E or 1, r, O].
        diagonal_Er: [E or 1, r].
    """
    alike = len(A) == len(Bt) == len(diagonal_Er)
    into_a = len(A) > len(Bt) or (alike and A.shape[2] < Bt.shape[2])
    if into_a:
        return diagonal_Er.unsqueeze(-1) * A, Bt
    return A, diagonal_Er.unsqueeze(-1) * Bt


def _attribute(name: str) -> str:
    """B is stored transposed, as the kernels read it."""
    return "Bt" if name == "B" else name


def _checked(name: str, size: tuple[int, ...], place: Place) -> FactorExperts:
    """The owner of a tensor, if it is the one that a layer needs."""
    assert place.owner is not None
    path, owner = place.owner
    assert isinstance(owner, FactorExperts)
    there = tuple(owner.whole(name).shape)
    if there != size:
        raise WrapError(
            f"sites {path!r} and {place.path!r} share {name} (experts.shared), which "
            f"has the shape {there} there and {size} here; give both the same rank"
        )
    return owner
