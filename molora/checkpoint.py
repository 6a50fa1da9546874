"""Saving and loading adapters: whole or not at all, verified, tied to their base.

A folder holds ``adapter_config.json`` (settings, and a fingerprint of the base),
``adapter_model.safetensors`` (parameters by their name in the model), ``README.md`` and
``manifest.json``. Nothing in it is a pickle, and nothing in it depends on the time.
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from molora import loftq
from molora.atomic import atomic_folder
from molora.config import AdapterConfig
from molora.continuing import continued
from molora.errors import CheckpointError, ConfigError, WrapError
from molora.filling import check_routers, fill, is_finite
from molora.fingerprint import (
    Fingerprint,
    differences,
    fingerprint,
    misfits,
    shortened,
)
from molora.freezing import set_trainable
from molora.manifest import CARD, CONFIG, TENSORS, write_json
from molora.manifest import write_manifest as write_manifest
from molora.merging import note_training, trained_rounded
from molora.model import check_wrappable, sites, unwrap, wrap_begun
from molora.model_card import is_generated, model_card
from molora.quantized import known_weight
from molora.saved import AdapterFile, SavedAdapter, read_adapter
from molora.saved import newest_valid as newest_valid
from molora.saved import verify as verify
from molora.targets import find_targets
from molora.wrapped import adapter_tensors

M = TypeVar("M", bound=nn.Module)

_BASE_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
    **unsupported: Any,
) -> None:
    """Save the adapter of a wrapped model, without its base, in one step.

    What was saved there before stays whole until the new files replace it; files of
    other origin in the folder are kept. A merged model gives the same bytes as before
    the merge.

    Args:
        model: A wrapped model.
        save_directory: Folder to write.
        state_dict: Where to take the adapter's tensors from instead of the model, by
            their names in it; other entries are let be.
        is_main_process: False writes nothing.
        **unsupported: Other arguments of transformers' ``save_pretrained``; an error.

    Raises:
        CheckpointError: The folder cannot be written, or holds other things under the
            same names; a tensor is missing or not finite.
        ConfigError: An argument that means nothing here.
        WrapError: The model is not wrapped.
    """
    if unsupported:
        raise ConfigError(
            f"save_pretrained: {', '.join(unsupported)} means nothing for an adapter, "
            "which is one safetensors file in a local folder. Drop it; to publish, use "
            "huggingface_hub.upload_folder"
        )
    sites(model)
    if not is_main_process:
        return
    target = Path(save_directory)
    _refuse_base_folder(target)
    with atomic_folder(target) as folder:
        write_adapter(model, folder, state_dict)
        card = target / CARD
        if card.is_file() and not is_generated(card):
            shutil.copyfile(card, folder / CARD)
        write_manifest(folder)


def write_adapter(
    model: nn.Module, folder: Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write config, tensors and card into an existing folder, not atomically.

    For those who write more into the folder; ``write_manifest`` has to come last.

    Args:
        model: A wrapped model.
        folder: Folder to write into, best one from ``atomic_folder``.
        state_dict: See ``save_pretrained``.

    Raises:
        CheckpointError: A tensor is missing or not finite.
        WrapError: The model is not wrapped.
    """
    found = sites(model)
    tensors = _tensors(model, state_dict)
    config = model.molora_config
    assert isinstance(config, AdapterConfig)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    present = fingerprint(model, {p: site.known_weight() for p, site in found.items()})
    file = AdapterFile(
        base_model_name_or_path=base,
        adapter=config.to_dict(),
        base=present,
        rounded=present.quantised or trained_rounded(model),
    )
    write_json(folder / CONFIG, file.to_dict())
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CARD).write_text(model_card(model, base), encoding="utf-8")


def load(
    base_model: M,
    folder: str | Path,
    trainable: bool = False,
    allow_base_mismatch: bool = False,
    *,
    router: Mapping[str, Any] | None = None,
    original: nn.Module | None = None,
) -> M:
    """Wrap a base model with a saved adapter.

    Checksums, format, base and the tensors' names, shapes and values are verified; if
    anything is wrong, the base is as it was. Train or eval mode is not changed.

    Args:
        base_model: The model that the adapter was trained on, in any floating dtype,
            quantised or not.
        folder: What ``save_pretrained`` wrote, or a trainer's checkpoint.
        trainable: Leave trainable what the adapter's config says is trained.
        allow_base_mismatch: Accept a base with other weights or config, for example a
            further trained one. Its layers must still have the same shapes.
        router: Settings of the routers to replace; see ``continued``. Another kind must
            have parameters of the same names and shapes: vectors learned with kind
            ``sigmoid`` are used with ``{"kind": "phatgoose"}``.
        original: The model before quantisation, which adapters trained with
            ``init_lora_weights: loftq_iter_<T>``, T > 1, need on a base in NF4.

    Returns:
        The same object.

    Raises:
        CheckpointError: The folder is missing, damaged, of a newer format, no molora
            adapter, or belongs to another base; or the other kind of router has other
            parameters.
        ConfigError: A wrong setting of the router.
        WrapError: The base is wrapped already or cannot be wrapped; ``original`` is
            missing, another model, or not read.
    """
    check_wrappable(base_model)
    saved = read_adapter(Path(folder))
    config = saved.config
    if router is not None:
        config = continued(config, {"router": router}, str(folder))
    return _wrapped(base_model, saved, config, trainable, allow_base_mismatch, original)


