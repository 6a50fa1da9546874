"""LoftQ: PEFT's iterates on stored weights, and banks on the weights that it makes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import molora
from molora.checkpoint import load_adapter_state
from molora.errors import CheckpointError, ConfigError, WrapError
from molora.model import adapter_parameters, sites
from molora.quantized import bits_of, dequantised
from tests.bits import Single, layer_of, quantise, single
from tests.oracle import load, near

Factory = Callable[..., PreTrainedModel]
IDS = torch.arange(1, 25).view(2, 12)


@pytest.mark.parametrize("t", [1, 2, 3, 4, 5])
def test_every_iterate_is_pefts(t: int) -> None:
    o = load("loftq")
    found = molora.loftq_factors(o["w"], 4, iterations=t)
    # a code at a threshold may flip with the rounding of the SVD
    assert (found.Q - o[f"Q/{t}"]).abs().max() < 1e-4
    assert (found.B @ found.A - o[f"B/{t}"] @ o[f"A/{t}"]).abs().max() < 1e-4
    rest = o["w"] - found.Q
    left = (rest - found.B @ found.A).norm()
    assert left.item() == pytest.approx(o[f"residual/{t}"].item(), rel=1e-4)
    # Eckart and Young: what the best part of rank 4 leaves
    tail = torch.linalg.svdvals(rest)[4:].norm()
    assert left.item() == pytest.approx(tail.item(), rel=1e-4)
    assert left < rest.norm()


def test_the_scale_is_divided_out() -> None:
    w = load("loftq")["w"]
    plain, scaled = molora.loftq_factors(w, 3), molora.loftq_factors(w, 3, scale=2.5)
    assert (2.5 * scaled.B @ scaled.A - plain.B @ plain.A).abs().max() < 1e-6
    assert torch.equal(plain.Q, scaled.Q)


def test_nf4_of_stored_weights() -> None:
    o = load("nf4")
    for width in (40, 24):
        # the flattened values are in the same blocks, however wide a row is
        w = o["small/w"].reshape(-1, width)
        assert near(molora.nf4(w), o["small/dequant"].reshape(-1, width)) is True
    doubled = molora.nf4(o["big/w"], double=True)
    assert near(doubled, o["big/dequant"])
    assert (doubled - molora.nf4(o["big/w"])).abs().max() > 1e-4


def settings(targets: Any, T: int, E: int = 1, **more: Any) -> molora.AdapterConfig:
    experts = {"kind": "lora", "num_experts": E, "r": 4, "lora_alpha": 4}
    init = {"init_lora_weights": f"loftq_iter_{T}"}
    raw = {
        "target_modules": targets,
        "experts": experts | init | more,
        "router": {"kind": "soft" if E > 1 else "none"},
    }
    return molora.AdapterConfig.from_dict(raw)


def of_file(T: int, E: int = 1, **more: Any) -> tuple[dict[str, Tensor], Single, Any]:
    """PEFT's weights in a layer of bitsandbytes, under experts from iterate T."""
    o = load("loftq")
    model = Single(layer_of("nf4", o["w"], compress_statistics=False))
    config = settings(["lin"], T, E, **more)
    molora.wrap(model, config, original=single(o["w"]))
    return o, model, sites(model)["lin"]


def product(experts: Any, end: str = "", expert: int = 0) -> Tensor:
    """B A of an expert, or of one of the frozen terms."""
    A, Bt = getattr(experts, f"A{end}"), getattr(experts, f"Bt{end}")
    made: Tensor = Bt[expert].t() @ A[expert]
    return made.detach()


def shake(site: Any) -> None:
    """Values as after training."""
    generator = torch.Generator().manual_seed(1)
    for values in (site.experts.A, site.experts.Bt):
        values.data.add_(0.2 * torch.randn(values.shape, generator=generator))


@pytest.mark.parametrize("T", [1, 2, 5])
def test_a_bank_trains_on_pefts_iterate(T: int) -> None:
    o, model, site = of_file(T)
    assert bits_of(site.base) == 4
    Q = dequantised(site.base)
    # as far as the rounding of the SVD lets the codes agree
    assert (Q - o[f"Q/{T}"]).abs().max() < 1e-4
    BA = o[f"B/{T}"] @ o[f"A/{T}"]
    assert (product(site.experts) - BA).abs().max() < 1e-4
    left = (o["w"] - Q - product(site.experts)).norm().item()
    assert left == pytest.approx(o[f"residual/{T}"].item(), rel=1e-4)
    if T > 1:
        last = o[f"B/{T - 1}"] @ o[f"A/{T - 1}"]
        assert (product(site.experts, "_last") - last).abs().max() < 1e-4
    trained = {n for n, p in adapter_parameters(model).items() if p.requires_grad}
    assert trained == {"lin.experts.A", "lin.experts.Bt"}
    assert site.experts.count() == 4 * (20 + 64)


