"""Saving and loading adapters: the same numbers come back, on the right base only."""

import copy
import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import molora
from molora.checkpoint import load_adapter_state, save_pretrained, verify
from molora.errors import CheckpointError, ConfigError, WrapError
from molora.model import adapter_parameters, sites

Factory = Any
IDS = torch.arange(1, 25).view(2, 12)
MIXTURE = {
    "target_modules": ["q_proj", "up_proj", "down_proj"],
    "experts": {"kind": "lora", "num_experts": 4, "r": 4},
    "router": {"kind": "topk", "top_k": 2},
    "balance": [{"kind": "switch", "weight": 0.01}],
}
SINGLE = {
    "target_modules": ["q_proj", "down_proj"],
    "experts": {"kind": "lora", "r": 4},
}
CONFIGS = {
    "mixture": MIXTURE,
    "single": SINGLE,
    "uneven": {
        "target_modules": "all-linear",
        "experts": {"kind": "lora", "num_experts": 3, "r": [2, 4, 8]},
        "router": {"kind": "soft", "temperature": 0.5},
        "overrides": [
            {"match": r"layers\.0\.", "experts": {"num_experts": 2, "r": 3}},
            {"match": "down_proj", "experts": {"shared": ["A"], "r": 2}},
        ],
    },
}


def wrapped(model: PreTrainedModel, config: dict[str, Any] = MIXTURE) -> Any:
    """Wrap, and give every parameter values as after training."""
    molora.wrap(model, molora.AdapterConfig.from_dict(config))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in sites(model).values():
            for parameter in site.experts.parameters():
                parameter.normal_(0, 0.2, generator=generator)
            for expert, rank in enumerate(site.experts.ranks):
                for factor in (site.experts.A, site.experts.Bt):
                    if factor.shape[0] > 1:
                        factor[expert, rank:] = 0
            for parameter in site.router.parameters() if site.router else ():
                parameter.normal_(0, 1, generator=generator)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_saved_comes_back_bit_for_bit(
    tiny_llama: Factory, tmp_path: Path, name: str
) -> None:
    model = wrapped(tiny_llama(), CONFIGS[name])
    model.save_pretrained(tmp_path / "out")
    again = molora.load(tiny_llama(), tmp_path / "out")
    mine, theirs = adapter_parameters(model), adapter_parameters(again)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert again.molora_config == model.molora_config
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(tiny_llama()))


