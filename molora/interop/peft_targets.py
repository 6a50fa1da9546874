"""Which layers a PEFT config adapts, as PEFT 0.21 reads it.

Loading a folder, PEFT passes over tensors of other layers, and starts layers anew that
have none. Neither is what was trained, so both are refused here.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from molora.errors import CheckpointError
from molora.hosts import find_host
from molora.manifest import CONFIG


def check_layers(
    folder: Path, config: Mapping[str, Any], model: nn.Module, paths: Iterable[str]
) -> None:
    """Refuse a folder whose tensors are not of the layers that its config names.

    Args:
        folder: For the message.
        config: PEFT's config; without target_modules, nothing is checked.
        model: The base model.
        paths: Layers of which the folder has tensors.

    Raises:
        CheckpointError: Layers too many or too few, or a pattern that is no regular
            expression.
    """
    if config.get("target_modules") in (None, "all-linear"):
        return
    there = set(paths)
    able = {n for n, module in model.named_modules() if find_host(module) is not None}
    try:
        named = {path for path in able | there if _adapts(config, path)}
    except re.error as error:
        raise CheckpointError(
            f"{folder / CONFIG}: the layers are named by what is no regular "
            f"expression: {error}"
        ) from None
    for found, what in (
        (there - named, "has tensors of {}, which its config does not adapt"),
        (named - there, "has no tensors of {}, which its config adapts"),
    ):
        if found:
            raise CheckpointError(
                f"{folder}: {what.format(min(found))} (target_modules, "
                "exclude_modules, layers_to_transform, layers_pattern); save it again "
                "with PEFT"
            )


def _adapts(config: Mapping[str, Any], path: str) -> bool:
    """Whether a layer has an adapter."""
    if _names(config.get("exclude_modules"), path):
        return False
    targets = config["target_modules"]
    if not _names(targets, path):
        return False
    chosen = config.get("layers_to_transform")
    # a whole path, or an expression for whole paths, is not narrowed down
    if isinstance(targets, str) or path in targets or chosen in (None, []):
        return True
    given = config.get("layers_pattern") or []
    given = [given] if isinstance(given, str) else given
    named = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in given]
    for pattern in named or [r".*?\.[^.]*\.(\d+)\."]:
        match = re.match(pattern, path)
        if match:
            return int(match[1]) in ([chosen] if isinstance(chosen, int) else chosen)
    return False


def _names(names: list[str] | str | None, path: str) -> bool:
    """Whether suffixes, or an expression for the whole path, mean a layer."""
    if isinstance(names, str) and names:
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names or [])
