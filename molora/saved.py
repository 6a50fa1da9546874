"""Reading saved adapters: what a folder is, is it whole, which is the newest."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from molora.atomic import settle
from molora.config import AdapterConfig
from molora.errors import CheckpointError, ConfigError
from molora.fingerprint import Fingerprint
from molora.manifest import (
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    TENSORS,
    check_format,
    check_manifest,
    read_json,
)
from molora.schema import Schema

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


class AdapterFile(Schema):
    """What adapter_config.json holds."""

    peft_type: Literal["MOLORA"] = "MOLORA"
    """Tells PEFT and transformers that this is no adapter of theirs."""
    format_version: int = FORMAT_VERSION
    """Version of the folder's layout."""
    base_model_name_or_path: str | None
    """Where the base came from."""
    adapter: dict[str, Any]
    """Fields of AdapterConfig."""
    base: Fingerprint
    """The base that the adapter was on when it was saved."""
    rounded: bool | None = None
    """Whether it was ever trained on a quantised base; None in older folders, where
    ``base`` tells."""

    @property
    def was_rounded(self) -> bool:
        """Whether the adapter was trained on a quantised base, there or before."""
        return self.base.quantised if self.rounded is None else self.rounded


@dataclass(frozen=True)
class SavedAdapter:
    """A verified checkpoint, read."""

    file: AdapterFile
    config: AdapterConfig
    tensors: dict[str, Tensor]
    source: Path


def verify(folder: str | Path) -> dict[str, Any]:
    """Check that a checkpoint is whole: format, sizes and checksums of all its files.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: It is not; the message names the file and what is wrong.
    """
    folder = Path(folder)
    _check_is_checkpoint(folder)
    manifest = check_manifest(folder)
    for name in (CONFIG, TENSORS):
        if name not in manifest.files:
            raise CheckpointError(f"{folder / MANIFEST}: does not list {name}")
    _adapter_file(folder)
    return manifest.to_dict()


def newest_valid(root: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the newest checkpoint in a folder that passes ``verify``.

    Args:
        root: Folder of ``checkpoint-<step>`` folders, which are taken by step; without
            any, of other adapter folders, taken by time.

    Returns:
        The newest valid one or None, and the newer ones that were passed over, each
        with the reason.
    """
    skipped = []
    for folder in _candidates(Path(root)):
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append((folder, str(error)))
        else:
            return folder, skipped
    return None, skipped


def read_adapter(folder: Path) -> SavedAdapter:
    """Verify a checkpoint and read it.

    Raises:
        CheckpointError: It cannot be used; the message names the newest one that can,
            if there is one in the folder or beside it.
    """
    with _advised(folder):
        verify(folder)
        file, config = _adapter_file(folder), read_settings(folder)
        path = folder / TENSORS
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return SavedAdapter(file, config, tensors, path)


def read_settings(folder: Path) -> AdapterConfig:
    """Read the settings alone, without the checksums.

    Raises:
        CheckpointError: It is no folder of a molora adapter.
    """
    _check_is_checkpoint(folder)
    try:
        return AdapterConfig.from_dict(_adapter_file(folder).adapter, "adapter")
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def _candidates(root: Path) -> list[Path]:
    """Folders that may be checkpoints, newest first."""
    if not root.is_dir():
        return []
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    steps = {
        path: int(match[1])
        for path in folders
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    if steps:
        return sorted(steps, key=lambda path: steps[path], reverse=True)
    named = (MANIFEST, CONFIG, TENSORS)
    adapters = [p for p in folders if any((p / name).exists() for name in named)]
    return sorted(adapters, key=lambda path: path.stat().st_mtime_ns, reverse=True)


@contextlib.contextmanager
def _advised(folder: Path) -> Iterator[None]:
    """Name the newest valid checkpoint at hand when this one cannot be used."""
    try:
        yield
    except CheckpointError as error:
        for root in (folder, folder.parent):
            newest, _ = newest_valid(root)
            if newest is not None and newest != folder:
                raise CheckpointError(
                    f"{error}. The newest valid checkpoint at hand is {newest}"
                ) from error
        raise


def _check_is_checkpoint(folder: Path) -> None:
    """Say what a folder is when it is no checkpoint of ours."""
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {kind}; give the folder of an adapter")
    settle(folder)
    if (folder / MANIFEST).exists():
        return
    if (folder / TENSORS).exists():
        if (folder / CONFIG).exists():
            _refuse_peft(folder)
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}, so its saving was cut short, or it was not "
            "written by molora"
        )
    for name in _PICKLES:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder}: holds {name}, a pickle, which can run code when it is "
                "read; molora reads safetensors only"
            )
    raise CheckpointError(f"{folder}: holds no adapter (no {MANIFEST})")


def _refuse_peft(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json, unless it belongs to PEFT."""
    raw = read_json(folder / CONFIG)
    kind = raw.get("peft_type")
    if kind != "MOLORA":
        raise CheckpointError(
            f"{folder}: holds a PEFT adapter of type {kind!r}, not a molora adapter; "
            "load it with peft.PeftModel.from_pretrained"
        )
    return raw


def _adapter_file(folder: Path) -> AdapterFile:
    path = folder / CONFIG
    raw = _refuse_peft(folder)
    check_format(raw, path)
    try:
        return AdapterFile.from_dict(raw)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
