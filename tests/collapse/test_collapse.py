"""Whole models: what is measured, what is delivered, what is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

import molora
from molora.collapse import COLLAPSERS
from molora.collapse.api import CollapseResult
from molora.collapse.base import CollapseConfig
from molora.collapse.calibration import FIT, HELD, read_calibration
from molora.collapse.factors import SiteFactors
from molora.collapse.passes import in_eval, plan, shared_inputs
from molora.collapse.report import CollapseReport
from molora.errors import ConfigError, DataError, WrapError
from molora.model import adapter_parameters, sites

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = {"kind": "lora", "num_experts": 4, "r": 2, "lora_alpha": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "topk": {"target_modules": LLAMA, "experts": PLAIN},
    "soft": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "experts": PLAIN,
        "router": {"kind": "soft"},
    },
    "shared_A": {"target_modules": ["up_proj"], "experts": PLAIN | {"shared": ["A"]}},
    "shared_B": {"target_modules": ["up_proj"], "experts": PLAIN | {"shared": ["B"]}},
    "ragged": {
        "target_modules": ["up_proj", "down_proj"],
        "experts": PLAIN | {"r": [1, 2, 3, 4], "lora_alpha": [1, 2, 3, 4]},
        "overrides": [
            {
                "match": r"layers\.0\.mlp\.up",
                "experts": {"num_experts": 1, "r": 3, "lora_alpha": 3},
                "router": {"kind": "none"},
            }
        ],
        "balance": [{"kind": "switch", "weight": 0.01}],
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "calibrated": {"rank": 3},
    "concat": {},
    "linear": {"rank": 3},
    "lorahub": {"rank": 3, "budget": 6},
    "select": {},
    "svd": {"rank": 3},
}


def mixture(model: nn.Module, config: dict[str, Any], seed: int = 0) -> Any:
    """Wrap, and make experts and routers random and different."""
    raw = {"router": {"kind": "topk", "top_k": 2}, **config}
    molora.wrap(model, molora.AdapterConfig.from_dict(raw))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("Bt"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.3 * noise)
            elif name.endswith("gate.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for site in sites(model).values():
        for expert, rank in enumerate(site.experts.ranks):
            if len(site.experts.Bt) > 1:
                site.experts.Bt.data[expert, rank:] = 0
    return model


def data(rows: int = 12, length: int = 10, seed: int = 0) -> list[dict[str, Tensor]]:
    """Right-padded batches of four rows, their lengths all different."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return [
        {"input_ids": i, "attention_mask": m, "labels": i}
        for i, m in zip(ids.split(4), mask.split(4), strict=True)
    ]


def quiet(model: Any, *args: Any, **kwargs: Any) -> CollapseResult:
    return molora.collapse(model, *args, show_progress=False, **kwargs)


class Watched:
    """Inputs, updates and outputs of every site on chosen tokens, by running it."""

    def __init__(self, model: Any, calibration: list[dict[str, Tensor]]):
        self.x: dict[str, dict[int, list[Tensor]]] = {}
        self.d: dict[str, dict[int, list[Tensor]]] = {}
        self.y: dict[str, dict[int, list[Tensor]]] = {}
        self.gates: dict[str, dict[int, list[Tensor]]] = {}
        found = sites(model)
        hooks = [s.register_forward_hook(self.watch) for s in found.values()]
        for batch in read_calibration(calibration, CollapseConfig()):
            real = batch.inputs["attention_mask"].bool()
            self.parts = torch.where(real, batch.part_B[:, None], -1)
            with torch.no_grad():
                model(**batch.inputs)
        for hook in hooks:
            hook.remove()

    def watch(self, site: Any, args: tuple[Tensor], y: Tensor) -> None:
        x, d = args[0], y - site.base(args[0])
        wide = site.in_features
        if site.router is not None:
            gates = site.router(x.reshape(-1, wide), None).gates
            gates = gates.view(*x.shape[:2], -1)
        else:
            gates = x.new_ones(*x.shape[:2], 1)
        named = ((self.x, x), (self.d, d), (self.y, y), (self.gates, gates))
        for table, value in named:
            for part in (FIT, HELD):
                rows = table.setdefault(site.path, {}).setdefault(part, [])
                rows.append(value[self.parts == part].double())

    def get(self, table: str, path: str, *parts: int) -> np.ndarray:
        values = getattr(self, table)[path]
        return torch.cat([v for part in parts for v in values[part]]).numpy()


