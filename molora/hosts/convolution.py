"""nn.Conv1d and nn.Conv2d as hosts: one token for each position of the output.

    y[n, :, l] = W p[n, l] + b + sum_e g_e delta_e(p[n, l])    p = unfold(x), I = C k k

W is [O, C, k, k] and flattened to [O, I], as PEFT has it; so every family is what it is
on a linear layer that reads the patches p. Experts that are products of two factors
read x by a convolution with A instead, which is the same.

Shape legend: see base.py.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from molora.errors import RoutingError, WrapError
from molora.experts import AbstractExperts, BilinearExperts
from molora.hosts.base import Host, add_parts

if TYPE_CHECKING:
    from molora.context import ForwardContext
    from molora.layer import MoloraLinear


class ConvHost(Host):
    """nn.Conv1d and nn.Conv2d.

    ``lora_dropout`` drops values of x, before patches are taken, where experts are
    products of two factors, as PEFT does; other families drop values of patches.

    Limitations: no groups, zero padding only. A router, and experts that are no
    product of two factors, need the patches, [N, L, C k k], which are k k times as
    large as x at stride 1; they are held for backward.
    """

    LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d)
    READS = "patches"
    SHOWN = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    PEFT = frozenset({"LOHA", "LOKR"})

    def sizes(self, layer: Any) -> tuple[int, int]:
        """See base class; I is C k k."""
        return layer.in_channels * math.prod(layer.kernel_size), layer.out_channels

    def kernel(self, layer: Any) -> tuple[int, ...]:
        """See base class."""
        return tuple(layer.kernel_size)

    def check(self, layer: Any, family: type[AbstractExperts]) -> None:
        """See base class."""
        name = type(layer).__name__
        own = type(layer).forward is not _kind(layer).forward
        own = own or not isinstance(layer.weight, nn.Parameter)
        if own or type(layer)._conv_forward is not _kind(layer)._conv_forward:
            raise WrapError(
                f"{name} computes in a way of its own, so no update of its weight is "
                "defined; exclude the layer"
            )
        if layer.groups > 1:
            raise WrapError(
                f"the {name} has groups={layer.groups}, whose outputs read different "
                "channels, and an expert is one map of all of them; exclude the layer"
            )
        if layer.padding_mode != "zeros":
            raise WrapError(
                f"the {name} has padding_mode={layer.padding_mode!r}; patches are "
                "padded with zeros only, so exclude the layer"
            )

    def seen(self, layer: Any, x: Tensor) -> Tensor:
        """Patches, [N, L, I], or [L, I] of an input without a batch axis."""
        x_N = x if _batched(layer, x) else x.unsqueeze(0)
        window = layer.kernel_size, layer.dilation, layer.stride
        x_N = F.pad(x_N, _pads(layer))
        if isinstance(layer, nn.Conv1d):
            x_N = x_N.unsqueeze(2)
            window = tuple((1, *part) for part in window)  # type: ignore[assignment]
        size, dilation, stride = window
        p_NIL = F.unfold(x_N, size, dilation=dilation, stride=stride)
        p_NLI = p_NIL.transpose(1, 2)
        return p_NLI if _batched(layer, x) else p_NLI[0]

    def line_up(self, seen: Tensor, context: "ForwardContext", path: str) -> None:
        """See base class; strides and patches make other positions."""
        mask_BS = context.mask_BS
        if mask_BS is not None and tuple(mask_BS.shape) != tuple(seen.shape[:-1]):
            raise RoutingError(
                f"site {path!r}: a convolution with outputs of the shape "
                f"{tuple(seen.shape[:-1])} does not line up with the "
                f"{context.mask_source} of shape {tuple(mask_BS.shape)}, so padding "
                "cannot be told from real tokens there. Add the site to "
                "exclude_modules, or drop the balance objective"
            )

    def run(
        self,
        site: "MoloraLinear",
        x: Tensor,
        seen: Tensor | None,
        gates: Tensor | None,
        top_k: int | None,
    ) -> Tensor:
        """See base class."""
        layer: Any = site.base
        if isinstance(site.experts, BilinearExperts):

            def shrink(A: Tensor, dropout: float) -> Tensor:
                return self._shrunk(layer, F.dropout(x, dropout), A)

            base_TO = self.rows(layer, site.base(x))
            return add_parts(site.experts, base_TO, gates, shrink)
        x_TI = (self.seen(layer, x) if seen is None else seen).flatten(0, -2)
        edited_TI = site.experts.edit_input(x_TI, gates, top_k)
        if edited_TI is x_TI:
            base_TO = self.rows(layer, site.base(x))
        else:
            base_TO = F.linear(edited_TI, layer.weight.flatten(1), layer.bias)
        y: Tensor = site.experts(x_TI, gates, base_TO, top_k)
        return y

    def _shrunk(self, layer: Any, x: Tensor, A: Tensor) -> Tensor:
        """A p of every patch, [T, E r], by a convolution."""
        window = (layer.in_channels, *layer.kernel_size)
        a_R = A.flatten(0, 1).unflatten(1, window).to(x.dtype)
        convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        z = convolve(x, a_R, None, layer.stride, layer.padding, layer.dilation)
        return self.rows(layer, z)

    def rows(self, layer: Any, y: Tensor) -> Tensor:
        """See base class."""
        rows = y.flatten(2).transpose(1, 2) if _batched(layer, y) else y.flatten(1).t()
        return rows.reshape(-1, rows.shape[-1])

    def shaped(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """See base class."""
        places = _positions(layer, x)
        if not _batched(layer, x):
            return y.t().reshape(-1, *places).contiguous()
        y_NLO = y.view(len(x), math.prod(places), y.shape[-1])
        # the layer's own output can be viewed in any shape
        return y_NLO.transpose(1, 2).reshape(len(x), -1, *places).contiguous()

    def weight_OI(self, weight: Tensor) -> Tensor:
        """See base class."""
        return weight.flatten(1)

    def stored(self, matrix_OI: Tensor, weight: Tensor) -> Tensor:
        """See base class."""
        return matrix_OI.view(weight.shape)

    def to_lora(self, layer: Any, a_rI: Tensor, b_Or: Tensor) -> dict[str, Tensor]:
        """See base class.

        Raises:
            WrapError: The layer is dilated, which PEFT's LoRA leaves out.
        """
        if any(step != 1 for step in layer.dilation):
            raise WrapError(
                f"PEFT's LoRA of a {type(layer).__name__} does not read its dilation "
                f"{layer.dilation}, so it cannot run there; save_pretrained, or "
                "molora.merge folds one expert into the base"
            )
        window = (layer.in_channels, *layer.kernel_size)
        ones = [1] * len(layer.kernel_size)
        shapes = a_rI.unflatten(1, window), b_Or.reshape(*b_Or.shape, *ones)
        return dict(zip(self.LORA, shapes, strict=True))


def _kind(layer: Any) -> type[nn.Conv1d] | type[nn.Conv2d]:
    return nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d


def _batched(layer: Any, x: Tensor) -> bool:
    return x.dim() == len(layer.kernel_size) + 2


def _pads(layer: Any) -> list[int]:
    """Zeros at both ends of every axis, the last axis first, as ``F.pad`` has it."""
    found: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            found += [total // 2, total - total // 2]
        else:
            found += [0 if layer.padding == "valid" else layer.padding[axis]] * 2
    return found


def _positions(layer: Any, x: Tensor) -> list[int]:
    """Sizes of the output behind its channels."""
    axes = len(layer.kernel_size)
    pads = _pads(layer)[::-1]
    return [
        (size + sum(pads[2 * i : 2 * i + 2]) - step * (window - 1) - 1) // stride + 1
        for i, (size, window, step, stride) in enumerate(
            zip(
                x.shape[-axes:],
                layer.kernel_size,
                layer.dilation,
                layer.stride,
                strict=True,
            )
        )
    ]
