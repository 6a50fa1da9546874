"""(IA)^3 banks: one vector equals PEFT, mixtures by definition, merge, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

import molora
from molora.errors import WrapError
from molora.model import adapter_parameters, sites

Factory = Callable[..., PreTrainedModel]
IDS = torch.arange(1, 25).view(2, 12)
# keys and values by their output, the second linear of the MLP by its input
TARGETS = {
    "llama": (["k_proj", "v_proj"], "down_proj"),
    "gpt2": (["c_attn"], r"mlp\.c_proj"),
}


def wrapped(model: Any, kind: str, E: int = 1, router: str = "none") -> Any:
    """A model under (IA)^3 experts with random vectors and gates."""
    outer, inner = TARGETS[kind]
    suffix = "|".join([*outer, inner])
    config = {
        "target_modules": rf".*\.({suffix})",
        "experts": {"kind": "ia3", "num_experts": E},
        "router": {"kind": router},
        "overrides": [{"match": inner, "experts": {"position": "input"}}],
    }
    molora.wrap(model, molora.AdapterConfig.from_dict(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.double()


@pytest.fixture
def make(request: Any, tiny_llama: Factory, tiny_gpt2: Factory) -> Any:
    def build(kind: str) -> PreTrainedModel:
        model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]()
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.5, generator=generator)
        return model

    return build


def loss_and_logits(model: Any) -> torch.Tensor:
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    logits: torch.Tensor = out.logits.detach()
    return logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_vector_is_what_peft_computes(kind: str, make: Any) -> None:
    ours = wrapped(make(kind), kind)
    outer, inner = TARGETS[kind]
    inner = "mlp.c_proj" if kind == "gpt2" else inner
    config = peft.IA3Config(target_modules=[*outer, inner], feedforward_modules=[inner])
    theirs: Any = peft.get_peft_model(make(kind).double(), config)
    vectors = {}
    for path, site in sites(ours).items():
        layer = theirs.base_model.model.get_submodule(path)
        vectors[path] = layer.ia3_l["default"]
        own: Any = site.experts.vectors
        with torch.no_grad():
            vectors[path].copy_(own.view_as(vectors[path]))
    got, want = loss_and_logits(ours), loss_and_logits(theirs)
    assert (got - want).abs().max() < 1e-10
    with torch.no_grad(), molora.disabled(ours):
        assert (ours(IDS).logits - got).abs().max() > 1e-3
    for path, site in sites(ours).items():
        grad: Any = site.experts.vectors.grad
        assert (grad.flatten() - vectors[path].grad.flatten()).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_vector_merges_with_the_bias_and_back(kind: str, make: Any) -> None:
    model = wrapped(make(kind), kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        want = model(IDS).logits
        got = molora.merge(model)(IDS).logits
        assert (got - want).abs().max() < 1e-10
        molora.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    plain = molora.unwrap(molora.merge(model))
    with torch.no_grad():
        assert (plain(IDS).logits - want).abs().max() < 1e-10


@pytest.mark.parametrize("router", ["soft", "topk"])
@pytest.mark.parametrize("position", ["input", "output"])
def test_a_mixture_by_its_definition(router: str, position: str) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(10, 7)).double()
    raw = {
        "target_modules": ["0"],
        "experts": {"kind": "ia3", "num_experts": 5, "position": position},
        "router": {"kind": router},
    }
    molora.wrap(layer, molora.AdapterConfig.from_dict(raw)).double()
    site: Any = sites(layer)["0"]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 10, generator=generator, dtype=torch.float64)
    # ones change nothing
    assert torch.equal(layer(x), site.base(x))
    for parameter in (site.experts.vectors, site.router.gate.weight):
        parameter.data.normal_(generator=generator)
    with molora.record_routing(layer) as trace:
        got = layer(x)
    gates = trace.sites["0"].gates[0].double().view(9, 5)
    for t in range(9):
        scale = sum(g * v for g, v in zip(gates[t], site.experts.vectors, strict=True))
        if position == "input":
            want = site.base(x[t] * scale)
        else:
            want = site.base(x[t]) * scale
        assert (got[t] - want).abs().max() < 1e-6


@pytest.mark.parametrize("router", ["soft", "topk"])
def test_it_is_saved_and_loaded(router: str, make: Any, tmp_path: Path) -> None:
    model = wrapped(make("llama"), "llama", 4, router).float()
    model.save_pretrained(tmp_path / "out")
    again = molora.load(make("llama"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(reentrant: bool, make: Any) -> None:
    plain = wrapped(make("llama"), "llama", 4, "topk").train()
    saving = wrapped(make("llama"), "llama", 4, "topk").train()
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    assert torch.equal(loss_and_logits(plain), loss_and_logits(saving))
    theirs = adapter_parameters(saving)
    for name, parameter in adapter_parameters(plain).items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert torch.equal(parameter.grad, theirs[name].grad)  # type: ignore


def test_what_it_cannot_is_refused_with_what_works(make: Any, tmp_path: Path) -> None:
    model = wrapped(make("llama"), "llama", 4, "soft").float()
    with pytest.raises(WrapError, match=r"no low-rank factors.*molora\.merge is exact"):
        molora.collapse(model, "svd", show_progress=False)
    with pytest.raises(WrapError, match="train one expert, which merges"):
        molora.merge(model)
    with pytest.raises(WrapError, match=r"4 experts.*molora\.export_peft_experts"):
        molora.export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