def test_the_package_and_the_function_of_one_name() -> None:
    import molora.collapse.svd

    assert callable(molora.collapse)
    assert molora.collapse.__name__ == "collapse"


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_on_every_family(
    tiny_llama: Callable[..., Any], kind: str, method: str
) -> None:
    """E is 1 everywhere, and the config alone rebuilds the same banks."""
    model = mixture(tiny_llama(), CONFIGS[kind])
    assert sorted(OPTIONS) == COLLAPSERS.names()
    if (method, kind) == ("lorahub", "ragged"):
        with pytest.raises(ConfigError, match=r"as many experts .* \[1, 4\]"):
            quiet(model, method, calibration=data(), **OPTIONS[method])
        return
    result = quiet(model, method, calibration=data(), **OPTIONS[method])
    check_delivered(model, tiny_llama(), result.report)


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_on_conv1d(tiny_gpt2: Callable[..., Any], method: str) -> None:
    config = {"target_modules": ["c_attn", "c_fc", "c_proj"], "experts": PLAIN}
    model = mixture(tiny_gpt2(), config)
    result = quiet(model, method, calibration=data(), **OPTIONS[method])
    check_delivered(model, tiny_gpt2(), result.report)
    if method == "calibrated":
        check_errors_of_final_fit(tiny_gpt2, config)


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_on_a_bf16_base(
    tiny_llama: Callable[..., Any], method: str
) -> None:
    model = mixture(tiny_llama().bfloat16(), CONFIGS["topk"])
    result = quiet(model, method, calibration=data(), **OPTIONS[method])
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    check_delivered(model, tiny_llama().bfloat16(), result.report)


def check_delivered(model: Any, fresh: Any, report: CollapseReport) -> None:
    """One expert, no router; a fresh base with the new config holds the same values."""
    config = molora.AdapterConfig.from_dict(model.molora_config.to_dict())
    assert config == model.molora_config
    molora.wrap(fresh, config)
    ours, theirs = adapter_parameters(model), adapter_parameters(fresh)
    assert {n: p.shape for n, p in ours.items()} == {
        n: p.shape for n, p in theirs.items()
    }
    for path, site in sites(model).items():
        assert site.router is None and site.objectives == []
        assert site.experts.num_experts == 1 and site.experts.scales() == [1.0]
        assert site.experts.A.shape[1] == report.sites[path].rank
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
        batch = data()[0]
        expected = model(**batch).logits
        assert torch.equal(fresh(**batch).logits, expected)
    assert torch.isfinite(expected).all()
    assert not report.exact


def test_constant_gates_collapse_to_the_same_logits(
    tiny_llama: Callable[..., Any],
) -> None:
    model = mixture(tiny_llama(), CONFIGS["soft"])
    with torch.no_grad():
        for site in sites(model).values():
            site.router.gate.weight.zero_()
        batch = data()[0]
        expected = model(**batch).logits
        scale = expected.abs().max()
        for method, rank in (("concat", None), ("svd", 8), ("calibrated", 8)):
            twin = copy.deepcopy(model)
            result = quiet(twin, method, rank, data())
            difference = (twin(**batch).logits - expected).abs().max() / scale
            assert difference < 1e-5
            assert result.report.worst_error is not None
            assert result.report.worst_error < 1e-6
            # measured to be equal is not proven to be
            assert not result.report.exact


