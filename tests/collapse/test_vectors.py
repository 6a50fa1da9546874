"""Collapse of (IA)^3 mixtures: exact for constant gates, errors by hand, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.errors import ConfigError, WrapError
from molora.model import adapter_parameters, sites

Factory = Any
IDS = torch.arange(2, 38).view(3, 12)
BATCHES = [{"input_ids": IDS, "tasks": ["sql", "chat", "sql"]}]
E = 3
BY_TASK = {"kind": "soft", "input": "task", "tasks": ["sql", "chat"]}


def mixture(make: Factory, router: dict[str, Any]) -> Any:
    raw = {
        "target_modules": ["k_proj", "down_proj"],
        "experts": {"kind": "ia3", "num_experts": E},
        "router": router,
        "overrides": [
            {"match": "down_proj", "experts": {"position": "input"}},
        ],
    }
    model: Any = molora.wrap(make(), molora.AdapterConfig.from_dict(raw)).double()
    g = torch.Generator().manual_seed(3)
    for p in adapter_parameters(model).values():
        p.data += torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.4
    return model.eval()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids).logits
    return out


def run(model: Any, method: str, **options: Any) -> Any:
    return molora.collapse(model, method, show_progress=False, **options).report


def vectors(model: Any) -> dict[str, Tensor]:
    return {p: s.experts.vectors.detach().clone() for p, s in sites(model).items()}


def test_constant_gates_collapse_exactly(tiny_llama: Factory, tmp_path: Path) -> None:
    """One task's gates are measured: the vector is their mean, outputs are equal."""
    model = mixture(tiny_llama, BY_TASK)
    before = vectors(model)
    gates = {
        p: torch.softmax(s.router.gate.weight.detach()[:, 0].float(), 0).double()
        for p, s in sites(model).items()
    }
    with molora.tasks(model, ["sql"] * 3):
        want = logits(model)
    report = run(model, "linear", calibration=BATCHES, tasks=["sql"], held_out=0.5)
    for path, site in sites(model).items():
        change_n = gates[path] @ (before[path] - 1)
        assert site.experts.num_experts == 1 and site.router is None
        assert (site.experts.vectors[0] - 1 - change_n).abs().max() < 1e-6
        assert report.sites[path].weight_error < 1e-12
        assert report.sites[path].error < 1e-6
    model.double()
    base = tiny_llama().double()
    assert (logits(model) - want).abs().max() < 1e-6
    assert (logits(base) - want).abs().max() > 1e-3
    model.float().save_pretrained(tmp_path / "a")
    again: Any = molora.load(tiny_llama(), tmp_path / "a").eval()
    assert torch.equal(logits(again), logits(model))
    molora.merge(again)
    assert (logits(again) - want).abs().max() < 1e-4


def test_even_and_given_weights(tiny_llama: Factory) -> None:
    for options, weights in (
        ({}, [1 / 3] * 3),
        ({"weights": [0.5, -1.0, 2.0]}, [0.5, -1.0, 2.0]),
    ):
        model = mixture(tiny_llama, {"kind": "soft"})
        before = vectors(model)
        report = run(model, "linear", **options)
        for path, after in vectors(model).items():
            change_n = torch.tensor(weights).double() @ (before[path] - 1)
            assert (after[0] - 1 - change_n).abs().max() < 1e-6
            assert report.sites[path].error is None
    # even gates are those of a router that prefers nobody: then it is exact
    model = mixture(tiny_llama, {"kind": "soft"})
    for site in sites(model).values():
        torch.nn.init.zeros_(site.router.gate.weight)
    want = logits(model)
    run(model, "linear")
    assert (logits(model.double()) - want).abs().max() < 1e-6


@pytest.mark.parametrize(
    "name", ["layers.1.self_attn.k_proj", "layers.0.mlp.down_proj"]
)
def test_the_error_is_that_of_the_held_out_rows(
    name: str, tiny_llama: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the definition over the tokens that a hook sees."""
    model = mixture(tiny_llama, {"kind": "soft"})
    path, seen = f"model.{name}", {}
    site: Any = sites(model)[path]

    def watch(module: Any, args: Any, y: Tensor) -> None:
        seen["x"], seen["y"] = args[0].detach(), y.detach()

    handle = site.register_forward_hook(watch)
    logits(model)
    handle.remove()
    with torch.no_grad():
        g = torch.softmax(seen["x"] @ site.router.gate.weight.double().t(), -1)
    change_En = site.experts.vectors.detach() - 1
    found = []
    for held in range(3):
        fit = [row for row in range(3) if row != held]
        scale = 1 + g[fit].mean((0, 1)) @ change_En
        x, y = seen["x"][held], seen["y"][held]
        with torch.no_grad():
            plain = site.base(x)
            ours = site.base(x * scale) if "down" in name else plain * scale
        found.append(float((ours - y).norm() / (plain - y).norm()))
    report = run(model, "linear", calibration=[{"input_ids": IDS}], held_out=0.34)
    got = report.sites[path].error
    assert min(abs(got - want) for want in found) < 1e-5 and got > 1e-3
    assert report.sites[path].output_error < got and not report.exact


def test_one_vector_is_selected(tiny_llama: Factory) -> None:
    model = mixture(tiny_llama, BY_TASK)
    before = vectors(model)
    run(model, "select", expert=1)
    for path, after in vectors(model).items():
        assert (after[0] - before[path][1]).abs().max() < 1e-6
    model = mixture(tiny_llama, BY_TASK)
    before, most = vectors(model), {}
    for path, site in sites(model).items():
        most[path] = int(site.router.gate.weight[:, 1].argmax())
    report = run(model, "select", calibration=BATCHES * 2, tasks=["chat"])
    for path, after in vectors(model).items():
        assert report.sites[path].details == {"expert": most[path]}
        assert (after[0] - before[path][most[path]]).abs().max() < 1e-6


def test_what_is_refused(tiny_llama: Factory) -> None:
    model = mixture(tiny_llama, {"kind": "soft"})
    want, parameters = logits(model), adapter_parameters(model)
    batches: Any = [{"input_ids": IDS}]
    for method in ("svd", "concat", "calibrated"):
        with pytest.raises(WrapError, match=rf"collapse.{method} works on low-rank"):
            run(model, method, calibration=batches)
    with pytest.raises(ConfigError, match="linear.rank: an .* vector has no rank"):
        run(model, "linear", rank=4)
    with pytest.raises(ConfigError, match="2 weights for 3 experts"):
        run(model, "linear", weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="has experts 0 to 2"):
        run(model, "select", expert=3)
    assert torch.equal(logits(model), want)
    assert adapter_parameters(model).keys() == parameters.keys()
    run(model, "linear")
    with pytest.raises(WrapError, match="one expert already"):
        run(model, "linear")
    raw = {
        "target_modules": ["k_proj", "v_proj"],
        "experts": {"kind": "ia3", "num_experts": 2},
        "router": {"kind": "soft"},
        "overrides": [{"match": "v_proj", "experts": {"kind": "lora"}}],
    }
    mixed: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    with pytest.raises(WrapError, match="others another family"):
        run(mixed, "linear")
