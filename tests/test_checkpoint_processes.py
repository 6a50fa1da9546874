"""Processes that die while they save, and that save to one folder."""

import multiprocessing
import os
import random
import resource
import signal
import time
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import molora
from molora.atomic import atomic_folder
from molora.checkpoint import newest_valid, verify, write_adapter
from molora.errors import CheckpointError
from molora.model import adapter_parameters

Factory = Any
TENSORS = "adapter_model.safetensors"
FORK = multiprocessing.get_context("fork")


def wrapped(model: PreTrainedModel) -> Any:
    config = {
        "target_modules": ["q_proj", "up_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 4},
        "router": {"kind": "topk", "top_k": 2},
    }
    return molora.wrap(model, molora.AdapterConfig.from_dict(config))


def stamp(model: PreTrainedModel, value: float) -> None:
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.fill_(value)


def stamped(folder: Path) -> int:
    """The one value that every number of a valid checkpoint has."""
    verify(folder)
    values = {v for t in load_file(folder / TENSORS).values() for v in t.unique()}
    assert len({float(v) for v in values}) == 1
    return int(values.pop())


def save_for_ever(model: PreTrainedModel, root: Path, first: int, link: Any) -> None:
    torch.set_num_threads(1)
    for step in count(first):
        stamp(model, step)
        model.save_pretrained(root / "steps" / f"checkpoint-{step}")
        model.save_pretrained(root / "out")
        model.save_pretrained(root / "mixed")
        link.send(step)


def test_kill_at_twenty_moments(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama())
    moments = random.Random(0)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "notes").write_text("mine")
    done = 0
    for _ in range(20):
        receiving, sending = FORK.Pipe(duplex=False)
        arguments = (model, tmp_path, done + 1, sending)
        child = FORK.Process(target=save_for_ever, args=arguments)
        child.start()
        done = receiving.recv()
        time.sleep(moments.uniform(0, 0.15))
        child.kill()
        child.join()
        done = last(receiving, sending, done)
        newest, skipped = newest_valid(tmp_path / "steps")
        assert newest is not None and skipped == []
        assert stamped(newest) == int(newest.name.split("-")[1])
        # what was reported is there; at most what came next is there as well
        found = [stamped(newest), *(stamped(tmp_path / n) for n in ("out", "mixed"))]
        assert set(found) <= {done, done + 1}
        done = max(found)
        assert (tmp_path / "mixed" / "notes").read_text() == "mine"
    os.truncate(newest / TENSORS, 1000)
    older, skipped = newest_valid(tmp_path / "steps")
    assert older is not None and stamped(older) < done
    assert [folder for folder, _ in skipped] == [newest]
    stamp(model, done + 1)
    for name in ("steps/checkpoint-0", "out", "mixed"):
        model.save_pretrained(tmp_path / name)
    # an empty lock file may stay where a process was killed with its work done
    left = [path.name for path in tmp_path.rglob(".*") if path.suffix != ".lock"]
    assert left == []


def last(receiving: Connection, sending: Connection, done: int) -> int:
    """The last number that was sent before the sender was killed."""
    sending.close()
    try:
        while True:
            done = receiving.recv()
    except EOFError:
        return done


def test_a_full_disk_leaves_the_last_save(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama())
    stamp(model, 1)
    model.save_pretrained(tmp_path / "out")
    stamp(model, 2)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
        with pytest.raises(CheckpointError, match="out: cannot be written"):
            model.save_pretrained(tmp_path / "out")

    child = FORK.Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert stamped(tmp_path / "out") == 1
    assert os.listdir(tmp_path) == ["out"]


def test_two_writers(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama())
    stamp(model, 1)
    model.save_pretrained(tmp_path / "out")
    receiving, sending = FORK.Pipe(duplex=False)

    def work() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            write_adapter(model, folder)
            sending.send(1)
            time.sleep(60)

    child = FORK.Process(target=work)
    child.start()
    receiving.recv()
    stamp(model, 2)
    with pytest.raises(CheckpointError, match="out: another process is saving"):
        model.save_pretrained(tmp_path / "out")
    assert stamped(tmp_path / "out") == 1
    child.kill()
    child.join()
    model.save_pretrained(tmp_path / "out")
    assert stamped(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]
