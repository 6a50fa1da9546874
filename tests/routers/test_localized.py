"""Localized balancing: the authors' numbers, their corrections, groups, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.context import ForwardContext, TokenRows
from molora.errors import ConfigError, RoutingError
from molora.routers import OBJECTIVES, Routing
from molora.run_config import load_run_config
from tests.oracle import DTYPES, build, load, near
from tests.registered import CONFIGS

GROUPS = {"1": 0, "0": 1}


def official(t: dict[str, Tensor], dtype: torch.dtype, sign: str) -> tuple[Any, Any]:
    """The model of the file and its site, with the objective at the file's weight."""
    settings = {"task_groups": GROUPS, "delta": float(t["delta"]), "sign": sign}
    model, site = build(
        t,
        dtype,
        router={"kind": "soft"},
        balance=float(t["blc_weight"]),
        kind="localized",
        settings=settings,
    )
    model.molora_runtime.stats = {}
    return model, site


def tasks_of(t: dict[str, Tensor]) -> list[str]:
    return [str(label) for label in t["task_types"].tolist()]


def value_of(t: dict[str, Tensor], model: Any) -> Tensor:
    value: Tensor = model.molora_runtime.stats["lin"].balance["localized"]
    return float(t["blc_weight"]) * value


@pytest.mark.parametrize("dtype", DTYPES)
def test_released_code(dtype: torch.dtype) -> None:
    t = load("loramoe_blc")
    model, site = official(t, dtype, "released")
    x = t["x"].to(dtype).requires_grad_()
    with molora.tasks(model, tasks_of(t)):
        y = model(x)
    (y * t["c"].to(dtype)).sum().backward()
    assert near(y.detach(), t["y"], "y")
    assert near(value_of(t, model), t["aux"], "aux")
    assert near(site.experts.A.grad, t["grad.A"], "A")
    assert near(site.experts.Bt.grad.transpose(1, 2), t["grad.B"], "B")
    assert near(site.router.gate.weight.grad, t["grad.router"], "router")
    assert near(x.grad, t["grad.x"], "x")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sign", "masked", "name"),
    [
        ("paper", False, "aux_intended_sign"),
        ("paper", True, "aux_intended_sign_masked"),
        ("released", True, "aux_masked"),
    ],
)
def test_documented_corrections(
    sign: str, masked: bool, name: str, dtype: torch.dtype
) -> None:
    t = load("loramoe_blc")
    model, site = official(t, dtype, sign)
    x = t["x"].to(dtype).requires_grad_()
    with molora.tasks(model, tasks_of(t)):
        y = model(x, attention_mask=t["mask"] if masked else None)
    (y * 0).sum().backward()
    assert near(value_of(t, model), t[f"alt.{name}"], name)
    # the gradient of the formula, by plain autograd
    leaves = [t[n].double().clone().requires_grad_() for n in ("x", "plain.router")]
    gates = torch.softmax(leaves[0] @ leaves[1].T, -1)
    m = (t["mask"] if masked else torch.ones_like(t["mask"])).double()[..., None]
    first = torch.tensor([[True] * 3 + [False] * 3])
    own = (t["task_types"] == 1)[:, None] == first
    up = own if sign == "released" else ~own
    z = (gates * m).sum(1) / m.sum(1) * torch.where(up, 1 + t["delta"], 1 - t["delta"])
    aux = t["blc_weight"] * z.var() / (z.mean() ** 2 + 1e-10)
    dx, dr = torch.autograd.grad(aux, leaves)
    assert near(x.grad, dx, "x")
    assert near(site.router.gate.weight.grad, dr, "router")


def made(groups: dict[str, int], **kw: Any) -> Any:
    cls = OBJECTIVES["localized"]
    return cls(
        cls.Config.from_dict(
            {"kind": "localized", "weight": 1.0, "task_groups": groups, **kw}
        )
    )


def routing(gates: Tensor) -> Routing:
    return Routing(gates, gates, gates.clamp(min=1e-9).log(), None)


def test_the_paper_sign_is_smallest_where_a_task_uses_its_own_group() -> None:
    rows = TokenRows(2, ("a", "b"))
    # gates in proportion to 1 / I: within 0.9 and 1.1
    own, other = 1 / 0.9, 1 / 1.1
    a = torch.tensor([own, own, other, other]) / (2 * own + 2 * other)
    gates = torch.stack([a, a, a.flip(0), a.flip(0)])
    wanted, swapped = routing(gates), routing(gates.flip(0))
    paper, released = made({"a": 0, "b": 1}), made({"a": 0, "b": 1}, sign="released")
    assert float(paper(wanted, None, rows)) == pytest.approx(0, abs=1e-9)
    assert float(released(swapped, None, rows)) == pytest.approx(0, abs=1e-9)
    assert float(paper(swapped, None, rows)) > 0.02
    assert float(released(wanted, None, rows)) > 0.02


