"""A frozen layer into whose weight the update of its only expert can be folded.

Shape legend
    I in features   O out features
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts import AbstractExperts
from molora.hosts import Host, host_of
from molora.quantized import (
    bits_of,
    dequantised,
    known_weight,
    plain_linear,
    relative,
    tensors_of,
)


class MergeCost(NamedTuple):
    """How far a merged weight is from what it could stand for, over the norm of that.

    Part of it is the rounding to the dtype that the model computes in.
    """

    dequantised: float
    """From the rounded weight that was trained on, plus the update."""
    original: float | None
    """From the weight before quantisation plus the update; None where not given."""


class MergeableLinear(nn.Module):
    """The frozen layer of a bank, with its original bytes while it is merged.

    Args:
        base: A layer of a type that has a host, see ``molora.hosts``.

    Attributes:
        host: What the type of the layer makes of input, output and weight.
        quantised: While merged, the quantised layer whose place an ordinary one has.
        merge_cost: What the merge cost, for a quantised layer.
    """

    path: str
    experts: AbstractExperts

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.host: Host = host_of(base)
        self.backup: Tensor | None = None
        self.backup_bias: Tensor | None = None
        self.gave_bias = False
        self.quantised: nn.Module | None = None
        # in a tuple: it is no part of this module
        self._given: tuple[nn.Module, ...] = ()
        self.merge_cost: MergeCost | None = None

    @property
    def weight(self) -> Any:
        """Weight of the base layer, for code that looks at its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """Bias of the base layer; None where its type has none."""
        return getattr(self.base, "bias", None)

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the base weight."""
        return self.backup is not None or self.quantised is not None

    @property
    def frozen_layer(self) -> nn.Module:
        """Layer of the base model as it was before any merge."""
        return self.base if self.quantised is None else self.quantised

    @property
    def given_layer(self) -> nn.Module:
        """Layer that the base model came with, which ``unwrap`` gives back."""
        if not self._given:
            return self.frozen_layer
        given: Any = self._given[0].train(self.training)
        device = self.weight.device
        layer: nn.Module = given if given.weight.device == device else given.to(device)
        return layer

    def hold(self, layer: nn.Module) -> None:
        """Compute with another layer than the one that the model came with."""
        self._given = self._given or (self.base,)
        self.base = layer

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Dense update of the only expert, [O, I] float32.

        Args:
            weight: [O, I] that it is added to; None means that of the frozen layer.

        Raises:
            WrapError: The bank has several experts, or experts that pass a
                nonlinearity, so no single update exists.
        """
        if not self.experts.linear:
            raise WrapError(
                f"site {self.path!r}: experts of kind "
                f"{type(self.experts).__name__} are no change of a weight, so nothing "
                "can be merged; keep the adapter beside the model"
            )
        if self.experts.num_experts > 1:
            raise WrapError(
                f"site {self.path!r} routes among {self.experts.num_experts} experts "
                "per token, which no single weight equals; run molora.collapse first"
            )
        weight = self._weight_OI() if weight is None else weight
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.experts.delta_weight(0, wide)

    def _weight_OI(self) -> Tensor:
        """Weight of the frozen layer before any merge, dequantised."""
        return self.host.weight_OI(self.base_weight())

    def _bias_O(self) -> Tensor | None:
        """Bias of the frozen layer before any merge."""
        layer = self.frozen_layer
        bias: Any = getattr(layer, "bias", None)
        bias = bias if self.backup_bias is None else self.backup_bias
        if bias is None or self.gave_bias:
            return None
        assert isinstance(bias, Tensor)
        return bias.detach()

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into base weight and bias; keep the original bytes.

        A layer without a bias gets one where the experts shift its output.
        """
        assert not self.merged
        delta_OI = self.delta_weight()
        weight = self.base.weight
        assert isinstance(weight, nn.Parameter)
        merged = self._sum(weight, self.host.stored(delta_OI, weight))
        self._merge_bias(len(delta_OI))
        self.backup = weight.detach().clone()
        weight.copy_(merged)

    @torch.no_grad()
    def merge_quantised(
        self, onto: str, dtype: torch.dtype, original: Tensor | None
    ) -> None:
        """Put an ordinary layer with the update in the place of a quantised one.

        Args:
            onto: One of ``quantized.BASES``.
            dtype: Dtype of the ordinary layer.
            original: Weight [O, I] before quantisation; needed for ``original``, else
                only for the cost.
        """
        assert not self.merged
        layer, weights = self.base, {"dequantised": self._weight_OI()}
        if original is not None:
            weights["original"] = original.to(weights["dequantised"].device)
        sums = {
            name: weight.float() + self.delta_weight(weight)
            for name, weight in weights.items()
        }
        restored = self.experts.restored()
        if restored is not None and "original" in sums:
            sums["original"] -= restored
        merged = self._finite(sums[onto].to(dtype))
        bias = self._merged_bias(len(merged), dtype)
        costs = {name: relative(merged, value) for name, value in sums.items()}
        self.merge_cost = MergeCost(costs["dequantised"], costs.get("original"))
        self.base, self.quantised = plain_linear(layer, merged, dtype, bias), layer

    def _merge_bias(self, out_features: int) -> None:
        """Fold what the experts add to the bias; a layer without one may get one."""
        old_O: Tensor | None = self.bias
        merged_O = self._merged_bias(out_features, self.weight.dtype)
        if merged_O is None or merged_O is old_O:
            return
        if old_O is None:
            self.base.bias = nn.Parameter(merged_O, requires_grad=False)
            self.gave_bias = True
        else:
            self.backup_bias = old_O.detach().clone()
            old_O.copy_(merged_O)

    def _merged_bias(self, out_features: int, dtype: torch.dtype) -> Tensor | None:
        """Bias with what the experts add; the frozen one where they add nothing."""
        old_O: Tensor | None = self.bias
        bias_O = old_O
        if bias_O is None:
            bias_O = self.weight.new_zeros(out_features, dtype=dtype)
        delta_O = self.experts.delta_bias(0, bias_O)
        if delta_O is None or not delta_O.any():
            return old_O
        return self._sum(bias_O, delta_O)

    def _sum(self, values: Tensor, delta: Tensor) -> Tensor:
        """Add in the wider dtype, return in that of the values."""
        wide = torch.promote_types(values.dtype, delta.dtype)
        return self._finite((values.to(wide) + delta).to(values.dtype))

    def _finite(self, merged: Tensor) -> Tensor:
        if not torch.isfinite(merged).all():
            raise WrapError(f"site {self.path!r}: the merged weight is not finite")
        return merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original bytes, or the quantised layer, back."""
        if self.quantised is not None:
            self.base, self.quantised, self.merge_cost = self.quantised, None, None
            return
        assert self.backup is not None
        weight = self.base.weight
        assert isinstance(weight, nn.Parameter)
        weight.copy_(self.backup)
        self.backup = None
        if self.gave_bias:
            self.base.register_parameter("bias", None)
            self.gave_bias = False
        if self.backup_bias is not None:
            bias = self.base.bias
            assert isinstance(bias, nn.Parameter)
            bias.copy_(self.backup_bias)
            self.backup_bias = None

    def base_weight(self) -> Tensor:
        """Weight of the frozen layer as it was before any merge, dequantised."""
        layer = self.frozen_layer
        if bits_of(layer) is not None:
            return dequantised(layer)
        weight = layer.weight if self.backup is None else self.backup
        assert isinstance(weight, Tensor)
        return weight.detach()

    def frozen_sources(self) -> list[Tensor]:
        """Every tensor that the weight of the frozen layer is made of."""
        return tensors_of(self.frozen_layer)

    def known_weight(self) -> Tensor:
        """What a fingerprint reads: of a quantised layer the shape alone."""
        return known_weight(self.frozen_layer) if self.backup is None else self.backup
