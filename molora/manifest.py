"""manifest.json: which files a saved folder holds, their sizes and checksums.

It is written last, so a folder with a manifest was written to its end. README.md is
left out: it is text for people, who may edit it.
"""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from molora.errors import CheckpointError, ConfigError
from molora.schema import Schema

FORMAT_VERSION = 1
"""Raised when a checkpoint of this version could not be read by older code."""

MANIFEST = "manifest.json"
CARD = "README.md"
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_LFS = b"version https://git-lfs"


class FileRecord(Schema):
    """One file of a folder."""

    size: int
    """Bytes."""
    sha256: str
    """Checksum of the content, in hexadecimal digits."""


class Manifest(Schema):
    """What manifest.json holds."""

    format_version: int
    """Version of the folder's layout."""
    versions: dict[str, str]
    """Versions of the libraries that wrote it."""
    files: dict[str, FileRecord]
    """By path in the folder, with forward slashes."""
    base_fingerprint: str | None = None
    """Checksum of the base that an adapter belongs to; None for other folders."""
    extra: dict[str, Any] = {}
    """What the writer added, for example the step of a training run."""
    checksum: str = ""
    """Checksum of all the fields above, in hexadecimal digits."""

    def computed(self) -> str:
        """What ``checksum`` has to be."""
        fields = self.to_dict()
        del fields["checksum"]
        return digest(fields)


def write_manifest(folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Record every file of a folder in its manifest.json; call this last.

    Args:
        folder: Folder whose files are complete.
        extra: JSON-ready values to keep in the manifest.
    """
    folder = Path(folder)
    base = None
    if (folder / CONFIG).is_file():
        described = read_json(folder / CONFIG).get("base")
        base = None if described is None else digest(described)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        versions=dict(_versions()),
        files={
            name: FileRecord(
                size=(folder / name).stat().st_size, sha256=_sha256(folder / name)
            )
            for name in file_names(folder)
            if name not in (MANIFEST, CARD)
        },
        base_fingerprint=base,
        extra=dict(extra or {}),
    )
    checksum = manifest.computed()
    write_json(folder / MANIFEST, {**manifest.to_dict(), "checksum": checksum})


def check_manifest(folder: Path) -> Manifest:
    """Compare a folder with its manifest. Files that it does not list are let be.

    Raises:
        CheckpointError: There is no readable manifest, it is of a newer format, or a
            listed file is missing or differs from what was written.
    """
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the manifest lists it")
        size = path.stat().st_size
        if size != record.size:
            raise CheckpointError(
                f"{path}: holds {size} bytes instead of {record.size}{_told(path)}; "
                "it was cut or changed after it was saved"
            )
        if _sha256(path) != record.sha256:
            raise CheckpointError(
                f"{path}: its checksum differs from the manifest's; it was damaged or "
                "changed after it was saved"
            )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest without looking at the files.

    Raises:
        CheckpointError: It is missing, unreadable, or of a newer format.
    """
    path = folder / MANIFEST
    raw = read_json(path)
    check_format(raw, path, raw.get("versions"))
    try:
        manifest = Manifest.from_dict(raw)
    except ConfigError as error:
        raise CheckpointError(f"{path}: damaged or not molora's: {error}") from None
    if manifest.checksum != manifest.computed():
        raise CheckpointError(
            f"{path}: its checksum differs from its content; it was damaged or changed "
            "after it was saved"
        )
    for name in manifest.files:
        if not _is_plain(name):
            raise CheckpointError(
                f"{path}: lists {name!r}, which is no path inside the folder; it was "
                "changed after it was saved"
            )
    return manifest


def listed(folder: Path) -> set[str] | None:
    """Names that a folder's manifest lists; None without a manifest of ours."""
    try:
        return set(read_manifest(folder).files)
    except CheckpointError:
        return None


def check_format(raw: Mapping[str, Any], path: Path, versions: Any = None) -> None:
    """Refuse a file of a newer or unknown format.

    Args:
        raw: What the file holds.
        path: The file, for the message.
        versions: Library versions that the file names, if it does.

    Raises:
        CheckpointError: The format version is newer than ours, or none.
    """
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{path}: format_version is {version!r}; damaged, or not molora's"
        )
    if version > FORMAT_VERSION:
        writer = versions.get("molora") if isinstance(versions, Mapping) else None
        needed = f"molora {writer} or newer" if writer else "a newer molora"
        raise CheckpointError(
            f"{path}: has format version {version}; this molora "
            f"{_versions()['molora']} reads up to {FORMAT_VERSION}. "
            f"Install {needed}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: no valid JSON ({error}){_told(path)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, the same bytes for the same value."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def digest(value: Any) -> str:
    """Checksum of a JSON-ready value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_names(folder: Path) -> list[str]:
    """Every file below a folder as a relative path with forward slashes, sorted."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


@functools.cache
def _versions() -> dict[str, str]:
    """Versions of the libraries that a saved folder depends on."""
    names = ("molora", "torch", "transformers", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def _is_plain(name: str) -> bool:
    """Whether a name can only mean a file inside the folder."""
    path = PurePosixPath(name)
    odd = set(name) & set("\\:\0")
    return (
        bool(path.parts)
        and not odd
        and not path.is_absolute()
        and ".." not in path.parts
        and path.as_posix() == name
    )


def _told(path: Path) -> str:
    """What an unreadable file looks like, where that is known."""
    with path.open("rb") as file:
        head = file.read(len(_LFS))
    if head == _LFS:
        return " (a Git LFS pointer, not the file: run git lfs pull)"
    return "" if head else " (the file is empty)"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