def test_three_groups_by_hand() -> None:
    rows = TokenRows(3, ("c", "a", "b"))
    objective = made({"a": 0, "b": 1, "c": 2, "d": 2}, delta=0.5)
    gates = torch.full((3, 3), 1 / 3).double()
    # Z: 1/6 at a row's own group, 1/2 elsewhere; mean 7/18
    mean = (3 / 6 + 6 / 2) / 9
    var = (3 * (1 / 6 - mean) ** 2 + 6 * (1 / 2 - mean) ** 2) / 8
    value = float(objective(routing(gates), None, rows))
    assert value == pytest.approx(var / mean**2, rel=1e-6)


def test_a_row_of_padding_is_no_row() -> None:
    g = torch.Generator().manual_seed(0)
    gates = torch.softmax(torch.randn(3, 4, 4, generator=g).double(), -1)
    mask = torch.ones(3, 4)
    mask[1] = 0
    mask[2, 1:] = 0
    objective = made({"a": 0, "b": 1})
    with_it = objective(
        routing(gates.flatten(0, 1)), mask.flatten(), TokenRows(3, ("a", "b", "b"))
    )
    # rows of one length, the other's mean by hand
    short = gates[2, :1].expand(4, -1)
    without = objective(
        routing(torch.cat([gates[0], short])), None, TokenRows(2, ("a", "b"))
    )
    assert float(with_it) == pytest.approx(float(without), rel=1e-12)


def test_missing_and_unknown_tasks_are_named() -> None:
    objective, gates = made({"a": 0, "b": 1}), torch.full((2, 2), 0.5)
    with pytest.raises(RoutingError, match=r"needs the task of every row.*'a', 'b'"):
        objective(routing(gates), None, TokenRows(2, None))
    with pytest.raises(RoutingError, match=r"no group is set for \['sql'\]; add them"):
        objective(routing(gates), None, TokenRows(2, ("a", "sql")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task_groups": {"a": 0, "b": 0}}, "at least two groups from 0 without gaps"),
        ({"task_groups": {"a": 0, "b": 2}}, "without gaps, got \\[0, 2\\]"),
        ({"task_groups": {"a": 1, "b": 2}}, "without gaps, got \\[1, 2\\]"),
        ({"task_groups": {}}, "at least two groups"),
        ({"delta": 1.0}, "balance\\[0\\].delta: .*less than 1"),
        ({"sign": "left"}, "balance\\[0\\].sign: .*'left'"),
        (
            {},
            "balance\\[0\\]: task_groups names 2 groups, which does not divide num_ex",
        ),
    ],
)
def test_bad_settings(change: dict[str, Any], words: str) -> None:
    block = {"kind": "localized", "weight": 1.0, "task_groups": {"a": 0, "b": 1}}
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 3},
        "router": {"kind": "soft"},
        "balance": [block | change],
    }
    with pytest.raises(ConfigError, match=words):
        molora.AdapterConfig.from_dict(raw)


def test_an_override_that_does_not_divide_is_named() -> None:
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 4},
        "router": {"kind": "soft"},
        "balance": [
            {"kind": "localized", "weight": 1.0, "task_groups": {"a": 0, "b": 1}}
        ],
        "overrides": [{"match": "up", "experts": {"num_experts": 5}}],
    }
    with pytest.raises(
        ConfigError, match=r"balance\[0\] \(at overrides\[0\]\): task_g"
    ):
        molora.AdapterConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("rows", "shape", "count"),
    [
        (3, (3, 4, 8), 3),
        (3, (12, 8), 3),
        (3, (1, 12, 8), 3),
        (1, (1, 12, 8), 1),
        (None, (3, 4, 8), 3),
        (4, (3, 4, 8), 0),
        (5, (12, 8), 0),
        (None, (12, 8), 0),
    ],
)
def test_rows_of_the_tokens(
    rows: int | None, shape: tuple[int, ...], count: int
) -> None:
    context = ForwardContext(rows=rows)
    if count:
        assert context.token_rows(shape, "up") == TokenRows(count, None)
        return
    with pytest.raises(RoutingError, match=r"site 'up': its input .* does not line up"):
        context.token_rows(shape, "up")


def test_a_run_with_a_task_without_a_group_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no group for the tasks \['scan'\]; add"):
        load_run_config(
            CONFIGS / "loramoe.yaml",
            [
                "adapter.balance.0.task_groups={sentiment: 0, intent_domain: 0, "
                "text2sql: 1}"
            ],
        )
