"""AdaLoRA and VeRA in PEFT's form, both ways, against PEFT's own layers."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import WrapError
from molora.experts import EXPERTS
from molora.model import sites
from tests.bilinear import bank, randomised

SIZES = {"q": (30, 50), "k": (50, 30)}


class Two(nn.Module):
    """Two layers of different widths that read different inputs."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in SIZES.items():
            self.add_module(name, nn.Linear(*size))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule("k")(self.get_submodule("q")(x).tanh())
        return y


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Two().double()


def test_adalora_is_what_peft_computes_and_comes_back() -> None:
    settings = {"init_r": 5, "lora_alpha": 7.0}
    for count in (1, 3):
        made = bank("adalora", 30, 50, num_experts=count, **settings)
        experts = randomised(made, 1)
        form = experts.to_peft(count - 1)
        assert form.peft_type == "ADALORA" and not form.model_tensors
        config = peft.AdaLoraConfig(target_modules=["q"], **form.settings)
        theirs: Any = peft.get_peft_model(base(), config).eval()
        layer = theirs.base_model.model.q
        for name, values in form.tensors.items():
            getattr(layer, name)["default"].data.copy_(values)
        x = torch.randn(4, 30, dtype=torch.float64)
        want = layer(x)
        gates = None
        if count > 1:
            gates = torch.eye(count, dtype=torch.float64)[-1].expand(4, -1)
        got = experts(x, gates, base().q(x))  # type: ignore[operator]
        assert (got - want).abs().max() < 1e-9
        assert (got - base().q(x)).abs().max() > 0.1  # type: ignore[operator]
        block, state = EXPERTS["adalora"].from_peft(form.settings, form.tensors, 30, 50)
        again = bank(**{"wide_in": 30, "wide_out": 50} | block)
        again.load_state_dict(state)
        want = experts.delta_weight(count - 1)
        assert (again.delta_weight(0) - want).abs().max() < 1e-12


def test_ranks_that_peft_pruned_come_back_as_zeros() -> None:
    experts = randomised(bank("adalora", 30, 50, init_r=5))
    keep = torch.tensor([[True, False, True, True, False]])
    experts.mask_ranks(keep)
    form = experts.to_peft(0)
    rows = {"lora_A": keep[0], "lora_E": keep[0]}
    cut = {name: form.tensors[name][mask] for name, mask in rows.items()}
    cut["lora_B"] = form.tensors["lora_B"][:, keep[0]]
    block, state = EXPERTS["adalora"].from_peft(form.settings, cut, 30, 50)
    again = bank(**{"wide_in": 30, "wide_out": 50} | block)
    again.load_state_dict(state)
    assert torch.allclose(again.delta_weight(0), experts.delta_weight(0), atol=1e-12)


def vera(saved: bool, key: int = 4) -> Any:
    settings: dict[str, Any] = {"kind": "vera", "r": 6, "d_initial": 0.3}
    if not saved:
        settings["trainability"] = {"A": "seeded", "B": "seeded"}
        settings["projection_prng_key"] = key
    raw = {"target_modules": ["q", "k"], "experts": settings}
    return molora.wrap(base(), molora.AdapterConfig.from_dict(raw)).double()


def in_peft(forms: dict[str, Any], **change: Any) -> Any:
    first = forms["q"]
    config = peft.VeraConfig(target_modules=["q", "k"], **first.settings | change)
    theirs: Any = peft.get_peft_model(base(), config).eval()
    for name, values in first.model_tensors.items():
        getattr(theirs.base_model, name)["default"].copy_(values)
    for path, form in forms.items():
        layer = theirs.base_model.model.get_submodule(path)
        for name, values in form.tensors.items():
            getattr(layer, name)["default"].data.copy_(values)
    return theirs.double()


@pytest.mark.parametrize("saved", [True, False])
def test_vera_is_what_peft_computes_and_comes_back(saved: bool) -> None:
    model = vera(saved)
    for site in sites(model).values():
        site.experts.lambda_b.data.normal_()  # type: ignore
        site.experts.lambda_d.data.normal_()  # type: ignore
    forms = {path: site.experts.to_peft(0) for path, site in sites(model).items()}
    assert all(bool(f.model_tensors) == saved for f in forms.values())
    assert all(f.settings["save_projection"] == saved for f in forms.values())
    x = torch.randn(4, 30, dtype=torch.float64)
    got, want = model(x), in_peft(forms)(x)
    assert (got - want).abs().max() < 1e-9
    assert (got - base()(x)).abs().max() > 0.1
    other = in_peft(forms, projection_prng_key=5)(x)
    assert ((other - want).abs().max() < 1e-9) == saved
    # back: the first layer owns the projections
    blocks, states = {}, {}
    for path, form in forms.items():
        tensors = {**form.tensors, **form.model_tensors}
        blocks[path], states[path] = EXPERTS["vera"].from_peft(
            form.settings, tensors, *SIZES[path]
        )
    assert blocks["q"] == blocks["k"]
    raw = {"target_modules": ["q", "k"], "experts": blocks["q"]}
    again = molora.wrap(base(), molora.AdapterConfig.from_dict(raw)).double()
    for path, site in sites(again).items():
        own = site.experts.state_dict().keys()
        assert states[path].keys() >= own
        site.experts.load_state_dict({n: states[path][n] for n in own})
    assert (again(x) - got).abs().max() < 1e-12


def test_projections_that_peft_has_not_are_refused() -> None:
    for settings in (
        {"shared": {"A": "model"}},
        {"trainability": {"A": "frozen"}},
        {"trainability": {}},
    ):
        with pytest.raises(WrapError, match="one pair of fixed projections"):
            bank("vera", 30, 50, **settings).to_peft(0)
    with pytest.raises(WrapError, match="PEFT has no format"):
        bank("sora", 30, 50).to_peft(0)
