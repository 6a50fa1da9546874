"""Kronecker banks: numbers of PEFT and LyCORIS, KronA, three factors, PEFT's format."""

import functools
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import ConfigError, WrapError
from tests.families import (
    disturb,
    gates_of,
    layer_of,
    run,
    site_of,
    vector,
    worst_of_sum,
    worst_of_vector,
)

PEFT = ["f4", "f_ge_sqrt", "f_nondiv", "full_full", "full_low", "low_full", "low_low"]
FILES = [f"lokr_{name}" for name in [*PEFT, "prime"]]
LYCORIS = [f"lycoris_lokr_{n}" for n in ("f_ge_sqrt", "full_low", "low_low")]


def settings_of(hyper: dict[str, Any]) -> dict[str, Any]:
    pre = "lycoris_" if "lycoris_factor" in hyper else ""
    return {
        "kind": "lokr",
        "r": hyper["r"],
        "alpha": float(hyper["alpha"]),
        "decompose_factor": hyper["lycoris_factor" if pre else "decompose_factor"],
        "decompose_both": hyper[f"{pre}decompose_both"],
        "sort_factors": bool(pre),
    }


def check(t: dict[str, Tensor], hyper: dict[str, Any], settings: dict[str, Any]) -> Any:
    site = site_of(settings, t["base.weight"], t["base.bias"])
    experts = site.experts
    assert experts.scale == pytest.approx(hyper["scale"])
    own = dict(experts.named_parameters())
    params = {n.removeprefix("param.") for n in t if n.startswith("param.")}
    assert params == {n.replace("_", "") for n in own}
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(t["param." + name.replace("_", "")])
    grads = {n.replace("_", ""): lambda p=p: p.grad[0] for n, p in own.items()}
    found = worst_of_vector(site, t, grads)
    assert max(found.values()) < 1e-12, found
    assert torch.allclose(site.delta_weight(), t["delta.weight"], rtol=0, atol=1e-12)
    return site


@pytest.mark.parametrize("name", FILES + LYCORIS)
def test_one_expert_is_what_others_compute(name: str) -> None:
    t, hyper = vector(name)
    site = check(t, hyper, settings_of(hyper))
    pre = "lycoris_factor_" if name in LYCORIS else "factor_"
    outs, ins = zip(*site.experts.sizes, strict=True)
    assert [list(outs), list(ins)] == [hyper[pre + "out"], hyper[pre + "in"]]
    assert site.experts.count() == sum(
        v.numel() for n, v in t.items() if n.startswith("param.")
    )


def test_whole_factors_have_the_scale_that_is_set() -> None:
    t, hyper = vector("lycoris_lokr_full_full")
    assert check(t, hyper, {"kind": "lokr", "r": None, "alpha": 1.0}) is not None


MIXTURES: list[tuple[tuple[int, int], dict[str, Any]]] = [
    ((50, 30), {"r": 2}),
    ((28, 20), {"r": 1, "decompose_both": True}),
    ((13, 29), {"r": 2, "decompose_factor": 4}),
    ((24, 24), {"r": None, "alpha": 0.5, "residual": True}),
    ((24, 60), {"r": None, "alpha": 2.0, "decompose_factor": [2, 3]}),
    ((64, 48), {"r": 1, "decompose_factor": [4, 4], "decompose_both": True}),
]


@pytest.mark.parametrize(("shape", "more"), MIXTURES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_by_its_definition(
    shape: tuple[int, int], more: dict[str, Any], top_k: int | None
) -> None:
    site = site_of({"kind": "lokr", **more}, *layer_of(*shape), E=4)
    disturb(site)
    own = site.experts
    count = 2 if "decompose_factor" not in more else None
    count = count or len(own.config.divisors()) + 1

    def factor(e: int, k: int) -> Tensor:
        if hasattr(own, f"w{k}"):
            whole: Tensor = getattr(own, f"w{k}")[e]
            return whole
        left: Tensor = getattr(own, f"w{k}_a")[e]
        return left @ getattr(own, f"w{k}_b")[e]

    def delta(e: int, x: Tensor) -> Tensor:
        scale = more.get("alpha", 8.0) / (more["r"] or 1)
        W = functools.reduce(torch.kron, [factor(e, k) for k in range(1, count + 1)])
        y = scale * x @ W.t()
        return y + own.s_res[e] * x if more.get("residual") else y

    found = worst_of_sum(site, delta, top_k=top_k)
    assert max(found.values()) < 1e-12, found
    x = torch.randn(3, shape[1], dtype=torch.float64)
    dense = own.delta_weight(2, site.base.weight)
    assert torch.allclose(dense, delta(2, torch.eye(shape[1]).double()).t(), atol=1e-12)
    assert torch.equal(run(site, x, torch.zeros(3, 4).double()), site.base(x))
    none = run(site, x[:0], gates_of(2, 4)[:0], top_k)
    none.sum().backward()
    assert none.shape == (0, shape[0])
    assert all(p.grad is not None and not p.grad.any() for p in own.parameters())


@pytest.mark.parametrize("init", [True, "lycoris"])
@pytest.mark.parametrize("r", [None, 2])
def test_it_starts_at_the_base(init: Any, r: int | None) -> None:
    settings = {"kind": "lokr", "r": r, "init_weights": init, "decompose_both": bool(r)}
    site = site_of(settings, *layer_of(60, 48), E=2)
    x = torch.randn(5, 48, dtype=torch.float64)
    assert torch.equal(run(site, x, gates_of(5, 2)), site.base(x))
    zero = [n for n, p in site.experts.named_parameters() if not p.any()]
    first, last = ("w1_a", "w2_b") if r else ("w1", "w2")
    assert zero == [first if init is True else last]
    for name, p in site.experts.named_parameters():
        bound = p.shape[2] ** -0.5
        if name not in zero:
            assert 0.7 * bound < p.abs().max() <= bound
            assert not torch.equal(p[0], p[1])


def test_memory_is_that_of_the_input() -> None:
    kept: dict[int, int] = {}
    for E in (2, 8):
        site = site_of({"kind": "lokr", "r": 2}, *layer_of(40, 40), E=E)
        x = torch.randn(16, 40, dtype=torch.float64, requires_grad=True)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1],  # noqa: B023
            lambda t: t,
        ):
            run(site, x, gates_of(16, E).requires_grad_())
        kept[E] = sum(sizes) - site.experts.count() - 16 * E
    assert kept[8] == kept[2] < 5 * 16 * 40


