"""A convolution with experts: PEFT's numbers, definitions in float64, refusals.

Shape legend: N batch   C channels   O out features   L positions   E experts   r rank
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
)
from torch import Tensor, nn
from torch.nn import functional as F

import molora
from molora.errors import CheckpointError, RoutingError, WrapError
from molora.experts import EXPERTS
from molora.model import adapter_parameters, sites
from tests.bilinear import numbers
from tests.oracle import DTYPES, near


class Image(nn.Module):
    """A model of one convolution."""

    def __init__(self, lin: nn.Module):
        super().__init__()
        self.lin = lin

    def forward(self, pixel_values: Tensor, attention_mask: Any = None) -> Tensor:
        y: Tensor = self.lin(pixel_values)
        return y


def wrapped(conv: nn.Module, router: Any = None, **settings: Any) -> tuple[Any, Any]:
    balance = settings.pop("balance", [])
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", **settings},
        "router": router or {"kind": "none"},
        "balance": balance,
    }
    model = molora.wrap(Image(conv), molora.AdapterConfig.from_dict(raw))
    return model, sites(model)["lin"]


def fill(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for values in adapter_parameters(model).values():
        values.data.copy_(torch.randn(values.shape, generator=generator) / 2)


def conv_of(t: dict[str, Tensor], hyper: dict[str, Any]) -> nn.Conv2d:
    sizes = {k: hyper[k] for k in ("stride", "padding", "dilation")}
    conv = nn.Conv2d(
        hyper["in_channels"], hyper["out_channels"], hyper["kernel"], **sizes
    )
    conv.weight.data, conv.bias.data = t["base.weight"].clone(), t["base.bias"].clone()  # type: ignore[union-attr]
    return conv


Names = dict[str, tuple[str, bool]]
"""Parameter here, parameter there, whether it is transposed."""
CASES: dict[str, tuple[str, dict[str, Any], Names]] = {
    "lora_conv2d": (
        "lora",
        {"r": 3, "lora_alpha": 6.0},
        {"A": ("A", False), "Bt": ("B", True)},
    ),
    "loha_conv2d_flat": (
        "loha",
        {"r": 3, "alpha": 6.0},
        {
            "w1_a": ("w1a", False),
            "w1_b": ("w1b", False),
            "w2_a": ("w2a", False),
            "w2_b": ("w2b", False),
        },
    ),
    "loha_conv2d_tucker": (
        "loha",
        {"r": 3, "alpha": 6.0, "use_effective_conv2d": True},
        {
            "w1_a": ("w1a", False),
            "w1_b": ("w1b", False),
            "w2_a": ("w2a", False),
            "w2_b": ("w2b", False),
            "t1": ("t1", False),
            "t2": ("t2", False),
        },
    ),
    "lokr_conv2d_flat": (
        "lokr",
        {"r": 1, "alpha": 6.0},
        {"w1": ("w1", False), "w2_a": ("w2a", False), "w2_b": ("w2b", False)},
    ),
    "lokr_conv2d_tucker": (
        "lokr",
        {"r": 1, "alpha": 6.0, "use_effective_conv2d": True},
        {
            "w1": ("w1", False),
            "w2_a": ("w2a", False),
            "w2_b": ("w2b", False),
            "t2": ("t2", False),
        },
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(CASES))
def test_pefts_numbers(case: str, dtype: torch.dtype) -> None:
    t, hyper = numbers(case)
    kind, settings, names = CASES[case]
    model, site = wrapped(conv_of(t, hyper), kind=kind, **settings)
    model.to(dtype)
    assert {name for name, _ in site.experts.named_parameters()} == set(names)

    def ours(values: Tensor, like: Tensor, turned: bool) -> Tensor:
        return (values.flatten(1).t() if turned else values).reshape(like.shape)

    for name, (theirs, turned) in names.items():
        own = getattr(site.experts, name)
        own.data.copy_(ours(t[f"param.{theirs}"], own, turned))
    x = t["x"].to(dtype).requires_grad_()
    y = model(x)
    assert near(y.detach(), t["y"], "y")
    (y * t["c"].to(dtype)).sum().backward()
    assert near(x.grad, t["grad.x"], "grad.x")
    for name, (theirs, turned) in names.items():
        own = getattr(site.experts, name)
        assert near(own.grad, ours(t[f"grad.{theirs}"], own, turned), theirs)
    delta = site.delta_weight().detach().view(site.base.weight.shape)
    assert near(delta, t["delta.weight"], "delta")
    before = site.base.weight.clone()
    molora.merge(model)
    assert near(site.base.weight, t["merged.weight"], "merged")
    assert near(model(x).detach(), t["y"], "merged y")
    molora.unmerge(model)
    assert torch.equal(site.base.weight, before)


CONVS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "2d": (lambda: nn.Conv2d(3, 4, (2, 3), (2, 1), (1, 2), (1, 2)), (2, 3, 7, 9)),
    "same": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 5, 6)),
    "valid": (lambda: nn.Conv2d(3, 4, 2, padding="valid", bias=False), (2, 3, 5, 4)),
    "one image": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "1d": (lambda: nn.Conv1d(3, 4, 3, 2, 1), (2, 3, 9)),
    "1d same": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=2), (2, 3, 9)),
    "one row": (lambda: nn.Conv1d(3, 4, 1), (3, 9)),
}


@pytest.mark.parametrize("E", [1, 4])
@pytest.mark.parametrize("name", list(CONVS))
def test_a_mixture_by_its_definition(name: str, E: int) -> None:
    """Expert by expert as convolutions; gates by one with the router's weight."""
    make, shape = CONVS[name]

    def once() -> tuple[Any, Any]:
        torch.manual_seed(0)
        router = {"kind": "topk"} if E > 1 else None
        made = wrapped(make(), router, num_experts=E, r=2, lora_alpha=4.0)
        fill(made[0])
        made[0].double()
        return made

    (model, site), (_, twin) = once(), once()
    conv = twin.base
    x = torch.randn(shape).double()
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = model(x1)
    call = F.conv1d if isinstance(conv, nn.Conv1d) else F.conv2d

    def convolve(rows: Tensor) -> Tensor:
        weight = rows.unflatten(1, conv.weight.shape[1:])
        return call(x2, weight, None, conv.stride, conv.padding, conv.dilation)

    axis = 0 if x.dim() < conv.weight.dim() else 1
    g = torch.ones_like(convolve(twin.experts.A[0, :1]))
    if E > 1:
        g = torch.softmax(convolve(twin.router.gate.weight), axis)
        kept = torch.zeros_like(g).scatter(axis, g.topk(2, axis).indices, 1.0)
        g = g * kept / (g * kept).sum(axis, keepdim=True)
    want = conv(x2)
    for e in range(E):
        z = convolve(twin.experts.A[e]).movedim(axis, -1)
        delta = (z @ twin.experts.Bt[e]).movedim(-1, axis)
        want = want + 2.0 * g.narrow(axis, e, 1) * delta
    assert y.is_contiguous() and near(y.detach(), want.detach())
    c = torch.randn_like(want)
    (y * c).sum().backward()
    (want * c).sum().backward()
    assert near(x1.grad, x2.grad, "x")  # type: ignore[arg-type]
    for path, values in site.named_parameters():
        if values.requires_grad:
            assert near(values.grad, twin.get_parameter(path).grad, path)


SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 2},
    "aflora": {"r": 2, "shared": {}},
    "boft": {"boft_block_size": 2},
    "goat": {"r": 4},
    "lotr": {"r": 2, "shared": {}},
    "melora": {"num_parts": 2, "r": 1},
    "mora": {"r": 4},
    "oft": {"oft_block_size": 3},
    "sum": {"parts": [{"kind": "lora", "r": 2}, {"kind": "lokr", "r": 2}]},
    "sparse": {"r": 2},
    "vera": {"r": 2, "shared": {}},
}
"""Settings of families whose defaults do not fit the layer."""


def linear_kinds() -> list[str]:
    found = [n for n in EXPERTS.names() if EXPERTS[n].linear]
    return [*found, "loha core", "lokr core"]


@pytest.mark.parametrize("kind", linear_kinds())
def test_every_family_is_its_update(kind: str) -> None:
    """The change of the weight, and of the bias, is what the layer computes."""
    torch.manual_seed(0)
    kind, core = kind.split()[0], kind.endswith(" core")
    settings = {"r": 1, "use_effective_conv2d": True} if core else SMALL.get(kind, {})
    if kind in ("dora", "sum"):
        settings = SMALL.get(kind, {"inner": {"kind": "lora", "r": 2}})
    model, site = wrapped(nn.Conv2d(4, 6, 3, 2, 1), kind=kind, **settings)
    x = torch.randn(2, 4, 5, 6)
    start = model(x).detach()
    if site.experts.starts_at_zero:
        assert torch.allclose(start, site.base(x), atol=1e-5)
    generator = torch.Generator().manual_seed(3)
    for values in site.experts.parameters():
        if values.is_floating_point() and values.requires_grad:
            values.data += torch.randn(values.shape, generator=generator) / 5
    model.double()
    want = model(x.double()).detach()
    assert (want - site.base(x.double())).abs().max() > 1e-3
    before = site.base.weight.clone(), site.base.bias.clone()
    molora.merge(model)
    assert near(model(x.double()).detach(), want)
    molora.unmerge(model)
    assert torch.equal(site.base.weight, before[0])
    assert torch.equal(site.base.bias, before[1])


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "Conv2d has groups=2, whose outputs read"),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circ"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), "way of its own"),
    ],
)
def test_what_cannot_be_right_is_refused(conv: nn.Module, message: str) -> None:
    with pytest.raises(WrapError, match=f"layer 'lin': .*{message}"):
        wrapped(conv, r=2)


