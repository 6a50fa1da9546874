"""X-LoRA: PEFT's numbers for one layer and whole models, and what surrounds them.

The first pass and its cache are in test_base_pass.py.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import molora
from molora.errors import ConfigError, RoutingError, WrapError
from molora.model import adapter_parameters, sites
from tests.oracle import DTYPES, load, near

Factory = Callable[..., PreTrainedModel]
E = 3
FORMS = {
    "plain": {},
    "mlp": {"depth": 3, "size": 12, "dropout": 0.0, "temperature": 1.3},
    "layerwise": {"layerwise": True, "top_k": 2},
    "second": {"top_k": 2, "top_k_gates": "second_softmax", "weight": 0.7},
}
PEFT_NAMES = {
    "depth": "xlora_depth",
    "size": "xlora_size",
    "dropout": "xlora_dropout_p",
    "temperature": "softmax_temperature",
    "layerwise": "layerwise_scalings",
    "top_k": "top_k_lora",
    "weight": "global_scaling_weight",
}


def adapter(targets: Any = "all-linear", **router: Any) -> molora.AdapterConfig:
    raw = {
        "target_modules": targets,
        "experts": {"kind": "lora", "num_experts": E, "r": 2},
        "router": {"kind": "xlora", **router},
    }
    return molora.AdapterConfig.from_dict(raw)


def build(make: Factory, targets: Any = "all-linear", **router: Any) -> Any:
    model: Any = molora.wrap(make(), adapter(targets, **router)).double()
    g = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 1.0 if "router" in name else 0.3, generator=g)
    return model.eval()


def router_of(model: Any) -> Any:
    (router,) = [s.router for s in sites(model).values() if s.router is not None]
    return router


def ids(rows: int = 3, width: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, 128, (rows, width), generator=g)


def same(a: Tensor, b: Tensor, tol: float = 1e-10) -> bool:
    return bool((a - b).abs().max() <= tol * (1 + b.abs().max()))


class Body(nn.Module):
    def forward(self, x: Tensor, hidden_state: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=hidden_state)


class Whole(nn.Module):
    """Layers of the oracle's size; the one that it holds is run."""

    def __init__(self, t: dict[str, Tensor]):
        super().__init__()
        self.config = PreTrainedConfig(hidden_size=t["hidden_state"].shape[-1])
        O, I = t["base.weight"].shape  # noqa: E741
        self.lins = nn.ModuleList(nn.Linear(I, O) for _ in range(int(t["n_layers"])))
        self.base_model = Body()
        self.number = int(t["layer_number"])
        run: Any = self.lins[self.number]
        run.weight.data, run.bias.data = t["base.weight"].clone(), t["base.bias"]

    def forward(self, x: Tensor, hidden_state: Tensor) -> Any:
        return self.lins[self.number](x)


def oracle(t: dict[str, Tensor], dtype: torch.dtype, **router: Any) -> Any:
    ranks, scales = t["plain.rank"].tolist(), t["scales"].tolist()
    raw = {
        "target_modules": r"lins\.\d",
        "experts": {
            "kind": "lora",
            "num_experts": len(ranks),
            "r": ranks,
            "lora_alpha": [r * s for r, s in zip(ranks, scales, strict=True)],
        },
        "router": {
            "kind": "xlora",
            "depth": 2,
            "size": len(t["plain.classifier.w1"]),
            "dropout": 0.0,
            "temperature": float(t["softmax_temperature"]),
            "layerwise": True,
            "weight": float(t["global_scaling_weight"]),
            **router,
        },
    }
    model: Any = molora.wrap(Whole(t), molora.AdapterConfig.from_dict(raw))
    model.to(dtype).train()
    site: Any = sites(model)[f"lins.{model.number}"]
    with torch.no_grad():
        site.experts.A.copy_(t["plain.A"])
        site.experts.Bt.copy_(t["plain.B"].transpose(1, 2))
        for i, layer in enumerate(router_of(model).layers, start=1):
            layer.weight.copy_(t[f"plain.classifier.w{i}"])
            layer.bias.copy_(t[f"plain.classifier.b{i}"])
    return model, site


