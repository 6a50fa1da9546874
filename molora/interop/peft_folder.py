"""Reading one PEFT LoRA folder, without PEFT: its factors and scales, or why not.

    y = base(x) + s B A x    s = lora_alpha / r, or lora_alpha / sqrt(r) under rsLoRA

Shape legend
    I in features   O out features   r rank of one layer
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from molora.errors import CheckpointError
from molora.manifest import CONFIG, TENSORS, read_json

_KEY = re.compile(
    r"base_model\.model\.(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))"
)
_TABLE = re.compile(r"base_model\.model\.(.+)\.base_layer\.weight")
"""Frozen weights that PEFT writes beside the LoRA of an embedding."""

NO_EFFECT = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Fields that are read here, or that change nothing once an adapter is trained."""

WHY = {
    "modules_to_save": "it trains whole modules beside the adapter, which experts "
    "cannot share. Retrain without modules_to_save",
    "bias": "it trains biases of the base, which experts cannot share. Retrain with "
    "bias='none'",
    "lora_bias": "experts have no bias of their own. Retrain without lora_bias",
    "alora_invocation_tokens": "it acts from these tokens of a prompt on, and experts "
    "on all of them. Retrain without it",
    "layer_replication": "its base has layers twice. Retrain without it",
    "target_parameters": "it adapts parameters of modules that are no linear layer. "
    "Retrain with target_modules alone",
    "trainable_token_indices": "it trains rows of the embedding, which experts cannot "
    "share. Retrain without it",
}
"""By field: why no expert can be made of what it adds."""

PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weight as it is."""


@dataclass(frozen=True)
class PeftLora:
    """One adapter.

    Attributes:
        folder: Where it was read.
        base: Name of its base model, if it says so.
        factors: A [r, I] and B [O, r] by module path, as stored.
        scales: s by module path.
        forms: Name and number of axes of A in the file, by module path.
        tables: Frozen weights in the file, by module path.
    """

    folder: Path
    base: str | None
    factors: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    forms: dict[str, tuple[str, int]] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)


def read_lora(folder: str | Path) -> PeftLora:
    """Read an adapter that is an ordinary LoRA.

    Own ranks and alphas by layer (rank_pattern, alpha_pattern) and rsLoRA are read.

    Raises:
        CheckpointError: It is no folder of a PEFT LoRA, not whole, of a variant whose
            update is not s B A, stored as a pickle or in float64, or with ranks,
            alphas or patterns that mean nothing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give that of a PEFT adapter")
    config = read_json(folder / CONFIG)
    _check_variant(folder, config)
    factors, forms, tables = _factors(folder)
    scales = {}
    for path, (a_rI, _) in factors.items():
        rank = value_at(config, "rank_pattern", "r", path, folder)
        alpha = value_at(config, "alpha_pattern", "lora_alpha", path, folder)
        if rank != a_rI.shape[0]:
            raise CheckpointError(
                f"{folder}: {path} has rank {a_rI.shape[0]}, but {CONFIG} says {rank}"
            )
        scales[path] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    base = config.get("base_model_name_or_path")
    return PeftLora(folder, base, factors, scales, forms, tables)


def check_start(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a LoRA whose initialisation has edited the base."""
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_INIT:
        raise CheckpointError(
            f"{folder}: init_lora_weights={start!r} has changed the base weight, which "
            "other experts share. Save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )


def check_alone(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is more than an update of each layer."""
    for name, why in WHY.items():
        value = config.get(name)
        if value and (name, value) != ("bias", "none"):
            raise CheckpointError(f"{folder}: {name}={value!r}: {why}")


def _check_variant(folder: Path, config: Mapping[str, Any]) -> None:
    check_start(folder, config)
    check_alone(folder, config)
    for name, value in config.items():
        if name not in NO_EFFECT and name not in WHY and value:
            raise CheckpointError(
                f"{folder}: {name}={value!r}: this is no plain LoRA, and molora does "
                "not know it"
            )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of an adapter, by key.

    Raises:
        CheckpointError: No file that can be read, or values that no expert can hold.
    """
    if not (folder / TENSORS).is_file():
        raise CheckpointError(
            f"{folder}: has no {TENSORS}; a pickle (.bin) is not read, since it can "
            "run code: save the adapter again with PEFT's safe_serialization"
        )
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / TENSORS}: cannot be read: {error}") from error
    for key, tensor in tensors.items():
        places = key.endswith(".shira_indices") and tensor.dtype == torch.int32
        known = tensor.is_floating_point() and tensor.dtype != torch.float64
        if not (known or places):
            raise CheckpointError(
                f"{folder}: {key} is {tensor.dtype}; experts are float32, save it so"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {key} holds NaN or infinity")
    return tensors


def _factors(
    folder: Path,
) -> tuple[
    dict[str, tuple[Tensor, Tensor]], dict[str, tuple[str, int]], dict[str, Tensor]
]:
    """A and B as matrices by module path, in pairs that fit; forms and tables."""
    halves: dict[str, dict[str, Tensor]] = {}
    forms: dict[str, tuple[str, int]] = {}
    tables: dict[str, Tensor] = {}
    for key, tensor in read_tensors(folder).items():
        match, table = _KEY.fullmatch(key), _TABLE.fullmatch(key)
        if table is not None:
            tables[table[1]] = tensor
            continue
        if match is None or tensor.dim() < 2:
            raise CheckpointError(
                f"{folder}: holds {key!r}, which is no factor of a LoRA"
            )
        path, half = match[1], match[2] or match[3]
        # a convolution's factors are kernels
        halves.setdefault(path, {})[half] = tensor.flatten(1)
        if half == "A":
            forms[path] = key.removeprefix(f"base_model.model.{path}."), tensor.dim()
    if not halves:
        raise CheckpointError(f"{folder}: holds no LoRA factors")
    for path, pair in halves.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise CheckpointError(
                f"{folder}: {path} lacks a factor that fits the other"
            )
    factors = {path: (pair["A"], pair["B"]) for path, pair in halves.items()}
    return factors, forms, tables


def value_at(
    config: Mapping[str, Any], patterns: str, default: str, path: str, folder: Path
) -> float:
    """Value of the first pattern that matches the end of the path, as PEFT does it."""
    value: Any
    name, value = default, config.get(default)
    table = config.get(patterns) or {}
    if not isinstance(table, Mapping):
        raise CheckpointError(
            f"{folder / CONFIG}: {patterns} is {table!r}, which is no table by layer"
        )
    for key, own in table.items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", path)
        except re.error as error:
            raise CheckpointError(
                f"{folder / CONFIG}: {patterns} has the key {key!r}, which is no "
                f"regular expression: {error}"
            ) from None
        if matches:
            name, value = f"{patterns}[{key!r}]", own
            break
    if name == default and default not in config:
        raise CheckpointError(f"{folder / CONFIG}: lacks {default}")
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(
            f"{folder / CONFIG}: {name} is {value!r}, and has to be a number above 0"
        )
    number: float = value
    return number