def test_conv1d_and_bfloat16_come_back(tiny_gpt2: Factory, tmp_path: Path) -> None:
    config = {**MIXTURE, "target_modules": ["c_attn", "c_fc"]}
    model = wrapped(tiny_gpt2().bfloat16(), config)
    model.save_pretrained(tmp_path / "out")
    again = molora.load(tiny_gpt2().bfloat16(), tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


def test_the_files_hold_what_others_can_check(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama())
    model.config._name_or_path = "org/base"
    model.save_pretrained(tmp_path / "out")
    written = files(tmp_path / "out")
    assert sorted(written) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # 2 layers of 3 targets, each with A, Bt and a gate
    assert len(tensors) == 2 * 3 * 3
    gate = model.model.layers[1].mlp.up_proj.router.gate.weight
    saved = tensors["model.layers.1.mlp.up_proj.router.gate.weight"]
    assert saved.tolist() == gate.tolist()
    assert tensors["model.layers.0.mlp.up_proj.experts.A"].shape == (4, 4, 32)
    manifest = json.loads(written["manifest.json"])
    assert manifest == verify(tmp_path / "out")
    assert manifest["format_version"] == 1
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = written[name]
        digest = hashlib.sha256(data).hexdigest()
        assert manifest["files"].pop(name) == {"size": len(data), "sha256": digest}
    assert manifest["files"] == {}
    config = json.loads(written["adapter_config.json"])
    assert config["peft_type"] == "MOLORA"
    assert config["base_model_name_or_path"] == "org/base"
    assert stat.S_IMODE((tmp_path / "out" / "manifest.json").stat().st_mode) == (
        stat.S_IMODE((tmp_path / "out" / "adapter_model.safetensors").stat().st_mode)
    )


def test_merging_does_not_change_what_is_saved(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama().bfloat16(), SINGLE)
    model.save_pretrained(tmp_path / "before")
    molora.merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert files(tmp_path / "before") == files(tmp_path / "merged")
    with pytest.raises(WrapError, match="unmerge"):
        load_adapter_state(model, tmp_path / "merged")


def test_a_collapsed_mixture_comes_back(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama(), CONFIGS["uneven"])
    molora.collapse(model, "concat", show_progress=False)
    model.save_pretrained(tmp_path / "out")
    again = molora.load(tiny_llama(), tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


def test_mode_and_trainable(tiny_llama: Factory, tmp_path: Path) -> None:
    wrapped(tiny_llama()).save_pretrained(tmp_path / "out")
    frozen = molora.load(tiny_llama().train(), tmp_path / "out")
    assert frozen.training and all(s.training for s in sites(frozen).values())
    assert not any(p.requires_grad for p in frozen.parameters())
    free = molora.load(tiny_llama().eval(), tmp_path / "out", trainable=True)
    assert not free.training
    trained = {n for n, p in free.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(free))


def test_tensors_of_a_state_dict(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama())
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", state_dict=state, is_main_process=True)
    again = adapter_parameters(molora.load(tiny_llama(), tmp_path / "out"))
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(again[name], parameter + 1)
    state.pop("model.layers.0.mlp.up_proj.experts.A")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.experts\.A"):
        model.save_pretrained(tmp_path / "out", state_dict=state)


def test_arguments_that_mean_nothing(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama())
    for options in ({"push_to_hub": True}, {"max_shard_size": "1GB"}, {"x": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            model.save_pretrained(tmp_path / "out", **options)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(WrapError, match="wrap"):
        save_pretrained(tiny_llama(), tmp_path / "out")


def test_values_that_are_not_finite_are_not_saved(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama())
    model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.experts.A[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.experts\.A"):
        model.save_pretrained(tmp_path / "out")
    molora.load(tiny_llama(), tmp_path / "out")


def test_a_trainer_saves_beside_its_checkpoints(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_text("state")
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    model = wrapped(tiny_llama())
    trainer = Trainer(model, arguments)
    for _ in range(2):
        trainer.save_model()
        assert (tmp_path / "checkpoint-1" / "optimizer.pt").read_text() == "state"
        assert (tmp_path / "training_args.bin").exists()
        again = molora.load(tiny_llama(), tmp_path)
        assert torch.equal(logits(again), logits(model))


def test_a_folder_with_a_model_is_refused(tiny_llama: Factory, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    before = files(tmp_path / "base")
    with pytest.raises(CheckpointError, match="base: holds a model"):
        wrapped(tiny_llama()).save_pretrained(tmp_path / "base")
    assert files(tmp_path / "base") == before


def test_a_wrapped_base_is_an_error(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama())
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(WrapError, match="wrapped already"):
        molora.load(model, tmp_path / "out")


def test_state_goes_into_the_parameters_that_are_there(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama())
    model.save_pretrained(tmp_path / "out")
    before = logits(model)
    identities = {name: id(p) for name, p in adapter_parameters(model).items()}
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(1)
    load_adapter_state(model, tmp_path / "out")
    assert torch.equal(logits(model), before)
    assert identities == {name: id(p) for name, p in adapter_parameters(model).items()}
    assert all(p.requires_grad for p in adapter_parameters(model).values())


def test_state_of_another_config_or_base(tiny_llama: Factory, tmp_path: Path) -> None:
    wrapped(tiny_llama()).save_pretrained(tmp_path / "out")
    config = copy.deepcopy(MIXTURE)
    config["experts"]["lora_alpha"] = 32.0
    other = wrapped(tiny_llama(), config)
    with pytest.raises(CheckpointError, match=r"lora_alpha.*32\.0.*16\.0"):
        load_adapter_state(other, tmp_path / "out")
    moved = wrapped(tiny_llama(1))
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter_state(moved, tmp_path / "out")
    load_adapter_state(moved, tmp_path / "out", allow_base_mismatch=True)
    with pytest.raises(WrapError):
        load_adapter_state(tiny_llama(), tmp_path / "out")


@pytest.mark.slow
def test_smollm2_comes_back_bit_for_bit(tmp_path: Path) -> None:
    from molora.base_models import load_base

    config = {
        "target_modules": "all-linear",
        "experts": {"kind": "lora", "num_experts": 8, "r": 8},
        "router": {"kind": "topk", "top_k": 2},
    }
    model = wrapped(load_base()[0], config)
    assert len(sites(model)) == 210
    model.save_pretrained(tmp_path / "out")
    again = molora.load(load_base()[0], tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