@pytest.mark.parametrize("T", [1, 5])
def test_outputs_and_gradients_are_those_of_q_and_the_factors(T: int) -> None:
    """In float64, with PEFT's Q, A and B in the place of ours."""
    o, model, site = of_file(T, lora_alpha=6)
    Q, A, B = (o[f"{name}/{T}"].double() for name in "QAB")
    site.base = single(Q).lin
    site.experts.double()
    with torch.no_grad():
        site.experts.A.copy_(A)
        site.experts.Bt.copy_(B.t())
    generator = torch.Generator().manual_seed(0)
    x, c = (
        torch.randn(1, 7, n, generator=generator, dtype=torch.float64) for n in (64, 20)
    )
    x.requires_grad_()
    y = model(x)
    (y * c).sum().backward()
    # y = x Q^T + s x A^T B^T
    s, X, C = 1.5, x.detach()[0], c[0]
    assert near(y.detach()[0], X @ Q.t() + s * X @ A.t() @ B.t())
    assert near(x.grad[0], C @ Q + s * C @ B @ A)
    assert near(site.experts.A.grad[0], s * (C @ B).t() @ X)
    assert near(site.experts.Bt.grad[0].t(), s * C.t() @ (X @ A.t()))


@pytest.mark.parametrize("T", [1, 3])
def test_a_mixture_starts_where_one_expert_does(T: int) -> None:
    o, model, site = of_file(T, 3)
    Q, experts = dequantised(site.base), site.experts
    best = molora.loftq_factors(o["w"], 4, iterations=T)
    for e in range(3):
        assert (product(experts, expert=e) - best.B @ best.A).abs().max() < 1e-5
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    want = x @ (best.Q + best.B @ best.A).t()
    # gates of a softmax sum to one
    assert (model(x[None])[0] - want).abs().max() < 1e-4
    shake(site)
    base = x @ Q.t()
    zero = experts(x, torch.zeros(5, 3), base).detach()
    assert torch.equal(zero, base)
    gates = torch.rand(5, 3, generator=torch.Generator().manual_seed(2))
    want = base.clone()
    for e in range(3):
        assert (experts.delta_weight(e, Q) - product(experts, expert=e)).norm() < 1e-5
        want += gates[:, e : e + 1] * (x @ product(experts, expert=e).t())
    assert (experts(x, gates, base).detach() - want).abs().max() < 1e-4


@pytest.mark.parametrize("T", [1, 3])
def test_the_base_is_given_back(T: int) -> None:
    o = load("loftq")
    layer = layer_of("nf4", o["w"])
    bytes_before = layer.weight.data.clone()
    model = Single(layer)
    x = torch.randn(1, 5, 64)
    before = model(x)
    molora.wrap(model, settings(["lin"], T), original=single(o["w"]))
    assert (sites(model)["lin"].base is layer) == (T == 1)
    assert (model(x) - before).norm() > 0.01 * before.norm()
    with molora.disabled(model):
        assert torch.equal(model(x), before)
    twin = copy.deepcopy(model)
    molora.unwrap(model)
    assert model.lin is layer and torch.equal(layer.weight.data, bytes_before)
    assert torch.equal(model(x), before)
    assert torch.equal(molora.unwrap(twin)(x), before)


