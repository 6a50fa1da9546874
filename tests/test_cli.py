"""The molora command: the whole job on a tiny model, and every kind of mistake."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import molora
from molora.cli import app, main
from molora.collapse import COLLAPSERS
from molora.config import read_yaml
from molora.model import sites
from molora.systems import SYSTEMS, System
from tests.registered import CONFIGS

COLOURS = ["red", "green", "blue"]
COUNT = ["one", "two", "three"]
WORDS = [*COLOURS, "circle", "square", *COUNT, "good", "bad", ":", "is", "the"]
COMMANDS = [c.callback.__name__ for c in app.registered_commands if c.callback]
RUN = {
    "seed": 3,
    "adapter": {
        "target_modules": ["up_proj", "down_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2, "lora_alpha": 8},
        "router": {"kind": "topk", "top_k": 2, "init_range": 0.5},
        "balance": [{"kind": "switch", "weight": 0.01}],
    },
    "data": {
        "max_length": 16,
        "tasks": [
            {
                "name": "judge",
                "train": "judge.jsonl",
                "eval": "judge.jsonl",
                "labels": ["good", "bad"],
            },
            {
                "name": "next",
                "train": "next.jsonl",
                "eval": "next.jsonl",
                "exact_match": True,
                "max_new_tokens": 3,
            },
        ],
    },
    "training": {
        "max_steps": 40,
        "save_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "report_to": "none",
        "disable_tqdm": True,
    },
    "collapse": {"method": "calibrated", "rank": 3, "calibration_rows": 12},
}


def molora_cli(*arguments: object) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    code = stop.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with a tokenizer of words, data of two tasks, and run.yaml."""
    folder = tmp_path_factory.mktemp("run")
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=32,
                initializer_range=0.4,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        ).save_pretrained(folder / "base")
    rows: dict[str, list[tuple[str, str]]] = {"judge": [], "next": []}
    for a, colour in enumerate(COLOURS):
        for b, count in enumerate(COUNT):
            judgement = "good" if (a + b) % 2 else "bad"
            rows["judge"].append((f"the {count} {colour} circle is :", judgement))
            rows["next"].append(
                (f"{count} {colour} :", f"{COUNT[(b + 1) % 3]} {colour}")
            )
    for name, pairs in rows.items():
        lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    run: dict[str, Any] = {**RUN, "model": {"name": str(folder / "base")}}
    run["training"] = {**RUN["training"], "output_dir": str(folder / "out")}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The run, trained."""
    assert molora_cli("train", folder / "run.yaml") == 0
    return folder / "run.yaml"


def load(folder: Path, adapter: str | Path = "adapter") -> PreTrainedModel:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return molora.load(base, folder / "out" / adapter).eval()


def words_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_train_saves_resumes_and_protects(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out"
    assert {"adapter", "checkpoint-20", "checkpoint-40"} <= {
        p.name for p in out.iterdir()
    }
    first = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    assert molora_cli("train", run) == 2
    assert "add" not in capsys.readouterr().out
    assert molora_cli("train", run, f"training.output_dir={folder / 'again'}") == 0
    printed = words_of(capsys.readouterr().out)
    # rows, tokens, supervised (a word or two, and the end), share, cut, left out
    assert ["judge", "9", "72", "18", "50.0%", "0", "0"] in _cells(printed)
    assert ["next", "9", "54", "27", "50.0%", "0", "0"] in _cells(printed)
    # the same seed gives the same adapter; so does a run that stopped at step 20
    again = folder / "again"
    assert (again / "adapter" / "adapter_model.safetensors").read_bytes() == first
    shutil.rmtree(again / "checkpoint-40")
    shutil.rmtree(again / "adapter")
    override = f"training.output_dir={again}"
    assert molora_cli("train", run, override, "--resume") == 0
    assert (again / "adapter" / "adapter_model.safetensors").read_bytes() == first


def test_train_evaluates_in_between_when_asked(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "between"
    changes = [
        "eval_strategy=steps",
        "eval_steps=1",
        "max_steps=1",
        f"output_dir={out}",
    ]
    assert molora_cli("train", run, *[f"training.{c}" for c in changes]) == 0
    state = json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())
    losses = [log["eval_loss"] for log in state["log_history"] if "eval_loss" in log]
    assert len(losses) == 1 and 0 < losses[0] < 10


def _cells(lines: list[list[str]]) -> list[list[str]]:
    """Table rows without their borders."""
    return [[cell for cell in line if cell not in "│|┃"] for line in lines]


def loss_by_hand(model: PreTrainedModel, folder: Path, name: str) -> float:
    """Mean negative log-likelihood of completion and end, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    total, count = 0.0, 0
    for line in (folder / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"])["input_ids"] + [2]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        for i, token in enumerate(answer):
            total -= float(logits[len(prompt) + i - 1, token])
            count += 1
    return total / count


def test_evaluate_gives_the_losses(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = folder / "scores.json"
    assert molora_cli("evaluate", run, "--json", scores) == 0
    values = json.loads(scores.read_text())
    model = load(folder)
    for name in ("judge", "next"):
        assert values[name]["n"] == 9
        want = loss_by_hand(model, folder, name)
        assert values[name]["loss"] == pytest.approx(want, abs=1e-5)
        with molora.disabled(model):
            assert want < loss_by_hand(model, folder, name) - 0.3
    assert (values["judge"]["exact_match"], values["next"]["accuracy"]) == (None, None)
    text = capsys.readouterr().out
    assert f"{values['judge']['loss']:.4f}" in text
    assert f"{values['judge']['accuracy']:.1%}" in text


def test_generate_in_a_padded_batch_equals_each_prompt_alone(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["two red :", "the three blue circle is :"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    for beams in (1, 3):
        options = ["--max-new-tokens", 3, "--num-beams", beams, "--task", "next"]
        assert molora_cli("generate", run, *flags, *options) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines[::2]] == [
            ["prompt", "1"],
            ["prompt", "2"],
        ]
        answers = lines[1::2]
        model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder / "base")
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            want = model.generate(
                ids, max_new_tokens=3, num_beams=beams, do_sample=False
            )[0, ids.shape[1] :]
            assert answer == tokenizer.decode(want, skip_special_tokens=True).strip()
            assert answer


def test_generate_reads_standard_input(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for arguments in ([], ["--prompt", "one red :"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("one red :\n"))
        assert molora_cli("generate", run, "--max-new-tokens", 4, *arguments) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_routes_of_tasks_and_of_a_prompt(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png, numbers = folder / "routes.png", folder / "routes.json"
    options = ["--prompt", "two red :", "--limit", 4, "--png", png, "--json", numbers]
    assert molora_cli("routes", run, *options) == 0
    values = json.loads(numbers.read_text())
    # four rows each: six words, a label and the end; three words, two and the end
    tokens = {name: task["tokens"] for name, task in values["tasks"].items()}
    assert tokens == {"judge": 32, "next": 24}
    assert png.read_bytes().startswith(b"\x89PNG")
    model, ids = load(folder), torch.tensor([[9 + 1, 4, 14]])
    with molora.record_routing(model) as trace, torch.no_grad():
        model(ids)
    gates = torch.stack([r.gates[0][0] for r in trace.sites.values()]).mean(0)
    (prompt,) = values["prompts"]
    assert prompt["tokens"] == ["two", "red", ":"]
    assert prompt["experts"] == gates.argmax(1).tolist()
    text = capsys.readouterr().out
    assert (
        "".join(
            f"{word}[{expert}]"
            for word, expert in zip(prompt["tokens"], prompt["experts"], strict=True)
        )
        in text
    )
    assert "use of the experts by layer" in text.lower()


def test_routes_as_a_page(folder: Path, run: Path) -> None:
    html, numbers = folder / "routes.html", folder / "routes.json"
    out = folder / "logged"
    changes = [f"training.output_dir={out}", "training.max_steps=4"]
    assert molora_cli("train", run, *changes, "training.logging_steps=2") == 0
    files = ["--html", html, "--json", numbers]
    options = [*changes, "--prompt", "two red :", *files]
    assert molora_cli("routes", run, *options) == 0
    embedded = '<script type="application/json" id="data">'
    shown = json.loads(html.read_text().split(embedded)[1].split("</script>")[0])
    values = json.loads(numbers.read_text())
    # with a page the tasks are routed beside the prompt
    assert [task["name"] for task in shown["tasks"]] == ["all tokens", "judge", "next"]
    for task in shown["tasks"][1:]:
        want = list(values["tasks"][task["name"]]["sites"].items())
        assert [place["path"] for place in shown["places"]] == [
            path for path, _ in want
        ]
        for found, (_, use) in zip(task["sites"], want, strict=True):
            assert found["share"] == pytest.approx(use["share"], rel=1e-5)
    log = [
        json.loads(line)
        for line in (out / "routing_log.jsonl").read_text().splitlines()
    ]
    path = shown["places"][2]["path"]
    rows = [row for row in log if row["site"] == path]
    assert shown["log"]["steps"] == [row["step"] for row in rows] == [2, 4]
    assert shown["log"]["sites"][2]["share"] == [row["share"] for row in rows]
    (text,) = shown["texts"]
    assert text["tokens"] == ["two", "red", ":"]
    model = load(folder, out / "adapter")
    with molora.record_routing(model) as trace, torch.no_grad():
        model(torch.tensor([[10, 4, 14]]))
    gates = trace.sites[path].gates[0][0]
    assert torch.allclose(torch.tensor(text["gates"][2]), gates, atol=1e-5)
    assert molora_cli("routes", run, "--html", folder / "no" / "page.html") == 2


def test_routes_of_one_layer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert molora_cli("routes", run, "--prompt", "two red :", "--layer", 1) == 0
    assert molora_cli("routes", run, "--prompt", "two red :", "--layer", 2) == 2
    assert "Routed layers: 0, 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def collapsed(folder: Path, run: Path) -> Path:
    assert molora_cli("collapse", run) == 0
    return folder / "out" / "collapsed"


def test_collapse_makes_one_adapter_and_tells_the_cost(
    folder: Path, collapsed: Path
) -> None:
    model = load(folder, "collapsed")
    assert {site.experts.num_experts for site in sites(model).values()} == {1}
    report = json.loads((folder / "out" / "collapsed.json").read_text())
    assert report["method"] == "calibrated"
    assert report["tokens_fit"] and report["tokens_held"]
    for name in ("judge", "next"):
        before = loss_by_hand(load(folder), folder, name)
        after = loss_by_hand(model, folder, name)
        assert report["losses"][name]["before"] == pytest.approx(before, abs=1e-5)
        assert report["losses"][name]["after"] == pytest.approx(after, abs=1e-5)


def test_merge_and_export_give_the_collapsed_logits(
    folder: Path, run: Path, collapsed: Path
) -> None:
    ids = torch.tensor([[5, 9, 14, 4]])
    want = load(folder, "collapsed")(ids).logits
    with torch.no_grad():
        # a second time replaces what the first wrote
        for _ in range(2):
            assert molora_cli("merge", run) == 0
            assert molora_cli("export", run) == 0
        merged = AutoModelForCausalLM.from_pretrained(folder / "out" / "merged")
        torch.testing.assert_close(merged(ids).logits, want, atol=1e-5, rtol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        peft = PeftModel.from_pretrained(base, folder / "out" / "peft")
        torch.testing.assert_close(peft(ids).logits, want, atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "merged")
    assert tokenizer("two red")["input_ids"] == [10, 4]


def test_export_as_a_lora_of_a_rank_tells_the_cost(
    folder: Path, run: Path, collapsed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "out" / "rank1"
    assert molora_cli("export", run, "--rank", "1", "--output", output) == 0
    told = capsys.readouterr().out
    assert "as a LoRA of rank 1" in told and "relative error" in told
    worst = 0.0
    for site in sites(load(folder, "collapsed")).values():
        s = torch.linalg.svdvals(site.delta_weight().double())
        worst = max(worst, float((s[1:].square().sum() / s.square().sum()).sqrt()))
    assert f"{worst:.2e}" in told and worst > 0.01
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 1
    assert molora_cli("export", run, "--rank", "0", "--output", output) == 2


def test_foreign_folders_are_left_alone(
    folder: Path, run: Path, collapsed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_text("mine")
    assert molora_cli("merge", run, "--output", foreign) == 2
    assert str(foreign) in capsys.readouterr().err
    assert (foreign / "model.safetensors").read_text() == "mine"


def test_a_mixture_is_not_merged(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, output = folder / "out" / "adapter", folder / "no"
    assert molora_cli("merge", run, "--adapter", adapter, "--output", output) == 2
    assert "4 experts" in capsys.readouterr().err
    assert not output.exists()


def test_inspect_prints_sizes_and_finds_damage(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = folder / "out" / "adapter"
    assert molora_cli("inspect", adapter) == 0
    text = capsys.readouterr().out
    lines = _cells(words_of(text))
    # 4 experts of 2 x (16 + 32) values, and gates of 4 x 16 and 4 x 32
    assert ["up_proj", "4", "2", "topk", "448", "0-1"] in lines
    assert ["down_proj", "4", "2", "topk", "512", "0-1"] in lines
    assert "values in experts: 1,536" in text
    assert "values in router: 384" in text
    assert "lora_alpha: 8.0" in text
    broken = folder / "broken"
    shutil.copytree(adapter, broken)
    data = bytearray((broken / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "adapter_model.safetensors").write_bytes(data)
    assert molora_cli("inspect", broken) == 2
    assert "checksum" in capsys.readouterr().err


SIZES = {
    "oft": ({"oft_block_size": 4}, "-"),
    "adalora": ({"init_r": 3}, "3"),
    "dora": ({"inner": {"kind": "lora", "r": 5}}, "5"),
    "lokr": ({"r": None, "alpha": 2.0}, "-"),
    "ia3": ({}, "-"),
}
"""Settings of a family, and the rank that is told."""


@pytest.mark.parametrize("kind", SIZES)
def test_inspect_tells_the_rank_of_what_has_one(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, told = SIZES[kind]
    raw = {"target_modules": ["up_proj"], "experts": {"kind": kind, **settings}}
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    molora.wrap(model, molora.AdapterConfig.from_dict(raw)).save_pretrained(tmp_path)
    assert molora_cli("inspect", tmp_path) == 0
    (line,) = (c for c in _cells(words_of(capsys.readouterr().out)) if "up_proj" in c)
    assert line[:4] == ["up_proj", "1", told, "none"]


def test_validate_counts_rows_and_names_every_broken_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run.yaml"
    assert molora_cli("validate", run) == 0
    lines = _cells(words_of(capsys.readouterr().out))
    assert ["judge", "9", "9"] in lines and ["valid"] in lines
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"pro\n')
    changes = ["data.tasks.0.train=bad.jsonl", "data.tasks.1.eval=judg.jsonl"]
    assert molora_cli("validate", run, *changes) == 2
    error = capsys.readouterr().err
    assert "bad.jsonl:2: invalid JSON" in error
    assert "judg.jsonl. Did you mean 'judge.jsonl'" in error


def test_deep_validation_loads_the_base(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run.yaml"
    assert molora_cli("validate", run, "--deep") == 0
    assert "4 target layers, 1,920 trained values" in capsys.readouterr().err
    wrong = "adapter.target_modules=[up_prj]"
    assert molora_cli("validate", run, wrong) == 0
    assert molora_cli("validate", run, wrong, "--deep") == 2
    assert "Did you mean 'up_proj'" in capsys.readouterr().err


def test_clusters_tells_a_number_of_experts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = folder / "run.yaml", folder / "clusters.json"
    options = ["--rule", "silhouette", "--largest", 5, "--rows", 18, "--json", file]
    assert molora_cli("clusters", run, *options) == 0
    found = json.loads(file.read_text())
    assert f"num_experts: {found['num_experts']}" in capsys.readouterr().out
    # two tasks whose rows end alike
    assert found["num_experts"] == 2
    assert sum(found["sizes"]) == 18
    assert list(found["inertia"]) == ["1", "2", "3", "4", "5"]
    assert molora_cli("clusters", run, "--rows", 4) == 2
    assert "4 rows cannot show up to 16" in capsys.readouterr().err


def test_new_experts_are_not_trained_in_part(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["adapter.train=router", f"training.output_dir={folder / 'part'}"]
    assert molora_cli("train", folder / "run.yaml", *changes) == 2
    assert "adapter.train=router: this command starts" in capsys.readouterr().err


def test_methods_lists_every_name_with_its_paper(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert molora_cli("methods") == 0
    lines = _cells(words_of(capsys.readouterr().out))
    for row in (
        ["experts", "lora", "arXiv:2106.09685"],
        ["router", "topk", "arXiv:1701.06538"],
        ["balance", "switch", "arXiv:2101.03961"],
        ["collapse", "calibrated", "arXiv:2212.09849"],
    ):
        assert any(line[:3] == row for line in lines)
    for system in SYSTEMS:
        # a cell may be folded at a space
        row = ["system", system.name.split(" ")[0], system.paper]
        assert any(line[:3] == row for line in lines), system.name
    text = COLLAPSERS.entries()["select"].limitations
    assert text == "what the other experts learned is lost."


@pytest.mark.parametrize("system", SYSTEMS, ids=[s.name for s in SYSTEMS])
def test_a_system_is_what_its_yaml_says(system: System) -> None:
    if system.config is not None:
        path = CONFIGS / system.config
        head = path.read_text().partition("\nseed:")[0]
        assert system.paper in head
        kind = read_yaml(path)["adapter"]["router"]["kind"]
        assert kind in system.made_of or system.name == "Mixture-of-LoRAs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "RUN", "sede=1"], "sede: unknown field. Did you mean 'seed'"),
        (
            ["train", "RUN", "adapter.experts.rnk=1"],
            "adapter.experts.rnk: unknown field",
        ),
        (["train", "RUN", "data.tasks.0.nam=x"], "data.tasks.0.nam: unknown field"),
        (["train", "RUN", "training.lerning_rate=1"], "Did you mean 'learning_rate'"),
        (["train", "RUN", "collapse.rnk=1"], "collapse.rnk: unknown field"),
        (["evaluate", "RUN", "model.name=/no/base"], "/no/base"),
        (["train", "RUN", "--resum"], "--resume"),
        (["train", "RUN", "--resume", "training.output_dir=OUT/x"], "no valid checkp"),
        (["train", "run.yml"], "run.yml: no such file"),
        (["trian", "RUN"], "Did you mean 'train'"),
        (["train"], "CONFIG.yaml"),
        (["evaluate", "RUN", "training.output_dir=OUT/x"], "molora train"),
        (["evaluate", "RUN", "--adapter", "nowhere"], "no adapter in nowhere"),
        (["evaluate", "RUN", "--json", "/no/x.json"], "/no/x.json: cannot be written"),
        (["generate", "RUN", "--prompt", ""], "prompt 1: prompt is empty"),
        (["generate", "RUN", "--prompt", "a", "--num-beams", "0"], "num-beams"),
        (["generate", "RUN", "--prompt", "a", "--task", "nxt"], "Did you mean 'next'"),
        (["generate", "RUN", "--prompt", "a " * 40], "reads at most 32"),
        (["routes", "RUN", "--limit", "0"], "nothing to route"),
        (["routes", "RUN", "--html", "/"], "/: cannot be written: is no regular"),
        (["routes", "RUN", "--html", "/no/x.html"], "there is no folder /no"),
        (["routes", "RUN", "--json", "OUT"], "OUT: cannot be written: is a folder"),
        (["routes", "RUN", "--png", "/no/x.png"], "there is no folder /no"),
        (["collapse", "RUN", "collapse.method=svdd"], "Did you mean 'svd'"),
        (["inspect", "nowhere"], "no adapter in nowhere"),
        (["inspect", "OUT"], "OUT"),
    ],
)
def test_a_mistake_ends_with_2_and_one_message(
    folder: Path,
    run: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUN": str(run), "OUT": str(folder / "out")}
    for name, place in places.items():
        arguments = [a.replace(name, place) for a in arguments]
        message = message.replace(name, place)
    capsys.readouterr()
    assert molora_cli(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.count("Error: ") == 1


@pytest.mark.parametrize("flag", ["--html", "--json", "--png"])
def test_files_are_checked_before_anything_is_loaded(
    run: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    monkeypatch.setattr("molora.commands.session.load_base", loads.append)
    assert molora_cli("routes", run, flag, "/no/file") == 2
    assert loads == []


@pytest.fixture(scope="module")
def named(folder: Path, run: Path) -> list[str]:
    """Settings of a run whose rows name their adapter, trained for one step."""
    settings = [
        f"training.output_dir={folder / 'named'}",
        "training.max_steps=1",
        "adapter.experts.num_experts=2",
        "adapter.router={kind: adapter, adapters: [judge, next]}",
        "adapter.balance=[]",
    ]
    assert molora_cli("train", run, *settings) == 0
    return settings


def test_routers_that_read_the_task_need_one(
    run: Path,
    named: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {}
    short = ["--prompt", "two red :", "--max-new-tokens", 3]
    for task in ("judge", "next", "base"):
        capsys.readouterr()
        assert molora_cli("generate", run, *named, *short, "--task", task) == 0
        answers[task] = capsys.readouterr().out
    numbers = tmp_path / "numbers.json"
    files = ["--json", numbers, "--html", tmp_path / "page.html", "--limit", 2]
    prompt = ["--prompt", "two red :"]
    assert molora_cli("routes", run, *named, *prompt, "--task", "next", *files) == 0
    assert json.loads(numbers.read_text())["prompts"][0]["experts"] == [1, 1, 1]
    assert molora_cli("routes", run, *named, "--limit", 2) == 0
    # nothing is loaded, and so nothing routed
    monkeypatch.setattr("molora.commands.session.load_base", None)
    for command in (["generate", *short[:2]], ["routes", *prompt, *files[2:4]]):
        for task, message in {"": "with --task", "nxt": "Did you mean 'next'"}.items():
            given = ["--task", task] if task else []
            capsys.readouterr()
            assert molora_cli(command[0], run, *named, *command[1:], *given) == 2
            error = capsys.readouterr().err
            assert message in error and "Tasks: judge, next, base" in error


def test_another_exception_keeps_its_traceback(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("our bug")

    monkeypatch.setattr("molora.commands.show.validate", broken)
    with pytest.raises(RuntimeError, match="our bug"):
        main(["validate", str(run)])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_gives_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert molora_cli(command, "--help") == 0
    assert f"Example: molora {command}" in capsys.readouterr().out


def test_demo_passes_its_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("molora.demo.run_demo", lambda *args: calls.append(args))
    arguments = ["demo", "--output", tmp_path, "--steps", 4, "--seed", 2]
    assert molora_cli(*arguments, "model.dtype=float32") == 0
    want = ["model.dtype=float32", "training.max_steps=4", "seed=2"]
    assert calls == [(tmp_path, want)]


@pytest.mark.slow
def test_the_installed_command_tells_a_mistake(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("molora")
    done = subprocess.run(
        [script, "train", "none.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    # before it, libraries may say what they miss on this machine
    assert done.stderr.endswith("Error: none.yaml: no such file.\n")
    assert "Traceback" not in done.stderr
