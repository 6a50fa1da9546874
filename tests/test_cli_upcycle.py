"""molora import, molora grow and training from what they wrote, on a tiny model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import molora
import tests.test_cli as cli
from molora.saved import read_settings

folder = cli.folder
IDS = torch.tensor([[1, 5, 6, 7, 8, 9]])


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


@pytest.fixture(scope="module")
def loras(folder: Path) -> list[Path]:
    made = []
    for number in range(3):
        config = LoraConfig(r=number + 1, target_modules=["up_proj", "down_proj"])
        model: Any = get_peft_model(base(folder), config)
        g = torch.Generator().manual_seed(number)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data.normal_(0, 0.3, generator=g)
        model.save_pretrained(folder / f"lora_{number}")
        made.append(folder / f"lora_{number}")
    return made


def test_adapters_of_another_base_are_forced(
    folder: Path, loras: list[Path], tmp_path: Path, capfd: Any
) -> None:
    shutil.copytree(loras[0], tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    other = json.loads(file.read_text()) | {"base_model_name_or_path": "some/other"}
    file.write_text(json.dumps(other))
    given = ["import", folder / "base", tmp_path / "lora", "--output", tmp_path / "o"]
    assert cli.molora_cli(*given) == 2
    assert "--allow-base-mismatch" in capfd.readouterr().err
    assert cli.molora_cli(*given, "--allow-base-mismatch") == 0
    got = molora.load(base(folder), tmp_path / "o")
    assert (logits(got) - logits(base(folder))).abs().max() > 1e-3


@pytest.fixture(scope="module")
def imported(folder: Path, loras: list[Path]) -> Path:
    out = folder / "imported"
    router = "{kind: topk, top_k: 2, init_range: 0.5}"
    given = ["import", folder / "base", *loras, "--router", router]
    assert cli.molora_cli(*given, "--train", "router", "--output", out) == 0
    return out


def run_from(folder: Path, start: Path, name: str, **adapter: Any) -> Path:
    """A run of two steps that starts from a folder."""
    raw = yaml.safe_load((folder / "run.yaml").read_text())
    training = raw["training"] | {"max_steps": 2, "output_dir": str(folder / name)}
    raw |= {"start_from": str(start), "adapter": adapter, "training": training}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    return folder / f"{name}.yaml"


def tensors(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def test_import_is_import_peft(
    folder: Path, loras: list[Path], imported: Path, capfd: Any
) -> None:
    router = {"kind": "topk", "top_k": 2, "init_range": 0.5}
    want = molora.import_peft(base(folder), loras, router=router, train="router")
    got = molora.load(base(folder), imported)
    assert torch.equal(logits(got), logits(want))
    assert got.molora_config == want.molora_config
    general = ["--general", loras[2], "--general-form", "delta", "--router", "soft"]
    out = ["--output", folder / "general", "--lora-dropout", 0.1, "--seed", 5]
    assert cli.molora_cli("import", folder / "base", *loras[:2], *general, *out) == 0
    told = capfd.readouterr().err
    assert "4 target layers, 2 experts each" in told and "start_from=" in told
    want = molora.import_peft(
        base(folder),
        loras[:2],
        router={"kind": "soft"},
        general=loras[2:],
        lora_dropout=0.1,
        seed=5,
    )
    got = molora.load(base(folder), folder / "general")
    assert torch.equal(logits(got), logits(want))
    assert got.molora_config == want.molora_config


def test_routers_are_trained_over_frozen_experts(
    folder: Path, imported: Path, capfd: Any
) -> None:
    run = run_from(folder, imported, "routers", router={"top_k": 3})
    assert cli.molora_cli("validate", run, "--deep") == 0
    assert cli.molora_cli("train", run) == 0
    assert "4 target layers, 288 trained values" in capfd.readouterr().err
    before, after = tensors(imported), tensors(folder / "routers" / "adapter")
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert torch.equal(values, after[name]) == (".experts." in name), name
    config = read_settings(folder / "routers" / "adapter")
    assert config.train == "router" and config.router.to_dict()["top_k"] == 3
    # a second run goes on from the checkpoint, on the same start
    more = ["training.max_steps=3", "--resume"]
    assert cli.molora_cli("train", run, *more) == 0
    assert "trained values" in capfd.readouterr().err


def test_the_grown_expert_is_trained_alone(folder: Path, imported: Path) -> None:
    run, out = folder / "run.yaml", folder / "grown"
    given = ["--adapter", imported, "--output", out]
    assert cli.molora_cli("grow", run, *given) == 0
    want = molora.grow(molora.load(base(folder), imported), seed=3)
    assert torch.equal(logits(molora.load(base(folder), out)), logits(want))
    # of alphas, r and router: the settings of the folder
    assert cli.molora_cli("train", run_from(folder, out, "newest")) == 0
    old, new = tensors(out), tensors(folder / "newest" / "adapter")
    for name, values in old.items():
        kept = name.endswith(".original0")
        assert torch.equal(values, new[name]) == kept, name


def test_another_router_for_inference(
    folder: Path, loras: list[Path], capfd: Any
) -> None:
    """Vectors learned by sigmoid gates ask for tasks; phatgoose uses them without."""
    out, run = folder / "gates", folder / "run.yaml"
    router = "{kind: sigmoid, task_experts: {judge: 0, next: 1}}"
    given = ["import", folder / "base", *loras[:2], "--router", router]
    assert cli.molora_cli(*given, "--output", out) == 0
    ask = ["--adapter", out, "--prompt", "one red :", "--max-new-tokens", 2]
    assert cli.molora_cli("generate", run, *ask) == 2
    assert "give it with --task" in capfd.readouterr().err
    goose = ["load_router.kind=phatgoose", "load_router.top_k=2"]
    assert cli.molora_cli("generate", run, *goose, *ask) == 0
    capfd.readouterr()
    assert cli.molora_cli("generate", run, "load_router.kind=adamole", *ask) == 2
    told = capfd.readouterr().err
    assert "gate.weight (2, 16)" in told and "Traceback" not in told
    # after training, the scores are those of molora evaluate
    trained = run_from(folder, out, "goose")
    assert cli.molora_cli("train", trained, "load_router.kind=tokp") == 2
    assert "unknown router 'tokp'" in capfd.readouterr().err
    assert not (folder / "goose").exists()
    assert cli.molora_cli("train", trained, *goose) == 0
    told = cli.words_of(capfd.readouterr().out)
    assert cli.molora_cli("evaluate", trained, *goose) == 0
    scores = cli.words_of(capfd.readouterr().out)
    assert ["Evaluation"] in scores and told[-len(scores) :] == scores


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no folder": (["import", "BASE", "no/lora", "--output", "x"], "no such folder"),
    "no LoRA": (["import", "BASE", "BASE", "--output", "x"], "adapter_config.json"),
    "no router": (["import", "BASE", "A", "B", "--output", "x"], "router"),
    "wrong kind": (["import", "BASE", "A", "B", "--router", "sofd", "--output", "x"],
        "soft"),
    "no YAML": (["import", "BASE", "A", "--router", "{kind", "--output", "x"],
        "no valid YAML"),
    "no router folder": (["import", "BASE", "A", "--router", "a/b", "--output", "x"],
        "no such folder"),
    "itself": (["import", "BASE", "A", "--output", "A"], "would be lost"),
    "nothing to grow": (["grow", "RUN", "--adapter", "no/adapter"], "no adapter in"),
    "task": (["grow", "RUN", "--adapter", "IMPORTED", "--task", "sql"], "drop it"),
    "start": (["train", "RUN", "start_from=no/adapter"], "does not exist"),
    "start with targets": (["train", "RUN", "start_from=IMPORTED"],
        "adapter.experts: belongs to the saved adapter"),
    "start no text": (["train", "RUN", "start_from=3"], "start_from"),
    "frozen": (["train", "RUN", "adapter.train=router"], "with start_from"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_message(
    case: str, folder: Path, loras: list[Path], imported: Path, capfd: Any
) -> None:
    names = {
        "BASE": folder / "base",
        "A": loras[0],
        "B": loras[1],
        "RUN": folder / "run.yaml",
        "IMPORTED": imported,
    }
    arguments, told = MISTAKES[case]
    filled = []
    for argument in arguments:
        key, equals, value = argument.rpartition("=")
        filled.append(f"{key}{equals}{names.get(value, value)}")
    assert cli.molora_cli(*filled) == 2
    error = capfd.readouterr().err
    assert "Error: " in error and told in error
    assert "Traceback" not in error
    assert not Path("x").exists()


@pytest.mark.parametrize("command", ["import", "grow"])
def test_help_gives_an_example(command: str, capfd: Any) -> None:
    assert cli.molora_cli(command, "--help") == 0
    assert f"Example: molora {command}" in capfd.readouterr().out
