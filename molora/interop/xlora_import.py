"""PEFT's X-LoRA folders: which adapters they mix, and their classifier as our router.

PEFT's classifier is Linear, ReLU, Dropout, Linear ... in one list; layers are numbered
by their place in it. PEFT 0.21 leaves out of the main file those whose number is also
the name of an adapter, and writes them, without their number, into the folder of that
adapter; they are found there.

Shape legend: E adapters; L target layers; D width of the hidden state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from molora.base_pass import hidden_width
from molora.errors import CheckpointError, ConfigError
from molora.manifest import CONFIG, TENSORS, read_json
from molora.routers.xlora import XLoRARouter

Router = Mapping[str, Any] | str | Path | None

_LAYERS = "base_model.internal_xlora_classifier.layers."

_NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
_READ = {
    "adapters",
    "enable_softmax",
    "enable_softmax_topk",
    "global_scaling_weight",
    "hidden_size",
    "layerwise_scalings",
    "scaling_pass_value",
    "softmax_temperature",
    "top_k_lora",
    "use_trainable_adapters",
    "xlora_depth",
    "xlora_dropout_p",
    "xlora_size",
}


def is_xlora(folder: str | Path) -> bool:
    """Whether a folder says that PEFT wrote it for X-LoRA."""
    file = Path(folder) / CONFIG
    return file.is_file() and read_json(file).get("peft_type") == "XLORA"


def split_xlora(
    folders: Sequence[str | Path], router: Router
) -> tuple[list[Path], Router]:
    """Put the adapters that an X-LoRA folder names in its place.

    Args:
        folders: As given to ``import_peft``.
        router: The same.

    Returns:
        Folders of LoRAs alone, and the router; both as given without X-LoRA.

    Raises:
        CheckpointError: An X-LoRA folder beside others, or one that names no adapter
            that is there.
        ConfigError: Another router for an X-LoRA folder.
    """
    found = [folder for folder in folders if is_xlora(folder)]
    if not found:
        return [Path(folder) for folder in folders], router
    advice = f"import_peft(base, [lora, ...], router={str(found[0])!r})"
    if len(folders) > 1:
        raise CheckpointError(
            f"{found[0]}: an X-LoRA folder is a whole mixture; give it alone, or name "
            f"the LoRAs in its order: {advice}"
        )
    if router is not None:
        raise ConfigError(
            f"import_peft: {found[0]} is an X-LoRA, whose router is its own classifier;"
            " drop router, or give the folders of its LoRAs with a new one"
        )
    config = read_json(Path(found[0]) / CONFIG)
    if config.get("use_trainable_adapters"):
        raise CheckpointError(
            f"{found[0]}: use_trainable_adapters is set: its LoRAs were trained on, "
            "and those that it names are from before. Save each of them, and give "
            f"these: {advice}"
        )
    named = [Path(folder) for folder in _adapters(Path(found[0]), config)]
    missing = [str(folder) for folder in named if not folder.is_dir()]
    if missing:
        raise CheckpointError(
            f"{found[0]}: names the LoRA {missing[0]}, which is no folder here; say "
            f"where its {len(named)} LoRAs are: {advice}"
        )
    return named, found[0]


def xlora_base(router: Router) -> dict[str, str | None]:
    """Base model that an X-LoRA folder names; nothing for other routers."""
    if not isinstance(router, str | Path) or not is_xlora(router):
        return {}
    return {
        str(router): read_json(Path(router) / CONFIG).get("base_model_name_or_path")
    }


def read_xlora(
    folder: Path, model: nn.Module, paths: Sequence[str], num_experts: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings of a router of kind xlora that computes what PEFT's classifier does.

    Args:
        folder: What PEFT's ``save_pretrained`` wrote.
        model: The base model.
        paths: Target layers.
        num_experts: E.

    Returns:
        The ``router`` block, and weights by module path of the layer that owns it.

    Raises:
        CheckpointError: An option that the router has not, a classifier that is not
            whole, or one of another model, number of adapters or of target layers.
    """
    config = read_json(folder / CONFIG)
    unknown = [
        n for n, v in config.items() if v and n not in _READ and n not in _NO_EFFECT
    ]
    if unknown:
        raise CheckpointError(
            f"{folder}: {unknown[0]}={config[unknown[0]]!r}: molora does not know this "
            "option of X-LoRA"
        )
    named = len(_adapters(folder, config))
    if named != num_experts:
        raise CheckpointError(
            f"{folder}: its classifier chooses among {named} LoRAs, and "
            f"{num_experts} were given"
        )
    raw = _settings(folder, config, num_experts)
    try:
        settings = XLoRARouter.Config.from_dict(raw)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: as our router: {error}") from None
    width = hidden_width(model)
    if config.get("hidden_size") != width:
        raise CheckpointError(
            f"{folder}: hidden_size is {config.get('hidden_size')!r}, but the last "
            f"hidden state of the model has {width} features; load the base that it "
            "was trained on"
        )
    out = num_experts * (len(paths) if settings.layerwise else 1)
    wide = [width, *[settings.size] * (settings.depth - 1), out]
    step = 3 if config.get("xlora_dropout_p", 0.2) > 0 else 2
    tensors = _read(folder / TENSORS)
    leader = next((n for n, _ in model.named_modules() if n in paths), paths[0])
    weights = {}
    for i in range(settings.depth):
        shapes = {"weight": (wide[i + 1], wide[i]), "bias": (wide[i + 1],)}
        for name, shape in shapes.items():
            values = _one(folder, tensors, step * i, name)
            if values.shape != shape:
                raise CheckpointError(
                    f"{folder}: {name} of layer {step * i} of the classifier has the "
                    f"shape {tuple(values.shape)}, not {shape}: {num_experts} LoRAs, "
                    f"{len(paths)} target layers, layerwise_scalings="
                    f"{settings.layerwise}"
                )
            weights[f"{leader}.layers.{i}.{name}"] = values
    return raw, weights


