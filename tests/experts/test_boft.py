"""BOFT banks: PEFT's and LyCORIS's numbers, definitions, refusals."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from molora.errors import ConfigError, WrapError
from molora.experts import BOFTExperts
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
    "PEFT": {"boft_block_size": 4},
    "odd": {"boft_block_size": 3, "output_scale": False},
    "paper": {"boft_n_butterfly_factor": 3, "output_scale": False},
    "scaled": {"boft_block_size": 2, "boft_n_butterfly_factor": 4},
    "number": {
        "boft_block_num": 6,
        "boft_block_size": 0,
        "boft_n_butterfly_factor": 2,
    },
    "output": {"boft_n_butterfly_factor": 2, "side": "output"},
    "bare output": {"side": "output", "output_scale": False},
}
each_form = pytest.mark.parametrize("form", FORMS)


def permutation(n: int, block: int, i: int) -> Tensor:
    """P_i as a matrix: in runs of 2^i blocks, even halves of blocks before odd ones."""
    half, run = block // 2, block * 2**i
    if i == 0:
        return torch.eye(n, dtype=torch.float64)
    order = []
    for start in range(0, n, run):
        halves = [list(range(h, h + half)) for h in range(start, start + run, half)]
        order += [f for part in halves[0::2] + halves[1::2] for f in part]
    return torch.eye(n, dtype=torch.float64)[order]


def rotation(V: Tensor) -> Tensor:
    """R [n, n] from the parameter [m, k, b, b] of one expert, factor by factor."""
    m, k, b, _ = V.shape
    eye = torch.eye(b, dtype=V.dtype)
    R = torch.eye(k * b, dtype=V.dtype)
    for i in range(m):
        S = (V[i] - V[i].mT) / 2
        C = torch.block_diag(*[(eye - s) @ torch.linalg.inv(eye + s) for s in S])
        P = permutation(k * b, b, i)
        R = P @ C @ P.T @ R
    return R


def bank(form: str, E: int) -> Any:
    site = site_of({"kind": "boft", **FORMS[form]}, *layer_of(16, 48), E=E)
    if form == "odd":
        site = site_of({"kind": "boft", **FORMS[form]}, *layer_of(7, 15), E=E)
    disturb(site)
    return site


def delta(site: Any) -> Any:
    """One expert as it is defined."""

    def of(e: int, x: Tensor) -> Tensor:
        R, weight = rotation(site.experts.V[e]), site.base.weight
        own = R @ weight if site.experts.config.side == "output" else weight @ R.T
        if site.experts.scale is not None:
            own = site.experts.scale[e].unsqueeze(1) * own
        return x @ (own - weight).T

    return of


@pytest.mark.parametrize("m", [1, 2, 3])
def test_one_expert_is_what_peft_computes(m: int) -> None:
    t, hyper = vector(f"boft_m{m}")
    settings = {
        "kind": "boft",
        "boft_block_size": hyper["block_size"],
        "boft_n_butterfly_factor": m,
    }
    site = site_of(settings, t["base.weight"], t["base.bias"])
    state = {"V": t["param.R"].unsqueeze(0), "scale": t["param.s"].T}
    site.experts.load_state_dict(state)
    grads = {
        "R": lambda: site.experts.V.grad[0],
        "s": lambda: site.experts.scale.grad.T,
    }
    found = worst_of_vector(site, t, grads)
    assert max(found.values()) < 1e-9, found
    assert site.experts.count() == t["param.R"].numel() + t["param.s"].numel()
    for i, order in enumerate(t["perm"]):
        eye = torch.eye(len(order), dtype=torch.float64)
        assert torch.equal(permutation(len(order), 4, i if m > 1 else 0), eye[order])


@pytest.mark.parametrize("m", [2, 4])
def test_the_output_side_is_what_lycoris_computes(m: int) -> None:
    t, hyper = vector(f"lycoris_boft_m{m}")
    t = {name: value.double() for name, value in t.items()}
    settings = {
        "kind": "boft",
        "boft_block_size": hyper["block_size"],
        "boft_n_butterfly_factor": m,
        "side": "output",
    }
    site = site_of(settings, t["base.weight"])
    # its q is V - V^T, each block is the inverse rotation of q, and within a block the
    # features of the two halves stand in turn, not one half after the other
    V = t["param.blocks"].requires_grad_()
    own = -2 * V[:, :, [0, 2, 1, 3]][..., [0, 2, 1, 3]]
    state = {"V": own.detach().unsqueeze(0), "scale": t["param.rescale"].T}
    site.experts.load_state_dict(state)
    eye = torch.eye(hyper["d_in"], dtype=torch.float64)
    delta = run(site, eye, None).T - t["base.weight"]
    # it inverts in float32
    assert off(delta, t["delta.weight"]) < 1e-5
    assert off(site.delta_weight(), t["delta.weight"]) < 1e-5
    (delta * t["c"]).sum().backward()
    own.backward(site.experts.V.grad[0])
    assert off(V.grad, t["grad.blocks"]) < 1e-5
    assert off(site.experts.scale.grad.T, t["grad.rescale"]) < 1e-5


@each_form
@pytest.mark.parametrize("E", [1, 3])
def test_a_mixture_is_the_sum_of_its_experts(form: str, E: int) -> None:
    site = bank(form, E)
    found = worst_of_sum(site, delta(site))
    assert max(found.values()) < 1e-12, found


@each_form
def test_a_sparse_mixture_is_the_same_sum(form: str) -> None:
    site = bank(form, 3)
    found = worst_of_sum(site, delta(site), top_k=2)
    assert max(found.values()) < 1e-12, found


@each_form
def test_no_or_one_token_and_the_start(form: str) -> None:
    site = bank(form, 3)
    with torch.no_grad():
        site.experts.V.zero_()
        if site.experts.scale is not None:
            site.experts.scale.fill_(1)
    for T in (0, 1):
        x = torch.randn(T, site.in_features, dtype=torch.float64, requires_grad=True)
        y = run(site, x, torch.rand(T, 3, dtype=torch.float64), 2)
        assert y.shape == (T, site.out_features) and torch.equal(y, site.base(x))
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


@each_form
def test_one_expert_merges_and_back(form: str) -> None:
    site = bank(form, 1)
    x = torch.randn(5, site.in_features, dtype=torch.float64)
    want, before = run(site, x, None), site.base.weight.clone()
    site.merge()
    assert off(site(x), want) < 1e-12
    site.unmerge()
    assert torch.equal(site.base.weight, before)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_it_is_a_rotation_that_mixes_more_with_every_factor(m: int) -> None:
    settings = {"boft_n_butterfly_factor": m, "output_scale": False}
    weight = torch.eye(32, dtype=torch.float64)
    site = site_of({"kind": "boft", **settings}, weight)
    disturb(site)
    R = run(site, weight, None).detach()
    assert off(R @ R.T, weight) < 1e-12
    # every feature reaches those of 2^(m-1) blocks
    assert torch.equal((R != 0).sum(1), torch.full((32,), 4 * 2 ** (m - 1)))


@pytest.mark.parametrize("form", ["PEFT", "odd"])
def test_peft_reads_and_writes_the_same_expert(form: str) -> None:
    site = bank(form, 3)
    made = site.experts.to_peft(1)
    assert made.peft_type == BOFTExperts.peft_type == "BOFT"
    linear = nn.Linear(site.in_features, site.out_features)
    base = nn.ModuleDict({"lin": linear}).double()
    base["lin"].load_state_dict(site.base.state_dict())
    config = peft.BOFTConfig(target_modules=["lin"], **made.settings)
    model = peft.get_peft_model(base, config)
    theirs: Any = model.base_model.model["lin"]
    for name, value in made.tensors.items():
        assert getattr(theirs, name)["default"].shape == value.shape
        getattr(theirs, name)["default"].data = value
    x = torch.randn(5, site.in_features, dtype=torch.float64)
    want = site.base(x) + delta(site)(1, x)
    assert off(theirs(x), want) < 1e-9
    experts, state = BOFTExperts.from_peft(config.to_dict(), made.tensors, 0, 0)
    again = site_of(experts, site.base.weight.data, site.base.bias.data)
    again.experts.load_state_dict(state)
    assert off(run(again, x, None), theirs(x)) < 1e-9


def test_peft_with_several_factors_is_read_back() -> None:
    # without its CUDA extension PEFT cannot hold these
    site = bank("scaled", 2)
    made = site.experts.to_peft(1)
    experts, state = BOFTExperts.from_peft(made.settings, made.tensors, 48, 16)
    again = site_of(experts, site.base.weight.data, site.base.bias.data)
    again.experts.load_state_dict(state)
    x = torch.randn(5, 48, dtype=torch.float64)
    assert off(run(again, x, None), site.base(x) + delta(site)(1, x)) < 1e-12
    with pytest.raises(WrapError, match="PEFT's BOFT rotates the input"):
        bank("output", 1).experts.to_peft(0)


@pytest.mark.parametrize("form", ["paper", "scaled", "output"])
def test_half_precision_base(form: str) -> None:
    weight, bias = (t.bfloat16() for t in layer_of(16, 48))
    settings = {"kind": "boft", **FORMS[form]}
    site = site_of(settings, weight, bias, E=3)
    site.experts.float()
    disturb(site, 0.1)
    x = torch.randn(6, 48).bfloat16().requires_grad_()
    gates = torch.rand(6, 3)
    y = run(site, x, gates)
    y.sum().backward()
    assert x.grad is not None and y.dtype == x.grad.dtype == torch.bfloat16
    assert site.experts.V.grad.dtype == torch.float32
    exact = site_of(settings, weight.double(), bias.double(), E=3)
    exact.experts.load_state_dict(site.experts.state_dict())
    assert off(y, run(exact, x.double(), gates.double())) < 0.03


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "block": ({"boft_block_size": 5}, WrapError, "size=5 does not divide the 48 input"),
    "number": (
        {"boft_block_num": 5, "boft_block_size": 0},
        WrapError,
        "near it do 2, 3, 4, 6, 8, 12",
    ),
    "deep": ({"boft_n_butterfly_factor": 4}, WrapError, "blocks of 4 take at most 3;"),
    "odd": (
        {"boft_block_size": 3, "boft_n_butterfly_factor": 2},
        WrapError,
        "at most 1 .an odd block has no halves",
    ),
    "output": ({"boft_block_size": 6, "side": "output"}, WrapError, "the 16 output"),
    "single": ({"boft_block_size": 1}, WrapError, "one feature cannot rotate"),
    "both": ({"boft_block_num": 2}, ConfigError, "set the other to 0"),
    "none": ({"boft_block_size": 0}, ConfigError, "set the other to 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_say_what_would(case: str) -> None:
    settings, error, match = BAD[case]
    with pytest.raises(error, match=match):
        site_of({"kind": "boft", **settings}, *layer_of(16, 48))
