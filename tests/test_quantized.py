"""Layers of bitsandbytes under a bank: against stored numbers, and by definition."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from torch import Tensor, nn

import molora
from molora import quantized
from molora.errors import WrapError
from molora.model import adapter_parameters, sites
from molora.quantized import bits_of, dequantised
from tests.bits import MIXTURE, SINGLE, layer_of, plain, quantise, wrapped

Factory = Callable[..., Any]
ORACLES = Path(__file__).parent / "oracles"
IDS = torch.arange(1, 25).view(2, 12)
KINDS = ["nf4", "int8"]


@pytest.fixture
def llama(tiny_llama: Factory) -> Factory:
    """Widths of multiples of 64, which bitsandbytes reads rightly on every CPU."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    return lambda seed=0: tiny_llama(seed, **shape)


def test_nf4_with_double_quantisation_is_that_of_the_vectors() -> None:
    t = load_file(ORACLES / "nf4.safetensors")
    layer = layer_of("nf4", t["big/w"], compress_statistics=True)
    state = layer.weight.quant_state
    assert torch.equal(layer.weight.data, t["big/packed"])
    assert torch.equal(state.absmax, t["big/absmax8"])
    assert torch.equal(state.state2.absmax, t["big/absmax_outer"])
    assert torch.equal(state.offset, t["big/offset"])
    assert torch.equal(dequantised(layer), t["big/dequant"])
    single = layer_of("nf4", t["small/w"], compress_statistics=False)
    assert torch.equal(single.weight.data, t["small/packed"])
    assert torch.equal(single.weight.quant_state.absmax, t["small/absmax"])
    assert torch.equal(dequantised(single), t["small/dequant"])


def test_one_expert_on_nf4_is_qlora() -> None:
    t = load_file(ORACLES / "qlora.safetensors")
    layer = layer_of("nf4", t["orig.weight"], t["base.bias"], compress_statistics=True)
    assert torch.equal(layer.weight.data, t["packed"])
    assert torch.equal(dequantised(layer), t["base.weight"])
    model = wrapped(nn.ModuleDict({"lin": layer}))
    site: Any = sites(model)["lin"]
    assert (site.in_features, site.out_features) == (64, 20)
    with torch.no_grad():
        site.experts.A.copy_(t["param.A"])
        site.experts.Bt.copy_(t["param.B"].t())
    x = t["x"].clone().requires_grad_()
    y = site(x)
    (y * t["c"]).sum().backward()
    got = {
        "y": y.detach(),
        "grad.x": x.grad,
        "grad.A": site.experts.A.grad[0],
        "grad.B": site.experts.Bt.grad[0].t(),
    }
    for name, value in got.items():
        scale = float(t[name].abs().max())
        torch.testing.assert_close(value, t[name], rtol=0, atol=1e-5 * max(1, scale))
    molora.merge(model, base="dequantised")
    delta = 2.0 * t["param.B"].double() @ t["param.A"].double()
    want = t["base.weight"].double() + delta
    torch.testing.assert_close(site.base.weight.double(), want, rtol=0, atol=1e-6)
    # PEFT rounds the sum to NF4 again, which loses part of the update
    again = quantize_4bit(site.base.weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(dequantize_4bit(*again), t["merged.weight"])
    lost = (t["merged.weight"] - want).norm() / delta.norm()
    assert lost > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_dequantised_weight_and_the_update(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 64, generator=g), torch.randn(48, generator=g)
    model = wrapped(nn.ModuleDict({"lin": layer_of(kind, weight, bias)}))
    site: Any = sites(model)["lin"].train()
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)
    held = site.base.weight
    if kind == "int8":
        # 127 levels to either side of a row's largest value
        top = weight.half().abs().amax(1, keepdim=True).double()
        codes = (weight.half().double() * 127 / top).round()
        want = codes * top / 127
    else:
        want = dequantize_4bit(held.data, held.quant_state).double()
    close(dequantised(site.base).double(), want, rtol=1e-6, atol=1e-6)
    A, B = site.experts.A[0].detach().double(), site.experts.Bt[0].detach().double().t()
    x = torch.randn(2, 5, 64, generator=g).requires_grad_()
    c = torch.randn(2, 5, 48, generator=g)
    y = site(x)
    (y * c).sum().backward()
    x64, c64 = x.detach().double(), c.double()
    y64 = x64 @ want.t() + bias.double() + 2.0 * x64 @ A.t() @ B.t()
    close(y.double(), y64)
    assert x.grad is not None
    close(x.grad.double(), c64 @ (want + 2.0 * B @ A))
    dA = 2.0 * B.t() @ c64.flatten(0, 1).t() @ x64.flatten(0, 1)
    close(site.experts.A.grad[0].double(), dA)
    # in eval, 8-bit layers round the input as well
    slack = 2e-2 if kind == "int8" else 1e-5
    with torch.no_grad():
        again = site.eval()(x)
    assert quantized.relative(again, y) < slack


