"""LoraHub: the authors' numbers, a search whose answer is known, bad input.

Shape legend
    B rows   S positions   E experts   I in features   O out features   r rank
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import molora
from molora.collapse import LoraHub
from molora.collapse.base import CollapseConfig
from molora.collapse.calibration import FIT, HELD, read_calibration
from molora.collapse.factors import SiteFactors
from molora.demo import METHODS
from molora.errors import ConfigError, DataError, WrapError
from molora.model import adapter_parameters, sites
from molora.run_config import CollapseSettings
from tests.oracle import build, load, near

FORMS = ["delta", "factors"]


def made(**settings: Any) -> LoraHub:
    return LoraHub(LoraHub.Config.from_dict(settings))


@pytest.mark.parametrize("form", FORMS)
def test_the_sum_of_experts_and_its_gradients(form: str) -> None:
    t = load("lorahub")
    zeros = {"plain.router": torch.zeros(5, 24).double()}
    _, site = build(t | zeros, torch.float64, router={"kind": "soft"})
    A_RI = t["plain.A"].reshape(-1, 24).requires_grad_()
    Bt_RO = t["plain.B"].mT.reshape(-1, 40).requires_grad_()
    w_E, x = t["weights"].requires_grad_(), t["x"].requires_grad_()
    factors = dataclasses.replace(SiteFactors.of(site), A_RI=A_RI, Bt_QO=Bt_RO)
    delta = made(form=form).combined(factors, w_E)
    y = nn.functional.linear(x, t["base.weight"], t["base.bias"])
    y = y + x @ delta.A_rI.T @ delta.Bt_rO
    leaves = [w_E, A_RI, Bt_RO, x]
    objective = (y * t["c"]).sum() + 0.05 * w_E.abs().mean()
    dw, dA, dB, dx = torch.autograd.grad(objective, leaves)
    if form == "factors":
        assert delta.rank == 3
        near(delta.A_rI.detach(), t["combined.A"], "A")
        near(delta.Bt_rO.T.detach(), t["scale"] * t["combined.B"], "B")
        near(y.detach(), t["y"], "y")
        near(objective.detach(), t["objective"], "objective")
        near(dw, t["grad.weights"], "w")
        near(dA.view(5, 3, 24), t["grad.A"], "A")
        near(dB.view(5, 3, 40).mT, t["grad.B"], "B")
        near(dx, t["grad.x"], "x")
        return
    assert delta.rank == 15
    near((delta.Bt_rO.T @ delta.A_rI).detach(), t["alt.delta_weight_exact"], "delta")
    near(y.detach(), t["alt.y_exact"], "y exact")
    # the gradients of the exact sum, by its definition
    w, A, B = (
        t[n].detach().requires_grad_() for n in ("weights", "plain.A", "plain.B")
    )
    d_OI = t["scale"] * torch.einsum("e,eor,eri->oi", w, B, A)
    plain = (x @ d_OI.T * t["c"]).sum() + 0.05 * w.abs().mean()
    want = torch.autograd.grad(plain, [w, A, B])
    near(dw, want[0], "w")
    near(dA.view(5, 3, 24), want[1], "A")
    near(dB.view(5, 3, 40).mT, want[2], "B")


def test_five_sets_of_weights_score_as_the_authors_code_does() -> None:
    t = load("lorahub_factors")
    A_EI, B_EO = (torch.stack([t[f"{n}/{e}"] for e in range(3)]) for n in "AB")
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 3, "r": 3, "lora_alpha": 6},
        "router": {"kind": "soft"},
    }
    holder = nn.Module()
    holder.lin = nn.Linear(14, 10).double()
    model = molora.wrap(holder, molora.AdapterConfig.from_dict(raw))
    factors = dataclasses.replace(
        SiteFactors.of(sites(model)["lin"]),
        A_RI=A_EI.reshape(9, 14),
        Bt_QO=B_EO.mT.reshape(9, 10),
    )
    scores = []
    for number, w_E in enumerate(t["weights"]):
        sum_ = made(form="factors").combined(factors, w_E)
        y = nn.functional.linear(t["x"], t["base.weight"], t["base.bias"])
        y = y + t["x"] @ sum_.A_rI.T @ sum_.Bt_rO
        scores.append((y - t["target"]).square().mean() + 0.05 * w_E.abs().mean())
        if number == 0:
            near(sum_.A_rI, t["final.A"], "A")
            near(sum_.Bt_rO.T, 2.0 * t["final.B"], "B")
            near(y, t["y"], "y")
    near(torch.stack(scores), t["score"], "score")


class Regression(nn.Module):
    """One layer whose loss is the squared distance of a sum of features to a label."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.lin = nn.Linear(6, 5)
        for parameter in self.lin.parameters():
            parameter.data.normal_(generator=generator)
        self.read = torch.randn(5, generator=generator)

    def forward(self, inputs_embeds: Tensor, labels: Tensor | None = None) -> Any:
        y = self.lin(inputs_embeds) @ self.read
        loss = None
        if labels is not None:
            seen = labels[:, 1:] != -100
            loss = (y[:, :-1] - labels[:, 1:])[seen].square().mean()
        return SimpleNamespace(loss=loss)


