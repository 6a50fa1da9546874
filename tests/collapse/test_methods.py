"""The mathematics of one site against dense float64 definitions in numpy.

Shape legend
    T tokens   E experts   I in features   O out features
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import molora
from molora.collapse import COLLAPSERS
from molora.collapse.calibrated import Calibrated, fitted, truncate_in_metric
from molora.collapse.factors import LowRank, SiteFactors, truncate
from molora.collapse.moments import Evidence, Moments, Usage, even
from molora.context import Runtime
from molora.errors import ConfigError
from molora.layer import MoloraLinear

FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {"num_experts": 3, "r": 2, "lora_alpha": 5.0},
    "ragged": {"num_experts": 3, "r": [1, 4, 2], "lora_alpha": [1.0, 6.0, 3.0]},
    "rslora": {"num_experts": 2, "r": 4, "lora_alpha": 3.0, "use_rslora": True},
    "shared_A": {"num_experts": 3, "r": 2, "lora_alpha": [1, 2, 3], "shared": ["A"]},
    "shared_B": {"num_experts": 3, "r": 2, "lora_alpha": [1, 2, 3], "shared": ["B"]},
    "four": {"num_experts": 4, "r": 4, "lora_alpha": 4.0},
    "one": {"num_experts": 1, "r": 5, "lora_alpha": 4.0},
}


def make_site(
    family: str, wide: int = 7, out: int = 6, seed: int = 0, conv: bool = False
) -> MoloraLinear:
    """A site with random factors and a router with strong opinions."""
    raw: dict[str, Any] = {"target_modules": ["x"], "experts": dict(FAMILIES[family])}
    raw["experts"]["kind"] = "lora"
    raw["router"] = {"kind": "none" if family == "one" else "soft"}
    generator = torch.Generator().manual_seed(seed)
    base = Conv1D(out, wide) if conv else nn.Linear(wide, out)
    site = MoloraLinear(
        base,
        molora.AdapterConfig.from_dict(raw).site("x"),
        path="x",
        runtime=Runtime(),
        objectives=[],
        generator=generator,
    ).eval()
    with torch.no_grad():
        # padding rows of B stay zero, as training leaves them
        site.experts.Bt.normal_(generator=generator)
        if family == "ragged":
            for expert, rank in enumerate(site.experts.ranks):
                site.experts.Bt[expert, rank:] = 0
        if site.router is not None:
            site.router.gate.weight.normal_(generator=generator)
    return site


def dense(site: MoloraLinear) -> np.ndarray:
    """Every expert's update as a matrix [E, O, I], by hand."""
    config = site.experts.config
    A, Bt = site.experts.A.detach().double(), site.experts.Bt.detach().double()
    deltas = []
    for e in range(config.num_experts):
        rank = config.r[e] if isinstance(config.r, list) else config.r
        alpha = config.lora_alpha
        alpha = alpha[e] if isinstance(alpha, list) else alpha
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        a, b = A[0 if len(A) == 1 else e], Bt[0 if len(Bt) == 1 else e]
        deltas.append(scale * sum(np.outer(b[i], a[i]) for i in range(rank)))
    return np.stack(deltas)


def full(delta: LowRank) -> np.ndarray:
    """The update as a matrix [O, I]."""
    return (delta.Bt_rO.t() @ delta.A_rI).numpy()


class Sample(NamedTuple):
    """Tokens of one site, with everything about them by definition."""

    x: np.ndarray
    gates: np.ndarray
    d: np.ndarray
    evidence: Evidence


def sample(site: MoloraLinear, x_TI: Tensor) -> Sample:
    """Route tokens; the update d [T, O] is the sum over dense experts."""
    x_TI = x_TI.double()
    if site.router is None:
        gates_TE = torch.ones(len(x_TI), 1).double()
    else:
        gates_TE = torch.softmax(x_TI @ site.router.gate.weight.double().t(), -1)
    gates_TE = gates_TE.detach()
    x, gates = x_TI.numpy(), gates_TE.numpy()
    d = np.einsum("te,eoi,ti->to", gates, dense(site), x)
    factors = SiteFactors.of(site)
    usage = Usage()
    usage.add(None, gates_TE)
    moments = Moments.empty(factors, x_TI.t() @ x_TI)
    moments.add(x_TI, factors.gated(x_TI, gates_TE), torch.tensor(d) + 1.0)
    return Sample(x, gates, d, Evidence(usage, moments))


