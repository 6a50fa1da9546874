"""Folders that appear whole or not at all.

A folder is written under another name, brought to the disk, and put into place:

- where there was nothing, by a rename;
- where there was a folder of ours, by exchanging the two names in one step;
- where that cannot be (other files lie in the folder, it is a mount point or the
  working directory, the system has no such step), by moving the new folder into the old
  one under the name ``PENDING`` and its files out of there, manifest last. Whoever
  reads or writes the folder next finishes what was cut short (``settle``).

Files that nobody listed in a manifest are never removed or replaced. A lock, which the
system frees when a process dies, keeps a second writer out.

Limitation: for POSIX systems; on a file system without locks (some network ones) the
lock of a killed process has to be deleted by hand.
"""

import contextlib
import ctypes
import errno
import filecmp
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from molora.errors import CheckpointError
from molora.manifest import CARD, CONFIG, MANIFEST, file_names, listed

PENDING = ".molora-pending"
"""Sub-folder from which a save that was cut short is finished."""

_TEMP = re.compile(r"\.(.+)\.tmp-\d+-[0-9a-f]{8}")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes target when the block ends well.

    If the block raises, or the process dies, target is what it was. Of a target that
    exists, the files that its manifest lists are replaced or dropped and others are
    kept. File modes follow the umask, the mode of an existing target is kept.

    Args:
        target: Folder to write. A link is followed; missing parents are made.

    Yields:
        A folder beside target (inside it where nothing can be made beside it).

    Raises:
        CheckpointError: Target is a file; it holds files of other origin that would be
            replaced; another process is saving to it; the disk is full or read-only.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; give a folder to save to")
    target = target.resolve()
    with _worded(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write")
        with _locked(target):
            _finish(target)
            _sweep(target)
            name = f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
            temp = _room(target) / name
            try:
                temp.mkdir()
                yield temp
                _seal(temp)
                _publish(temp, target)
            finally:
                # after an exchange this is the old folder
                shutil.rmtree(temp, ignore_errors=True)


def settle(folder: Path) -> None:
    """Finish a save into an existing folder that was cut short, if there is one.

    Raises:
        CheckpointError: It cannot be finished: another process is busy with it for ten
            seconds, or the folder cannot be written to.
    """
    folder = folder.resolve()
    if (folder / PENDING).is_dir():
        with _worded(folder), _locked(folder, seconds=10):
            _finish(folder)


def atomic_text(target: Path, text: str) -> None:
    """Write a text file (UTF-8) that appears whole or not at all.

    Args:
        target: The file; a link is followed. What it held is replaced.
        text: All of it.

    Raises:
        OSError: It cannot be written, or is no regular file; target is what it was.
    """
    target = file_to_write(target)
    temp = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temp.write_text(text, encoding="utf-8")
        _fsync(temp)
        temp.replace(target)
    finally:
        temp.unlink(missing_ok=True)
    _fsync(target.parent)


def file_to_write(target: Path) -> Path:
    """The regular file that ``atomic_text`` writes for target, links followed.

    Raises:
        OSError: Target is something else, or its folder cannot be written to.
    """
    # of links in a circle, realpath gives one
    real = Path(os.path.realpath(target))
    # a rename would put a file in the place of a device or a pipe
    if real.is_symlink() or (target.exists() and not target.is_file()):
        raise OSError(errno.EINVAL, "is no regular file; name another file")
    if not real.parent.is_dir():
        raise OSError(errno.ENOENT, f"there is no folder {real.parent}")
    if not os.access(real.parent, os.W_OK):
        raise OSError(errno.EACCES, f"no permission to write to {real.parent}")
    return real


@contextlib.contextmanager
def _worded(target: Path) -> Iterator[None]:
    """Turn what a disk or a file system refuses into an error that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target}: cannot be written: {error}. What was last saved there whole is "
            "still there; make room on the disk or save elsewhere"
        ) from error


@contextlib.contextmanager
def _locked(target: Path, seconds: float = 0) -> Iterator[None]:
    """Hold the one lock of a target."""
    beside = not target.is_dir() or os.access(target.parent, os.W_OK)
    path = (target.parent if beside else target) / f".{target.name}.lock"
    lock = FileLock(path, timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"{target}: another process is saving to this folder; wait for it, or give "
            "each run a folder of its own"
        ) from None
    try:
        yield
    finally:
        # before the release: a waiter then sees that its file has no name any more
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _room(target: Path) -> Path:
    """Folder for the temporary one: on the disk of target, and writable."""
    if not target.is_dir():
        return target.parent
    inside = target.is_mount() or not os.access(target.parent, os.W_OK)
    return target if inside else target.parent


def _sweep(target: Path) -> None:
    """Remove what killed processes left: temporary folders whose lock is free."""
    for room in (target.parent, target):
        for path in room.glob(".*.tmp-*"):
            match = _TEMP.fullmatch(path.name)
            if match is None:
                continue
            if match[1] == target.name:
                shutil.rmtree(path, ignore_errors=True)
            else:
                # an error means that its writer is alive, or is another user
                with (
                    contextlib.suppress(CheckpointError, OSError),
                    _locked(room / match[1]),
                ):
                    shutil.rmtree(path, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Give files the mode that the umask asks for; bring all to the disk."""
    # mkdir applied the umask; reading it otherwise would set it for all threads
    mode = folder.stat().st_mode & 0o666
    for base, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(base, name)
            if not path.is_symlink():
                path.chmod(mode)
                _fsync(path)
        _fsync(Path(base))


def _publish(temp: Path, target: Path) -> None:
    """Put a sealed folder into the place of target."""
    if not target.exists():
        temp.rename(target)
    elif not (_holds_only_ours(target) and _exchange(temp, target)):
        _refuse_clashes(temp, target)
        temp.rename(target / PENDING)
        _fsync(target)
        _finish(target)
    _fsync(target.parent)


def _holds_only_ours(target: Path) -> bool:
    """Whether no file would be lost that a manifest of ours does not list."""
    names = set(file_names(target))
    return names <= (listed(target) or set()) | {MANIFEST, CARD} and (
        not names or MANIFEST in names
    )


def _exchange(temp: Path, target: Path) -> bool:
    """Swap the names of two folders in one step; False where that cannot be done."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    if swap is None or _is_below(target):
        return False
    shutil.copymode(target, temp)
    names = os.fsencode(temp), os.fsencode(target)
    done = swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return bool(done == 0)


def _is_below(target: Path) -> bool:
    """Whether the process works inside target, and would lose its folder with it."""
    try:
        return Path.cwd().is_relative_to(target)
    except FileNotFoundError:
        return False


def _refuse_clashes(temp: Path, target: Path) -> None:
    """Refuse to put files over others that are not ours, or over folders."""
    ours = _is_ours(target)
    clashes = []
    for name in file_names(temp):
        place = target / name
        inner = place.relative_to(target).parents
        blocked = place.is_dir() or any((target / p).is_file() for p in inner)
        differs = place.is_file() and not filecmp.cmp(temp / name, place, shallow=False)
        if blocked or (differs and not ours):
            clashes.append(name)
    if clashes:
        raise CheckpointError(
            f"{target}: this save would replace what molora did not write there: "
            f"{', '.join(clashes)}. Save to another folder, or remove these"
        )


def _is_ours(target: Path) -> bool:
    """Whether molora or a trainer wrote the folder, even if it is damaged by now."""
    if re.fullmatch(r"checkpoint-\d+", target.name) or listed(target) is not None:
        return True
    config = target / CONFIG
    return config.is_file() and b'"MOLORA"' in config.read_bytes()


def _finish(target: Path) -> None:
    """Move the files of a pending save to their places; repeatable."""
    pending = target / PENDING
    if not pending.is_dir():
        return
    new = listed(pending)
    if new is not None:
        for name in (listed(target) or set()) - new:
            (target / name).unlink(missing_ok=True)
    for name in sorted(file_names(pending), key=lambda name: name == MANIFEST):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (pending / name).replace(place)
        _fsync(place.parent)
    shutil.rmtree(pending)
    _fsync(target)


def _fsync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