@pytest.mark.parametrize(
    ("experts", "dtype"), [(SINGLE, torch.bfloat16), (MIXTURE, torch.float32)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_trains_as_its_dequantised_twin(
    llama: Factory, kind: str, experts: dict[str, Any], dtype: torch.dtype
) -> None:
    base = quantise(llama().to(dtype), kind)
    twin = wrapped(plain(base).to(dtype), experts).train()
    model = wrapped(base, experts).train()
    assert len(sites(model)) == 7
    grads = []
    for either in (model, twin):
        out = either(input_ids=IDS, labels=IDS)
        out.loss.backward()
        mine = adapter_parameters(either).items()
        grads.append((out.logits, {name: p.grad for name, p in mine}))
    (logits, mine), (want, theirs) = grads
    slack = 1e-5 if dtype == torch.float32 else 5e-2
    assert quantized.relative(logits, want) < slack
    for name in mine:
        assert mine[name].dtype == torch.float32
        assert quantized.relative(mine[name], theirs[name]) < 10 * slack, name


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_read_the_weight_read_the_dequantised_one(
    llama: Factory, kind: str
) -> None:
    goat = {"kind": "goat", "num_experts": 3, "r": 4}
    raw = {"target_modules": "all-linear", "experts": goat, "router": {"kind": "soft"}}
    config = molora.AdapterConfig.from_dict(raw)
    base = quantise(llama(), kind)
    twin = molora.wrap(plain(base), config, seed=1)
    model = molora.wrap(base, config, seed=1)
    theirs = adapter_parameters(twin)
    for name, mine in adapter_parameters(model).items():
        assert torch.equal(mine, theirs[name]), name
    with torch.no_grad():
        logits = model.train()(input_ids=IDS).logits
        want = twin.train()(input_ids=IDS).logits
    assert quantized.relative(logits, want) < 1e-5


def pack_in_eval(layer: Any) -> None:
    """What a CPU with AVX512-BF16 says of itself."""
    layer.support_avx512bf16_for_cpu = True


def test_the_trap_of_a_bare_layer_in_eval_mode() -> None:
    """On such CPUs one forward in eval mode spoils a layer; here it is made to."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    layer = layer_of("nf4", weight)
    right = dequantised(layer)
    pack_in_eval(layer)
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
    assert layer.weight.quant_state.packing_format_for_cpu
    # no gradient, or one of other operations, of which torch warns
    x = torch.randn(3, 64, requires_grad=True)
    y = layer.train()(x)
    if y.requires_grad:
        y.sum().backward()
    want = right.sum(0).expand(3, 64)
    assert x.grad is None or quantized.relative(x.grad, want) > 0.5
    spoilt = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert quantized.relative(spoilt.view_as(right), right) > 0.5
    with pytest.raises(WrapError, match=r"'lin' ran in eval mode on the CPU"):
        wrapped(nn.ModuleDict({"lin": layer}))


def test_a_wrapped_model_is_not_in_the_trap(llama: Factory) -> None:
    grads = []
    for evaluated in (False, True):
        model = quantise(llama(), "nf4")
        for layer in model.modules():
            if bits_of(layer) == 4:
                pack_in_eval(layer)
        # layers without experts pass gradients as well
        model = wrapped(model, target_modules=["q_proj"])
        before = [dequantised(m) for m in model.modules() if bits_of(m) == 4]
        if evaluated:
            with torch.no_grad():
                model.eval()(input_ids=IDS)
        after = [dequantised(m) for m in model.modules() if bits_of(m) == 4]
        assert len(after) == 7
        assert all(map(torch.equal, before, after))
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in adapter_parameters(model).values()])
    assert len(grads[0]) == 2
    for one, other in zip(*grads, strict=True):
        assert one is not None and other is not None
        assert one.abs().sum() > 0 and torch.equal(one, other)


def test_widths_that_the_cpu_reads_wrongly_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With AVX512 some widths restart the blocks of 64 in every row."""

    def restarting(packed: Tensor, state: Any) -> Tensor:
        right = dequantize_4bit(packed, state)
        per_block = state.absmax.repeat_interleave(64)[: right.numel()].view_as(right)
        blocks = -(-right.shape[1] // 64)
        wrong = state.absmax.repeat_interleave(64)[: 64 * blocks]
        return right / per_block * wrong[: right.shape[1]]

    model = nn.ModuleDict({"lin": layer_of("nf4", torch.randn(8, 80))})
    if quantized._reads_width(80):
        assert bits_of(wrapped(copy.deepcopy(model)).lin.base) == 4  # type: ignore
    quantized._reads_width.cache_clear()
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", restarting)
    with pytest.raises(WrapError, match="'lin'.* 80 input features wrongly .* int8"):
        wrapped(model)
    quantized._reads_width.cache_clear()


def test_layers_that_hold_no_quantised_weight_yet_are_refused() -> None:
    model = nn.ModuleDict({"lin": bnb.nn.Linear4bit(64, 64)})
    with pytest.raises(WrapError, match=r"'lin' .* not quantised yet.*to\('cpu'\)"):
        wrapped(model)


def test_a_copy_of_a_quantised_model_is_its_equal(llama: Factory) -> None:
    model = wrapped(quantise(llama(), "nf4"), MIXTURE)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
        with molora.disabled(model):
            got = model(input_ids=IDS).logits
    base = quantise(llama(), "nf4")
    # as wrap does: what a CPU with AVX512-BF16 packs it rounds in another way
    quantized.keep_unpacked(base)
    with torch.no_grad():
        want = base(input_ids=IDS).logits
    assert torch.equal(got, want)
    plain_again = molora.unwrap(model)
    with torch.no_grad():
        assert torch.equal(plain_again(input_ids=IDS).logits, want)
    assert bits_of(plain_again.model.layers[0].mlp.up_proj) == 4
