"""The domain loss: definition, gradients, what it teaches, growth, bad input.

Shape legend
    B rows   S positions   T tokens   E experts
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import molora
from molora.context import TokenRows
from molora.errors import ConfigError, RoutingError
from molora.model import adapter_parameters, sites
from molora.routers import OBJECTIVES, Routing
from molora.run_config import load_run_config
from tests.oracle import build, load, near
from tests.registered import CONFIGS

Factory = Callable[..., Any]
TASKS = ["law", "code", "chat", "bills"]


def made(tasks: list[str], **given: Any) -> Any:
    cls = OBJECTIVES["domain"]
    raw = {"kind": "domain", "weight": 1.0, "tasks": tasks, **given}
    return cls(cls.Config.from_dict(raw))


def routing(logits: Tensor) -> Routing:
    return Routing(torch.softmax(logits, -1), None, logits, None)


def test_two_rows_by_hand() -> None:
    # softmax of (log 3, 0) is (3/4, 1/4)
    logits = torch.tensor([[math.log(3), 0.0]] * 4, dtype=torch.float64)
    logits.requires_grad_()
    weight_T = torch.tensor([1.0, 1.0, 1.0, 0.0])
    rows = TokenRows(2, ("code", "law"))
    value = made(["law", "code"])(routing(logits), weight_T, rows)
    # two tokens of code cost log 4, one of law log 4/3, the padding nothing
    want = (2 * math.log(4) + math.log(4 / 3)) / 3
    assert value.item() == pytest.approx(want, rel=1e-12)
    value.backward()
    assert logits.grad is not None
    code, law = [3 / 4, -3 / 4], [-1 / 4, 1 / 4]
    grad = torch.tensor([code, code, law, [0, 0]]).double() / 3
    torch.testing.assert_close(logits.grad, grad, rtol=1e-12, atol=1e-15)


def test_uniform_costs_log_e_and_no_token_nothing() -> None:
    for count in (2, 3, 7):
        objective = made([f"t{i}" for i in range(count)])
        logits = torch.full((4, count), 0.3).double().requires_grad_()
        rows = TokenRows(2, ("t1", "t0"))
        value = objective(routing(logits), None, rows)
        assert value.item() == pytest.approx(math.log(count), rel=1e-12)
        empty = objective(routing(logits), torch.zeros(4), rows)
        assert float(empty) == 0 and empty.requires_grad


@pytest.mark.parametrize("router", [{"kind": "soft"}, {"kind": "topk", "top_k": 2}])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_against_the_definition(router: dict[str, Any], masked: bool) -> None:
    t = load("loramoe_blc")
    names = ["a", "b", "c", "d", "e", "f"]
    rows = ["e", "b", "c", "a"][: len(t["x"])]
    model, site = build(
        t,
        torch.float64,
        router=router,
        balance=0.7,
        kind="domain",
        settings={"tasks": names},
    )
    model.molora_runtime.stats = {}
    x = t["x"].clone().requires_grad_()
    mask = t["mask"] if masked else None
    with molora.tasks(model, rows):
        y = model(x, attention_mask=mask)
    (y * 0).sum().backward()
    leaves = [t[n].clone().requires_grad_() for n in ("x", "plain.router")]
    logits = leaves[0] @ leaves[1].T
    m = (t["mask"] if masked else torch.ones_like(t["mask"])).double()
    own = torch.stack([logits[b, :, names.index(n)] for b, n in enumerate(rows)])
    loss = ((torch.logsumexp(logits, -1) - own) * m).sum() / m.sum()
    value = model.molora_runtime.stats["lin"].balance["domain"]
    assert near(value, loss.detach(), "value")
    dx, dr = torch.autograd.grad(0.7 * loss, leaves)
    assert near(x.grad, dx, "x")
    assert near(site.router.gate.weight.grad, dr, "router")


def folders(base: Any, path: Path, count: int) -> list[Path]:
    """PEFT LoRAs that were trained apart, here with random values."""
    made = []
    for i in range(count):
        lora = LoraConfig(r=2 + i, lora_alpha=4, target_modules=["q_proj", "up_proj"])
        torch.manual_seed(i)
        model = get_peft_model(base(), lora)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
        model.save_pretrained(path / str(i))
        made.append(path / str(i))
    return made


def batch(tasks: list[str], seed: int, rows: int = 4) -> dict[str, Tensor]:
    """Rows of each task, in words that no other task has, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(3 + 8 * i, 11 + 8 * i, (rows, 10), generator=generator)
        for i in range(len(tasks))
    ]
    input_ids = torch.cat(ids)
    mask = torch.ones_like(input_ids)
    mask[::3, 7:] = 0
    return {"input_ids": input_ids * mask, "attention_mask": mask}