@pytest.mark.parametrize("kind", ["topk", "ragged", "shared_A", "shared_B"])
def test_reported_errors_are_those_of_the_layers_themselves(
    tiny_llama: Callable[..., Any], kind: str
) -> None:
    """A method that learns nothing from data delivers what it was judged by."""
    model = mixture(tiny_llama(), CONFIGS[kind])
    before = Watched(model, data())
    report = quiet(model, "linear", rank=1, calibration=data()).report
    for path, site in sites(model).items():
        x = torch.tensor(before.get("x", path, HELD)).float()
        with torch.no_grad():
            update = (site(x) - site.base(x)).double().numpy()
        d, y = before.get("d", path, HELD), before.get("y", path, HELD)
        off = np.linalg.norm(update - d)
        got = report.sites[path]
        assert got.error == pytest.approx(off / np.linalg.norm(d), rel=1e-4)
        assert got.output_error == pytest.approx(off / np.linalg.norm(y), rel=1e-4)
        assert off > 0.1 * np.linalg.norm(d)
    errors = [site.error for site in report.sites.values()]
    assert report.mean_error == pytest.approx(np.mean(errors))
    assert report.worst_error == max(errors)
    assert report.sites[report.worst_site].error == max(errors)
    mask = torch.cat([batch["attention_mask"] for batch in data()])
    assert report.tokens_fit + report.tokens_held == mask.sum()


def test_calibrated_is_the_dense_fit_of_fit_rows_then_of_all_rows(
    tiny_llama: Callable[..., Any],
) -> None:
    check_errors_of_final_fit(tiny_llama, CONFIGS["topk"])


def check_errors_of_final_fit(make: Callable[..., Any], config: dict[str, Any]) -> None:
    """Judged by the fit to FIT rows, delivered is the fit to all; both dense here."""
    ridge, rank = 1e-2, 3
    model = mixture(make(), config)
    deltas = {
        path: torch.stack([site.experts.delta_weight(e) for e in range(4)])
        for path, site in sites(model).items()
    }
    seen = Watched(model, data())
    report = quiet(
        model, "calibrated", rank, data(rows=12), ridges=[ridge], held_out=0.25
    ).report

    def dense_fit(path: str, *parts: int) -> np.ndarray:
        x, d, gates = (seen.get(name, path, *parts) for name in ("x", "d", "gates"))
        experts = deltas[path].detach().double().numpy()
        mean = np.einsum("e,eoi->oi", gates.mean(0), experts)
        C = x.T @ x
        size = ridge * np.trace(C) / len(C)
        rest = (d - x @ mean.T).T @ x
        W = mean + np.linalg.solve(C + size * np.eye(len(C)), rest.T).T
        values, vectors = np.linalg.eigh(C)
        root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
        u = np.linalg.svd(W @ root)[0][:, :rank]
        return u @ u.T @ W

    for path, site in sites(model).items():
        x, d = seen.get("x", path, HELD), seen.get("d", path, HELD)
        off = np.linalg.norm(x @ dense_fit(path, FIT).T - d) / np.linalg.norm(d)
        assert report.sites[path].error == pytest.approx(off, rel=1e-3)
        assert report.sites[path].details == {"ridge": ridge}
        got = site.delta_weight().detach().numpy()
        expected = dense_fit(path, FIT, HELD)
        assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)
        gates = seen.get("gates", path, FIT, HELD).mean(0)
        np.testing.assert_allclose(report.sites[path].gates, gates, atol=1e-5)


def test_calibrated_is_never_far_behind_the_mean(
    tiny_llama: Callable[..., Any],
) -> None:
    model = mixture(tiny_llama(), CONFIGS["topk"])
    errors = {}
    for method in ("svd", "calibrated"):
        report = quiet(copy.deepcopy(model), method, 4, data(rows=32)).report
        errors[method] = report.mean_error
    assert errors["calibrated"] < errors["svd"]


def test_padding_counts_nowhere(tiny_llama: Callable[..., Any]) -> None:
    """Padded batches give what the same rows without padding give."""
    model = mixture(tiny_llama(), CONFIGS["topk"])
    bare = []
    for batch in data():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            bare.append({"input_ids": ids[mask.bool()][None]})
    padded = quiet(copy.deepcopy(model), "calibrated", 3, data()).report
    alone = quiet(model, "calibrated", 3, bare).report
    assert padded.tokens_held == alone.tokens_held
    for path, site in padded.sites.items():
        twin = alone.sites[path]
        assert site.error == pytest.approx(twin.error, rel=1e-4)
        np.testing.assert_allclose(site.gates, twin.gates, atol=1e-5)