def inputs(count: int, wide: int = 7, seed: int = 1) -> Tensor:
    """Correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(wide, wide, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    x = torch.randn(count, wide, generator=generator, dtype=torch.float64)
    return x @ mix * torch.logspace(-1, 1, wide, dtype=torch.float64)


def clustered(count: int, seed: int) -> Tensor:
    """One cluster of inputs per expert; expert e is routed by direction e."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.eye(4, 16)
    noise = torch.randn(count, 16, generator=generator)
    return centres[torch.arange(count) % 4] + 0.5 * noise


def clustered_site() -> MoloraLinear:
    """Four experts, each routed to by its cluster."""
    site = make_site("four", wide=16, out=16)
    assert site.router is not None
    site.router.gate.weight.data = 2 * torch.eye(4, 16)
    return site


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conv", [False, True])
def test_factors_are_the_weighted_sum_of_dense_updates(family: str, conv: bool) -> None:
    site = make_site(family, conv=conv)
    deltas = dense(site)
    factors = SiteFactors.of(site)
    weights = torch.linspace(-0.5, 1.5, len(deltas), dtype=torch.float64)
    expected = np.einsum("e,eoi->oi", weights.numpy(), deltas)
    combined = factors.combine(weights)
    np.testing.assert_allclose(full(combined), expected, atol=1e-6)
    mixed = LowRank(factors.mixed(weights), factors.Bt_QO)
    np.testing.assert_allclose(full(mixed), expected, atol=1e-6)
    for e, delta in enumerate(deltas):
        np.testing.assert_allclose(full(factors.expert(e)), delta, atol=1e-6)
    ranks = {"plain": 6, "ragged": 7, "rslora": 8, "four": 16, "one": 5}
    # experts that share a factor add up to one of their rank
    assert combined.rank == ranks.get(family, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_gated_rank_vectors_give_the_update_of_every_token(family: str) -> None:
    site = make_site(family)
    found = sample(site, inputs(9))
    factors = SiteFactors.of(site)
    zg_TQ = factors.gated(torch.tensor(found.x), torch.tensor(found.gates))
    np.testing.assert_allclose((zg_TQ @ factors.Bt_QO).numpy(), found.d, atol=1e-5)
    x_TI = torch.tensor(found.x).float()
    update = site(x_TI) - site.base(x_TI)
    np.testing.assert_allclose(update.detach().numpy(), found.d, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    wide=st.integers(1, 8),
    out=st.integers(1, 8),
    rank=st.integers(1, 10),
    seed=st.integers(0, 10**6),
)
def test_truncation_is_that_of_the_dense_svd(
    rows: int, wide: int, out: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, wide, generator=generator, dtype=torch.float64)
    Bt = torch.randn(rows, out, generator=generator, dtype=torch.float64)
    delta = LowRank(A, Bt)
    got = truncate(delta, rank)
    assert got.rank == min(rank, rows, wide, out)
    u, s, vt = np.linalg.svd(full(delta))
    expected = u[:, : got.rank] * s[: got.rank] @ vt[: got.rank]
    np.testing.assert_allclose(full(got), expected, atol=1e-8 * max(1, s[0]))
    # both factors carry the root of each singular value
    np.testing.assert_allclose(
        got.A_rI.norm(dim=1).square().numpy(), s[: got.rank], atol=1e-8
    )


@pytest.mark.parametrize(
    ("energy", "rank"), [(1.0, 3), (0.999, 3), (25 / 26, 2), (0.9, 2), (0.5, 1)]
)
def test_energy_keeps_the_fewest_values_that_hold_it(energy: float, rank: int) -> None:
    # singular values 4, 3, 1: squares 16, 25 and 26 of 26
    eye = torch.eye(5, dtype=torch.float64)[:3]
    sizes = torch.tensor([[3.0], [4.0], [1.0]], dtype=torch.float64)
    assert truncate(LowRank(eye, sizes * eye), energy=energy).rank == rank


def test_a_zero_update_keeps_rank_one() -> None:
    zero = torch.zeros(3, 4, dtype=torch.float64)
    assert truncate(LowRank(zero + 1, zero), energy=0.9).rank == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_svd_is_the_dense_svd_of_the_mean_gate_update(family: str) -> None:
    site = make_site(family)
    found = sample(site, inputs(50))
    method = COLLAPSERS["svd"](COLLAPSERS["svd"].Config(rank=2))
    got, _ = method.solve(SiteFactors.of(site), found.evidence, {})
    mean = np.einsum("e,eoi->oi", found.gates.mean(0), dense(site))
    u, s, vt = np.linalg.svd(mean)
    np.testing.assert_allclose(full(got), u[:, :2] * s[:2] @ vt[:2], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_fit_is_least_squares_shrunk_to_the_mean(family: str, ridge: float) -> None:
    site = make_site(family)
    found = sample(site, inputs(40))
    mean = np.einsum("e,eoi->oi", found.gates.mean(0), dense(site))
    penalty = ridge * np.mean(np.sum(found.x**2, 0))
    # min |X W^T - D|^2 + penalty |W - mean|^2 as one stacked system
    root = math.sqrt(penalty) * np.eye(7)
    system = np.concatenate([found.x, root])
    target = np.concatenate([found.d, root @ mean.T])
    expected = np.linalg.lstsq(system, target, rcond=None)[0].T
    factors = SiteFactors.of(site)
    P_QI = fitted(factors, found.evidence, ridge)
    got = full(LowRank(P_QI, factors.Bt_QO))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_with_little_ridge_the_fit_is_plain_least_squares() -> None:
    site = make_site("plain")
    found = sample(site, inputs(40))
    expected = np.linalg.lstsq(found.x, found.d, rcond=None)[0].T
    factors = SiteFactors.of(site)
    P_QI = fitted(factors, found.evidence, 1e-12)
    got = full(LowRank(P_QI, factors.Bt_QO))
    np.testing.assert_allclose(got, expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 8),
    wide=st.integers(1, 7),
    out=st.integers(1, 8),
    rank=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_truncation_in_the_metric_is_the_whitened_dense_one(
    rows: int, wide: int, out: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    P = torch.randn(rows, wide, generator=generator, dtype=torch.float64)
    Bt = torch.randn(rows, out, generator=generator, dtype=torch.float64)
    x = inputs(4 * wide, wide, seed)
    got = truncate_in_metric(P, Bt, x.t() @ x, rank)
    W = (Bt.t() @ P).numpy()
    values, vectors = np.linalg.eigh((x.t() @ x).numpy())
    root = vectors * np.sqrt(values) @ vectors.T
    u, s, vt = np.linalg.svd(W @ root)
    best = np.linalg.norm(s[rank:])
    error = np.linalg.norm((full(got) - W) @ root)
    assert got.rank <= rank
    assert error == pytest.approx(best, rel=1e-6, abs=1e-6 * np.linalg.norm(s))


def test_truncation_in_the_metric_allows_inputs_that_span_little() -> None:
    x = inputs(2)
    P = torch.ones(3, 7, dtype=torch.float64)
    Bt = torch.eye(3, 6, dtype=torch.float64)
    got = truncate_in_metric(P, Bt, x.t() @ x, 1)
    W = (Bt.t() @ P).numpy()
    np.testing.assert_allclose(full(got), W, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_the_tokens(family: str) -> None:
    site = make_site(family)
    found = sample(site, inputs(30))
    factors = SiteFactors.of(site)
    assert found.evidence.moments is not None
    for delta in (truncate(factors.combine(factors.even_E), 1), factors.expert(0)):
        off = np.linalg.norm(found.x @ full(delta).T - found.d)
        got = found.evidence.moments.errors(factors, delta)
        expected = off / np.linalg.norm(found.d)
        assert got.update == pytest.approx(expected, rel=1e-6, abs=1e-6)
        # the layer's output is d + 1 here
        assert got.output == pytest.approx(off / np.linalg.norm(found.d + 1), abs=1e-6)


def test_the_ridge_is_the_one_with_the_least_held_out_error() -> None:
    site = clustered_site()
    factors = SiteFactors.of(site)
    # hardly more tokens to fit than inputs: the smallest ridge overfits
    fit, held = sample(site, clustered(24, 3)), sample(site, clustered(200, 4))
    ridges = [1e-6, 1e-3, 1e-1, 10.0]
    mean = np.einsum("e,eoi->oi", fit.gates.mean(0), dense(site))
    errors = {}
    for ridge in ridges:
        C = fit.x.T @ fit.x
        inverse = np.linalg.inv(C + ridge * np.trace(C) / 16 * np.eye(16))
        W = mean + (fit.d - fit.x @ mean.T).T @ fit.x @ inverse
        # reduced-rank regression: project on the leading directions of W C W^T
        u = np.linalg.eigh(W @ C @ W.T)[1][:, -8:]
        errors[ridge] = np.linalg.norm(held.x @ (u @ u.T @ W).T - held.d)
    method = Calibrated(Calibrated.Config(rank=8, ridges=ridges))
    tuned = method.tune(factors, fit.evidence, held.evidence)
    best = min(errors, key=lambda ridge: errors[ridge])
    assert tuned == {"ridge": best}
    assert 1e-6 < best < 10
    delta, _ = method.solve(factors, fit.evidence, tuned)
    assert held.evidence.moments is not None
    got = held.evidence.moments.errors(factors, delta).update
    expected = errors[best] / np.linalg.norm(held.d)
    assert got == pytest.approx(expected, rel=1e-6)


def test_inputs_that_are_all_zero_leave_the_mean() -> None:
    site = make_site("plain")
    factors = SiteFactors.of(site)
    found = sample(site, torch.zeros(5, 7))
    P_QI = fitted(factors, found.evidence, 1e-3)
    mean = np.einsum("e,eoi->oi", found.gates.mean(0), dense(site))
    got = full(LowRank(P_QI, factors.Bt_QO))
    np.testing.assert_allclose(got, mean, atol=1e-6)
    assert found.evidence.moments is not None
    # nothing to be wrong about
    assert found.evidence.moments.errors(factors, factors.expert(0)).update == 0.0


def test_on_clustered_inputs_the_calibrated_fit_beats_the_mean() -> None:
    site = clustered_site()
    factors = SiteFactors.of(site)
    fit, held = sample(site, clustered(400, 3)), sample(site, clustered(200, 4))
    assert held.evidence.moments is not None
    errors = {}
    for name, cls in (("svd", COLLAPSERS["svd"]), ("calibrated", Calibrated)):
        method = cls(cls.Config.from_dict({"rank": 8}))
        tuned = method.tune(factors, fit.evidence, held.evidence)
        delta, _ = method.solve(factors, fit.evidence, tuned)
        errors[name] = held.evidence.moments.errors(factors, delta).update or 0
    assert errors["calibrated"] < 0.6 * errors["svd"]


def test_concat_keeps_a_and_scales_b_by_the_mean_gate() -> None:
    site = make_site("plain")
    found = sample(site, inputs(20))
    method = COLLAPSERS["concat"](COLLAPSERS["concat"].Config())
    got, _ = method.solve(SiteFactors.of(site), found.evidence, {})
    np.testing.assert_allclose(got.A_rI, site.experts.A.detach().view(6, 7))
    gates = found.gates.mean(0)
    expected = 2.5 * gates[:, None, None] * site.experts.Bt.detach().double().numpy()
    np.testing.assert_allclose(got.Bt_rO, expected.reshape(6, 6), rtol=1e-6)


def test_linear_weighs_updates_and_not_factors() -> None:
    site = make_site("plain")
    cls = COLLAPSERS["linear"]
    method = cls(cls.Config(rank=6, weights=[0.5, -1.0, 2.0]))
    factors = SiteFactors.of(site)
    got, details = method.solve(factors, even(factors), {})
    deltas = dense(site)
    expected = 0.5 * deltas[0] - deltas[1] + 2 * deltas[2]
    np.testing.assert_allclose(full(got), expected, atol=1e-6)
    assert details["weights"] == [0.5, -1.0, 2.0]


def test_linear_takes_weights_per_task() -> None:
    site = make_site("plain")
    factors = SiteFactors.of(site)
    usage = Usage()
    usage.add("sql", torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    usage.add("chat", torch.tensor([[0.0, 0.0, 1.0]]))
    cls = COLLAPSERS["linear"]
    method = cls(cls.Config(rank=6, weights={"sql": 2.0, "chat": -1.0}))
    got, _ = method.solve(factors, Evidence(usage), {})
    deltas = dense(site)
    np.testing.assert_allclose(full(got), deltas[0] + deltas[1] - deltas[2], atol=1e-6)
    unknown = cls(cls.Config(weights={"spl": 1.0}))
    with pytest.raises(ConfigError, match="no calibration row of task 'spl'"):
        unknown.solve(factors, Evidence(usage), {})


def test_select_takes_the_expert_with_the_most_weight() -> None:
    site = make_site("ragged")
    factors = SiteFactors.of(site)
    usage = Usage()
    usage.add("sql", torch.tensor([[0.1, 0.5, 0.4], [0.8, 0.1, 0.1]]))
    usage.add("chat", torch.tensor([[0.0, 1.0, 0.0]]))
    cls = COLLAPSERS["select"]
    got, details = cls(cls.Config()).solve(factors, Evidence(usage), {})
    assert details == {"expert": 1}
    assert got.rank == 4
    np.testing.assert_allclose(full(got), dense(site)[1], atol=1e-6)
    cut, _ = cls(cls.Config(expert=1, rank=2)).solve(factors, Evidence(usage), {})
    u, s, vt = np.linalg.svd(dense(site)[1])
    np.testing.assert_allclose(full(cut), u[:, :2] * s[:2] @ vt[:2], atol=1e-6)


def test_usage_means_are_per_task_and_add_up() -> None:
    first, second = Usage(), Usage()
    first.add("a", torch.tensor([[1.0, 0.0]]))
    first.add("b", torch.tensor([[0.0, 1.0]]))
    second.add("b", torch.tensor([[1.0, 1.0], [0.5, 0.0]]))
    both = first + second
    assert both.mean().tolist() == [2.5 / 4, 2.0 / 4]
    assert both.mean(["b"]).tolist() == [1.5 / 3, 2.0 / 3]
    assert first.tokens == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        ({"kind": "soft"}, 0.25),
        ({"kind": "topk", "top_k": 2}, 0.25),
        # two of four, each at a quarter: half the weight of a renormalised router
        ({"kind": "topk", "top_k": 2, "renormalize": False}, 0.125),
    ],
)
def test_even_gates_are_what_an_undecided_router_gives(
    router: dict[str, Any], expected: float
) -> None:
    raw = {"num_experts": 4, "kind": "lora"}
    config = molora.AdapterConfig.from_dict(
        {"target_modules": ["x"], "experts": raw, "router": router}
    )
    site = MoloraLinear(
        nn.Linear(4, 4),
        config.site("x"),
        path="x",
        runtime=Runtime(),
        objectives=[],
        generator=torch.Generator(),
    )
    assert SiteFactors.of(site).even_E.tolist() == pytest.approx([expected] * 4)