def test_transposed_ones_are_no_host() -> None:
    with pytest.raises(WrapError, match="Embedding, Conv1d and Conv2d only"):
        wrapped(nn.ConvTranspose2d(4, 4, 3), r=2)


def test_dropout_is_on_the_pixels() -> None:
    model, site = wrapped(nn.Conv2d(3, 4, 3, padding=1), r=2, lora_dropout=0.5)
    fill(model)
    x = torch.randn(2, 3, 5, 5)
    torch.manual_seed(7)
    y = model.train()(x).detach()
    torch.manual_seed(7)
    kept = F.dropout(x, 0.5)
    delta = F.conv2d(kept, site.delta_weight().view(4, 3, 3, 3), padding=1)
    assert near(y, (site.base(x) + delta).detach())
    assert near(
        model.eval()(x).detach(),
        (
            site.base(x) + F.conv2d(x, site.delta_weight().view(4, 3, 3, 3), padding=1)
        ).detach(),
    )


def test_masks_of_other_positions_are_refused() -> None:
    balance = [{"kind": "switch", "weight": 0.01}]
    model, site = wrapped(
        nn.Conv1d(3, 4, 3, 2, 1), {"kind": "topk"}, num_experts=4, r=2, balance=balance
    )
    fill(model)
    x, mask = torch.randn(2, 3, 8), torch.ones(2, 8, dtype=torch.long)
    model.train()(x).sum().backward()
    assert site.router.gate.weight.grad.any()
    with pytest.raises(RoutingError, match="'lin': a convolution with outputs"):
        model(x, attention_mask=mask)
    model.eval()
    assert torch.equal(model(x, attention_mask=mask), model(x))
    # models ask a layer for its stride
    assert site.stride == (2,) and site.out_channels == 4


def test_calibration_is_for_linear_layers() -> None:
    model, site = wrapped(
        nn.Conv2d(3, 4, 2), {"kind": "soft"}, num_experts=3, r=2, lora_alpha=2.0
    )
    fill(model)
    want = sum(site.experts.delta_weight(e) for e in range(3)) / 3
    with pytest.raises(WrapError, match="this Conv2d reads patches.*without cal"):
        molora.collapse(model, "calibrated", calibration=[])
    molora.collapse(model, "linear", rank=6)
    assert near(sites(model)["lin"].delta_weight().detach(), want.detach())


THEIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LoraConfig, {"r": 3, "lora_alpha": 6}),
    "loha": (LoHaConfig, {"r": 3, "alpha": 6}),
    "loha core": (LoHaConfig, {"r": 3, "alpha": 6, "use_effective_conv2d": True}),
    "lokr": (LoKrConfig, {"r": 1, "alpha": 6}),
    "lokr core": (LoKrConfig, {"r": 1, "alpha": 6, "use_effective_conv2d": True}),
    "lokr whole": (LoKrConfig, {"r": 8, "alpha": 6}),
}


@pytest.mark.parametrize("layer", ["1d", "2d"])
@pytest.mark.parametrize("kind", list(THEIRS))
def test_peft_reads_and_writes_the_same(kind: str, layer: str, tmp_path: Path) -> None:
    make, shape = CONVS[layer]
    if kind == "lora" and layer == "2d":
        # PEFT's LoRA leaves dilation out
        model, _ = wrapped(make(), r=2)
        with pytest.raises(WrapError, match=r"not read its dilation \(1, 2\)"):
            molora.export_peft(model, tmp_path)
        make, shape = (lambda: nn.Conv2d(3, 4, (2, 3), (2, 1), (1, 2))), (2, 3, 7, 9)
    if (kind, layer) == ("lokr whole", "1d"):
        model, _ = wrapped(make(), kind="lokr", r=8)
        with pytest.raises(WrapError, match="PEFT 0.21 computes another product"):
            molora.export_peft(model, tmp_path)
        other = {"init_weights": False, "target_modules": ["lin"]}
        get_peft_model(Image(make()), LoKrConfig(r=8, **other)).save_pretrained(  # type: ignore[arg-type]
            str(tmp_path)
        )
        with pytest.raises(CheckpointError, match="PEFT 0.21 computes another"):
            molora.import_peft(Image(make()), [tmp_path])
        return

    def base() -> Any:
        torch.manual_seed(0)
        return Image(make()).eval()

    cls, settings = THEIRS[kind]
    theirs: Any = get_peft_model(base(), cls(target_modules=["lin"], **settings))
    generator = torch.Generator().manual_seed(1)
    for name, values in theirs.named_parameters():
        if values.requires_grad:
            values.data.copy_(torch.randn(values.shape, generator=generator) / 3)
            assert "lin" in name
    x = torch.randn(shape)
    want = theirs.eval()(x).detach()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = molora.import_peft(base(), [tmp_path / "theirs"])
    assert torch.allclose(ours(x).detach(), want, atol=1e-5)
    molora.export_peft(ours, tmp_path / "ours")
    again: Any = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert torch.allclose(again(x).detach(), want, atol=1e-5)
    if kind == "lora":
        other = Image(nn.Linear(shape[-1], 4))
        with pytest.raises(CheckpointError, match="axes, which is not for a Linear"):
            molora.import_peft(other, [tmp_path / "theirs"])


