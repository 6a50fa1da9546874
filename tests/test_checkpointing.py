"""Recomputation in backward repeats its own forward; see also routers/test_balance."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.model import adapter_parameters

Factory = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


def wrapped(make: Factory, mode: bool | None, before: bool = False) -> Any:
    """A model in training with dropout and noise; mode is reentrant or None."""
    raw = {
        "target_modules": "all-linear",
        "experts": {"kind": "lora", "num_experts": 3, "r": 2, "lora_dropout": 0.2},
        "router": {"kind": "topk", "noise": 0.5},
        "balance": [{"kind": "switch", "weight": 0.5}],
    }
    model: Any = make()
    if before and mode is not None:
        model.activation_checkpointing_enable({"use_reentrant": mode})
    molora.wrap(model, molora.AdapterConfig.from_dict(raw))
    if not before and mode is not None:
        model.activation_checkpointing_enable({"use_reentrant": mode})
    g = torch.Generator().manual_seed(1)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 1.0 if "router" in name else 0.2, generator=g)
    return model.train()


def gradients(model: Any, backward: Callable[[Any], None]) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        backward(model)
    grads = {n: p.grad for n, p in adapter_parameters(model).items()}
    assert all(grad is not None for grad in grads.values())
    return grads  # type: ignore[return-value]


def plainly(model: Any) -> None:
    model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()


def beside_a_disabled_one(model: Any) -> None:
    """A reference forward with the adapter off, between forward and backward."""
    loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    with molora.disabled(model):
        reference = model(input_ids=IDS.flip(1), labels=IDS).loss.detach()
        (loss * reference).backward()


@pytest.mark.parametrize("backward", [plainly, beside_a_disabled_one])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_gradients(
    reentrant: bool, before: bool, backward: Any, tiny_llama: Factory
) -> None:
    want = gradients(wrapped(tiny_llama, None), backward)
    got = gradients(wrapped(tiny_llama, reentrant, before), backward)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, atol=1e-6, rtol=1e-4)
