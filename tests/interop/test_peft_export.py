"""An exported adapter gives the same logits in PEFT, which reads it by its own code."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import molora
from molora.errors import CheckpointError, WrapError
from molora.model import adapter_parameters, sites

Factory = Any
IDS = torch.arange(1, 25).view(2, 12)
UNEVEN = {
    "experts": {"kind": "lora", "r": 4, "lora_alpha": 12, "use_rslora": True},
    "overrides": [{"match": r"\.0\.", "experts": {"r": 2, "lora_alpha": 1.5}}],
}


def trained(model: PreTrainedModel, **config: Any) -> Any:
    molora.wrap(model, molora.AdapterConfig.from_dict(config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(0, 0.1, generator=generator)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_computes_the_same(
    tiny_llama: Factory,
    tiny_gpt2: Factory,
    tmp_path: Path,
    architecture: str,
    dtype: torch.dtype,
) -> None:
    make = {"llama": tiny_llama, "gpt2": tiny_gpt2}[architecture]
    model = trained(make().to(dtype), target_modules="all-linear", **UNEVEN)
    molora.export_peft(model, tmp_path / "out")
    theirs = PeftModel.from_pretrained(make().to(dtype), tmp_path / "out").eval()
    error = (logits(theirs) - logits(model)).abs().max()
    change = (logits(make().to(dtype)) - logits(model)).abs().max()
    # bfloat16 keeps 8 bits, and PEFT computes its update in float32
    bound = 1e-5 if dtype == torch.float32 else 2**-5 * logits(model).abs().max()
    assert error <= bound
    assert change > 5 * bound


def test_the_files_are_what_one_rank_readers_expect(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = trained(tiny_llama(), target_modules=["q_proj", "down_proj"], **UNEVEN)
    model.config._name_or_path = "org/base"
    molora.export_peft(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert config["r"] == config["lora_alpha"] == 4
    assert config["bias"] == "none" and config["fan_in_fan_out"] is False
    assert not config["use_dora"] and not config["use_rslora"]
    assert config["base_model_name_or_path"] == "org/base"
    assert sorted(config["target_modules"]) == sorted(sites(model))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(sites(model))
    path = "model.layers.0.mlp.down_proj"
    experts = sites(model)[path].experts
    a = tensors[f"base_model.model.{path}.lora_A.weight"]
    b = tensors[f"base_model.model.{path}.lora_B.weight"]
    assert a.shape == (4, 64) and b.shape == (32, 4)
    assert not a[2:].any() and not b[:, 2:].any()
    assert torch.equal(a[:2], experts.A[0])
    # rsLoRA: alpha / sqrt(r)
    torch.testing.assert_close(b[:, :2], experts.Bt[0].T * (1.5 / 2**0.5))


def test_transformers_loads_it_by_itself(tiny_llama: Factory, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained(base, target_modules=["q_proj", "down_proj"], **UNEVEN)
    molora.export_peft(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


def test_merged_or_not_is_the_same(tiny_gpt2: Factory, tmp_path: Path) -> None:
    model = trained(tiny_gpt2(), target_modules=["c_attn"], **UNEVEN)
    molora.export_peft(model, tmp_path / "one")
    molora.merge(model)
    # over an older export too
    for name in ("one", "two"):
        molora.export_peft(model, tmp_path / name)
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    config = json.loads(two["adapter_config.json"])
    assert config["fan_in_fan_out"] is True


def test_several_experts_have_to_be_collapsed_first(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    config = {
        "target_modules": ["q_proj"],
        "experts": {"kind": "lora", "num_experts": 2},
        "router": {"kind": "soft"},
    }
    model = trained(tiny_llama(), **config)
    with pytest.raises(WrapError, match=r"layers\.0\.self_attn\.q_proj.*collapse"):
        molora.export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    molora.collapse(model, "concat", show_progress=False)
    molora.export_peft(model, tmp_path / "out")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


def test_it_is_no_checkpoint_of_ours(tiny_llama: Factory, tmp_path: Path) -> None:
    model = trained(tiny_llama(), target_modules=["q_proj"], **UNEVEN)
    molora.export_peft(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="PEFT adapter of type 'LORA'"):
        molora.load(tiny_llama(), tmp_path / "out")
    with pytest.raises(WrapError):
        molora.export_peft(tiny_llama(), tmp_path / "plain")


def test_peft_is_not_needed(
    tiny_llama: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # makes every import of it fail
    monkeypatch.setitem(sys.modules, "peft", None)
    model = trained(tiny_llama(), target_modules=["q_proj"], **UNEVEN)
    molora.export_peft(model, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size > 0