VARIANTS = {"topk": "masked", "topk_softmax": "second_softmax", "soft": None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_layer_of_peft(variant: str, dtype: torch.dtype) -> None:
    t, gates = load("xlora"), VARIANTS[variant]
    more = {"top_k": int(t["top_k"]), "top_k_gates": gates} if gates else {}
    model, site = oracle(t, dtype, **more)
    x = t["x"].to(dtype).requires_grad_()
    with molora.record_routing(model) as trace:
        y = model(x, hidden_state=t["hidden_state"].to(dtype))
    (y * t["c"].to(dtype)).sum().backward()
    near(y.detach(), t[f"{variant}.y"], "y")
    recorded = trace.sites[site.path].gates[0] / t["global_scaling_weight"].float()
    near(recorded, t[f"{variant}.gates"], "gates")
    first, last = router_of(model).layers
    for got, name in (
        (x.grad, "x"),
        (site.experts.A.grad, "A"),
        (site.experts.Bt.grad.transpose(1, 2), "B"),
        (first.weight.grad, "classifier.w1"),
        (first.bias.grad, "classifier.b1"),
        (last.weight.grad, "classifier.w2"),
        (last.bias.grad, "classifier.b2"),
    ):
        near(got, t[f"{variant}.grad.{name}"], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_renormalised_gates(dtype: torch.dtype) -> None:
    t = load("xlora")
    top = {"top_k": int(t["top_k"]), "top_k_gates": "softmax"}
    model, _ = oracle(t, dtype, **top)
    y = model(t["x"].to(dtype), hidden_state=t["hidden_state"].to(dtype))
    near(y.detach(), t["alt.topk_renormalised.y"], "y")


def peft_folders(make: Factory, folder: Path) -> list[str]:
    """Trained-looking LoRAs, one rank and scale each."""
    found = []
    for e in range(E):
        config = LoraConfig(
            r=e + 1, lora_alpha=4, target_modules=["q_proj", "down_proj"]
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(e)
            model: Any = get_peft_model(make(), config)
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(p, std=0.5)
        model.save_pretrained(folder / str(e))
        found.append(str(folder / str(e)))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_whole_model_of_peft(form: str, tiny_llama: Factory, tmp_path: Path) -> None:
    """Logits, scalings and the classifier's gradients, adapters frozen."""
    settings, folders = FORMS[form], peft_folders(tiny_llama, tmp_path)
    names = {PEFT_NAMES[n]: v for n, v in settings.items() if n in PEFT_NAMES}
    theirs: Any = get_peft_model(
        tiny_llama(use_cache=False),
        XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=32,
            adapters={str(i): folder for i, folder in enumerate(folders)},
            enable_softmax_topk=settings.get("top_k_gates") == "second_softmax",
            **names,
        ),
    )
    ours: Any = molora.import_peft(
        tiny_llama(), folders, router={"kind": "xlora", **settings}, train="router"
    )
    classifier = theirs.base_model.internal_xlora_classifier
    official = [m for m in classifier.layers if isinstance(m, nn.Linear)]
    for mine, layer in zip(router_of(ours).layers, official, strict=True):
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(5))
        mine.load_state_dict(layer.state_dict())
    mask = torch.ones_like(ids())
    mask[0, 4:] = 0
    data = {"input_ids": ids(), "attention_mask": mask, "labels": ids()}
    found = [model(**data) for model in (theirs, ours)]
    near(found[1].logits.detach(), found[0].logits.detach(), "logits")
    # the adapters and the scalings matter
    with molora.disabled(ours), torch.no_grad():
        assert not same(ours(**data).logits, found[1].logits, 1e-2)
    for out in found:
        out.loss.backward()
    for mine, layer in zip(router_of(ours).layers, official, strict=True):
        near(mine.weight.grad, layer.weight.grad, "weight")
        near(mine.bias.grad, layer.bias.grad, "bias")
        assert float(layer.weight.grad.abs().max()) > 1e-4
    trained = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(official) and all("router" in n for n in trained)


@pytest.mark.parametrize("form", FORMS)
def test_recomputation_and_micro_batches(form: str, tiny_llama: Factory) -> None:
    model = build(tiny_llama, **FORMS[form]).train()

    def gradients(*parts: Tensor) -> list[Tensor]:
        model.zero_grad()
        for part in parts:
            model(input_ids=part, labels=part).loss.div(len(parts)).backward()
        return [p.grad.clone() for p in adapter_parameters(model).values()]

    want = gradients(ids())
    rows = gradients(*ids().split(1))
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients(ids())
    for a, b, c in zip(want, rows, again, strict=True):
        # Llama's norms round to float32
        assert same(b, a, 1e-7) and same(c, a, 1e-7)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RoutingError, match="use_reentrant: false"):
        gradients(ids())