def _settings(
    folder: Path, config: Mapping[str, Any], num_experts: int
) -> dict[str, Any]:
    """The router block; temperature and top-k as PEFT applies them."""
    if config.get("scaling_pass_value", 0) != 0:
        raise CheckpointError(
            f"{folder}: scaling_pass_value={config['scaling_pass_value']!r}: the first "
            "pass has its adapters off here; only 0 can be read"
        )
    once, again = config.get("enable_softmax", True), config.get("enable_softmax_topk")
    top_k = config.get("top_k_lora")
    if not once and not again:
        raise CheckpointError(
            f"{folder}: enable_softmax=False: gates would be plain logits, of either "
            "sign, which no router has here; train it with enable_softmax or "
            "enable_softmax_topk"
        )
    depth = config.get("xlora_depth", 1)
    settings = {
        "kind": "xlora",
        "depth": depth,
        "layerwise": config.get("layerwise_scalings", False),
        "weight": config.get("global_scaling_weight", 1.0),
    }
    if depth != 1:
        settings["size"] = config.get("xlora_size", 2048)
        settings["dropout"] = config.get("xlora_dropout_p", 0.2)
    if once:
        settings["temperature"] = config.get("softmax_temperature", 1.0)
    if once and again:
        # without top_k the second softmax is over all
        top_k = num_experts if top_k is None else top_k
        return {**settings, "top_k": top_k, "top_k_gates": "second_softmax"}
    if top_k is None:
        return settings
    return {**settings, "top_k": top_k, "top_k_gates": "masked" if once else "softmax"}


def _adapters(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Paths of the adapters in the order of the classifier's outputs."""
    adapters = config.get("adapters")
    if not isinstance(adapters, Mapping) or not adapters:
        raise CheckpointError(f"{folder / CONFIG}: adapters names no LoRA")
    names = [str(number) for number in range(len(adapters))]
    if set(adapters) != set(names):
        raise CheckpointError(
            f"{folder / CONFIG}: adapters are named {sorted(adapters)}; PEFT runs "
            f"X-LoRA with the names {names} only"
        )
    return [str(adapters[name]) for name in names]


def _one(folder: Path, tensors: dict[str, Tensor], number: int, name: str) -> Tensor:
    """A parameter of the classifier, from the main file or an adapter's."""
    values = tensors.get(f"{_LAYERS}{number}.{name}")
    beside = folder / str(number) / TENSORS
    if values is None and beside.is_file():
        values = _read(beside).get(f"{_LAYERS}{name}")
    if values is None:
        raise CheckpointError(
            f"{folder}: lacks {name} of layer {number} of the classifier, in {TENSORS} "
            f"and in {number}/{TENSORS}, where PEFT 0.21 puts it. Write it again: "
            "safetensors.torch.save_file({n: v for n, v in "
            "peft_model.state_dict().items() if 'xlora_classifier' in n}, "
            f"{str(folder / TENSORS)!r})"
        )
    if values.dtype == torch.float64 or not values.is_floating_point():
        raise CheckpointError(
            f"{folder}: {name} of layer {number} of the classifier is {values.dtype}; "
            "routers are float32, save it so"
        )
    if not torch.isfinite(values).all():
        raise CheckpointError(
            f"{folder}: {name} of layer {number} of the classifier holds NaN or "
            "infinity"
        )
    return values


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent}: has no {file.name}; a pickle (.bin) is not read, since it "
            "can run code: save it again with PEFT's safe_serialization"
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
