"""Folders appear whole or not at all: by faults planted at every step."""

import os
import resource
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from molora import atomic
from molora.atomic import PENDING, atomic_folder, atomic_text, settle
from molora.errors import CheckpointError
from molora.manifest import check_manifest, write_manifest


def fill(folder: Path, text: str, names: tuple[str, ...] = ("a.txt", "sub/b.txt")):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    write_manifest(folder)


def save(target: Path, text: str, names: tuple[str, ...] = ("a.txt", "sub/b.txt")):
    with atomic_folder(target) as folder:
        fill(folder, text, names)


def contents(target: Path) -> str:
    """The one text that all files of a checked folder hold."""
    settle(target)
    texts = {(target / name).read_text() for name in check_manifest(target).files}
    assert len(texts) == 1
    return texts.pop()


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process and return its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[[Path], int]]:
    """Start processes that hold a target open; they are killed at the end."""
    pids: list[int] = []

    def start(target: Path) -> int:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            with atomic_folder(target) as folder:
                (folder / "half").write_text("half")
                os.write(writing, b"1")
                time.sleep(60)
            os._exit(0)
        pids.append(pid)
        assert os.read(reading, 1) == b"1"
        os.close(reading)
        os.close(writing)
        return pid

    yield start
    for pid in pids:
        kill(pid)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as folder:
        assert folder.parent == target.parent
        assert folder.name.startswith(f".out.tmp-{os.getpid()}-")
        fill(folder, "new")
        assert not target.exists()
    assert contents(target) == "new"
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "out"
    save(target, "old")
    with pytest.raises(error), atomic_folder(target) as folder:
        fill(folder, "new")
        raise error
    assert contents(target) == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_of_ours_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda temp, target: False)
    target = tmp_path / "out"
    save(target, "old", ("a.txt", "stale.txt"))
    before = target.stat().st_ino
    save(target, "new", ("a.txt", "sub/b.txt"))
    assert contents(target) == "new"
    assert sorted(os.listdir(target)) == ["a.txt", "manifest.json", "sub"]
    assert os.listdir(tmp_path) == ["out"]
    # proof that the step was or was not an exchange of names
    assert (target.stat().st_ino != before) == can_exchange


def test_files_of_others_stay(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "runs").mkdir(parents=True)
    (target / "runs" / "events").write_text("mine")
    (target / "link").symlink_to(target / "runs")
    save(target, "one", ("a.txt", "stale.txt"))
    save(target, "two", ("a.txt",))
    assert contents(target) == "two"
    assert (target / "runs" / "events").read_text() == "mine"
    assert sorted(os.listdir(target)) == ["a.txt", "link", "manifest.json", "runs"]


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out: .*a\.txt"):
        save(target, "new")
    assert (target / "a.txt").read_text() == "mine"
    assert os.listdir(target) == ["a.txt"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_broken_checkpoint_of_a_trainer_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-6"
    save(target, "old")
    (target / "manifest.json").unlink()
    save(target, "new")
    assert contents(target) == "new"


def test_a_folder_where_a_file_belongs_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "out"
    save(target, "old", ("a.txt",))
    (target / "b.txt").mkdir()
    (target / "b.txt" / "mine").touch()
    with pytest.raises(CheckpointError, match=r"b\.txt"):
        save(target, "new", ("a.txt", "b.txt"))
    assert contents(target) == "old"


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way_is_an_error_before_any_work(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file"), atomic_folder(tmp_path / name):
        pytest.fail("work has begun")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_place_is_an_error_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    save(target, "old")
    # root may write everywhere, so what the system says is given here
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="out"), atomic_folder(target):
        pytest.fail("work has begun")


def test_a_link_is_followed(tmp_path: Path) -> None:
    save(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == "new"


def test_the_working_directory_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "out", "old")
    monkeypatch.chdir(tmp_path / "out")
    save(Path("."), "new")
    assert Path("a.txt").read_text() == "new"


def test_a_place_without_room_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mount"
    target.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == target)
    for text in ("old", "new"):
        with atomic_folder(target) as folder:
            assert folder.parent == target
            fill(folder, text)
        assert contents(target) == text
    assert sorted(os.listdir(target)) == ["a.txt", "manifest.json", "sub"]


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)]
)
def test_modes_follow_the_umask(
    tmp_path: Path, umask: int, file: int, folder: int
) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out") as temp:
            # safetensors makes files that only their owner can read
            save_file({"x": torch.zeros(1)}, temp / "x.safetensors")
    finally:
        os.umask(before)
    path = tmp_path / "out" / "x.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == file
    assert stat.S_IMODE(path.parent.stat().st_mode) == folder