def peft_layer(rows: int, wide: int, **settings: Any) -> tuple[Any, Any]:
    model = nn.ModuleDict({"lin": nn.Linear(wide, rows)}).double()
    base = nn.Linear(wide, rows).double()
    base.load_state_dict(model["lin"].state_dict())
    config = peft.LoKrConfig(target_modules=["lin"], init_weights=False, **settings)
    return peft.get_peft_model(model, config).double(), base  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "more",
    [
        {"r": 2},
        {"r": 1, "decompose_both": True, "decompose_factor": 8},
        {"r": None, "alpha": 0.5},
    ],
)
def test_peft_computes_the_same_from_what_is_exported(more: dict[str, Any]) -> None:
    site = site_of({"kind": "lokr", **more}, *layer_of(40, 48), E=2)
    disturb(site)
    form = site.experts.to_peft(1)
    theirs, base = peft_layer(40, 48, **form.settings)
    prefix = "base_model.model.lin."
    state = {prefix + n: v for n, v in form.tensors.items()}
    assert state.keys() == peft.get_peft_model_state_dict(theirs).keys()
    peft.set_peft_model_state_dict(theirs, state)
    x = torch.randn(5, 48, dtype=torch.float64)
    gates = torch.tensor([[0.0, 1.0]]).double().expand(5, 2)
    want = theirs.base_model.model["lin"](x) - base(x)
    got = run(site, x, gates) - site.base(x)
    assert (got - want).abs().max() < 1e-9 < want.abs().max()


@pytest.mark.parametrize("both", [False, True])
def test_what_peft_saved_is_read(both: bool) -> None:
    theirs, base = peft_layer(20, 28, r=1, alpha=6, decompose_both=both)
    state = peft.get_peft_model_state_dict(theirs)
    tensors = {n.removeprefix("base_model.model.lin."): v for n, v in state.items()}
    config = theirs.peft_config["default"].to_dict()
    cls = molora.experts.LoKrExperts
    block, ours = cls.from_peft(config, tensors, 28, 20)
    site = site_of(block, base.weight.data, base.bias.data)
    site.experts.load_state_dict(ours)
    x = torch.randn(5, 28, dtype=torch.float64)
    want = theirs.base_model.model["lin"](x)
    assert torch.allclose(run(site, x, None), want, rtol=0, atol=1e-9)
    with pytest.raises(WrapError, match="holds lokr_w1.* not .*lokr_t2"):
        cls.from_peft(config, {**tensors, "lokr_t2": tensors["lokr_w2_a"]}, 28, 20)


def test_what_does_not_fit_is_refused() -> None:
    layer = layer_of(20, 28)
    with pytest.raises(WrapError, match=r"experts\.residual.*28 to 20"):
        site_of({"kind": "lokr", "residual": True}, *layer)
    with pytest.raises(ConfigError, match="decompose_both: r null"):
        site_of({"kind": "lokr", "r": None, "decompose_both": True}, *layer)
    for factor in (0, [4, 0], []):
        with pytest.raises(ConfigError, match="decompose_factor: give -1"):
            site_of({"kind": "lokr", "decompose_factor": factor}, *layer)
    three = site_of({"kind": "lokr", "decompose_factor": [2, 2]}, *layer)
    with pytest.raises(WrapError, match="two factors and no residual.*3 factors"):
        three.experts.to_peft(0)
    other = {"kind": "lokr", "decompose_factor": 7, "sort_factors": True}
    with pytest.raises(WrapError, match=r"sort_factors: PEFT would split"):
        site_of(other, *layer).experts.to_peft(0)


def test_half_precision_bases() -> None:
    weight, bias = layer_of(20, 28)
    settings = {"kind": "lokr", "r": 2}
    site = site_of(settings, weight.bfloat16(), bias.bfloat16(), E=2)
    site.experts.float()
    disturb(site)
    x = torch.randn(5, 28).bfloat16()
    y = run(site, x, gates_of(5, 2).float())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and site.experts.w1.grad.dtype == torch.float32
    exact = site_of(settings, weight.bfloat16().double(), bias.bfloat16().double(), E=2)
    exact.experts.load_state_dict(site.experts.state_dict())
    want = run(exact, x.double(), gates_of(5, 2))
    assert (y.double() - want).abs().max() < 0.05 * want.abs().max()
