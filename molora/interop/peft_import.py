"""Upcycling: several PEFT adapters of one method become the experts of one bank.

    y = base(x) + sum_e g_e(x) delta_e(x)

LoRAs are read by peft_loras.py, adapters of other methods by peft_family.py.

Shape legend
    E experts
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from molora.config import AdapterConfig
from molora.errors import CheckpointError, ConfigError
from molora.freezing import Train
from molora.interop.general import Subtract
from molora.interop.peft_adapter import family_of
from molora.interop.peft_experts import ROUTER, router_values
from molora.interop.peft_family import Adapters
from molora.interop.peft_loras import Loras
from molora.interop.xlora_import import (
    is_xlora,
    read_xlora,
    split_xlora,
    xlora_base,
)
from molora.model import check_wrappable, sites, unwrap, wrap

M = TypeVar("M", bound=nn.Module)


def import_peft(
    base_model: M,
    folders: Sequence[str | Path],
    *,
    router: Mapping[str, Any] | str | Path | None = None,
    train: Train = "all",
    balance: Sequence[Mapping[str, Any]] = (),
    lora_dropout: float = 0.0,
    seed: int = 0,
    allow_base_mismatch: bool = False,
    general: Sequence[str | Path] = (),
    general_form: Subtract = "delta",
) -> M:
    """Wrap a base model with one expert per PEFT adapter, in place.

    Read are ordinary LoRAs with their own ranks, alphas, rank and alpha patterns, with
    or without rsLoRA, and every method that an expert family is (``peft_type`` of the
    class). Adapters of those have equal settings at a layer. All must have the same
    target layers, except LoRAs where each row names its adapter (router.kind
    ``adapter``) or one classifier weighs them (xlora): one that lacks a layer adds
    nothing there, trained or not, as by itself.

    A PEFT X-LoRA is read with its classifier. PEFT keeps its LoRAs frozen, which is
    ``train: router`` here.

    Args:
        base_model: The model that the adapters were trained on.
        folders: What PEFT's ``save_pretrained`` wrote, one for each expert. A single
            one makes an ordinary adapter; that of an X-LoRA stands for the LoRAs that
            it names and for its router.
        router: Settings of the router, as in a YAML; or the folder that
            ``export_peft_experts`` wrote, whose routers are used, or that of an X-LoRA
            whose LoRAs are elsewhere now. None is for one adapter.
        train: ``router`` freezes the experts, ``all`` trains them along; ``newest`` is
            for ``molora.grow``.
        balance: Balance objectives, as in a YAML.
        lora_dropout: Dropout in training; those of the adapters are not taken over.
        seed: Seed of the routers' initial weights.
        allow_base_mismatch: Accept adapters that name another base.
        general: Folders of LoRAs whose mean is taken from every expert (GenKnowSub),
            for routers such as arrow that tell experts apart by what they change.
        general_form: ``delta`` takes the updates, exactly, and adds the general ranks
            to those of every expert; ``factors`` takes A and B apart, as PEFT does.

    Returns:
        The same object.

    Raises:
        CheckpointError: A folder is no adapter that can be an expert; adapters of
            different methods, bases, targets or settings, or that do not fit the model.
        ConfigError: A wrong setting.
        WrapError: The model is wrapped already or cannot be wrapped. Whatever is
            raised, the model is as it was.
    """
    if train == "newest":
        raise ConfigError(
            "train: newest is for an expert that molora.grow adds; import with "
            "train: all or router, then grow"
        )
    check_wrappable(base_model)
    for name, given in (("folders", folders), ("general", general)):
        if isinstance(given, str | Path):
            raise ConfigError(
                f"import_peft: {name} is a list of folders; give [{str(given)!r}]"
            )
    if not folders:
        raise CheckpointError("import_peft: give at least one folder of a PEFT LoRA")
    if general_form not in get_args(Subtract):
        raise ConfigError(f"general_form: {general_form!r} is none of delta, factors")
    folders, router = split_xlora(folders, router)
    source: Loras | Adapters
    family = _one_family([*folders, *general])
    if family == "lora":
        source = Loras.read(folders, general, general_form, lora_dropout)
    elif general:
        raise ConfigError(f"import_peft: general is for LoRAs, and these are {family}")
    else:
        source = Adapters.read(folders, family, base_model, lora_dropout)
    if not general and general_form != "delta":
        raise ConfigError("general_form is read with general=[folders] only; drop it")
    bases = {**source.bases, **xlora_base(router)}
    _check_bases(base_model, bases, allow_base_mismatch)
    routers, weights = _routers(router, base_model, source.paths, len(folders))
    apart = ("adapter", "xlora")
    named = all(settings.get("kind") in apart for settings in routers.values())
    blocks = source.blocks(base_model, named)
    described = {p: {"experts": blocks[p], "router": routers[p]} for p in blocks}
    config = _config(base_model, described, train, balance)
    with contextlib.ExitStack() as undo:
        wrap(base_model, config, seed=seed)
        undo.callback(unwrap, base_model)
        for site in sites(base_model).values():
            source.fill(site)
        _fill_routers(base_model, weights)
        undo.pop_all()
    return base_model


def _one_family(folders: Sequence[str | Path]) -> str:
    """Family of all adapters; a bank holds experts of one."""
    families = {str(folder): family_of(folder) for folder in folders}
    if len(set(families.values())) > 1:
        told = "; ".join(f"{folder}: {family}" for folder, family in families.items())
        raise CheckpointError(
            f"import_peft: the adapters are of different methods ({told}), but a bank "
            "holds one; import them apart, or export each as a LoRA of one rank"
        )
    return next(iter(families.values()))


def _check_bases(
    model: nn.Module, bases: Mapping[str, str | None], allowed: bool
) -> None:
    """Refuse adapters that name different bases; folders count by their last name."""
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    given = [("the model", own), *bases.items()]
    named = [(where, base) for where, base in given if base]
    short = {str(base).rstrip("/").rpartition("/")[2] for _, base in named}
    if len(short) > 1 and not allowed:
        told = "; ".join(f"{where}: {base}" for where, base in named)
        raise CheckpointError(
            f"import_peft: the adapters belong to different bases ({told}). Load the "
            "base they were trained on, or force it with allow_base_mismatch=True "
            "(--allow-base-mismatch)"
        )


def _routers(
    router: Mapping[str, Any] | str | Path | None,
    model: nn.Module,
    paths: list[str],
    num_experts: int,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Router settings by site, and weights where a file holds them."""
    if router is None or isinstance(router, Mapping):
        return dict.fromkeys(paths, dict(router or {"kind": "none"})), {}
    if is_xlora(router):
        settings, weights = read_xlora(Path(router), model, paths, num_experts)
        return dict.fromkeys(paths, settings), weights
    file = Path(router) / ROUTER
    try:
        with safe_open(file, "pt") as opened:
            settings = json.loads((opened.metadata() or {})["routers"])
            weights = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: no router file of molora: {error}") from None
    if settings.keys() != set(paths):
        raise CheckpointError(f"{file}: has routers for other target layers")
    return settings, weights