def test_the_mode_of_a_folder_is_kept(tmp_path: Path) -> None:
    save(tmp_path / "out", "old")
    (tmp_path / "out").chmod(0o700)
    save(tmp_path / "out", "new")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_a_second_writer_fails_at_once(
    tmp_path: Path, writer: Callable[[Path], int]
) -> None:
    target = tmp_path / "out"
    save(target, "old")
    pid = writer(target)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="out: another process"):
        save(target, "second")
    assert time.monotonic() - start < 1
    save(tmp_path / "other", "free")
    # the other target's sweep has let the living writer's folder be
    assert len(list(tmp_path.glob(".out.tmp-*"))) == 1
    kill(pid)
    save(target, "third")
    assert contents(target) == "third"
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_a_second_writer_in_one_process_fails(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        fill(folder, "first")
        with pytest.raises(CheckpointError, match="another process"):
            save(tmp_path / "out", "second")
    assert contents(tmp_path / "out") == "first"


def test_what_dead_writers_of_other_targets_left_is_removed(
    tmp_path: Path, writer: Callable[[Path], int]
) -> None:
    kill(writer(tmp_path / "checkpoint-1"))
    assert len(list(tmp_path.glob(".checkpoint-1.tmp-*"))) == 1
    (tmp_path / ".mine.tmp-1").mkdir()
    save(tmp_path / "checkpoint-2", "new")
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp-1", "checkpoint-2"]


def test_atomic_folders_nest(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as outer:
        save(outer, "new")
    assert contents(tmp_path / "out") == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("tool", ["python", "safetensors"])
def test_a_full_disk(tmp_path: Path, tool: str) -> None:
    target = tmp_path / "out"
    save(target, "old")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        error = pytest.raises(CheckpointError, match="out: cannot be written")
        with error, atomic_folder(target) as folder:
            if tool == "python":
                (folder / "a.txt").write_bytes(bytes(20000))
            else:
                save_file({"x": torch.zeros(5000)}, folder / "x.safetensors")

    assert in_child(work) == 0
    assert contents(target) == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("case", ["new", "exchange", "beside_others", "settle"])
def test_a_crash_at_any_step_loses_nothing(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the process before its n-th change of the file system, for every n."""
    # the system outlives the process, so the disk does not matter here, only time
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    target = tmp_path / "out"
    new = "old" if case == "settle" else "new"
    seen = []
    status = 9
    while status == 9:
        assert len(seen) < 100
        reset(target, case)
        status = in_child(lambda: crash_at(len(seen), target, case))
        if (target / PENDING).is_dir():
            # the manifest says that all is there, so it is moved last
            waiting = os.listdir(target / PENDING)
            assert "manifest.json" in waiting or not waiting
        seen.append(contents(target) if target.exists() else "nothing")
        if case in ("beside_others", "settle"):
            assert (target / "notes").read_text() == "mine"
    assert status == 0
    before = "nothing" if case == "new" else "old"
    # first what was there, from some step on what was saved
    assert seen == sorted(seen, key=[before, new].index)
    assert {seen[0], seen[-1]} == {before, new}
    assert len(seen) > 5
    save(target, "next")
    assert contents(target) == "next"
    assert os.listdir(tmp_path) == ["out"]


def reset(target: Path, case: str) -> None:
    """Put an old folder there; for settle, one whose save was cut short."""
    for path in target.parent.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if case == "new":
        return
    save(target, "old", ("a.txt", "stale.txt"))
    if case != "exchange":
        (target / "notes").write_text("mine")
    if case == "settle":
        (target / PENDING).mkdir()
        fill(target / PENDING, "old", ("a.txt", "b.txt"))


def crash_at(count: int, target: Path, case: str) -> None:
    acts = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}
    left = count

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        # shutil.rmtree names files by their folder's descriptor
        inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        inside = inside or str(target.parent) in str(arguments[0])
        if (event in acts or writes) and inside:
            if left == 0:
                os._exit(9)
            left -= 1

    sys.addaudithook(hook)
    if case == "settle":
        settle(target)
    else:
        save(target, "new", ("a.txt", "b.txt"))


def test_a_text_replaces_regular_files_alone(tmp_path: Path) -> None:
    pipe, link, loop = (tmp_path / name for name in ("pipe", "link", "loop"))
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    loop.symlink_to(loop)
    for place in (pipe, link, loop, tmp_path, Path("/")):
        with pytest.raises(OSError, match="is no regular file"):
            atomic_text(place, "text")
    assert pipe.is_fifo() and link.is_symlink()
    with pytest.raises(OSError, match="there is no folder"):
        atomic_text(tmp_path / "no" / "file", "text")
    link.unlink()
    link.symlink_to(tmp_path / "file")
    for text in ("first", "second"):
        atomic_text(link, text)
        assert (tmp_path / "file").read_text() == text and link.is_symlink()
