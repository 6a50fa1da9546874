"""Top-k routing in one launch, where a GPU's kernels can; see ``triton_topk``.

Shape legend
    T tokens   E experts   I in features
"""

import functools

import torch
from torch import Tensor

from molora.kernels.backends import is_installed

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_route(x_TI: Tensor, weight_EI: Tensor) -> bool:
    """Whether ``topk_route`` takes these; else the same is a few PyTorch operators."""
    if not x_TI.is_cuda or torch.compiler.is_compiling():
        return False
    return (
        x_TI.dtype in _DTYPES
        and weight_EI.dtype in (torch.float32, x_TI.dtype)
        and weight_EI.device == x_TI.device
        and _runs(x_TI.device)
        and _fits(len(x_TI), len(weight_EI))
    )


def topk_route(
    x_TI: Tensor,
    weight_EI: Tensor,
    top_k: int,
    temperature: float,
    renormalize: bool,
    message: str,
) -> tuple[Tensor, Tensor]:
    """Logits and top-k gates of a linear gate, differentiable by x and W.

    Args:
        x_TI: Tokens, any strides.
        weight_EI: Weight of the gate.
        top_k: Experts per token, at most E.
        temperature: Divides the logits.
        renormalize: Divide the gates by the sum of those that are kept.
        message: What the device says when a logit is NaN or infinite.

    Returns:
        [T, E] logits after the temperature and [T, E] gates, in float32. The gradient
        of a gate that is zero is not read.
    """
    from molora.kernels import triton_topk

    finite = _flag(x_TI.device)
    rest = (top_k, temperature, renormalize)
    if torch.is_grad_enabled():
        logits_TE, gates_TE = triton_topk.TopK.apply(  # type: ignore[no-untyped-call]
            x_TI, weight_EI.contiguous(), finite, *rest
        )
    else:
        logits_TE, gates_TE = triton_topk.gates_of(
            x_TI, weight_EI.contiguous(), finite, *rest
        )
    torch._assert_async(finite, message)
    return logits_TE, gates_TE


@functools.cache
def _flag(device: torch.device) -> Tensor:
    """One byte that is 1 until a logit is not finite, after which the device stops."""
    return torch.ones((), dtype=torch.uint8, device=device)


@functools.cache
def _runs(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    if not is_installed("triton"):
        return False
    is_amd = torch.version.hip is not None
    return is_amd or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _fits(tokens: int, experts: int) -> bool:
    from molora.kernels.triton_dense import MAX_ROWS
    from molora.kernels.triton_topk import MAX_EXPERTS

    return tokens <= MAX_ROWS and experts <= MAX_EXPERTS