def test_only_rows_of_the_asked_tasks_count(tiny_llama: Callable[..., Any]) -> None:
    model = mixture(tiny_llama(), CONFIGS["topk"])
    rows = data()
    mixed = [b | {"tasks": ["sql", "chat", "sql", "chat"]} for b in rows]
    only = [{k: v[::2] for k, v in batch.items()} for batch in rows]
    asked = quiet(copy.deepcopy(model), "svd", 3, mixed, tasks=["sql"]).report
    alone = quiet(copy.deepcopy(model), "svd", 3, only).report
    assert asked.tokens_fit + asked.tokens_held == alone.tokens_fit + alone.tokens_held
    for path, site in asked.sites.items():
        np.testing.assert_allclose(site.gates, alone.sites[path].gates, atol=1e-5)
    seen = Watched(model, only)
    picked = quiet(model, "select", calibration=mixed, tasks=["sql"]).report
    for path, site in picked.sites.items():
        gates = seen.get("gates", path, FIT, HELD).sum(0)
        assert site.details == {"expert": int(gates.argmax())}


def test_a_small_budget_takes_more_passes_to_the_same_result(
    tiny_llama: Callable[..., Any],
) -> None:
    shape = {
        "num_hidden_layers": 1,
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_key_value_heads": 4,
    }
    model = mixture(tiny_llama(**shape), CONFIGS["topk"])
    wide = quiet(copy.deepcopy(model), "calibrated", 3, data())
    narrow = quiet(model, "calibrated", 3, data(), memory_budget_mb=3)
    assert wide.report.passes == 1
    assert narrow.report.passes > 1
    assert list(narrow.report.sites) == list(wide.report.sites)
    for path, site in wide.report.sites.items():
        twin = narrow.report.sites[path]
        assert site.error == pytest.approx(twin.error, rel=1e-9)
        assert site.details == twin.details
    with pytest.raises(ConfigError, match=r"memory_budget_mb=1: site .* needs 3"):
        quiet(
            mixture(tiny_llama(**shape), CONFIGS["topk"]),
            calibration=data(),
            memory_budget_mb=1,
        )


def test_sites_with_one_input_are_found_and_stay_together(
    tiny_llama: Callable[..., Any],
) -> None:
    model = mixture(tiny_llama(), CONFIGS["topk"])
    batch = read_calibration(data(), CollapseConfig())[0]
    with in_eval(model):
        leaders = shared_inputs(model, batch)
        factors = {path: SiteFactors.of(site) for path, site in sites(model).items()}
    first = {p.split(".")[-1]: q for p, q in leaders.items() if ".layers.0." in p}
    short = {name: leader.split(".")[-1] for name, leader in first.items()}
    assert short == {
        "q_proj": "q_proj",
        "k_proj": "q_proj",
        "v_proj": "q_proj",
        "o_proj": "o_proj",
        "gate_proj": "gate_proj",
        "up_proj": "gate_proj",
        "down_proj": "down_proj",
    }
    groups = plan(factors, leaders, 2, 1)
    assert sorted(path for group in groups for path in group) == sorted(factors)
    for group in groups:
        assert all(leaders[path] in group for path in group)


