"""OFT banks: PEFT's and LyCORIS's numbers, definitions, refusals."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import ConfigError, WrapError
from molora.experts import OFTExperts
from molora.experts.oft import cayley_turn, neumann_turn, skew
from tests.families import (
    disturb,
    layer_of,
    off,
    run,
    site_of,
    vector,
    worst_of_sum,
    worst_of_vector,
)

FORMS: dict[str, dict[str, Any]] = {
    "series": {"oft_block_size": 4},
    "two terms": {"oft_block_size": 6, "num_cayley_neumann_terms": 2},
    "exact": {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False},
    "shared": {"oft_block_size": 3, "block_share": True},
    "output": {"oft_block_size": 4, "side": "output"},
}
each_form = pytest.mark.parametrize("form", FORMS)


def defined(Q: Tensor, settings: dict[str, Any]) -> Tensor:
    """R of one Q by the published formulas."""
    eye = torch.eye(len(Q), dtype=Q.dtype)
    if not settings.get("use_cayley_neumann", True):
        return (eye - Q) @ torch.linalg.inv(eye + Q)
    t = settings.get("num_cayley_neumann_terms", 5)
    if t == 2:
        return eye + 2 * Q
    t = max(t, 4)
    powers = [torch.linalg.matrix_power(Q, p) for p in range(1, t)]
    return eye + 2 * sum(powers[:-1], torch.zeros_like(Q)) + powers[-1]


def dense(upper: Tensor, n: int, settings: dict[str, Any]) -> Tensor:
    """Block-diagonal R [n, n] of one expert."""
    blocks = []
    for row in upper:
        b = next(b for b in range(2, n + 1) if b * (b - 1) // 2 == len(row))
        U = torch.zeros(b, b, dtype=row.dtype)
        U[tuple(torch.triu_indices(b, b, 1))] = row
        blocks.append(defined(U - U.T, settings))
    if len(blocks) == 1:
        blocks = blocks * (n // len(blocks[0]))
    return torch.block_diag(*blocks)


def bank(form: str, E: int, outs: int = 8, ins: int = 12) -> Any:
    site = site_of({"kind": "oft", **FORMS[form]}, *layer_of(outs, ins), E=E)
    disturb(site)
    return site


def delta(site: Any, form: str) -> Any:
    """One expert as it is defined."""

    def of(e: int, x: Tensor) -> Tensor:
        settings = FORMS[form]
        on_output = settings.get("side") == "output"
        n = site.out_features if on_output else site.in_features
        change = dense(site.experts.upper[e], n, settings)
        change = change - torch.eye(n, dtype=change.dtype)
        weight = site.base.weight
        return x @ weight.T @ change.T if on_output else x @ change @ weight.T

    return of


@pytest.mark.parametrize(
    "name", ["cayley", "neumann_t2", "neumann_t3", "neumann_t5", "share", "coft"]
)
def test_one_expert_is_what_peft_computes(name: str) -> None:
    t, hyper = vector(f"oft_{name}")
    settings: dict[str, Any] = {
        "oft_block_size": hyper["block_size"],
        "use_cayley_neumann": hyper["use_cayley_neumann"],
        "coft": hyper["coft"],
        "block_share": hyper["block_share"],
    }
    if hyper["use_cayley_neumann"]:
        settings["num_cayley_neumann_terms"] = hyper["terms"]
    if hyper["coft"]:
        settings["eps"] = hyper["eps"]
    site = site_of({"kind": "oft", **settings}, t["base.weight"], t["base.bias"])
    assert site.experts.count() == t["param.u"].numel()
    with torch.no_grad():
        site.experts.upper.copy_(t.get("param.u_before", t["param.u"]))
    found = worst_of_vector(site.train(), t, {"u": lambda: site.experts.upper.grad[0]})
    # PEFT takes eps / sqrt(k) in float32
    assert max(found.values()) < (1e-8 if hyper["coft"] else 1e-9), found
    # coft has overwritten the parameter
    assert off(site.experts.upper.detach()[0], t["param.u"]) < 1e-8


def test_coft_bounds_without_training_as_well() -> None:
    weight, bias = layer_of(8, 12)
    settings = {"kind": "oft", "oft_block_size": 3, "coft": True, "eps": 0.1}
    site = site_of(settings, weight, bias).eval()
    disturb(site)
    before = site.experts.upper.clone()
    x = torch.eye(12, dtype=torch.float64)
    held = run(site, x, None)
    assert torch.equal(site.experts.upper, before)
    assert off(run(site.train(), x, None), held) < 1e-12
    norms = skew(site.experts.upper[0], 3).flatten(1).norm(dim=1)
    assert off(norms, torch.full((4,), 0.05, dtype=torch.float64)) < 1e-12


def test_the_output_side_is_what_lycoris_computes() -> None:
    t, hyper = vector("lycoris_diag_oft")
    t = {name: value.double() for name, value in t.items()}
    settings = {
        "kind": "oft",
        "oft_block_size": hyper["block_size"],
        "use_cayley_neumann": False,
        "side": "output",
    }
    site = site_of(settings, t["base.weight"])
    R = t["param.blocks"].requires_grad_()
    i, j = torch.triu_indices(4, 4, 1)
    # its q is R - R^T, and it takes the inverse rotation transposed
    upper = (R - R.mT)[:, i, j]
    site.experts.upper.data.copy_(upper.detach())
    merged = run(site, torch.eye(11, dtype=torch.float64), None).T
    rescale = t["param.rescale"].requires_grad_()
    delta = rescale * merged - t["base.weight"]
    # it inverts in float32
    assert off(delta.detach(), t["delta.weight"]) < 1e-5
    own = (rescale * (t["base.weight"] + site.delta_weight())).detach()
    assert off(own - t["base.weight"], t["delta.weight"]) < 1e-5
    (delta * t["c"]).sum().backward()
    upper.backward(site.experts.upper.grad[0])
    assert off(R.grad, t["grad.blocks"]) < 1e-5
    assert off(rescale.grad, t["grad.rescale"]) < 1e-5


@each_form
@pytest.mark.parametrize(("E", "top_k"), [(1, None), (4, None), (4, 2)])
def test_a_mixture_is_the_sum_of_its_experts(
    form: str, E: int, top_k: int | None
) -> None:
    site = bank(form, E)
    found = worst_of_sum(site, delta(site, form), top_k=top_k)
    assert max(found.values()) < 1e-12, found


@each_form
def test_no_or_one_token_and_the_start(form: str) -> None:
    site = site_of({"kind": "oft", **FORMS[form]}, *layer_of(8, 12), E=3)
    for T in (0, 1):
        x = torch.randn(T, 12, dtype=torch.float64, requires_grad=True)
        gates = torch.rand(T, 3, dtype=torch.float64)
        y = run(site, x, gates)
        assert y.shape == (T, 8) and torch.equal(y, site.base(x))
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


@each_form
def test_one_expert_merges_and_back(form: str) -> None:
    site = bank(form, 1)
    x = torch.randn(5, 12, dtype=torch.float64)
    want, before = run(site, x, None), site.base.weight.clone()
    site.merge()
    assert off(site(x), want) < 1e-12
    site.unmerge()
    assert torch.equal(site.base.weight, before)


def test_exact_rotations_keep_lengths_and_the_branches_are_inverse() -> None:
    Q = skew(torch.randn(5, 6, dtype=torch.float64), 4)
    eye = torch.eye(4, dtype=torch.float64)
    R = eye + cayley_turn(Q)
    assert off(R.mT @ R, eye.expand(5, 4, 4)) < 1e-12
    # hand-worked: Q = [[0, 1/2], [-1/2, 0]] turns by 2 atan(1/2), cos = 3/5
    half = skew(torch.tensor([[0.5]], dtype=torch.float64), 2)
    exact = torch.tensor([[[0.6, -0.8], [0.8, 0.6]]], dtype=torch.float64)
    assert off(torch.eye(2) + cayley_turn(half), exact) < 1e-12
    small = 0.05 * Q / Q.norm(dim=(1, 2), keepdim=True)
    for terms in (4, 5, 6):
        series = neumann_turn(small, terms)
        # transposed they agree up to the first power that is left out
        assert off(series, cayley_turn(small).mT) < 2 * 0.05 ** (terms - 1)
        assert off(series, cayley_turn(small)) > 0.01
    assert torch.equal(neumann_turn(Q, 3), neumann_turn(Q, 4))


@pytest.mark.parametrize(
    "form", [form for form in FORMS if FORMS[form].get("side") != "output"]
)
def test_peft_reads_and_writes_the_same_expert(form: str) -> None:
    site = bank(form, 3)
    made = site.experts.to_peft(1)
    assert made.peft_type == OFTExperts.peft_type == "OFT"
    base = nn.ModuleDict({"lin": nn.Linear(12, 8)}).double()
    base["lin"].load_state_dict(site.base.state_dict())
    config = peft.OFTConfig(target_modules=["lin"], **made.settings)
    theirs: Any = peft.get_peft_model(base, config).base_model.model["lin"]
    theirs.oft_R["default"].weight.data = made.tensors["oft_R.weight"]
    x = torch.randn(5, 12, dtype=torch.float64)
    want = site.base(x) + delta(site, form)(1, x)
    assert off(theirs(x), want) < 1e-9
    experts, state = OFTExperts.from_peft(config.to_dict(), made.tensors, 12, 8)
    again = site_of(experts, site.base.weight.data, site.base.bias.data)
    again.experts.load_state_dict(state)
    assert off(run(again, x, None), theirs(x)) < 1e-9


def test_what_peft_cannot_hold_is_refused() -> None:
    with pytest.raises(WrapError, match="PEFT's OFT rotates the input"):
        bank("output", 1).experts.to_peft(0)
    old = {"oft_R.weight": torch.zeros(3, 6)}
    with pytest.raises(WrapError, match="does not say use_cayley_neumann"):
        OFTExperts.from_peft({"coft": False}, old, 12, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype) -> None:
    weight, bias = (t.to(dtype) for t in layer_of(8, 12))
    site = site_of({"kind": "oft", "oft_block_size": 4}, weight, bias, E=3)
    site.experts.float()
    disturb(site, 0.1)
    x = torch.randn(6, 12).to(dtype).requires_grad_()
    gates = torch.rand(6, 3)
    y = run(site, x, gates)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype  # type: ignore[union-attr]
    assert site.experts.upper.grad.dtype == torch.float32
    exact = site_of({"kind": "oft", "oft_block_size": 4}, weight.double(), None, E=3)
    exact.experts.load_state_dict(site.experts.state_dict())
    want = run(exact, x.double(), gates.double()) + bias.double()
    assert off(y, want.detach()) < 0.03


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "block": ({"oft_block_size": 5}, WrapError, r"size=5 does not divide the 12 input"),
    "wide": ({"oft_block_size": 24}, WrapError, r"near it do 2, 3, 4, 6, 12"),
    "number": ({"r": 7, "oft_block_size": 0}, WrapError, r"experts\.r=7 does not"),
    "output": ({"oft_block_size": 3, "side": "output"}, WrapError, "the 8 output"),
    "single": ({"oft_block_size": 1}, WrapError, "one feature cannot rotate"),
    "both": ({"r": 2}, ConfigError, "set the other to 0"),
    "none": ({"oft_block_size": 0}, ConfigError, "set the other to 0"),
    "terms": ({"num_cayley_neumann_terms": 1}, ConfigError, "num_cayley_neumann"),
    "unread": ({"eps": 0.1}, ConfigError, "coft: true only"),
    "exact": (
        {"use_cayley_neumann": False, "num_cayley_neumann_terms": 4},
        ConfigError,
        "use_cayley_neumann: true only",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_say_what_would(case: str) -> None:
    settings, error, match = BAD[case]
    with pytest.raises(error, match=match):
        site_of({"kind": "oft", **settings}, *layer_of(8, 12))


def test_settings_survive_a_round_trip() -> None:
    raw = {"kind": "oft", "r": 2, "oft_block_size": 0, "use_cayley_neumann": False}
    config = molora.AdapterConfig.from_dict({"target_modules": ["a"], "experts": raw})
    assert molora.AdapterConfig.from_dict(config.to_dict()) == config
