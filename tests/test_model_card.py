"""README.md of a saved adapter."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

import molora
from molora.model import adapter_parameters

Factory = Any
MIXTURE = {
    "target_modules": ["q_proj", "up_proj", "down_proj"],
    "experts": {"kind": "lora", "num_experts": 4, "r": 4},
    "router": {"kind": "topk", "top_k": 2},
}


def wrapped(model: PreTrainedModel) -> Any:
    return molora.wrap(model, molora.AdapterConfig.from_dict(MIXTURE))


def test_the_card_says_what_is_known(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama())
    model.config._name_or_path = "org/base"
    model.save_pretrained(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "molora"
    assert card.data.base_model == "org/base"
    assert card.data.base_model_relation == "adapter"
    assert card.data.pipeline_tag == "text-generation"
    # A and B of 4 experts of rank 4, and the gates of 4: q 32 to 32, up 32 to 64, down
    # 64 to 32, in two layers
    trained = 2 * (16 * (64 + 96 + 96) + 4 * (32 + 32 + 64))
    assert f"{trained:,} trained parameters at 6 layers" in card.text
    assert "| up_proj | 2 | 4 lora | 4 | topk, top 2 |" in card.text
    assert "Collapse" not in card.text
    model.config._name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model is None


def test_the_card_tells_what_a_collapse_cost(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama())
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, 0, 0.2)
    result = molora.collapse(
        model,
        "svd",
        rank=4,
        calibration=[{"input_ids": torch.arange(1, 25).view(2, 12)}] * 4,
        show_progress=False,
    )
    model.save_pretrained(tmp_path / "out")
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "by the method `svd`" in text
    assert f"mean {result.report.mean_error:.4f}" in text
    assert str(result.report.worst_site) in text


def test_a_card_that_people_wrote_is_kept(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama())
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    molora.load(tiny_llama(), tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert len(os.listdir(tmp_path / "out")) == 4
