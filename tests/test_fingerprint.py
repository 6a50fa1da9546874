"""An adapter is loaded onto the base that it was trained on, whatever its dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import molora
from molora.errors import CheckpointError
from molora.fingerprint import differences, fingerprint
from molora.model import adapter_parameters, is_wrapped

Factory = Any
MIXTURE = {
    "target_modules": ["q_proj", "up_proj", "down_proj"],
    "experts": {"kind": "lora", "num_experts": 4, "r": 4},
    "router": {"kind": "topk", "top_k": 2},
}


def wrapped(model: PreTrainedModel) -> Any:
    # not the seed with which loading wraps
    return molora.wrap(model, molora.AdapterConfig.from_dict(MIXTURE), seed=7)


@pytest.mark.parametrize("saved", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_one_base_in_several_dtypes_is_one_base(
    tiny_llama: Factory, tmp_path: Path, stored: str, saved: str
) -> None:
    """Through transformers' own loading, which does the rounding."""
    tiny_llama().to(getattr(torch, stored)).save_pretrained(tmp_path / "base")

    def base(dtype: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)

    wrapped(base(saved)).save_pretrained(tmp_path / "out")
    for dtype in ("float32", "bfloat16", "float16"):
        # both halves of a float32 file hold less than it does
        apart = stored == "float32" and {saved, dtype} == {"bfloat16", "float16"}
        if not apart:
            assert is_wrapped(molora.load(base(dtype), tmp_path / "out"))


def test_samples_are_rounded_to_even() -> None:
    # halfway between neighbours of bfloat16: 1 + 2^-8 goes down to 1, 1 + 3 * 2^-8 up
    # to 1 + 2^-6; the smallest value above the middle goes up
    high = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]])
    low = torch.tensor([[1.0, 1 + 2**-6, 1 + 2**-7]])
    linear = torch.nn.Linear(3, 1)
    first, second = (fingerprint(linear, {"x": w}).sites["x"] for w in (high, low))
    assert first.bfloat16 == second.bfloat16
    assert first.float16 != second.float16


@pytest.mark.parametrize(
    ("seed", "settings", "told"),
    [
        (1, {}, r"6 of 6 target layers have other weights: model\.layers\.0\."),
        (0, {"vocab_size": 130}, "vocab_size is 130 instead of 128"),
        (0, {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05 instead of 1e-06"),
    ],
)
def test_another_base_of_the_same_shape(
    tiny_llama: Factory, tmp_path: Path, seed: int, settings: Any, told: str
) -> None:
    model = wrapped(tiny_llama())
    model.config._name_or_path = "org/base"
    model.save_pretrained(tmp_path / "out")
    other = tiny_llama(seed, **settings)
    with pytest.raises(CheckpointError, match=told) as caught:
        molora.load(other, tmp_path / "out")
    assert "org/base" in str(caught.value)
    assert "allow_base_mismatch=True" in str(caught.value)
    assert not is_wrapped(other) and type(other) is type(tiny_llama())
    molora.load(other, tmp_path / "out", allow_base_mismatch=True)
    mine, theirs = adapter_parameters(model), adapter_parameters(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"hidden_size": 64}, r"q_proj has the shape \[64, 64\] instead of \[32, 32\]"),
        ({"num_hidden_layers": 1}, r"layers\.1\.self_attn\.q_proj is missing"),
        ({"num_hidden_layers": 3}, r"layers\.2\.self_attn\.q_proj had no adapter"),
    ],
)
def test_another_base_of_another_shape(
    tiny_llama: Factory, tmp_path: Path, settings: Any, told: str
) -> None:
    wrapped(tiny_llama()).save_pretrained(tmp_path / "out")
    for allowed in (False, True):
        other = tiny_llama(**settings)
        with pytest.raises(CheckpointError, match=told):
            molora.load(other, tmp_path / "out", allow_base_mismatch=allowed)
        assert not is_wrapped(other)


def test_a_base_without_the_layers(
    tiny_llama: Factory, tiny_gpt2: Factory, tmp_path: Path
) -> None:
    wrapped(tiny_llama()).save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not fit this base: .*q_proj"):
        molora.load(tiny_gpt2(), tmp_path / "out")


def test_a_few_training_steps_make_another_base(tiny_llama: Factory) -> None:
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    before = fingerprint(model, {"x": weight})
    assert differences(before, fingerprint(model, {"x": weight.clone()})) == []
    with torch.no_grad():
        weight[7, 3] *= 1.01
    assert differences(before, fingerprint(model, {"x": weight})) != []


def test_incidental_config_does_not_matter(tiny_llama: Factory, tmp_path: Path) -> None:
    wrapped(tiny_llama()).save_pretrained(tmp_path / "out")
    other = tiny_llama(pad_token_id=3, attention_dropout=0.1, use_cache=False)
    other.config._name_or_path = "elsewhere"
    molora.load(other, tmp_path / "out")