@pytest.mark.parametrize("T", [1, 3])
def test_a_saved_adapter_goes_onto_any_base(T: int, tmp_path: Path) -> None:
    o, model, site = of_file(T)
    start = product(site.experts)
    shake(site)
    x = torch.randn(1, 5, 64)
    want, learned = model(x), product(site.experts) - start
    torch.manual_seed(0)
    molora_save(model, tmp_path)
    again = Single(layer_of("nf4", o["w"], compress_statistics=False))
    given = again.lin
    if T > 1:
        with pytest.raises(WrapError, match=r"does not hold.*original=load_base"):
            molora.load(again, tmp_path)
        assert again.lin is given and type(again) is Single
        other = single(o["w"].flip(0))
        with pytest.raises(WrapError, match="loftq: original is another model"):
            molora.load(again, tmp_path, original=other)
    else:
        with pytest.raises(WrapError, match="nothing here reads the unquantised"):
            molora.load(again, tmp_path, original=single(o["w"]))
    twin = single(o["w"]) if T > 1 else None
    molora.load(again, tmp_path, original=twin)
    assert torch.equal(again(x), want)
    molora.unwrap(again)
    assert again.lin is given
    # elsewhere it is what was learned that is added
    for other in (single(o["w"]), Single(layer_of("int8", o["w"]))):
        base = other(x)
        molora.load(other, tmp_path)
        assert (other(x) - base - x @ learned.t()).abs().max() < 2e-2
        found = sites(other)["lin"]
        assert (found.delta_weight() - learned).abs().max() < 1e-5
    with pytest.raises(WrapError, match="nothing here reads the unquantised"):
        molora.load(single(o["w"]), tmp_path, original=single(o["w"]))


@pytest.mark.parametrize("mark", ["forward", "_hf_hook"])
def test_a_layer_with_hooks_of_accelerate_is_refused(mark: str) -> None:
    o = load("loftq")
    layer = layer_of("nf4", o["w"])
    # a copy of the layer would keep what is bound to the layer itself
    vars(layer)[mark] = layer.forward
    model = Single(layer)
    with pytest.raises(WrapError, match="hooks of accelerate.*one device"):
        molora.wrap(model, settings(["lin"], 3), original=single(o["w"]))
    assert model.lin is layer


def molora_save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def test_resuming_needs_the_same_weights(tmp_path: Path) -> None:
    o, model, site = of_file(3)
    shake(site)
    molora_save(model, tmp_path / "same")
    _, fresh, there = of_file(3)
    load_adapter_state(fresh, tmp_path / "same")
    x = torch.randn(1, 5, 64)
    assert torch.equal(fresh(x), model(x))
    # another rounding of the SVD: what is held is still what Q was made from
    own = there.experts.A_last.detach().clone()
    site.experts.A_last.data *= 1 + 1e-5
    molora_save(model, tmp_path / "near")
    load_adapter_state(fresh, tmp_path / "near")
    assert torch.equal(there.experts.A_last, own)
    assert not torch.equal(site.experts.A_last, own)
    site.experts.A_last.data[0, 0] *= -1
    molora_save(model, tmp_path / "other")
    before = there.experts.A.detach().clone()
    site.experts.A_last.data[0, 0] *= -1
    with pytest.raises(CheckpointError, match="trained on other 4-bit weights"):
        load_adapter_state(fresh, tmp_path / "other")
    assert torch.equal(there.experts.A, before)


@pytest.mark.parametrize("T", [1, 3])
def test_merging_onto_both_weights(T: int) -> None:
    o, model, site = of_file(T)
    start, Q, held = product(site.experts), dequantised(site.base), site.base
    shake(site)
    trained = product(site.experts)
    x = torch.randn(1, 5, 64)
    before = model(x)
    sums = {"dequantised": Q + trained, "original": o["w"] + trained - start}
    for base, want in sums.items():
        molora.merge(model, base=base, original=single(o["w"]))
        assert (site.weight - want).abs().max() < 1e-5
        cost = molora.merge_costs(model)["lin"]
        apart = (sums["dequantised"] - sums["original"]).norm() / want.norm()
        # the two differ by what LoftQ leaves
        for name, value in zip(sums, cost, strict=True):
            expected = 0.0 if name == base else apart.item()
            assert value == pytest.approx(expected, rel=0.05, abs=1e-6)
        molora.unmerge(model)
        assert site.base is held and torch.equal(model(x), before)
    molora.merge(model, base="dequantised")
    molora.unwrap(model)
    assert isinstance(model.lin, nn.Linear) and bits_of(model.lin) is None
    assert (model(x) - before).abs().max() < 1e-4


def wide(make: Factory, **more: Any) -> PreTrainedModel:
    """4-bit layers need widths that are multiples of 64 on a CPU."""
    return make(hidden_size=64, intermediate_size=64, num_hidden_layers=1, **more)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


