"""Bilinear families against their authors' numbers; see ../oracles/README.md."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import ConfigError, WrapError
from molora.model import sites
from tests.bilinear import bank, check_single, numbers, randomised
from tests.oracle import near


def test_adalora() -> None:
    t, hyper = numbers("adalora_forward")
    settings = {"init_r": hyper["init_r"], "lora_alpha": float(hyper["alpha"])}
    experts = bank("adalora", hyper["d_in"], hyper["d_out"], **settings)
    tensors = {"A": t["param.A"], "Bt": t["param.B"].t(), "E": t["param.E"].t()}
    grads = {"A": t["grad.A"], "Bt": t["grad.B"].t(), "E": t["grad.E"].t()}
    check_single(experts, t, tensors | {f"grad.{k}": v for k, v in grads.items()})
    start = bank("adalora", 400, 300, init_r=8, num_experts=4)
    for values in (start.A, start.Bt):
        assert values.std().item() == pytest.approx(0.02, rel=0.03)
    assert not start.E.any()


def test_sora() -> None:
    t, hyper = numbers("sora_forward")
    settings = {"r": hyper["r"], "lora_alpha": float(hyper["alpha"])}
    experts = bank("sora", hyper["d_in"], hyper["d_out"], **settings)
    tensors = {"A": t["param.A"], "Bt": t["param.B"].t(), "gate": t["param.gate"]}
    grads = {"A": t["grad.A"], "Bt": t["grad.B"].t(), "gate": t["grad.gate"]}
    assert (t["param.gate"] == 0).sum() == 1
    check_single(experts, t, tensors | {f"grad.{k}": v for k, v in grads.items()})
    assert len(experts.expert_factors(0)[0]) == hyper["r"] - 1
    start = bank("sora", 20, 30, r=400)
    assert start.gate.std().item() == pytest.approx(1, rel=0.15)


def test_aflora() -> None:
    t, hyper = numbers("aflora_forward")
    experts = bank("aflora", hyper["d_in"], hyper["d_out"], r=hyper["r"])
    # its vectors start from a float32 value there
    assert (experts.lambda_d[0] - t["init.s_d"]).abs().max() < 1e-8
    assert torch.equal(experts.lambda_b[0], t["init.s_u"])
    names = {"A": "A", "lambda_d": "s_d", "lambda_b": "s_u"}
    tensors = {name: t[f"param.{theirs}"] for name, theirs in names.items()}
    grads = {f"grad.{name}": t[f"grad.{theirs}"] for name, theirs in names.items()}
    tensors |= {"Bt": t["param.B"].t(), "grad.Bt": t["grad.B"].t()}
    check_single(experts, t, tensors | grads)


class Sites(nn.Module):
    """Layers of a file by their names."""

    def __init__(self, t: dict[str, Tensor], names: dict[str, str]):
        super().__init__()
        for path, name in names.items():
            weight, bias = t[f"{name}/base.weight"], t[f"{name}/base.bias"]
            layer = nn.Linear(*reversed(weight.shape))
            layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
            parts = path.split(".")
            parent: nn.Module = self
            for part in parts[:-1]:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(parts[-1], layer)


def wrapped(model: nn.Module, targets: list[str], **experts: Any) -> Any:
    raw = {"target_modules": targets, "experts": experts}
    return molora.wrap(model, molora.AdapterConfig.from_dict(raw)).double()


def check_site(site: Any, t: dict[str, Tensor], pre: str) -> None:
    x = t[pre + "x"].clone().requires_grad_()
    y = site(x)
    assert near(y.detach(), t[pre + "y"], pre + "y")
    (y * t[pre + "c"]).sum().backward()
    assert near(x.grad, t[pre + "grad.x"], pre + "grad.x")
    merged = site.base.weight + site.delta_weight()
    assert near(merged.detach(), t[pre + "merged.weight"], pre + "merged")


@pytest.mark.parametrize("kind", ["frozen", "seeded"])
def test_vera(kind: str) -> None:
    t, hyper = numbers("vera")
    names = list(hyper["sites"])
    settings: dict[str, Any] = {"trainability": {"A": kind, "B": kind}}
    if kind == "seeded":
        settings["projection_prng_key"] = hyper["projection_prng_key"]
    model = wrapped(
        Sites(t, {n: n for n in names}), names, kind="vera", r=hyper["r"], **settings
    )
    found = sites(model)
    first: Any = found[names[0]].experts
    if kind == "seeded":
        # drawn as PEFT draws them, widest input and output over all sites
        assert torch.equal(first.A[0].float(), t["init.A"])
        assert torch.equal(first.Bt[0].t().float(), t["init.B"])
        assert not any(n.endswith((".A", ".Bt")) for n in model.state_dict())
    first.A.data.copy_(t["shared.A"])
    first.Bt.data.copy_(t["shared.B"].t())
    for name in names:
        experts: Any = found[name].experts
        assert torch.equal(experts.lambda_d[0].float(), t["init.lambda_d"])
        for vector in ("lambda_d", "lambda_b"):
            getattr(experts, vector).data.copy_(t[f"{name}/param.{vector}"])
        check_site(found[name], t, f"{name}/")
        for vector in ("lambda_d", "lambda_b"):
            grad = getattr(experts, vector).grad[0]
            assert near(grad, t[f"{name}/grad.{vector}"], vector)
        assert experts.count() == hyper["r"] + hyper["sites"][name]["d_out"]
    assert first.A.grad is None and first.Bt.grad is None


def test_lotr() -> None:
    t, hyper = numbers("lotr")
    paths = {f"layers.{i}.lin": str(i) for i in range(hyper["layers"])}
    settings = {"r": hyper["r"], "lora_alpha": hyper["alpha"]}
    model = wrapped(Sites(t, paths), ["lin"], kind="lotr", **settings)
    found = sites(model)
    first: Any = found["layers.0.lin"].experts
    first.A.data.copy_(t["shared.V"])
    first.Bt.data.copy_(t["shared.U"].t())
    for path, name in paths.items():
        experts: Any = found[path].experts
        assert not experts.G.any()
        experts.G.data.copy_(t[f"{name}/param.G"])
        check_site(found[path], t, f"{name}/")
        assert near(experts.G.grad[0], t[f"{name}/grad.G"], "grad.G")
    # summed over the layers
    assert near(first.A.grad[0], t["grad.V"], "grad.V")
    assert near(first.Bt.grad[0].t(), t["grad.U"], "grad.U")
    r, size = hyper["r"], hyper["d_in"] + hyper["d_out"]
    counted = sum(site.experts.count() for site in found.values())
    assert counted == r * size + hyper["layers"] * r * r


def test_melora() -> None:
    t, hyper = numbers("melora")
    settings = {
        "num_parts": hyper["n"],
        "r": hyper["r"],
        "lora_alpha": [float(a) for a in hyper["alpha"]],
    }
    experts = bank("melora", hyper["d_in"], hyper["d_out"], **settings)
    n = range(hyper["n"])
    tensors = {}
    for pre, prefix in (("param", ""), ("grad", "grad.")):
        tensors[f"{prefix}A"] = torch.cat([t[f"{pre}.A.{i}"] for i in n])
        tensors[f"{prefix}Bt"] = torch.cat([t[f"{pre}.B.{i}"].t() for i in n])
    check_single(experts, t, tensors)
    delta = experts.delta_weight(0)
    assert near(delta, t["delta.weight"])
    assert not delta[:10, 14:].any() and not delta[10:, :14].any()
    with pytest.raises(WrapError, match=r"num_parts=4 does not divide the 30.*\[1, 2"):
        bank("melora", 30, 50, num_parts=4)
    with pytest.raises(ConfigError, match="r lists 3 values for num_parts=2"):
        bank("melora", 30, 50, r=[1, 2, 3])
    start = bank("melora", 400, 32, num_parts=4, r=8)
    assert start.A.abs().max().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("case", ["a", "b"])
def test_prolora(case: str) -> None:
    t, hypers = numbers("prolora")
    hyper, pre = hypers["cases"][case], f"{case}/"
    settings = {
        "r": hyper["r"],
        "unshared_r": hyper["u"],
        "in_chunks": hyper["m"],
        "out_chunks": hyper["n"],
        "lora_alpha": float(hyper["alpha"]),
    }
    experts = bank("prolora", hyper["d_in"], hyper["d_out"], **settings)
    tensors = {}
    for group, prefix in (("param", ""), ("grad", "grad.")):
        tensors[f"{prefix}A"] = t[f"{pre}{group}.A0"]
        tensors[f"{prefix}Bt"] = t[f"{pre}{group}.B0"].t()
        if hyper["u"]:
            tensors[f"{prefix}A_unshared"] = t[f"{pre}{group}.Au"]
            tensors[f"{prefix}B_unshared"] = t[f"{pre}{group}.Bu"]
    check_single(experts, t, tensors, pre)
    A, Bt, _ = experts.factors()
    assert torch.equal(A[0], t[pre + "full.A"].t())
    assert torch.equal(Bt[0], t[pre + "full.B"])
    with pytest.raises(ConfigError, match="unshared_r=8 leaves none"):
        bank("prolora", 30, 50, unshared_r=8)
    with pytest.raises(ConfigError, match="no A_unshared"):
        bank("prolora", 30, 50, unshared_r=0, trainability={"A_unshared": "frozen"})
    with pytest.raises(WrapError, match="in_chunks=64: a layer has 30"):
        bank("prolora", 30, 50, in_chunks=64)
    # the bound of the whole input, not that of a chunk
    start = bank("prolora", 400, 30, in_chunks=4, r=16)
    for values in (start.A, start.A_unshared):
        assert values.abs().max().item() == pytest.approx(0.05, rel=0.03)


def test_alora_with_open_gates_is_lora() -> None:
    t, hyper = numbers("lora")
    settings = {"r": hyper["r"], "lora_alpha": float(hyper["alpha"])}
    wide = t["base.weight"].shape[::-1]
    tensors = {"A": t["param.A"], "Bt": t["param.B"].t()}
    grads = {"grad.A": t["grad.A"], "grad.Bt": t["grad.B"].t()}
    experts = bank("alora", *wide, **settings)
    assert torch.equal(experts.gates, torch.ones(1, hyper["r"]).double())
    check_single(experts, t, tensors | grads)
    # a gate of zero is a row of B of zero
    keep = torch.arange(hyper["r"]).unsqueeze(0) != 1
    experts.mask_ranks(keep)
    got = experts.delta_weight(0)
    masked = t["param.B"] * keep
    scale = hyper["alpha"] / hyper["r"]
    assert near(got, scale * masked @ t["param.A"])


@pytest.mark.parametrize("form", ["raw", "softmax", "sigmoid"])
def test_bilora_by_hand(form: str) -> None:
    experts = bank("bilora", 5, 4, r=3, singular_values=form)
    zero = experts.Lambda if form == "raw" else experts.Bt
    other = experts.Bt if form == "raw" else experts.Lambda
    assert not zero.any() and bool(other.any()) == (form == "raw")
    randomised(experts)
    v = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    experts.Lambda.data.copy_(v)
    # e^0 + e^1 + e^-2 = 3.853617...; sigmoid(1) = 0.731058...
    want = {
        "raw": [0.0, 1.0, -2.0],
        "softmax": [0.2594964603, 0.7053845126, 0.0351190271],
        "sigmoid": [0.5, 0.7310585786, 0.1192029220],
    }[form]
    diagonal = torch.tensor(want, dtype=torch.float64)
    assert (experts.diagonal()[0] - diagonal).abs().max() < 1e-9
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    P, Q = experts.Bt[0].t(), experts.A[0]
    by_hand = x @ (P @ torch.diag(diagonal) @ Q).t()
    got = experts(x, None, None)
    assert (got - by_hand).abs().max() < 1e-8
    assert (experts.delta_weight(0) - P @ torch.diag(diagonal) @ Q).abs().max() < 1e-8
    # d loss / d v by central differences
    c = torch.randn_like(got)
    (got * c).sum().backward()
    step = 1e-5
    for j in range(3):
        sides = []
        for sign in (1, -1):
            experts.Lambda.data[0, j] = v[j] + sign * step
            sides.append((experts(x, None, None) * c).sum().item())
        experts.Lambda.data.copy_(v)
        slope = (sides[0] - sides[1]) / (2 * step)
        assert experts.Lambda.grad[0, j].item() == pytest.approx(slope, abs=1e-6)


def test_lorafa_is_lora_with_a_frozen_a() -> None:
    t, hyper = numbers("lorafa")
    settings = {"r": hyper["r"], "lora_alpha": float(hyper["alpha"])}
    trainability = {"A": "frozen"}
    experts = bank(
        "lora", hyper["d_in"], hyper["d_out"], trainability=trainability, **settings
    )
    assert experts.frozen == ("A",) and experts.count() == hyper["r"] * hyper["d_out"]
    experts.A.data.copy_(t["param.A"])
    experts.A.requires_grad_(False)
    base = nn.functional.linear(t["x"], t["base.weight"], t["base.bias"])
    before = t["init.B"]
    for step in range(hyper["steps"]):
        experts.Bt.data.copy_(before.t())
        experts.Bt.grad = None
        loss = (experts(t["x"], None, base) - t["target"]).square().mean()
        assert near(loss.detach(), t["loss"][step], "loss")
        loss.backward()
        assert near(experts.Bt.grad[0].t(), t["grad.B"][step], "grad.B")
        assert experts.A.grad is None
        before = t["B"][step]


def test_lori_trains_the_entries_of_its_mask() -> None:
    t, hyper = numbers("lori_trace")
    settings = {"r": hyper["r"], "lora_alpha": float(hyper["alpha"])}
    trainability = {"A": "frozen", "B": "masked"}
    experts = bank(
        "lora", hyper["d_in"], hyper["d_out"], trainability=trainability, **settings
    )
    experts.A.data.copy_(t["param.A"])
    experts.A.requires_grad_(False)
    experts.mask_Bt.copy_(t["mask"].t())
    assert experts.count() == int(t["mask"].sum())
    base = nn.functional.linear(t["x"], t["base.weight"], t["base.bias"])
    optimizer = torch.optim.AdamW(
        [experts.Bt], lr=hyper["lr"], weight_decay=hyper["weight_decay"]
    )
    for step in range(hyper["steps"]):
        optimizer.zero_grad()
        loss = (experts(t["x"], None, base) - t["target"]).square().mean()
        assert near(loss.detach(), t["loss"][step], "loss")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([experts.Bt], hyper["max_grad_norm"])
        # masked before it is clipped, as there
        assert near(experts.Bt.grad[0].t(), t["grad_used"][step], "grad")
        optimizer.step()
        assert near(experts.Bt.detach()[0].t(), t["B"][step], "B")


def test_lori_masks_by_one_threshold_over_all_sites() -> None:
    t, hyper = numbers("lori_mask")
    names = hyper["names"]
    model = nn.Module()
    for i in range(len(names)):
        out, _ = t[f"B/{i}"].shape
        model.add_module(f"lin{i}", nn.Linear(11, out))
    rank = t["B/0"].shape[1]
    trainability = {"A": "frozen", "B": "masked"}
    targets = [f"lin{i}" for i in range(len(names))]
    wrapped(model, targets, kind="lora", r=rank, trainability=trainability)
    found = sites(model)
    for i in range(len(names)):
        site: Any = found[f"lin{i}"]
        site.experts.Bt.data.copy_(t[f"B/{i}"].t())
    kept = molora.mask_by_magnitude(model, 1 - hyper["sparsity"])
    assert kept == sum(int(t[f"model/{i}"].sum()) for i in range(len(names)))
    for i in range(len(names)):
        site = found[f"lin{i}"]
        assert torch.equal(site.experts.mask_Bt[0].t(), t[f"model/{i}"])
        assert not site.experts.Bt.any()