def _config(
    model: nn.Module,
    described: dict[str, dict[str, Any]],
    train: Train,
    balance: Sequence[Mapping[str, Any]],
) -> AdapterConfig:
    """The most common settings, and an override for each site that differs."""
    texts = {path: json.dumps(one, sort_keys=True) for path, one in described.items()}
    usual = Counter(texts.values()).most_common(1)[0][0]
    names = sorted({path.rpartition(".")[2] for path in described})
    hits = {p for p, _ in model.named_modules() if p.rpartition(".")[2] in names}
    exact = "|".join(re.escape(path) for path in described)
    raw = {
        "target_modules": names if hits == set(described) else exact,
        **json.loads(usual),
        "balance": [dict(item) for item in balance],
        "train": train,
        "overrides": [
            {"match": f"^{re.escape(path)}$", **_changes(described[path], usual)}
            for path, text in texts.items()
            if text != usual
        ],
    }
    return AdapterConfig.from_dict(raw, "import_peft")


def _changes(one: dict[str, Any], usual: str) -> dict[str, Any]:
    before = json.loads(usual)
    changed = {part: one[part] for part in one if one[part] != before[part]}
    return {
        # another kind starts from its own defaults
        part: settings
        if settings["kind"] != before[part]["kind"]
        else {n: v for n, v in settings.items() if before[part].get(n) != v}
        for part, settings in changed.items()
    }


@torch.no_grad()
def _fill_routers(model: nn.Module, weights: dict[str, Tensor]) -> None:
    if not weights:
        return
    own: dict[str, Tensor] = {}
    for path, site in sites(model).items():
        if site.router is not None:
            if f"{path}.bias_E" in weights and site.router.bias_E is None:
                site.router.add_bias(site.experts.num_experts)
            own |= {f"{path}.{name}": v for name, v in router_values(site.router)}
    # a bias that the file has not starts at zero
    fresh = [name for name in own.keys() - weights.keys() if name.endswith(".bias_E")]
    own = {name: values for name, values in own.items() if name not in fresh}
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in weights.items()}:
        raise CheckpointError(
            f"{ROUTER}: its weights are of other routers, or of another number of "
            "experts; give the folders that were exported with it, all of them"
        )
    for name, parameter in own.items():
        parameter.copy_(weights[name])
