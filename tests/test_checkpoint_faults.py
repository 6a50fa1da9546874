"""Broken, foreign and contested checkpoints: a clear error, and nothing is lost."""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import molora
from molora.checkpoint import (
    load_adapter_state,
    newest_valid,
    verify,
    write_manifest,
)
from molora.errors import CheckpointError
from molora.model import adapter_parameters

Factory = Any
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"
KEY = "model.layers.1.mlp.up_proj.experts.A"
FORK = multiprocessing.get_context("fork")


def wrapped(model: PreTrainedModel) -> Any:
    config = {
        "target_modules": ["q_proj", "up_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 4},
        "router": {"kind": "topk", "top_k": 2},
    }
    return molora.wrap(model, molora.AdapterConfig.from_dict(config))


@pytest.fixture
def out(tiny_llama: Factory, tmp_path: Path) -> Path:
    """A good checkpoint."""
    wrapped(tiny_llama()).save_pretrained(tmp_path / "run" / "out")
    return tmp_path / "run" / "out"


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that a failed load must leave as it was."""
    return {
        "class": type(model),
        "names": [name for name, _ in model.named_modules()],
        "weights": {n: p.tolist() for n, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "attributes": sorted(vars(model)),
    }


def refused(folder: Path, make: Factory, told: str) -> str:
    """Require that loading fails with these words and leaves the base alone."""
    base = make()
    base.model.embed_tokens.requires_grad_(False)
    before = state(base)
    with pytest.raises(CheckpointError, match=told) as caught:
        molora.load(base, folder)
    assert state(base) == before
    return str(caught.value)


def cut(size: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size(path.stat().st_size))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # behind the header of a safetensors file
    place = 8 + int.from_bytes(data[:8], "little") + 100
    data[place if place < len(data) else len(data) // 2] ^= 1
    path.write_bytes(data)


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


DAMAGE = {
    "half": cut(lambda size: size // 2),
    # a text file can miss its last line end
    "less": cut(lambda size: size - 2),
    "more": cut(lambda size: size + 1),
    "four": cut(lambda size: 4),
    "empty": cut(lambda size: 0),
    "flip": flip,
    "pointer": pointer,
    "missing": Path.unlink,
    "text": lambda path: path.write_text("no json"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", [TENSORS, CONFIG, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(
    tiny_llama: Factory, out: Path, name: str, damage: str
) -> None:
    DAMAGE[damage](out / name)
    told = refused(out, tiny_llama, name)
    assert str(out) in told
    if damage == "pointer":
        assert "git lfs pull" in told
    with pytest.raises(CheckpointError, match=name):
        verify(out)


@pytest.mark.parametrize("data", [b"", b"1234", (2**40).to_bytes(8, "little") + b"{}"])
def test_a_file_that_was_bad_when_it_was_listed(
    tiny_llama: Factory, out: Path, data: bytes
) -> None:
    (out / TENSORS).write_bytes(data)
    write_manifest(out)
    refused(out, tiny_llama, TENSORS)


def rewrite(path: Path, raw: dict[str, Any]) -> None:
    """Write a manifest by hand, with a checksum that holds."""
    rest = {name: value for name, value in raw.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    checksum = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps({**rest, "checksum": checksum}))


def test_no_path_leads_out_of_the_folder(tiny_llama: Factory, out: Path) -> None:
    raw = json.loads((out / MANIFEST).read_text())
    for name in ("../x", "/etc/passwd", "a/../../x", "", ".", "a\\b", "c:x", "a//b"):
        raw["files"][name] = {"size": 0, "sha256": ""}
        rewrite(out / MANIFEST, raw)
        refused(out, tiny_llama, "no path inside the folder")
        del raw["files"][name]


def test_every_value_of_the_manifest_counts(tiny_llama: Factory, out: Path) -> None:
    write_manifest(out, {"step": 12})
    text = (out / MANIFEST).read_text()
    for old, new in (('"step": 12', '"step": 13'), ('"torch": "2', '"torch": "3')):
        assert old in text
        (out / MANIFEST).write_text(text.replace(old, new))
        refused(out, tiny_llama, "its checksum differs from its content")
    (out / MANIFEST).write_text(text)
    assert verify(out)["extra"] == {"step": 12}


def test_files_have_to_be_listed(tiny_llama: Factory, out: Path) -> None:
    raw = json.loads((out / MANIFEST).read_text())
    del raw["files"][TENSORS]
    rewrite(out / MANIFEST, raw)
    refused(out, tiny_llama, f"does not list {TENSORS}")


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_format_says_what_to_install(
    tiny_llama: Factory, out: Path, version: int
) -> None:
    raw = json.loads((out / MANIFEST).read_text())
    raw["format_version"] = version
    raw["versions"]["molora"] = "7.0"
    raw["a_new_field"] = True
    (out / MANIFEST).write_text(json.dumps(raw))
    told = refused(out, tiny_llama, f"format version {version}.*reads up to 1")
    assert "Install molora 7.0 or newer" in told


def edit_config(out: Path, **changes: Any) -> None:
    raw = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps({**raw, **changes}))
    write_manifest(out)


def test_a_config_that_does_not_hold(tiny_llama: Factory, out: Path) -> None:
    adapter = json.loads((out / CONFIG).read_text())["adapter"]
    for change, told in (
        ({"format_version": 2}, "format version 2"),
        ({"format_version": None}, "format_version is None"),
        ({"adapter": {**adapter, "rank": 3}}, r"adapter\.rank: unknown field"),
        ({"adapter": adapter, "base": {}}, r"base\.config"),
    ):
        edit_config(out, **change)
        refused(out, tiny_llama, told)
        edit_config(out, format_version=1)


def edit_tensors(out: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(out / TENSORS)
    edit(tensors)
    save_file(tensors, out / TENSORS)
    write_manifest(out)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t: t.pop(KEY), f"lacks {KEY}"),
        (lambda t: t.update(extra=t[KEY].clone()), "has no place for: extra"),
        (
            lambda t: t.update({KEY: t[KEY][:, :2].clone()}),
            rf"{KEY} has the shape \(4, 2, 32\) instead of \(4, 4, 32\)",
        ),
        (lambda t: t.update({KEY: t[KEY].double()}), f"{KEY} is torch.float64"),
        (lambda t: t.update({KEY: t[KEY].long()}), f"{KEY} is torch.int64"),
        (lambda t: t[KEY][1, 2, 3].fill_(torch.nan), f"{KEY} holds NaN"),
        (lambda t: t[KEY][1, 2, 3].fill_(-torch.inf), f"{KEY} holds NaN or infinity"),
    ],
)
def test_tensors_are_checked_both_ways(
    tiny_llama: Factory, out: Path, edit: Any, told: str
) -> None:
    edit_tensors(out, edit)
    refused(out, tiny_llama, told)
    model = wrapped(tiny_llama())
    before = {name: p.clone() for name, p in adapter_parameters(model).items()}
    with pytest.raises(CheckpointError, match=told):
        load_adapter_state(model, out)
    after = adapter_parameters(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_folders_that_are_no_adapter(tiny_llama: Factory, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", tiny_llama, "file: is a file")
    refused(tmp_path / "none", tiny_llama, "none: does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tiny_llama, "holds no adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    refused(tmp_path / "base", tiny_llama, "holds no adapter")


def test_a_pickle_is_not_opened(tiny_llama: Factory, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / CONFIG).write_text('{"peft_type": "MOLORA", "format_version": 1}')
    torch.save({KEY: torch.zeros(1)}, folder / "adapter_model.bin")
    refused(folder, tiny_llama, r"adapter_model\.bin, a pickle, which can run code")


def test_an_adapter_of_peft_is_named_as_such(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    adapter = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapter.save_pretrained(tmp_path / "peft")
    refused(tmp_path / "peft", tiny_llama, "PEFT adapter of type 'LORA'")
    before = (tmp_path / "peft" / TENSORS).read_bytes()
    with pytest.raises(CheckpointError, match="would replace"):
        wrapped(tiny_llama()).save_pretrained(tmp_path / "peft")
    assert (tmp_path / "peft" / TENSORS).read_bytes() == before


# which one is left


def test_the_newest_valid_one(tiny_llama: Factory, out: Path) -> None:
    root = out.parent / "steps"
    for step in (3, 20, 100):
        shutil.copytree(out, root / f"checkpoint-{step}")
    shutil.copytree(out, root / "checkpoint-best")
    assert newest_valid(root) == (root / "checkpoint-100", [])
    flip(root / "checkpoint-100" / TENSORS)
    (root / "checkpoint-20" / MANIFEST).unlink()
    path, skipped = newest_valid(root)
    assert path == root / "checkpoint-3"
    assert [folder.name for folder, _ in skipped] == ["checkpoint-100", "checkpoint-20"]
    assert "checksum" in skipped[0][1] and "no manifest.json" in skipped[1][1]
    told = refused(root / "checkpoint-100", tiny_llama, TENSORS)
    assert f"newest valid checkpoint at hand is {root / 'checkpoint-3'}" in told
    assert "checkpoint-3" in refused(root, tiny_llama, "no adapter")
    (root / "checkpoint-3" / CONFIG).unlink()
    path, skipped = newest_valid(root)
    assert path is None and len(skipped) == 3
    assert newest_valid(root / "nowhere") == (None, [])


def test_without_steps_time_decides(out: Path) -> None:
    root = out.parent
    for age, name in enumerate(("c", "b", "a")):
        shutil.copytree(out, root / name)
        os.utime(root / name, (age, age))
    os.utime(out, (9, 9))
    (root / "notes").mkdir()
    assert newest_valid(root) == (out, [])
    flip(out / TENSORS)
    path, skipped = newest_valid(root)
    assert path == root / "a" and [folder for folder, _ in skipped] == [out]
