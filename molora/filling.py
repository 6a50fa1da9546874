"""Copying a saved adapter's tensors into a wrapped model: strict both ways."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from molora.errors import CheckpointError
from molora.fingerprint import shortened
from molora.saved import SavedAdapter
from molora.wrapped import adapter_tensors, sites


def fill(model: nn.Module, saved: SavedAdapter) -> None:
    """Copy tensors into parameters; all are checked before any is changed.

    Raises:
        CheckpointError: One is missing, unexpected, or does not fit its place.
    """
    parameters = adapter_tensors(model)
    tensors = saved.tensors
    missing = sorted(parameters.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{saved.source}: lacks {shortened(missing)}")
    unexpected = sorted(tensors.keys() - parameters.keys())
    if unexpected:
        raise CheckpointError(
            f"{saved.source}: holds what this adapter has no place for: "
            f"{shortened(unexpected)}"
        )
    for name, parameter in parameters.items():
        wrong = _unfit(tensors[name], parameter)
        if wrong:
            raise CheckpointError(f"{saved.source}: {name} {wrong}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def check_routers(model: nn.Module, saved: SavedAdapter) -> None:
    """Refuse routers that do not have the parameters of the saved ones.

    Raises:
        CheckpointError: Names, shapes or layers differ; tells both lists.
    """
    now = _of_routers(model, adapter_tensors(model))
    then = _of_routers(model, saved.tensors)
    if now != then:
        raise CheckpointError(
            f"{saved.source.parent}: the saved routers have {_told(then)}; those that "
            f"were asked for have {_told(now)}. A router can be loaded as another kind "
            "where all parameters have the same names and shapes"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity."""
    # numpy takes one thread: hundreds of short parallel loops crawl on a busy machine
    return bool(np.isfinite(tensor.float().numpy()).all())


def _unfit(tensor: Tensor, parameter: Tensor) -> str:
    """Why a tensor cannot become a parameter, or nothing."""
    if tensor.shape != parameter.shape:
        shapes = tuple(tensor.shape), tuple(parameter.shape)
        return f"has the shape {shapes[0]} instead of {shapes[1]}"
    wider = torch.promote_types(tensor.dtype, parameter.dtype) != parameter.dtype
    if wider or tensor.is_floating_point() != parameter.is_floating_point():
        return f"is {tensor.dtype}, which {parameter.dtype} cannot hold"
    if not is_finite(tensor):
        return "holds NaN or infinity"
    return ""


def _of_routers(
    model: nn.Module, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of what routers hold, by layer and name."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for path in sites(model):
        start = f"{path}.router."
        own = {n: tuple(t.shape) for n, t in tensors.items() if n.startswith(start)}
        if own:
            found[path] = {n.removeprefix(start): shape for n, shape in own.items()}
    return found


def _told(routers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    """Names and shapes, and at how many layers each."""
    alike = Counter(f"{n} {s}" for own in routers.values() for n, s in own.items())
    if not alike:
        return "no parameters"
    told = ", ".join(f"{what} at {count} layers" for what, count in alike.items())
    return f"{told} ({shortened(sorted(routers))})"