def test_methods_that_peft_has_not_on_convolutions_are_refused(tmp_path: Path) -> None:
    model, _ = wrapped(nn.Conv2d(3, 4, 2), kind="adalora", init_r=2)
    fill(model)
    with pytest.raises(WrapError, match="is a Conv2d, on which PEFT does not have"):
        molora.export_peft(model, tmp_path)
    x = torch.randn(1, 3, 4, 4)
    torch.manual_seed(0)
    want = model(x).detach()
    molora.export_peft(model, tmp_path, rank=4)
    plain = molora.unwrap(model)
    again: Any = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.allclose(again(x).detach(), want, atol=1e-5)


def test_a_core_needs_a_window() -> None:
    raw = {"kind": "lokr", "r": 1, "use_effective_conv2d": True}
    config = {"target_modules": ["lin"], "experts": raw}
    with pytest.raises(WrapError, match="'lin': .*use_effective_conv2d: is for conv"):
        molora.wrap(Image(nn.Linear(6, 4)), molora.AdapterConfig.from_dict(config))
    # as in PEFT a window of one position has no core
    _, site = wrapped(nn.Conv2d(6, 8, 1), **raw)
    assert not hasattr(site.experts, "t2")


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("init", [True, "lycoris"])
def test_cores_start_at_the_base(kind: str, init: Any) -> None:
    settings = {"kind": kind, "r": 2, "use_effective_conv2d": True}
    _, site = wrapped(nn.Conv2d(30, 40, 3), **settings, init_weights=init)
    assert not site.delta_weight().any()
    zero = [n for n, p in site.experts.named_parameters() if not p.any()]
    first = {"loha": "w2_b", "lokr": "w1"}[kind]
    last = {"loha": "w2_a", "lokr": "w2_b"}[kind]
    assert zero == [first if init is True else last]
    if init is True:
        # fan in is r k k, as of a convolution
        bound = (2 * 9) ** -0.5
        assert 0.7 * bound < site.experts.t2.abs().max() <= bound


def test_peft_adapters_of_other_forms_are_refused(tmp_path: Path) -> None:
    settings: Any = {"target_modules": ["lin"]}
    for config in (
        LoraConfig(r=2, use_dora=True, **settings),
        OFTConfig(r=0, oft_block_size=3, **settings),
    ):
        theirs: Any = get_peft_model(Image(nn.Conv2d(3, 4, 3)), config)  # type: ignore[arg-type]
        theirs.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="lin is a Conv2d, on which"):
            molora.import_peft(Image(nn.Conv2d(3, 4, 3)), [tmp_path])
    model, _ = wrapped(nn.Conv2d(3, 4, 3), kind="dora")
    with pytest.raises(WrapError, match="PEFT does not have DoRAExperts"):
        molora.export_peft(model, tmp_path / "ours")


@pytest.mark.parametrize("E", [1, 4])
def test_half_precision(E: int) -> None:
    def make() -> tuple[Any, Tensor]:
        torch.manual_seed(0)
        router = {"kind": "soft"} if E > 1 else None
        model, _ = wrapped(nn.Conv2d(3, 4, 3, padding=1), router, num_experts=E, r=2)
        fill(model)
        return model, torch.randn(2, 3, 6, 5)

    model, x = make()
    want = model.double()(x.double()).detach()
    model, _ = make()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    # experts stay in float32
    sites(model)["lin"].base.to(torch.bfloat16)
    half = model(x.to(torch.bfloat16))
    for y in (mixed, half):
        assert y.dtype == torch.bfloat16
        assert (y.detach().double() - want).abs().max() < 0.05 * want.abs().max()
        y.float().sum().backward()
