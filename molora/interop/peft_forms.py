"""One expert per layer in PEFT's own format of its method.

A family gives each layer as a ``PeftForm``; here the layers become one config and one
file. A setting that differs by layer goes into PEFT's pattern for it; where PEFT has
none, it is refused. ``feedforward_modules`` says of a layer whether it is one of them.

Shape legend
    I in features   O out features
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.errors import WrapError
from molora.experts import AbstractExperts, LoRAExperts
from molora.experts.peft_form import PeftForm
from molora.layer import MoloraLinear
from molora.manifest import CONFIG, TENSORS, write_json

PATTERNS = {
    "LORA": {"r": "rank_pattern", "lora_alpha": "alpha_pattern"},
    "LOHA": {"r": "rank_pattern", "alpha": "alpha_pattern"},
    "LOKR": {"r": "rank_pattern", "alpha": "alpha_pattern"},
}
"""By method: settings that may differ by layer, and the table PEFT reads them from."""

PEFT_VERSION = "0.21.2"
"""Version of PEFT whose formats are written; it warns of OFT that names none."""

TAKES_CONV1D = {"LORA", "ADALORA", "VERA", "IA3"}
"""Methods that PEFT puts on GPT-2's Conv1D."""


def has_own_form(experts: AbstractExperts) -> bool:
    """Whether PEFT has the method; a plain LoRA is written by peft.py."""
    return experts.peft_type is not None and not isinstance(experts, LoRAExperts)


def write_forms(
    model: nn.Module, found: dict[str, MoloraLinear], expert: int, folder: Path
) -> tuple[str, tuple[str, ...]]:
    """Write one expert of every layer into an existing folder.

    Args:
        model: The wrapped model.
        found: Its sites, all of families with a form in PEFT.
        expert: Its number, the same at every layer.
        folder: Where config and tensors go.

    Returns:
        PEFT's name of the method, and notes on what it needs to read them.

    Raises:
        WrapError: Different methods, settings that differ where PEFT has one for all
            layers, or layers that PEFT does not support.
    """
    forms = {path: _form(site, expert) for path, site in found.items()}
    kind = _one_method(forms)
    if kind not in TAKES_CONV1D:
        for path, site in found.items():
            if isinstance(site.base, Conv1D):
                raise WrapError(
                    f"site {path!r} is a Conv1D, on which PEFT does not put {kind}; "
                    "give export_peft a rank (--rank) for a LoRA that comes near it"
                )
    _check_hosts(kind, found)
    tensors = {
        f"base_model.model.{path}.{name}": values
        for path, form in forms.items()
        for name, values in form.tensors.items()
    }
    for name, values in _model_tensors(forms).items():
        tensors[f"base_model.{name}"] = values
    settings = _settings(model, kind, {path: f.settings for path, f in forms.items()})
    stored = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    save_file(stored, folder / TENSORS, metadata={"format": "pt"})
    write_json(folder / CONFIG, {**common_fields(model, found, kind), **settings})
    notes = dict.fromkeys(form.note for form in forms.values() if form.note is not None)
    return kind, tuple(notes)


def _check_hosts(kind: str, found: Mapping[str, MoloraLinear]) -> None:
    """Refuse methods that PEFT has not, or in another form, on a type of layer."""
    for path, site in found.items():
        if site.host.PEFT is not None and kind not in site.host.PEFT:
            raise WrapError(
                f"site {path!r} is a {type(site.base).__name__}, on which PEFT does "
                f"not have {type(site.experts).__name__}; give export_peft a rank "
                "(--rank) for a LoRA that comes near them"
            )


def common_fields(
    model: nn.Module, found: dict[str, MoloraLinear], kind: str
) -> dict[str, Any]:
    """Fields that the config of every method has."""
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", lambda: False)()
    fields = {
        "peft_type": kind,
        "peft_version": PEFT_VERSION,
        "task_type": "CAUSAL_LM" if can_generate else None,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "inference_mode": True,
        "target_modules": names_of(model, found),
    }
    if kind in TAKES_CONV1D:
        conv = any(isinstance(site.base, Conv1D) for site in found.values())
        fields["fan_in_fan_out"] = conv
    return fields


def names_of(model: nn.Module, paths: Iterable[str]) -> list[str] | str:
    """Layers as PEFT finds them: paths, or a regular expression where these mislead.

    A path in a list also stands for every module whose own path ends in it.
    """
    wanted = list(paths)
    others = [name for name, _ in model.named_modules() if name not in set(wanted)]
    if any(other.endswith(path) for other in others for path in wanted):
        return "|".join(re.escape(path) for path in wanted)
    return wanted


def listed(names: list[str] | str | None, path: str) -> bool:
    """Whether PEFT's ``feedforward_modules`` mean a layer."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path.endswith(name) for name in names or [])


def exactly(path: str) -> str:
    """Key of a pattern for one layer; PEFT matches it with the end of any path."""
    return f"^{re.escape(path)}"


def by_layer(values: Mapping[str, Any], pattern: str, name: str) -> dict[str, Any]:
    """The most common value of a setting, and a pattern for the other layers."""
    usual = Counter(values.values()).most_common(1)[0][0]
    own = {exactly(path): v for path, v in values.items() if v != usual}
    return {name: usual, pattern: own}


def _form(site: MoloraLinear, expert: int) -> PeftForm:
    try:
        return site.experts.to_peft(expert)
    except WrapError as error:
        raise WrapError(
            f"site {site.path!r}: {error}; or give export_peft a rank (--rank) for a "
            "LoRA that comes near it"
        ) from None


def _one_method(forms: Mapping[str, PeftForm]) -> str:
    first, *_ = forms
    for path, form in forms.items():
        if form.peft_type != forms[first].peft_type:
            raise WrapError(
                f"site {first!r} is {forms[first].peft_type} and {path!r} is "
                f"{form.peft_type}, but a PEFT folder holds one method; give "
                "export_peft a rank for a LoRA of every layer"
            )
    return forms[first].peft_type


def _settings(
    model: nn.Module, kind: str, layers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One config of the settings of all layers."""
    fields: dict[str, Any] = {}
    for name in dict.fromkeys(n for settings in layers.values() for n in settings):
        # a layer without the setting does not read it
        values = {path: own[name] for path, own in layers.items() if name in own}
        distinct = list(dict.fromkeys(map(repr, values.values())))
        if name == "feedforward_modules":
            fields[name] = names_of(model, [path for path, on in values.items() if on])
        elif len(distinct) == 1:
            fields[name] = next(iter(values.values()))
        elif name in PATTERNS.get(kind, {}):
            fields |= by_layer(values, PATTERNS[kind][name], name)
        else:
            raise WrapError(
                f"layers differ in {name} ({', '.join(distinct)}), which PEFT's {kind} "
                "has once for all layers; give them one value, or give export_peft a "
                "rank for a LoRA of every layer"
            )
    return fields


def _model_tensors(forms: Mapping[str, PeftForm]) -> dict[str, Tensor]:
    """Tensors outside the layers: the largest, of which each layer has the corner."""
    found: dict[str, Tensor] = {}
    for form in forms.values():
        for name, values in form.model_tensors.items():
            if name not in found or values.numel() > found[name].numel():
                found[name] = values
    for path, form in forms.items():
        for name, values in form.model_tensors.items():
            corner = found[name][tuple(slice(size) for size in values.shape)]
            if not torch.equal(corner, values):
                raise WrapError(
                    f"site {path!r} has {name} of its own, which PEFT's "
                    f"{form.peft_type} has once for all layers; share it among the "
                    "layers, or give export_peft a rank (--rank) for a LoRA of every "
                    "layer"
                )
    return found