def test_dropout_of_the_classifier_is_for_training(tiny_llama: Factory) -> None:
    model = build(tiny_llama, depth=2, size=8, dropout=0.5)
    assert torch.equal(model(ids()).logits, model(ids()).logits)
    model.train()
    assert not torch.equal(model(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("form", FORMS)
def test_saved_loaded_and_copied(
    form: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    model = build(tiny_llama, **FORMS[form]).float()
    model.save_pretrained(tmp_path / "a")
    again = molora.load(tiny_llama(), tmp_path / "a").eval()
    with torch.no_grad():
        want = model(ids()).logits
        assert torch.equal(again(ids()).logits, want)
        twin = deepcopy(model)
        router_of(model).layers[0].weight.zero_()
        assert torch.equal(twin(ids()).logits, want)
        assert not torch.equal(model(ids()).logits, want)
        folders = molora.export_peft_experts(twin, tmp_path / "b")
        back = molora.import_peft(tiny_llama(), folders, router=tmp_path / "b").eval()
        assert torch.equal(back(ids()).logits, want)


def test_merge_collapse_and_unwrap(tiny_llama: Factory) -> None:
    model = build(tiny_llama, ["q_proj", "up_proj"], layerwise=True)
    base = tiny_llama().double()
    with torch.no_grad():
        with pytest.raises(WrapError, match="routes among 3 experts"):
            molora.merge(model)
        with molora.disabled(model):
            assert torch.equal(model(ids()).logits, base(ids()).logits)
        with molora.record_routing(model) as trace:
            model(ids())
        gates = {path: r.gates[0].mean((0, 1)) for path, r in trace.sites.items()}
        site = sites(model)["model.layers.1.mlp.up_proj"]
        A, Bt, scale = site.experts.factors()
        weight = (gates[site.path].double() * scale)[:, None, None] * A
        want = torch.einsum("eri,ero->oi", weight, Bt)
    batches = [{"input_ids": ids()}]
    report = molora.collapse(
        model, method="linear", rank=6, calibration=batches, held_out=0.34
    ).report
    assert report.mean_error > 0
    # mean gates of the rows that were fitted differ from those of all rows
    delta = site.delta_weight()
    assert (delta - want).norm() < 0.5 * want.norm()
    with torch.no_grad():
        molora.merge(model)(ids())
        molora.unmerge(model)
        assert torch.equal(molora.unwrap(model)(ids()).logits, base(ids()).logits)


def test_what_means_nothing_is_refused(tiny_llama: Factory) -> None:
    for settings, told in (
        ({"scope": "site"}, "router.scope='site'.*one classifier"),
        ({"scope": "block"}, "router.scope='block'"),
        ({"input": "sequence"}, "router.input='sequence'"),
        ({"top_k": 4}, "top_k=4 exceeds num_experts=3"),
        ({"top_k_gates": "softmax"}, "no effect without top_k"),
        ({"size": 8}, "no effect with depth: 1"),
    ):
        with pytest.raises(ConfigError, match=told):
            adapter(**settings)
    raw = adapter(layerwise=True).to_dict()
    with pytest.raises(ConfigError, match="objectives read one"):
        molora.AdapterConfig.from_dict(
            {**raw, "balance": [{"kind": "switch", "weight": 0.1}]}
        )
    with pytest.raises(WrapError, match=r"neither an output embedding nor"):
        molora.wrap(nn.Sequential(nn.Linear(4, 4)), adapter(["0"]))
    model: Any = tiny_llama()
    model.config.is_encoder_decoder = True
    with pytest.raises(WrapError, match="has an encoder"):
        molora.wrap(model, adapter())
    model = build(tiny_llama)
    with pytest.raises(RoutingError, match="call the whole model"):
        model.model.layers[0].self_attn.k_proj(torch.zeros(1, 3, 32).double())
    with pytest.raises(RoutingError, match="not finite"):
        router_of(model).routings(torch.full((1, 32), torch.nan))
