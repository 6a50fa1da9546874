"""The commands on a quantised base, from training to a plain model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import molora
from molora.base_models import load_base
from molora.cli import main
from molora.quantized import relative
from molora.saved import read_adapter

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "one", "two", "three", ":"]
IDS = torch.tensor([[1, 4, 5, 7, 6]])


def molora_cli(*arguments: object) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    code = stop.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, two rows to train on, and run.yaml, trained and collapsed."""
    folder = tmp_path_factory.mktemp("run")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder / "base")
    shape: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "base")
    rows = [("one :", "two"), ("two :", "three")]
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in rows]
    (folder / "count.jsonl").write_text("\n".join(lines) + "\n")
    task = {"name": "count", "train": "count.jsonl", "eval": "count.jsonl"}
    run = {
        "model": {"name": str(folder / "base"), "quantization": "nf4"},
        "adapter": {
            "target_modules": ["up_proj", "down_proj"],
            "experts": {"kind": "lora", "num_experts": 2, "r": 2},
            "router": {"kind": "soft"},
        },
        "data": {"max_length": 16, "tasks": [task]},
        "training": {
            "output_dir": str(folder / "out"),
            "optim": "paged_adamw_32bit",
            "max_steps": 3,
            "learning_rate": 0.02,
            "per_device_train_batch_size": 2,
            "report_to": "none",
            "disable_tqdm": True,
        },
        "collapse": {"method": "svd", "rank": 2, "calibration_rows": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    assert molora_cli("train", folder / "run.yaml") == 0
    assert molora_cli("collapse", folder / "run.yaml") == 0
    return folder


def test_every_command_reads_the_quantised_base(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run.yaml"
    saved = read_adapter(folder / "out" / "adapter").file.base
    assert {site.bfloat16 for site in saved.sites.values()} == {None}
    assert molora_cli("evaluate", run, "--json", folder / "scores.json") == 0
    scores = json.loads((folder / "scores.json").read_text())
    model = molora.load(
        load_base(str(folder / "base"), quantization="nf4")[0],
        folder / "out" / "adapter",
    ).eval()
    # the answer and the end of both rows
    total = 0.0
    for row in ([4, 7, 5, 2], [5, 7, 6, 2]):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        total -= float(logits[1, row[2]] + logits[2, row[3]])
    assert scores["count"]["loss"] == pytest.approx(total / 4, rel=1e-4)
    capsys.readouterr()
    assert molora_cli("generate", run, "--prompt", "one :", "--max-new-tokens", 2) == 0
    with torch.no_grad():
        first = int(model(input_ids=torch.tensor([[4, 7]])).logits[0, -1].argmax())
    assert WORDS[first] in capsys.readouterr().out or first < 4
    assert molora_cli("routes", run) == 0
    assert "Use of the experts" in capsys.readouterr().out


def test_merge_asks_which_base_is_meant(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, collapsed = folder / "run.yaml", folder / "out" / "collapsed"
    assert molora_cli("merge", run) == 2
    error = capsys.readouterr().err
    assert "'dequantised'" in error and "'original'" in error
    assert molora_cli("merge", run, "--base", "dequantized") == 2
    assert "neither" in capsys.readouterr().err
    # it was trained on the rounded weights, and those of the base are others
    for given in ([], ["--base", "dequantised"]):
        assert molora_cli("merge", run, "model.quantization=none", *given) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "trained on a quantised base" in error and "--base original" in error
    held = molora.load(
        load_base(str(folder / "base"), quantization="nf4")[0], collapsed
    ).eval()
    exact = molora.load(load_base(str(folder / "base"))[0], collapsed).eval()
    asked = ["model.quantization=none", "--base", "original"]
    output = folder / "asked"
    assert molora_cli("merge", run, *asked, "--output", output) == 0
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(output)(IDS).logits
        assert relative(got, exact(input_ids=IDS).logits) < 1e-5
    capsys.readouterr()
    for base, twin in {"dequantised": held, "original": exact}.items():
        output = folder / base
        assert molora_cli("merge", run, "--base", base, "--output", output) == 0
        told = " ".join(capsys.readouterr().err.split())
        for name in ("dequantised", "original"):
            mean = "0.00%" if name == base else r"[4-9]\.\d\d%"
            assert re.search(f"From the {name} weights .* are {mean} away", told)
        assert "quantization_config" not in (output / "config.json").read_text()
        with torch.no_grad():
            got = AutoModelForCausalLM.from_pretrained(output)(IDS).logits
            want = twin(input_ids=IDS).logits
        # layers without experts hold the weights asked for as well
        assert relative(got, want) < 1e-5


def test_a_run_from_loftq(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "loftq"
    sets = [
        "adapter.experts.init_lora_weights=loftq_iter_2",
        "adapter.experts.num_experts=1",
        "adapter.router={kind: none}",
        f"training.output_dir={out}",
        "training.save_steps=1",
    ]
    run = [folder / "run.yaml", *sets]
    assert molora_cli("train", *run) == 0
    assert molora_cli("train", *run, "training.max_steps=5", "--resume") == 0
    assert (out / "checkpoint-5").is_dir()
    trained = read_adapter(out / "adapter")
    assert trained.config.experts.init_lora_weights == "loftq_iter_2"
    assert molora_cli("evaluate", *run) == 0
    assert molora_cli("generate", *run, "--prompt", "one :") == 0
    base, twin = (
        load_base(str(folder / "base"), quantization=held)[0]
        for held in ("nf4", "none")
    )
    model = molora.load(base, out / "adapter", original=twin).eval()
    # the scores after training read the router anew, and the weights with it
    scored = [
        f"training.output_dir={folder / 'loftq_scored'}",
        "adapter.experts.num_experts=2",
        "adapter.router={kind: sigmoid}",
        "load_router={kind: phatgoose}",
    ]
    assert molora_cli("train", *run, *scored) == 0
    elsewhere = molora.load(twin, out / "adapter").eval()
    for choice, held in {"dequantised": model, "original": elsewhere}.items():
        merged = ["--base", choice, "--output", folder / f"loftq_{choice}"]
        assert molora_cli("merge", *run, *merged) == 0
        plain = AutoModelForCausalLM.from_pretrained(folder / f"loftq_{choice}")
        with torch.no_grad():
            want = held(input_ids=IDS).logits
            assert relative(plain(IDS).logits, want) < 1e-5
    capsys.readouterr()
    exported = ["--output", folder / "loftq_peft"]
    assert molora_cli("export", *run, *exported) == 2
    assert "model.quantization=none" in capsys.readouterr().err
    assert molora_cli("export", *run, "model.quantization=none", *exported) == 0
    assert molora_cli("train", *run, "model.quantization=none", "--resume") == 2
    assert "load the base with model.quantization: nf4" in " ".join(
        capsys.readouterr().err.split()
    )