class Doubling(nn.Module):
    """Doubles a tensor in place between two layers that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 6)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(6, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = self.first(x)
        x.mul_(2)
        return y + self.second(x)


def test_a_tensor_changed_in_place_is_another_input() -> None:
    torch.manual_seed(0)
    model = mixture(
        Doubling(), {"target_modules": ["first", "second"], "experts": PLAIN}
    )
    rows = [{k: v for k, v in b.items() if k != "labels"} for b in data()]
    seen = Watched(model, rows)
    report = quiet(model, "linear", rank=1, calibration=rows).report
    for path, site in sites(model).items():
        x, d = seen.get("x", path, HELD), seen.get("d", path, HELD)
        off = x @ site.delta_weight().detach().double().numpy().T - d
        error = np.linalg.norm(off) / np.linalg.norm(d)
        assert report.sites[path].error == pytest.approx(error, rel=1e-4)


def test_losses_are_asked_for_before_and_after(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = mixture(tiny_llama(), CONFIGS["topk"])
    batch = data()[0]

    def evaluate(asked: Any) -> dict[str, float]:
        with torch.no_grad():
            return {"sql": asked(**batch).loss.item()}

    before = evaluate(model)["sql"]
    result = quiet(model, "svd", 2, data(), evaluate=evaluate)
    loss = result.report.losses["sql"]
    assert loss == {"before": before, "after": evaluate(model)["sql"]}
    assert loss["before"] != loss["after"]
    result.save(tmp_path / "deep" / "report.json")
    read = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert read == result.to_dict() == model.molora_report
    assert CollapseReport.from_dict(read) == result.report
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.json"]
    console = Console(width=150, record=True)
    console.print(result.table(worst=2), result.report.loss_table())
    text = console.export_text()
    assert result.report.worst_site in text and f"{before:.4f}" in text
    assert "lossless" not in text


def test_without_data_gates_are_even_and_nothing_is_claimed(
    tiny_llama: Callable[..., Any],
) -> None:
    model = mixture(tiny_llama(), CONFIGS["topk"])
    path, site = next(iter(sites(model).items()))
    mean = sum(site.experts.delta_weight(e) for e in range(4)).detach() / 4
    report = quiet(model, "svd", rank=3).report
    assert report.gates == "even"
    assert report.mean_error is None and report.tokens_held is None
    got = site.delta_weight().detach()
    s = np.linalg.svd(mean.double().numpy())[1]
    error = np.sqrt((s[3:] ** 2).sum() / (s**2).sum())
    assert report.sites[path].weight_error == pytest.approx(error, rel=1e-5)
    assert float((got - mean).norm() / mean.norm()) == pytest.approx(error, rel=1e-5)


def test_a_site_gets_no_more_rank_than_it_holds(
    tiny_llama: Callable[..., Any],
) -> None:
    model = mixture(tiny_llama(), CONFIGS["ragged"])
    report = quiet(model, "svd", rank=5).report
    ranks = [site.rank for site in report.sites.values()]
    # one expert of rank 3 at the overridden site, R = 10 elsewhere
    assert ranks == [3, 5, 5, 5]
    overrides = model.molora_config.overrides
    assert [o.match for o in overrides] == [r"^model\.layers\.0\.mlp\.up_proj$"]


def test_energy_sets_the_rank_of_each_site(tiny_llama: Callable[..., Any]) -> None:
    model = mixture(tiny_llama(), CONFIGS["topk"])
    wanted = {}
    for path, site in sites(model).items():
        mean = sum(site.experts.delta_weight(e) for e in range(4)).detach() / 4
        squares = np.linalg.svd(mean.double().numpy())[1] ** 2
        share = np.cumsum(squares) / squares.sum()
        wanted[path] = int((share < 0.8).sum()) + 1
    report = quiet(model, "svd", energy=0.8).report
    assert {path: site.rank for path, site in report.sites.items()} == wanted


def test_one_expert_everywhere_can_only_lose_rank(
    tiny_llama: Callable[..., Any],
) -> None:
    one = {
        "target_modules": ["up_proj"],
        "experts": {"kind": "lora", "r": 4},
        "router": {"kind": "none"},
    }
    model = mixture(tiny_llama(), one)
    batch = data()[0]
    with torch.no_grad():
        expected = model(**batch).logits
        for method in ("svd", "calibrated"):
            twin = copy.deepcopy(model)
            report = quiet(twin, method, 16, data()).report
            assert report.exact
            assert [site.rank for site in report.sites.values()] == [4, 4]
            torch.testing.assert_close(
                twin(**batch).logits, expected, rtol=1e-5, atol=1e-6
            )
            assert not quiet(copy.deepcopy(model), method, 2, data()).report.exact
    with pytest.raises(WrapError, match="concat has nothing to collapse; calibrated"):
        quiet(model, "concat")


def test_a_collapsed_model_merges(tiny_llama: Callable[..., Any]) -> None:
    model = mixture(tiny_llama(), CONFIGS["topk"])
    quiet(model, "svd", 3, data())
    batch = data()[0]
    with torch.no_grad():
        expected = model(**batch).logits
        molora.merge(model)
        merged = model(**batch).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(WrapError, match="unmerge it first"):
        quiet(model, "svd", 3)


@pytest.mark.parametrize("target", ["lm_head", "up_proj"])
def test_the_output_head_sees_every_token(
    tiny_llama: Callable[..., Any], target: str
) -> None:
    """Calibration leaves out logits that nobody reads; a site at the head reads."""
    model = mixture(tiny_llama(), {"target_modules": [target], "experts": PLAIN})
    kept = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, y: kept.append(y.shape[1])
    )
    report = quiet(model, "concat", calibration=data()).report
    real = sum(int(batch["attention_mask"].sum()) for batch in data())
    assert report.tokens_fit + report.tokens_held == real
    assert set(kept) == ({10} if target == "lm_head" else {1})


def test_layers_between_the_body_and_the_logits_see_every_token() -> None:
    """BERT slices before the transform of its head, where sites may be."""
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
    )
    raw = {"target_modules": "all-linear", "experts": PLAIN}
    model = mixture(BertLMHeadModel(settings).eval(), raw)
    report = quiet(model, "concat", calibration=data()).report
    real = sum(int(batch["attention_mask"].sum()) for batch in data())
    # the counts are those of the last site
    assert "transform" in list(report.sites)[-1]
    assert report.tokens_fit + report.tokens_held == real


def test_unwrap_drops_the_report(tiny_llama: Callable[..., Any]) -> None:
    model = mixture(tiny_llama(), CONFIGS["topk"])
    quiet(model, "concat")
    assert model.molora_report["method"] == "concat"
    assert "molora_report" not in molora.unwrap(model).__dict__


def test_mode_and_trainability_are_kept(tiny_llama: Callable[..., Any]) -> None:
    model = mixture(tiny_llama(), CONFIGS["topk"])
    model.train()
    model.model.layers[0].eval()
    modes = {n: m.training for n, m in model.named_modules() if ".experts" not in n}
    for parameter in sites(model)["model.layers.0.mlp.up_proj"].experts.parameters():
        parameter.requires_grad_(False)
    quiet(model, "calibrated", 3, data())
    after = {n: m.training for n, m in model.named_modules() if n in modes}
    assert after == {n: modes[n] for n in after}
    for path, site in sites(model).items():
        frozen = path == "model.layers.0.mlp.up_proj"
        assert all(p.requires_grad is not frozen for p in site.experts.parameters())
        assert site.experts.training == site.training


def snapshot(model: Any) -> Any:
    return (
        {name: id(p) for name, p in model.named_parameters()},
        {name: p.clone() for name, p in model.named_parameters()},
        model.molora_config,
        {name: m.training for name, m in model.named_modules()},
        {path: (s.router, s.objectives) for path, s in sites(model).items()},
        [len(m._forward_hooks) for m in model.modules()],
        "molora_report" in model.__dict__,
    )


def assert_same(a: Any, b: Any) -> None:
    assert a[0] == b[0]
    for name, value in a[1].items():
        torch.testing.assert_close(value, b[1][name], rtol=0, atol=0, equal_nan=True)
    assert a[2] is b[2]
    assert a[3:] == b[3:]


class Trap:
    """An evaluation that fails the second time."""

    def __init__(self, answers: list[Any]):
        self.answers = answers

    def __call__(self, model: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def nan_base(model: Any) -> None:
    """Make token 1, which ``data`` never draws, unusable."""
    model.model.embed_tokens.weight.data[1] = float("nan")


NOT_FINITE = [{"input_ids": torch.ones(4, 3).long()}]
ALL_PADDING = [
    {"input_ids": torch.full((4, 3), 3), "attention_mask": torch.zeros(4, 3)}
]


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("svdd", {}, ConfigError, "unknown collapse method 'svdd'.*'svd'"),
        ("svd", {"rnk": 2}, ConfigError, r"collapse\.svd\.rnk: unknown.*'rank'"),
        ("svd", {"rank": 0}, ConfigError, r"collapse\.svd\.rank: .*greater than"),
        ("svd", {"rank": 2, "energy": 0.5}, ConfigError, "rank or energy, not both"),
        ("svd", {"energy": 1.5}, ConfigError, r"collapse\.svd\.energy"),
        ("svd", {"expert": 1}, ConfigError, r"collapse\.svd\.expert: unknown field"),
        ("concat", {"rank": 4}, ConfigError, "concat keeps the rank R"),
        ("linear", {"weights": [1.0]}, ConfigError, "1 weights for 4 experts"),
        ("linear", {"weights": {"a": 1.0}}, ConfigError, "linear needs calibration"),
        ("linear", {"weights": [float("nan")] * 4}, ConfigError, "finite"),
        ("select", {"expert": 4}, ConfigError, "experts 0 to 3"),
        ("select", {}, ConfigError, "select needs calibration data"),
        ("calibrated", {}, ConfigError, "calibrated needs calibration data"),
        ("svd", {"held_out": 0.5}, ConfigError, "held_out is read with calibration"),
        ("svd", {"calibration": data(), "held_out": 1.0}, ConfigError, "less than 1"),
        ("svd", {"calibration": NOT_FINITE}, Exception, "not finite|NaN or infinity"),
        ("svd", {"calibration": ALL_PADDING}, DataError, "saw no real token"),
        (
            "svd",
            {"calibration": data(), "evaluate": Trap([{"a": 1.0}, KeyError("later")])},
            KeyError,
            "later",
        ),
        (
            "svd",
            {"evaluate": Trap([{"a": 1.0}, {"b": 1.0}])},
            ConfigError,
            "other tasks",
        ),
        (
            "svd",
            {"evaluate": Trap([{"a": 1.0}, {"a": float("nan")}])},
            ConfigError,
            "the loss nan for task 'a'",
        ),
        (
            "svd",
            {"evaluate": Trap([KeyboardInterrupt("now")])},
            KeyboardInterrupt,
            "now",
        ),
        (
            "svd",
            {"evaluate": Trap([{}, KeyboardInterrupt("now")])},
            KeyboardInterrupt,
            "now",
        ),
    ],
)
def test_what_fails_leaves_the_model_as_it_was(
    tiny_llama: Callable[..., Any],
    method: str,
    options: dict[str, Any],
    error: type[BaseException],
    message: str,
) -> None:
    model = mixture(tiny_llama(), CONFIGS["shared_A"])
    nan_base(model)
    model.train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        quiet(model, method, **options)
    assert_same(snapshot(model), before)


def test_nan_at_sites_without_a_router_is_named(
    tiny_llama: Callable[..., Any],
) -> None:
    one = {
        "target_modules": ["up_proj"],
        "experts": {"kind": "lora", "r": 4},
        "router": {"kind": "none"},
    }
    model = mixture(tiny_llama(), one)
    nan_base(model)
    with pytest.raises(DataError, match=r"site 'model\.layers\.0\.mlp\.up_proj' hold"):
        quiet(model, "calibrated", 2, NOT_FINITE)


def test_unwrapped_and_disabled_models_are_refused(
    tiny_llama: Callable[..., Any],
) -> None:
    with pytest.raises(WrapError, match=r"call molora\.wrap first"):
        quiet(tiny_llama(), "svd")
    model = mixture(tiny_llama(), CONFIGS["topk"])
    with molora.disabled(model), pytest.raises(WrapError, match="disabled"):
        quiet(model, "svd")
