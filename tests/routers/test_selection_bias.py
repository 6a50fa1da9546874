"""The bias on the selection: by hand, counted once, moved once per step, saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

import molora
from molora.context import ForwardContext
from molora.errors import ConfigError
from molora.model import adapter_parameters, sites
from molora.routers import ROUTERS
from molora.training import MoloraTrainer
from molora.training.sampling import Collator
from tests.registered import objective

Factory = Callable[..., PreTrainedModel]
RATE = 0.25


def identity(E: int = 4, K: int = 2, **settings: Any) -> Any:
    """A top-k router with a bias, whose logits are its input."""
    cls: Any = ROUTERS["topk"]
    made = cls(
        cls.Config(kind="topk", top_k=K, **settings),
        in_features=E,
        num_experts=E,
        site="m",
        generator=torch.Generator(),
    )
    nn.init.eye_(made.gate.weight)
    made.add_bias(E)
    return made.eval()


def test_the_bias_chooses_and_the_gates_do_not_see_it() -> None:
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    made = identity()
    assert made(p.log(), ForwardContext()).gates.gt(0).tolist() == [[1, 1, 0, 0]]
    made.bias_E += torch.tensor([0.0, 0.0, 0.15, 0.0])
    routing = made(p.log(), ForwardContext())
    want = torch.tensor([[0.4 / 0.6, 0, 0.2 / 0.6, 0]])
    assert torch.allclose(routing.gates, want)
    # objectives read probabilities without it
    assert torch.allclose(routing.probs, p)


def test_the_bias_does_not_bring_back_a_dropped_expert() -> None:
    made = identity(E=3, K=1, renormalize=False, expert_dropout=0.9).train()
    made.bias_E += torch.tensor([100.0, 0.0, 0.0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gates = made(torch.zeros(300, 3), ForwardContext()).gates
    # often the first one is hidden, and then another one serves
    assert (gates.gt(0).sum(-1) == 1).all()
    assert 50 < int((gates[:, 0] == 0).sum()) < 250


def test_step_by_hand() -> None:
    made = identity()
    made.load_E = torch.tensor([6.0, 4.0, 1.0, 5.0])
    objective("bias", RATE).step(made)
    assert made.bias_E.tolist() == [-RATE, 0.0, RATE, -RATE]


def wrapped(make: Factory, mode: bool | None = None) -> Any:
    raw = {
        "target_modules": ["up_proj", "q_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "topk", "init_range": 0.5},
        "balance": [{"kind": "bias", "weight": RATE}],
    }
    model: Any = molora.wrap(make(), molora.AdapterConfig.from_dict(raw))
    if mode is not None:
        model.activation_checkpointing_enable({"use_reentrant": mode})
    with torch.no_grad():
        for site in sites(model).values():
            site.experts.Bt.normal_(  # type: ignore
                0, 0.1, generator=torch.Generator().manual_seed(0)
            )
    return model.train()


IDS = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


@pytest.mark.parametrize("mode", [None, True, False])
def test_each_real_token_is_counted_once(
    mode: bool | None, tiny_llama: Factory
) -> None:
    model = wrapped(tiny_llama, mode)
    model.molora_runtime.stats = {}
    for _ in range(2):
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    for path, site in sites(model).items():
        stats = model.molora_runtime.stats[path]
        # eleven real tokens, two experts each, two forwards
        assert float(site.router.load_E.sum()) == 44
        assert torch.equal(site.router.load_E, stats.chosen_sum_E)
        half = stats.chosen_sum_E / 2
        worst = float(half.max() / half.mean())
        assert float(stats.balance["bias"]) / 2 == pytest.approx(worst)
    loads = {path: site.router.load_E.clone() for path, site in sites(model).items()}
    molora.after_optimizer_step(model)
    for path, site in sites(model).items():
        want = RATE * torch.sign(loads[path].mean() - loads[path])
        assert torch.equal(site.router.bias_E, want)
        assert site.router.load_E is None
    # evaluation counts nothing, and a step that is left out moves nothing
    model.eval()(input_ids=IDS)
    assert all(s.router.load_E is None for s in sites(model).values())
    model.train()(input_ids=IDS)
    before = {p: s.router.bias_E.clone() for p, s in sites(model).items()}
    molora.after_optimizer_step(model, taken=False)
    for path, site in sites(model).items():
        assert torch.equal(site.router.bias_E, before[path])
        assert site.router.load_E is None


def test_it_adds_no_gradient(tiny_llama: Factory) -> None:
    grads = []
    for balanced in (True, False):
        model = wrapped(tiny_llama)
        for site in sites(model).values():
            site.objectives = site.objectives if balanced else []
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in adapter_parameters(model).values()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_it_evens_out_the_load() -> None:
    made = identity(E=4, K=1, renormalize=False)
    z = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    z[:, 0] += 1.0
    bias, worst = objective("bias", 0.01), []
    for _ in range(60):
        routing = made(z, ForwardContext())
        made.load_E = routing.load(None)
        worst.append(float(bias(routing, None)))
        bias.step(made)
    assert worst[0] > 1.9 and max(worst[-5:]) < 1.15


def test_it_is_saved_and_loaded(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama)
    model(input_ids=IDS)
    molora.after_optimizer_step(model)
    model.save_pretrained(tmp_path / "a")
    again: Any = molora.load(tiny_llama(), tmp_path / "a")
    for path, site in sites(again).items():
        router: Any = sites(model)[path].router
        assert float(router.bias_E.abs().sum()) > 0
        assert torch.equal(site.router.bias_E, router.bias_E)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


class Poisoned(MoloraTrainer):
    """The second optimizer step has a gradient that is not finite."""

    biases: list[list[Tensor]]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.state.global_step == 1:
            for p in adapter_parameters(self.model).values():
                p.grad = p.grad * float("nan")  # type: ignore[operator]
        return loss

    def log(self, *args: Any, **kwargs: Any) -> None:
        found = [s.router.bias_E.clone() for s in sites(self.model).values()]
        self.biases.append(found)
        super().log(*args, **kwargs)


def test_the_trainer_moves_it_once_per_step_that_is_taken(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama)
    ids = IDS[0].tolist()
    row = {"input_ids": ids, "labels": ids, "task_id": 0}
    trainer = Poisoned(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=[row] * 12,  # type: ignore[arg-type]
        data_collator=Collator(0),
    )
    trainer.biases = []
    trainer.train()
    first, second, third = trainer.biases[:3]
    for a, b, c in zip(first, second, third, strict=True):
        # one move of the rate, none, one again
        assert set(a.abs().tolist()) <= {0.0, RATE} and float(a.abs().sum()) > 0
        assert torch.equal(a, b)
        assert set((c - b).abs().tolist()) <= {0.0, RATE}
        assert not torch.equal(b, c)


@pytest.mark.parametrize("kind", ["soft", "topp", "adamole"])
def test_a_router_that_does_not_rank_is_refused(kind: str) -> None:
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 4},
        "router": {"kind": kind},
        "balance": [{"kind": "bias", "weight": 0.1}],
    }
    with pytest.raises(ConfigError, match=r"balance\[0\]: a bias moves experts up"):
        molora.AdapterConfig.from_dict(raw)