def train(model: Any, tasks: list[str], steps: int = 120) -> None:
    trained = [p for p in adapter_parameters(model).values() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    model.train()
    for step in range(steps):
        rows = batch(tasks, step)
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        with molora.tasks(model, [t for t in tasks for _ in range(4)]):
            model(**rows, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def shares(model: Any, tasks: list[str]) -> Tensor:
    """Share of each task's real tokens whose largest gate is its own, at worst."""
    rows = batch(tasks, 1000)
    with torch.no_grad(), molora.record_routing(model) as trace:
        model(**rows)
    real = rows["attention_mask"].bool()
    result = []
    for i in range(len(tasks)):
        mine = slice(4 * i, 4 * i + 4)
        result.append(
            min(
                site.gates[0]
                .view(*real.shape, -1)[mine][real[mine]]
                .argmax(-1)
                .eq(i)
                .float()
                .mean()
                for site in trace.sites.values()
            )
        )
    return torch.stack(result)


def imported(base: Factory, path: Path, tasks: list[str]) -> Any:
    return molora.import_peft(
        base(),
        folders(base, path, len(tasks)),
        router={"kind": "topk", "top_k": 2},
        train="router",
        balance=[{"kind": "domain", "weight": 1.0, "tasks": tasks}],
    )


def test_each_task_learns_its_own_expert_and_one_is_added(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = imported(tiny_llama, tmp_path, TASKS[:3])
    experts = {n: p.clone() for n, p in _experts(model).items()}
    assert shares(model, TASKS[:3]).min() < 0.9
    train(model, TASKS[:3])
    assert shares(model, TASKS[:3]).min() > 0.95
    assert all(torch.equal(p, experts[n]) for n, p in _experts(model).items())

    rows = {p: site.router.gate.weight.clone() for p, site in sites(model).items()}
    molora.grow(model, task="bills")
    assert model.molora_config.balance[0].tasks == TASKS
    train(model, TASKS)
    assert shares(model, TASKS).min() > 0.95
    for path, site in sites(model).items():
        assert torch.equal(site.experts.A[:3], experts[f"{path}.A"])
        assert torch.equal(site.experts.Bt[:3], experts[f"{path}.Bt"])
        assert site.experts.Bt[3].abs().max() > 0
        # so tokens that do not choose the new expert are what they were
        assert torch.equal(site.router.gate.weight[:3], rows[path])
    model.save_pretrained(tmp_path / "grown")
    again = molora.load(tiny_llama(), tmp_path / "grown")
    assert again.molora_config == model.molora_config
    assert shares(again, TASKS).min() > 0.95


def _experts(model: Any) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": p
        for path, site in sites(model).items()
        for name, p in site.experts.named_parameters()
    }


def test_growth_needs_the_task_and_only_then(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = imported(tiny_llama, tmp_path, TASKS[:3])
    before = model.molora_config
    with pytest.raises(ConfigError, match=r"molora\.grow\(model, task=\.\.\.\)"):
        molora.grow(model)
    with pytest.raises(ConfigError, match="listed twice"):
        molora.grow(model, task="law")
    assert model.molora_config is before
    assert {s.experts.num_experts for s in sites(model).values()} == {3}
    raw = before.to_dict() | {"balance": []}
    plain = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    with pytest.raises(ConfigError, match="task='bills' is read by .*domain"):
        molora.grow(plain, task="bills")


def config(**changed: Any) -> dict[str, Any]:
    return {
        "target_modules": ["q_proj"],
        "experts": {"kind": "lora", "num_experts": 3, "r": 2},
        "router": {"kind": "soft"},
        "balance": [{"kind": "domain", "weight": 1.0, "tasks": TASKS[:3]}],
    } | changed


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (
            {"experts": {"kind": "lora", "num_experts": 4, "r": 2}},
            "3 tasks for num_exp",
        ),
        ({"balance": [{"kind": "domain", "weight": 1.0}]}, "tasks: this field is req"),
        (
            {"balance": [{"kind": "domain", "weight": 1.0, "tasks": ["a", "b", "a"]}]},
            "listed twice",
        ),
        ({"router": {"kind": "sigmoid"}}, "no probabilities"),
        (
            {"overrides": [{"match": "x", "experts": {"num_experts": 2}}]},
            "3 tasks for num_experts=2",
        ),
    ],
)
def test_bad_settings(changed: dict[str, Any], match: str) -> None:
    assert molora.AdapterConfig.from_dict(config()).balance[0].kind == "domain"
    with pytest.raises(ConfigError, match=match):
        molora.AdapterConfig.from_dict(config(**changed))


def test_missing_and_unknown_tasks_are_named() -> None:
    objective, logits = made(["law", "code"]), torch.zeros(2, 2)
    with pytest.raises(RoutingError, match="needs the task of every row"):
        objective(routing(logits), None, TokenRows(2, None))
    with pytest.raises(RoutingError, match=r"no expert is named for \['chat'\]"):
        objective(routing(logits), None, TokenRows(2, ("chat", "law")))
    with pytest.raises(ConfigError, match=r"no expert for \['poems'\]"):
        load_run_config(CONFIGS / "moa.yaml", ["data.tasks.0.name=poems"])
