"""GOAT banks: the base stays, saving, collapse and export by their definition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

import molora
from molora.errors import WrapError
from molora.model import adapter_parameters, sites

Factory = Callable[..., PreTrainedModel]
IDS = torch.arange(1, 25).view(2, 12)


def wrapped(model: Any, E: int = 4, router: str = "topk", **more: Any) -> Any:
    raw = {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "experts": {"kind": "goat", "num_experts": E, "r": 3, "rho": 0.5} | more,
        "router": {"kind": router if E > 1 else "none"},
    }
    return molora.wrap(model, molora.AdapterConfig.from_dict(raw))


def shaken(model: Any) -> Any:
    """Trained values that are not those of the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            if parameter.requires_grad:
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * draw)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


def test_the_base_is_never_changed(tiny_llama: Factory) -> None:
    plain = tiny_llama()
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    want = logits(plain)
    model = wrapped(plain)
    assert (logits(model) - want).abs().max() > 1e-3
    with molora.disabled(model):
        assert torch.equal(logits(model), want)
    molora.unwrap(model)
    assert all(torch.equal(p, before[n]) for n, p in plain.named_parameters())


def test_one_expert_starts_as_the_base(tiny_llama: Factory) -> None:
    want = logits(tiny_llama())
    # all of the start is taken off again
    model = wrapped(tiny_llama(), E=1)
    assert (logits(model) - want).abs().max() < 1e-5
    merged = logits(shaken(model))
    molora.merge(model)
    assert (logits(model) - merged).abs().max() < 1e-5


def test_it_is_saved_with_its_start(tiny_llama: Factory, tmp_path: Path) -> None:
    model = shaken(wrapped(tiny_llama()))
    model.save_pretrained(tmp_path / "out")
    again = molora.load(tiny_llama(), tmp_path / "out", trainable=True)
    assert torch.equal(logits(again), logits(model))
    for name, parameter in adapter_parameters(again).items():
        assert parameter.requires_grad == (not name.endswith("_start")), name


def test_every_expert_is_exported_with_the_correction(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = shaken(wrapped(tiny_llama(), E=2, router="soft"))
    folders = molora.export_peft_experts(model, tmp_path / "out")
    again = molora.import_peft(tiny_llama(), folders, router=tmp_path / "out")
    assert (logits(again) - logits(model)).abs().max() < 1e-5
    one = PeftModel.from_pretrained(tiny_llama(), folders[1]).eval()
    for site in sites(model).values():
        # the second expert alone
        site.router.gate.weight.data.zero_()  # type: ignore
        delta = site.experts.delta_weight(1)
        theirs: Any = one.base_model.model.get_submodule(site.path)
        got = theirs.get_delta_weight("default")
        assert (got - delta).abs().max() < 1e-6


def test_it_is_collapsed_by_its_mean(tiny_llama: Factory) -> None:
    model = shaken(wrapped(tiny_llama(), E=2, router="soft"))
    for site in sites(model).values():
        nn.init.zeros_(site.router.gate.weight)  # type: ignore
    want = logits(model)
    molora.collapse(model, "concat", show_progress=False)
    assert (logits(model) - want).abs().max() < 1e-5


def test_mistakes(tiny_llama: Factory) -> None:
    with pytest.raises(WrapError, match="32 singular values .* segments of 3"):
        wrapped(tiny_llama(), E=9, r=4)
    with pytest.raises(WrapError, match=r"start from what depends.*lora experts"):
        molora.grow(wrapped(tiny_llama()))