def regression(weights: list[float], form: str) -> tuple[Any, list[dict[str, Tensor]]]:
    """A mixture of two experts, and rows that the experts explain under weights."""
    experts = {"kind": "lora", "num_experts": 2, "r": 2, "lora_alpha": 3.0}
    raw = {"target_modules": ["lin"], "experts": experts, "router": {"kind": "soft"}}
    model = molora.wrap(Regression(), molora.AdapterConfig.from_dict(raw))
    generator = torch.Generator().manual_seed(1)
    bank = sites(model)["lin"].experts
    with torch.no_grad():
        bank.Bt.normal_(generator=generator)
    A, B = bank.A.detach(), bank.Bt.detach().mT
    w = torch.tensor(weights)
    d_OI = 1.5 * torch.einsum("e,eor,eri->oi", w, B, A)
    if form == "factors":
        d_OI = 1.5 * torch.einsum("e,eor->or", w, B) @ torch.einsum("e,eri->ri", w, A)
    x = torch.randn(8, 6, 6, generator=generator)
    y = (model.lin.base(x) + x @ d_OI.T).detach() @ model.read
    labels = torch.cat([torch.full((8, 1), 7.0), y[:, :-1]], 1)
    return model, [
        {"inputs_embeds": a, "labels": b}
        for a, b in zip(x.split(4), labels.split(4), strict=True)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_planted_weights_are_found(form: str) -> None:
    planted = [0.8, -0.6]
    model, rows = regression(planted, form)
    result = molora.collapse(
        model,
        "lorahub",
        calibration=rows,
        form=form,
        penalty=0.0,
        budget=90,
        show_progress=False,
    )
    prepared = result.report.prepared
    # factors is the same with both signs turned
    found = np.array(prepared["weights"]) * (1 if form == "delta" else 0)
    if form == "factors":
        found = np.array(prepared["weights"]) * np.sign(prepared["weights"][0])
    np.testing.assert_allclose(found, planted, atol=2e-2)
    assert prepared["objective"]["after"] < 1e-3 * prepared["objective"]["before"]
    held = prepared["held_out_loss"]
    assert held["after"] < 1e-3 * held["before"]
    assert result.report.sites["lin"].rank == (4 if form == "delta" else 2)


MIXTURE = {
    "target_modules": ["q_proj", "down_proj"],
    "experts": {"kind": "lora", "num_experts": 3, "r": 2, "lora_alpha": 4},
    "router": {"kind": "topk", "top_k": 2},
}


def mixture(model: Any, **experts: Any) -> Any:
    raw = MIXTURE | {"experts": MIXTURE["experts"] | experts}  # type: ignore[operator]
    molora.wrap(model, molora.AdapterConfig.from_dict(raw))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("Bt"):
                parameter.normal_(0, 0.3, generator=generator)
    return model


def data(labels: bool = True) -> list[dict[str, Any]]:
    ids = torch.randint(3, 128, (8, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[2, 5:] = mask[5, 3:] = 0
    target = ids.masked_fill(mask == 0, -100)
    target[0, :4] = -100
    return [
        {"input_ids": i, "attention_mask": m} | ({"labels": t} if labels else {})
        for i, m, t in zip(ids.split(4), mask.split(4), target.split(4), strict=True)
    ]


def mean_loss(model: Any, part: int) -> float:
    """Cross-entropy of every token with a label, by definition."""
    losses = []
    for batch in read_calibration(data(), CollapseConfig()):
        with torch.no_grad():
            logits = model(**batch.inputs).logits.double()
        for row in (batch.part_B == part).nonzero()[:, 0].tolist():
            for s in range(1, 9):
                label = int(batch.labels[row, s])  # type: ignore[index]
                if label != -100:
                    losses.append(-torch.log_softmax(logits[row, s - 1], -1)[label])
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_reported_is_what_is_delivered(
    tiny_llama: Callable[..., Any], form: str
) -> None:
    model = mixture(tiny_llama())
    with molora.disabled(model):
        base = mean_loss(model, FIT)
    options: Any = {"calibration": data(), "form": form, "show_progress": False}
    options |= {"budget": 30, "penalty": 1e-3}
    result = molora.collapse(model, "lorahub", **options)
    prepared = result.report.prepared
    weights = np.array(prepared["weights"])
    penalty = 1e-3 * np.abs(weights).sum() / 3
    assert prepared["objective"]["before"] == pytest.approx(base, rel=1e-5)
    assert prepared["objective"]["after"] == pytest.approx(
        mean_loss(model, FIT) + penalty, rel=1e-5
    )
    assert prepared["held_out_loss"]["after"] == pytest.approx(
        mean_loss(model, HELD), rel=1e-5
    )
    assert prepared["objective"]["after"] < base
    assert np.abs(weights).max() > 0.01 and np.abs(weights).max() <= 1.5
    assert result.report.options["budget"] == 30
    assert any("does not aim at the mixture" in note for note in result.report.notes)
    again = molora.collapse(mixture(tiny_llama()), "lorahub", **options)
    assert again.report.prepared == prepared


def test_numpys_generator_is_the_callers(tiny_llama: Callable[..., Any]) -> None:
    np.random.seed(5)
    want = np.random.RandomState(5).rand(3)
    options: Any = {"calibration": data(), "budget": 5, "show_progress": False}
    molora.collapse(mixture(tiny_llama()), "lorahub", **options)
    assert np.array_equal(np.random.rand(3), want)


def test_no_weight_at_all_is_said(tiny_llama: Callable[..., Any]) -> None:
    options: Any = {"calibration": data(), "budget": 5, "show_progress": False}
    report = molora.collapse(
        mixture(tiny_llama()), "lorahub", penalty=1e6, **options
    ).report
    assert report.prepared["weights"] == [0.0, 0.0, 0.0]
    assert any("the result is the base" in note for note in report.notes)
    other = molora.collapse(mixture(tiny_llama()), "lorahub", penalty=0, **options)
    assert any(other.report.prepared["weights"])
    assert not any("the result is the base" in note for note in other.report.notes)


@pytest.mark.parametrize(
    ("missing", "budget", "match"),
    [(False, 4, "less than 5"), (True, 40, r"molora\[lorahub\]")],
)
def test_refused_before_anything_is_read(
    missing: bool,
    budget: int,
    match: str,
    tiny_llama: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def batches() -> Iterator[dict[str, Any]]:
        seen.append("batches")
        yield from data()

    def evaluate(model: Any) -> dict[str, float]:
        seen.append("evaluate")
        return {"x": 1.0}

    if missing:
        monkeypatch.setitem(sys.modules, "nevergrad", None)
    options: Any = {"calibration": batches(), "evaluate": evaluate, "budget": budget}
    assert refused(mixture(tiny_llama()), ConfigError, match, **options)
    assert seen == []


def test_the_rank_truncates_the_found_sum(tiny_llama: Callable[..., Any]) -> None:
    full, cut = mixture(tiny_llama()), mixture(tiny_llama())
    options: Any = {"calibration": data(), "budget": 5, "show_progress": False}
    whole = molora.collapse(full, "lorahub", **options)
    low = molora.collapse(cut, "lorahub", rank=2, **options)
    assert whole.report.prepared == low.report.prepared
    for path, site in sites(cut).items():
        assert low.report.sites[path].rank == 2 and whole.report.sites[path].rank == 6
        d = sites(full)[path].delta_weight().double()
        u, s, vt = torch.linalg.svd(d)
        near(site.delta_weight(), ((u[:, :2] * s[:2]) @ vt[:2]).float(), path)


def refused(model: Any, error: type[Exception], match: str, **options: Any) -> bool:
    """The collapse is refused, and the mixture is what it was."""
    before = {n: p.clone() for n, p in adapter_parameters(model).items()}
    config = model.molora_config
    with pytest.raises(error, match=match):
        molora.collapse(model, "lorahub", show_progress=False, **options)
    after = adapter_parameters(model)
    assert after.keys() == before.keys()
    same = all(torch.equal(after[name], before[name]) for name in before)
    return same and model.molora_config is config


def test_bad_input_is_refused(tiny_llama: Callable[..., Any]) -> None:
    model = mixture(tiny_llama())
    assert refused(model, ConfigError, "needs calibration data.*labels")
    assert refused(model, DataError, "needs labels", calibration=data(labels=False))
    none = [d | {"labels": torch.full_like(d["labels"], -100)} for d in data()]
    assert refused(model, DataError, "no row to fit has a label", calibration=none)
    options: Any = {"calibration": data()}
    assert refused(model, ConfigError, "drop rank", form="factors", rank=2, **options)
    assert refused(model, ConfigError, "budget.*or equal to 100", budget=101, **options)
    assert refused(model, ConfigError, "less than 5", budget=4, **options)
    assert refused(model, ConfigError, "unknown field.*budget", budgets=3, **options)
    one = molora.wrap(
        tiny_llama(),
        molora.AdapterConfig.from_dict(
            {
                "target_modules": ["q_proj"],
                "experts": {"kind": "lora", "num_experts": 1},
            }
        ),
    )
    assert refused(one, WrapError, "lorahub has nothing to collapse", **options)


@pytest.mark.parametrize(
    ("experts", "match"),
    [({"r": [1, 2, 4]}, r"ranks \[1, 2, 4\]"), ({"shared": ["A"]}, "share A or B")],
)
def test_factors_need_experts_of_one_form(
    tiny_llama: Callable[..., Any], experts: dict[str, Any], match: str
) -> None:
    model = mixture(tiny_llama(), **experts)
    assert refused(model, ConfigError, match, form="factors", calibration=data())


def test_what_fails_in_the_search_leaves_the_mixture(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture(tiny_llama())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nevergrad", None)
        assert refused(model, ConfigError, r"molora\[lorahub\]", calibration=data())
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    assert refused(model, Exception, "loss is nan", calibration=data())


def test_the_yaml_of_a_run_names_its_settings() -> None:
    raw = {"method": "lorahub", "budget": 20, "form": "factors", "seed": 4}
    assert CollapseSettings.from_dict(raw).options == {
        "budget": 20,
        "form": "factors",
        "seed": 4,
    }
    with pytest.raises(ConfigError, match="drop rank"):
        CollapseSettings.from_dict(raw | {"rank": 4})


def test_the_demo_takes_what_needs_no_search() -> None:
    assert METHODS == ["calibrated", "concat", "linear", "select", "svd"]