@pytest.mark.parametrize("T", [1, 2])
def test_a_collapsed_mixture_stays_on_its_weights(
    T: int, tiny_llama: Factory, tmp_path: Path
) -> None:
    model: Any = quantise(wide(tiny_llama), "nf4")
    twin = wide(tiny_llama)
    config = settings(["up_proj", "down_proj"], T, 2, lora_alpha=6)
    molora.wrap(model, config, original=twin)
    for site in sites(model).values():
        shake(site)
    deltas = {
        path: sum(site.experts.delta_weight(e, site.base_weight()) for e in (0, 1)) / 2
        for path, site in sites(model).items()
    }
    starts = {path: site.experts.restored() for path, site in sites(model).items()}
    molora.collapse(model, method="linear", rank=9)
    for path, site in sites(model).items():
        assert (site.delta_weight() - deltas[path]).abs().max() < 1e-5
        assert (site.experts.restored() - starts[path]).abs().max() < 1e-6
        assert site.experts.A.shape[1] == 8 and site.experts.A_start.shape[1] == 4
        trained = {n for n, p in site.experts.named_parameters() if p.requires_grad}
        assert trained == {"A", "Bt"}
    model.save_pretrained(tmp_path)
    again = quantise(wide(tiny_llama), "nf4")
    molora.load(again, tmp_path, original=twin if T > 1 else None)
    assert torch.equal(logits(again), logits(model))
    elsewhere = molora.load(wide(tiny_llama), tmp_path)
    for path, site in sites(elsewhere).items():
        learned = deltas[path] - starts[path]
        assert (site.delta_weight() - learned).abs().max() < 1e-5


def test_what_is_exported_and_what_is_grown(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model: Any = quantise(wide(tiny_llama), "nf4")
    molora.wrap(model, settings(["up_proj"], 2), original=wide(tiny_llama))
    for site in sites(model).values():
        shake(site)
    model.save_pretrained(tmp_path / "own")
    for export in (molora.export_peft, molora.export_peft_experts):
        with pytest.raises(WrapError, match=r"model\.quantization=none"):
            export(model, tmp_path / "peft")
    elsewhere = molora.load(wide(tiny_llama), tmp_path / "own")
    molora.export_peft(elsewhere, tmp_path / "peft")
    theirs = molora.import_peft(wide(tiny_llama), [tmp_path / "peft"])
    assert (logits(theirs) - logits(elsewhere)).abs().max() < 1e-5
    mixture = quantise(wide(tiny_llama), "nf4")
    raw = settings(["up_proj"], 2, 2).to_dict() | {"router": {"kind": "topk"}}
    config = molora.AdapterConfig.from_dict(raw)
    molora.wrap(mixture, config, original=wide(tiny_llama))
    (site,) = sites(mixture).values()
    held = site.base
    shake(site)
    molora.grow(mixture)
    assert site.base is held
    Q = site.base_weight()
    assert torch.equal(site.experts.delta_weight(2, Q), site.experts.restored())


def test_it_is_refused_where_it_means_nothing() -> None:
    o = load("loftq")
    held = Single(layer_of("nf4", o["w"]))
    layer, twin = held.lin, single(o["w"])
    for model, config, original, message in (
        (held, settings(["lin"], 1), None, r"original=load_base\(name\)"),
        (held, settings(["lin"], 5), single(o["w"][:3]), "another model"),
        (held, settings(["lin"], 1), held, "no unquantised linear layer 'lin'"),
        (single(o["w"]), settings(["lin"], 1), twin, r"model\.quantization: nf4"),
        (
            Single(layer_of("int8", o["w"])),
            settings(["lin"], 1),
            twin,
            r"not held so.*quantization='nf4'",
        ),
        (Single(layer_of("fp4", o["w"])), settings(["lin"], 1), twin, "not held so"),
        (held, settings(["lin"], 1, r=21), twin, "takes r of the 20 directions"),
        (held, settings(["lin"], 1, loftq_r=3), twin, "loftq_r stands in what"),
        (
            held,
            settings(["lin"], 1, init_lora_weights=True),
            twin,
            "original: nothing here reads",
        ),
    ):
        with pytest.raises(WrapError, match=message):
            molora.wrap(model, config, original=original)
        assert type(model) is Single
    assert held.lin is layer
    inside = settings(["lin"], 1).to_dict()
    inner = {"kind": "lora", "init_lora_weights": "loftq"}
    inside["experts"] = {"kind": "dora", "inner": inner}
    with pytest.raises(WrapError, match="by itself, not inside of DoRAExperts"):
        molora.wrap(held, molora.AdapterConfig.from_dict(inside), original=twin)
    with pytest.raises(ConfigError, match="loftq_r: init_lora_weights is not loftq"):
        settings(["lin"], 1, init_lora_weights="pissa", loftq_r=2)
