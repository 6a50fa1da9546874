"""Saved adapters loaded with another router: PHATGOOSE's second stage, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.checkpoint import start_from
from molora.continuing import continued
from molora.errors import CheckpointError, ConfigError
from molora.model import is_wrapped, sites
from tests.oracle import DTYPES, Layer, build, load, near

STAGE = {"kind": "sigmoid", "task_experts": {"sql": 0, "chat": 1, "code": 2}}


def learned(dtype: torch.dtype) -> tuple[dict[str, Tensor], Any]:
    """Three experts, the first with PHATGOOSE's learned vector, as they are saved."""
    t = load("phatgoose_stage2")
    g = torch.Generator().manual_seed(4)
    v_I, A, B = t["plain.gate_vector"], t["plain.A"], t["plain.B"]
    more = torch.randn(2, len(v_I), generator=g, dtype=v_I.dtype)
    three = {
        "plain.A": torch.cat([A, A + 1, A - 1]),
        "plain.B": torch.cat([B, B - 1, B / 2]),
        "plain.router": torch.cat([v_I[None], more]),
    }
    model, _ = build(t | three, dtype, router=STAGE)
    return t | three, model


def plain(t: dict[str, Tensor]) -> Any:
    return Layer(t["base.weight"].clone(), t["base.bias"])


def definition(t: dict[str, Tensor], x_TI: Tensor) -> Tensor:
    """Section 3 of the paper: the two best of LN(x) . LN(v_e) / sqrt(I)."""

    def unit(a: Tensor) -> Tensor:
        a = a - a.mean(-1, keepdim=True)
        return a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    z_TE = unit(x_TI) @ unit(t["plain.router"]).T / x_TI.shape[-1] ** 0.5
    p_TK, ids_TK = z_TE.softmax(-1).topk(2)
    p_TK = p_TK / (p_TK.sum(-1, keepdim=True) + 1e-6)
    y_TO = x_TI @ t["base.weight"].T + t["base.bias"]
    for k in range(2):
        A, B = t["plain.A"][ids_TK[:, k]], t["plain.B"][ids_TK[:, k]]
        update = torch.einsum("tor,tri,ti->to", B, A, x_TI)
        y_TO = y_TO + p_TK[:, k, None] * float(t["scale"]) * update
    return y_TO


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_of_the_second_stage_route(dtype: torch.dtype, tmp_path: Path) -> None:
    # what is saved is float32, so the numbers are those of float32 values
    t, model = learned(torch.float32)
    model.save_pretrained(tmp_path / "a")
    ours: Any = molora.load(
        plain(t).float(), tmp_path / "a", router={"kind": "sigmoid"}
    )
    near(sites(ours)["lin"].router.gate.weight[0], t["plain.gate_vector"], "vector")
    x = t["x"].flatten(0, -2).float()
    with molora.tasks(ours, ["sql"]):
        got = ours(x[None])[0]
    near(got.detach(), t["y"].flatten(0, -2), "second stage")
    goose: Any = molora.load(
        plain(t).float(), tmp_path / "a", router={"kind": "phatgoose", "top_k": 2}
    )
    goose.to(dtype)
    names = ["plain.A", "plain.B", "plain.router", "base.weight", "base.bias"]
    wide = {n: t[n].float().double() for n in names} | {"scale": t["scale"]}
    x = x.to(dtype).requires_grad_()
    want_x = x.detach().double().requires_grad_()
    y, want = goose(x), definition(wide, want_x)
    near(y.detach(), want.detach(), "y")
    y.square().sum().backward()
    want.square().sum().backward()
    near(x.grad, want_x.grad, "x")
    goose.float().save_pretrained(tmp_path / "b")
    again: Any = molora.load(plain(t).float(), tmp_path / "b")
    assert type(sites(again)["lin"].router).__name__ == "PHATGOOSERouter"


def test_other_kinds_tell_both_lists(tmp_path: Path) -> None:
    t, model = learned(torch.float32)
    model.save_pretrained(tmp_path / "a")
    wide = t["base.weight"].shape[1]
    base = plain(t).float()
    for router, told in (
        ({"kind": "adamole"}, rf"saved routers have gate.weight \(3, {wide}\) at 1 .*"
         r"asked for have .*threshold"),
        ({"kind": "arrow"}, "asked for have no parameters"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=told):
            molora.load(base, tmp_path / "a", router=router)
        assert not is_wrapped(base)
    for router, told in (
        ({"kind": "goose"}, "'goose'"),
        ({"kind": "phatgoose", "top_k": 9}, "top_k=9 exceeds"),
        ({"top_k": 1}, "router.top_k: unknown field"),
        ("phatgoose", "expected a mapping"),
    ):
        with pytest.raises(ConfigError, match=told):
            molora.load(base, tmp_path / "a", router=router)  # type: ignore


def test_what_is_kept_of_the_old_router() -> None:
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 3, "r": 2},
        "router": {"kind": "topk", "top_k": 2, "scope": "model", "temperature": 2.0},
        "balance": [{"kind": "switch", "weight": 0.1}],
    }
    config = molora.AdapterConfig.from_dict(raw)
    other = continued(config, {"router": {"kind": "soft"}})
    assert other.router.to_dict()["scope"] == "model"
    assert other.router.to_dict()["temperature"] == 1.0
    assert other.balance == []
    same = continued(config, {"router": {"top_k": 3}, "train": "router"})
    assert same.router.to_dict()["temperature"] == 2.0
    assert same.router.to_dict()["top_k"] == 3 and len(same.balance) == 1
    assert same.train == "router"
    with pytest.raises(ConfigError, match=r"adapter.experts: belongs to the saved"):
        continued(config, {"experts": {"r": 4}})
    several = molora.AdapterConfig.from_dict(
        raw | {"overrides": [{"match": "0", "router": {"top_k": 3}}]}
    )
    with pytest.raises(ConfigError, match="routers of several settings"):
        continued(several, {"router": {"kind": "soft"}})


def test_training_goes_on_with_other_settings(tmp_path: Path) -> None:
    t, model = learned(torch.float32)
    model.save_pretrained(tmp_path / "a")
    changes = {"train": "router", "router": {"kind": "soft"}}
    config = continued(model.molora_config, changes)
    ours: Any = start_from(plain(t).float(), tmp_path / "a", config)
    trained = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert trained == ["lin.router.gate.weight"]
    near(sites(ours)["lin"].router.gate.weight.detach(), t["plain.router"], "values")
