"""A frozen layer into whose weight the update of its only expert can be folded.

Shape legend
    I in features   O out features
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.errors import WrapError
from molora.experts import AbstractExperts, BilinearExperts


class MergeableLinear(nn.Module):
    """The frozen layer of a bank, with its original bytes while it is merged.

    Args:
        base: An nn.Linear or a Conv1D.
    """

    path: str
    experts: AbstractExperts

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.backup: Tensor | None = None
        self.backup_bias: Tensor | None = None
        self.gave_bias = False

    @property
    def weight(self) -> Any:
        """Weight of the base layer, for code that looks at its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """Bias of the base layer."""
        return self.base.bias

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the base weight."""
        return self.backup is not None

    def delta_weight(self) -> Tensor:
        """Dense update of the only expert, [O, I] float32.

        Raises:
            WrapError: The bank has several experts, so no single update exists.
        """
        if self.experts.num_experts > 1:
            advice = "run molora.collapse first"
            if not isinstance(self.experts, BilinearExperts):
                advice = "save the mixture itself, or train one expert, which merges"
            raise WrapError(
                f"site {self.path!r} routes among {self.experts.num_experts} experts "
                f"per token, which no single weight equals; {advice}"
            )
        if not self.experts.linear:
            raise WrapError(
                f"site {self.path!r}: experts of kind "
                f"{type(self.experts).__name__} are no change of a weight, so nothing "
                "can be merged; keep the adapter beside the model"
            )
        weight = self._weight_OI()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.experts.delta_weight(0, wide)

    def _weight_OI(self) -> Tensor:
        """Weight of the frozen layer before any merge."""
        weight = self.base_weight()
        return weight.t() if isinstance(self.base, Conv1D) else weight

    def _bias_O(self) -> Tensor | None:
        """Bias of the frozen layer before any merge."""
        bias = self.base.bias if self.backup_bias is None else self.backup_bias
        if bias is None or self.gave_bias:
            return None
        assert isinstance(bias, Tensor)
        return bias.detach()

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into base weight and bias; keep the original bytes.

        A layer without a bias gets one where the experts shift its output.
        """
        assert self.backup is None
        delta_OI = self.delta_weight()
        weight = self.base.weight
        assert isinstance(weight, nn.Parameter)
        delta = delta_OI.t() if isinstance(self.base, Conv1D) else delta_OI
        merged = self._sum(weight, delta)
        self._merge_bias(len(delta_OI))
        self.backup = weight.detach().clone()
        weight.copy_(merged)

    def _merge_bias(self, out_features: int) -> None:
        """Fold what the experts add to the bias; a layer without one may get one."""
        old_O = self.base.bias
        bias_O = self.weight.new_zeros(out_features) if old_O is None else old_O
        assert isinstance(bias_O, Tensor)
        delta_O = self.experts.delta_bias(0, bias_O)
        if delta_O is None or not delta_O.any():
            return
        merged_O = self._sum(bias_O, delta_O)
        if old_O is None:
            self.base.bias = nn.Parameter(merged_O, requires_grad=False)
            self.gave_bias = True
        else:
            self.backup_bias = bias_O.detach().clone()
            bias_O.copy_(merged_O)

    def _sum(self, values: Tensor, delta: Tensor) -> Tensor:
        """Add in the wider dtype, return in that of the values."""
        wide = torch.promote_types(values.dtype, delta.dtype)
        merged = (values.to(wide) + delta).to(values.dtype)
        if not torch.isfinite(merged).all():
            raise WrapError(f"site {self.path!r}: the merged weight is not finite")
        return merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original bytes back."""
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
        """Weight of the frozen layer as it was before any merge."""
        weight = self.base.weight if self.backup is None else self.backup
        assert isinstance(weight, Tensor)
        return weight.detach()