def start_from(
    base_model: M,
    folder: str | Path,
    config: AdapterConfig,
    original: nn.Module | None = None,
) -> M:
    """Wrap a base model with a saved adapter, to train it on with other settings.

    Args:
        base_model: The model that the adapter was trained on.
        folder: What ``save_pretrained`` wrote.
        config: Its settings, changed by ``continued``.
        original: See ``load``.

    Raises:
        CheckpointError, WrapError: See ``load``.
    """
    check_wrappable(base_model)
    saved = read_adapter(Path(folder))
    return _wrapped(base_model, saved, config, True, False, original)


def _wrapped(
    base_model: M,
    saved: SavedAdapter,
    config: AdapterConfig,
    trainable: bool,
    allow_base_mismatch: bool,
    original: nn.Module | None,
) -> M:
    """Wrap with a config and fill; whatever is raised, the base is as it was."""
    folder = saved.source.parent
    try:
        targets = find_targets(base_model, saved.config)
    except WrapError as error:
        raise CheckpointError(
            f"{folder}: does not fit this base: {error}. Load {_base_of(saved)}"
        ) from None
    weights = {path: known_weight(layer) for path, layer in targets.items()}
    _check_base(saved, fingerprint(base_model, weights), allow_base_mismatch)
    with contextlib.ExitStack() as undo:
        # the values come from the file, those of LoftQ as well
        wrap_begun(base_model, config, 0, loftq.asking)
        undo.callback(unwrap, base_model)
        if config.router != saved.config.router:
            check_routers(base_model, saved)
        fill(base_model, saved)
        loftq.rebuild(sites(base_model), original)
        note_training(base_model, saved.file.was_rounded)
        undo.pop_all()
    for site in sites(base_model).values():
        set_trainable(site, config.train, trainable)
    return base_model


def load_adapter_state(
    model: nn.Module, folder: str | Path, allow_base_mismatch: bool = False
) -> None:
    """Put a checkpoint's tensors into a model that is wrapped with the same config.

    Parameters keep their identity, so optimizers stay valid. If anything is wrong, no
    parameter is changed.

    Args:
        model: A wrapped model that is not merged.
        folder: A checkpoint.
        allow_base_mismatch: See ``load``.

    Raises:
        CheckpointError: See ``load``; also when the adapter's config differs.
        WrapError: The model is not wrapped, or it is merged.
    """
    found = sites(model)
    if any(site.merged for site in found.values()):
        raise WrapError("the model is merged; call molora.unmerge before loading")
    saved = read_adapter(Path(folder))
    config = model.molora_config
    assert isinstance(config, AdapterConfig)
    now, then = config.to_dict(), saved.config.to_dict()
    other = [name for name in now if now[name] != then[name]]
    if other:
        told = "; ".join(f"{n} is {now[n]!r}, was {then[n]!r}" for n in other)
        raise CheckpointError(
            f"{folder}: saved with another adapter config ({told}). Wrap the model as "
            "it was, or use molora.load on a plain base"
        )
    weights = {path: site.known_weight() for path, site in found.items()}
    _check_base(saved, fingerprint(model, weights), allow_base_mismatch)
    # Q is not made anew, so what it follows from stays
    saved.tensors.update(loftq.check_resumed(found, saved.tensors))
    fill(model, saved)
    note_training(model, saved.file.was_rounded)


def _tensors(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Adapter tensors on the CPU, all present and finite."""
    names = adapter_tensors(model)
    source = names if state_dict is None else state_dict
    missing = [name for name in names if name not in source]
    if missing:
        raise CheckpointError(
            f"state_dict lacks {len(missing)} of the adapter's {len(names)} tensors: "
            f"{shortened(missing)}"
        )
    tensors = {name: source[name].detach().cpu().contiguous() for name in names}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"{name} holds NaN or infinity, so nothing was saved; what was saved "
                "before is still there. Lower the learning rate"
            )
    return tensors


def _refuse_base_folder(target: Path) -> None:
    """Refuse a folder that transformers would no longer read as a plain model."""
    if any((target / name).is_file() for name in _BASE_WEIGHTS):
        raise CheckpointError(
            f"{target}: holds a model; an adapter beside it would hide it from "
            "transformers. Save the adapter to a folder of its own"
        )


def _base_of(saved: SavedAdapter) -> str:
    name = saved.file.base_model_name_or_path
    return f"the base it was trained on, {name!r}" if name else "the base it belongs to"


def _check_base(saved: SavedAdapter, present: Fingerprint, allowed: bool) -> None:
    """Refuse a base on which the adapter does not fit, or was not trained."""
    where, advice = saved.source.parent, f"Load {_base_of(saved)}"
    unfit = misfits(saved.file.base, present)
    if unfit:
        raise CheckpointError(
            f"{where}: does not fit this base: {'; '.join(unfit[:5])}"
            f"{f' and {len(unfit) - 5} more' if len(unfit) > 5 else ''}. {advice}"
        )
    other = differences(saved.file.base, present)
    if other and not allowed:
        raise CheckpointError(
            f"{where}: was trained on another base: {'; '.join(other)}. {advice}, or "
            "force it with molora.load(..., allow_base_mismatch=True)"
        )
