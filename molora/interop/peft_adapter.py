"""Reading one PEFT adapter of a method that a family here is.

A family reads one layer (``from_peft``) as the settings and the values of a bank of
one expert.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from molora.errors import CheckpointError, WrapError
from molora.experts import EXPERTS
from molora.hosts import find_host, host_of, sizes
from molora.interop.peft_folder import check_alone, check_start, read_tensors, value_at
from molora.interop.peft_forms import PATTERNS, listed
from molora.interop.peft_targets import check_layers
from molora.manifest import CONFIG, read_json


@dataclass(frozen=True)
class PeftAdapter:
    """One adapter.

    Attributes:
        folder: Where it was read.
        base: Name of its base model, if it says so.
        blocks: Settings of a bank of one expert, by module path.
        states: State dict of that bank.
        tensors: What the file has for a layer, and outside the layers.
    """

    folder: Path
    base: str | None
    blocks: dict[str, dict[str, Any]]
    states: dict[str, dict[str, Tensor]]
    tensors: dict[str, dict[str, Tensor]]


def family_of(folder: str | Path) -> str:
    """Registered name of the family that a PEFT adapter is an expert of.

    Raises:
        CheckpointError: It is no adapter of PEFT, or of a method that no family is.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give that of a PEFT adapter")
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind == "MOLORA":
        raise CheckpointError(
            f"{folder}: peft_type is 'MOLORA', not one of PEFT's; load it with "
            "molora.load"
        )
    if kind == "LORA":
        return "dora" if config.get("use_dora") else "lora"
    families = {n: EXPERTS[n].peft_type for n in EXPERTS.names()}
    found = [name for name, method in families.items() if method and method == kind]
    if not found:
        known = sorted({method for method in families.values() if method} | {"LORA"})
        raise CheckpointError(
            f"{folder}: peft_type is {kind!r}, of which no experts can be made; those "
            f"that can: {', '.join(known)}"
        )
    return str(kind).lower() if str(kind).lower() in found else found[0]


def read_adapter(folder: str | Path, family: str, model: nn.Module) -> PeftAdapter:
    """Read an adapter that is not a plain LoRA.

    Args:
        folder: What PEFT wrote.
        family: What ``family_of`` said.
        model: The base model, which tells layers from their tensors.

    Raises:
        CheckpointError: A variant that the family is not, layers that the model lacks,
            or tensors that do not fit.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    check_start(folder, config)
    check_alone(folder, config)
    if config.get("use_cayley_neumann"):
        _check_series(folder, config.get("peft_version"))
    cls, modules = EXPERTS[family], dict(model.named_modules())
    layers, outside = _by_path(folder, modules)
    check_layers(folder, config, model, layers)
    blocks, states = {}, {}
    for path, tensors in layers.items():
        taken = host_of(modules[path]).PEFT
        if taken is not None and cls.peft_type not in taken:
            raise CheckpointError(
                f"{folder}: {path} is a {type(modules[path]).__name__}, on which "
                f"{family} experts are not what PEFT's are; leave it out there"
            )
        settings = _settings(config, str(cls.peft_type), path, folder)
        window: dict[str, Any] = {}
        if cls.reads_kernel:
            window = {"kernel": host_of(modules[path]).kernel(modules[path])}
        try:
            blocks[path], states[path] = cls.from_peft(
                settings, {**outside, **tensors}, *sizes(modules[path]), **window
            )
        except WrapError as error:
            raise CheckpointError(f"{folder}: {path}: {error}") from None
        except KeyError as error:
            raise CheckpointError(f"{folder}: {path} lacks {error}") from None
    return PeftAdapter(
        folder,
        config.get("base_model_name_or_path"),
        blocks,
        states,
        {path: tensors | outside for path, tensors in layers.items()},
    )


def _check_series(folder: Path, version: str | None) -> None:
    """Refuse OFT's Cayley-Neumann series as it was before PEFT 0.18."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (0, 18):
        told = f"was written by PEFT {version}" if version else "names no peft_version"
        raise CheckpointError(
            f"{folder}: {told}, and use_cayley_neumann is another function before PEFT "
            "0.18 than since; train it again, or name the version that trained it as "
            f"peft_version in {CONFIG}"
        )


def _by_path(
    folder: Path, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by layer and what follows its path, and those outside the layers."""
    layers: dict[str, dict[str, Tensor]] = {}
    outside: dict[str, Tensor] = {}
    for key, values in read_tensors(folder).items():
        parts = key.split(".")
        if parts[0] != "base_model":
            raise CheckpointError(f"{folder}: holds {key!r}, which is no key of PEFT")
        if parts[1] != "model":
            outside[".".join(parts[1:])] = values
            continue
        for end in range(len(parts) - 1, 2, -1):
            path = ".".join(parts[2:end])
            if find_host(modules.get(path)) is not None:
                layers.setdefault(path, {})[".".join(parts[end:])] = values
                break
        else:
            raise CheckpointError(
                f"{folder}: holds {key!r}, but the model has no layer there that "
                "can hold experts"
            )
    if not layers:
        raise CheckpointError(f"{folder}: holds no tensors of a layer")
    return layers, outside


def _settings(
    config: Mapping[str, Any], kind: str, path: str, folder: Path
) -> dict[str, Any]:
    """PEFT's config as one layer sees it."""
    settings = dict(config)
    for name, pattern in PATTERNS.get(kind, {}).items():
        settings[name] = value_at(config, pattern, name, path, folder)
    if "feedforward_modules" in config:
        settings["feedforward_modules"] = listed(config["feedforward_modules"], path)
    return settings
