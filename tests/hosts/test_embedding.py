"""An embedding with experts: PEFT's numbers, definitions in float64, refusals.

Shape legend: V ids   O out features   T tokens   E experts   r rank
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import molora
from molora.context import ForwardContext
from molora.errors import CheckpointError, ConfigError, RoutingError, WrapError
from molora.fingerprint import fingerprint
from molora.model import adapter_parameters, sites
from tests.bilinear import FAMILIES, numbers
from tests.oracle import DTYPES, near

Factory = Callable[..., PreTrainedModel]


class Words(nn.Module):
    """An embedding behind the argument names of a language model."""

    def __init__(self, emb: nn.Module):
        super().__init__()
        self.emb = emb

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Tensor:
        y: Tensor = self.emb(input_ids)
        return y


def wrapped(emb: nn.Module, router: Any = None, **experts: Any) -> tuple[Any, Any]:
    raw = {
        "target_modules": ["emb"],
        "experts": {"kind": "lora", **experts},
        "router": router or {"kind": "none"},
    }
    model = molora.wrap(Words(emb), molora.AdapterConfig.from_dict(raw))
    return model, sites(model)["emb"]


def fill(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for values in adapter_parameters(model).values():
        values.data.copy_(torch.randn(values.shape, generator=generator) / 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pefts_numbers(dtype: torch.dtype) -> None:
    t, hyper = numbers("lora_embedding")
    emb = nn.Embedding(hyper["num_embeddings"], hyper["dim"])
    emb.weight.data = t["base.weight"].clone()
    model, site = wrapped(emb, r=hyper["r"], lora_alpha=hyper["alpha"])
    model.to(dtype)
    site.experts.A.data.copy_(t["param.A"])
    site.experts.Bt.data.copy_(t["param.B"].t())
    y = model(t["ids"])
    assert near(y.detach(), t["y"], "y")
    (y * t["c"].to(dtype)).sum().backward()
    assert near(site.experts.A.grad[0], t["grad.A"], "A")
    assert near(site.experts.Bt.grad[0].t(), t["grad.B"], "B")
    assert near(site.delta_weight().t().detach(), t["delta.weight"], "delta")
    before = site.base.weight.clone()
    molora.merge(model)
    assert near(site.base.weight, t["merged.weight"], "merged")
    assert near(model(t["ids"]).detach(), t["y"], "merged y")
    molora.unmerge(model)
    assert torch.equal(site.base.weight, before)
    with molora.disabled(model):
        assert torch.equal(model(t["ids"]), before[t["ids"]])


def by_hand(site: Any, ids: Tensor, router: str) -> Tensor:
    """The layer by its definition, expert by expert."""
    W = site.base.weight.detach().double()
    y = W[ids]
    experts = site.experts
    logits = y @ site.router.gate.weight.double().t()
    g = torch.softmax(logits, -1)
    if router == "topk":
        g = g * torch.zeros_like(g).scatter(-1, g.topk(2).indices, 1.0)
        g = g / g.sum(-1, keepdim=True)
    for e in range(g.shape[-1]):
        A, Bt = (p[e % len(p)].double() for p in (experts.A, experts.Bt))
        y = y + g[..., e : e + 1] * 2.0 * (A[:, ids].movedim(0, -1) @ Bt)
    return y


@pytest.mark.parametrize("shared", [[], ["A"], ["B"]])
@pytest.mark.parametrize("kind", ["topk", "soft"])
def test_a_mixture_by_its_definition(kind: str, shared: list[str]) -> None:
    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        made = wrapped(
            nn.Embedding(11, 7),
            {"kind": kind},
            num_experts=4,
            r=3,
            lora_alpha=6.0,
            shared=shared,
        )
        fill(made[0])
        made[0].double()
        return made

    ids = torch.tensor([[1, 4, 4], [10, 0, 1]])
    (model, site), (_, twin) = make(), make()
    with molora.record_routing(model) as trace:
        y = model(ids)
    want = by_hand(twin, ids, kind)
    assert near(y.detach(), want.detach())
    assert trace.sites["emb"].gates[0].shape == (2, 3, 4)
    c = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).double()
    (y * c).sum().backward()
    (want * c).sum().backward()
    for name in ("experts.A", "experts.Bt", "router.gate.weight"):
        assert near(site.get_parameter(name).grad, twin.get_parameter(name).grad, name)
    # an id that no row holds has no gradient
    assert not site.experts.A.grad[..., 5].any() and site.experts.A.grad[..., 4].any()


@pytest.mark.parametrize("kind", [*FAMILIES, "loha", "pissa"])
def test_every_bilinear_family_is_its_update(kind: str) -> None:
    settings = FAMILIES.get(kind, {"r": 2})
    if kind == "pissa":
        kind, settings = "lora", {"r": 2, "init_lora_weights": "pissa"}
    shared = {"shared": {}} if kind in ("vera", "aflora", "lotr") else {}
    model, site = wrapped(nn.Embedding(12, 6), kind=kind, **settings, **shared)
    start = model(torch.arange(12).view(3, 4)).detach().view(12, 6)
    assert torch.allclose(start, site.base.weight, atol=1e-6)
    fill(model)
    model.double()
    y = model(torch.arange(12).view(3, 4)).detach()
    want = site.base.weight + site.delta_weight().t()
    assert near(y, want.detach().view(3, 4, 6))
    assert (y.view(12, 6) - site.base.weight).abs().max() > 1e-3


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_other_starts_leave_a_mixture_at_the_base(init: str) -> None:
    router = {"kind": "topk", "renormalize": False}
    emb = nn.Embedding(12, 6)
    model, site = wrapped(emb, router, num_experts=4, r=2, init_lora_weights=init)
    ids = torch.arange(12).view(3, 4)
    assert site.experts.A.any() and site.experts.Bt.any()
    assert torch.allclose(model(ids).detach(), emb.weight[ids], atol=1e-5)


def test_the_start_is_pefts() -> None:
    _, site = wrapped(nn.Embedding(50, 40), r=8, num_experts=3, router={"kind": "soft"})
    assert not site.experts.A.any()
    assert site.experts.Bt.std().item() == pytest.approx(1, rel=0.1)
    assert not torch.equal(site.experts.Bt[0], site.experts.Bt[1])
    _, site = wrapped(nn.Embedding(50, 40), r=8, trainability={"A": "frozen"})
    # a frozen A of zeros would learn nothing
    assert site.experts.A.all() and not site.experts.Bt.any()
    _, site = wrapped(
        nn.Embedding(9, 6), r=[1, 3], num_experts=2, router={"kind": "soft"}
    )
    assert site.experts.Bt[0, 0].all() and not site.experts.Bt[0, 1:].any()


def test_padding_and_frequencies_as_in_torch() -> None:
    ids = torch.tensor([[3, 0, 3, 3, 5]])
    for settings in (
        {"padding_idx": 0},
        {"scale_grad_by_freq": True},
        {"sparse": True},
    ):
        emb = nn.Embedding(7, 4, **settings)
        model, site = wrapped(emb, r=2, lora_alpha=2.0)
        fill(model)
        c = torch.randn(1, 5, 4)
        (model(ids) * c).sum().backward()
        table = site.experts.A[0].detach().t().clone().requires_grad_()
        settings.pop("sparse", None)
        z = nn.functional.embedding(ids, table, **settings)
        ((z @ site.experts.Bt[0].detach()) * c).sum().backward()
        assert near(site.experts.A.grad[0].t(), table.grad)
        assert site.base.weight.grad is None
    molora.unwrap(model)
    assert type(model.emb) is nn.Embedding


class BartLike(nn.Embedding):
    """A number as the factor, as in BART."""

    embed_scale = 8.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma", "bart"])
def test_scaled_embeddings(kind: str, dtype: torch.dtype) -> None:
    made: Any = BartLike(9, 6)
    if kind == "gemma":
        made = Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=50.596)
    made.to(dtype)
    if kind == "gemma":
        # loading leaves the factor in float32
        made.embed_scale = torch.tensor(50.596)
    model, site = wrapped(made, r=2)
    fill(model)
    ids = torch.arange(9).unsqueeze(0)
    y, before = model(ids).detach(), site.base.weight.clone()
    factor = 8.0 if kind == "bart" else float(made.embed_scale.to(dtype))
    want = (site.base.weight + site.delta_weight().t()).detach().double() * factor
    want = want.unsqueeze(0)
    assert y.dtype == dtype
    assert (y.double() - want).abs().max() < torch.finfo(dtype).eps * want.abs().max()
    # the factor is rounded as it is there, which single entries hide
    site.base.weight.data.zero_()
    lookup = site.delta_weight().t().double() * factor
    ratio = model(ids).detach().double().abs().sum() / lookup.abs().sum()
    # bfloat16 would make 50.5 of 50.596
    assert abs(ratio.item() - 1) < 1e-3
    site.base.weight.data.copy_(before)
    molora.merge(model)
    merged = model(ids).detach().double()
    assert (merged - want).abs().max() < 2 * torch.finfo(dtype).eps * want.abs().max()
    if (kind, dtype) == ("gemma", torch.float32):
        # PEFT multiplies its update too
        molora.unmerge(model)
        twin = Words(Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=50.596))
        twin.emb.weight.data.copy_(site.base.weight)
        theirs: Any = get_peft_model(
            twin, LoraConfig(r=2, lora_alpha=16, target_modules=["emb"])
        )  # type: ignore[arg-type]
        lora = theirs.base_model.model.emb
        lora.lora_embedding_A.default.data.copy_(site.experts.A[0])
        lora.lora_embedding_B.default.data.copy_(site.experts.Bt[0].t())

        assert near(theirs(ids).detach(), y)


class Offset(nn.Embedding):
    """Positions begin at 2, as in BART."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


class Normed(BartLike):
    """Says that it multiplies, and does more."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


@pytest.mark.parametrize(
    ("emb", "experts", "message"),
    [
        (nn.Embedding(9, 6), {"kind": "ia3"}, "IA3Experts are no product"),
        (nn.Embedding(9, 6), {"kind": "lokr"}, "use experts.kind lora"),
        (nn.Embedding(9, 6), {"lora_dropout": 0.1}, "lora_dropout.*set it to 0"),
        (nn.Embedding(9, 6, max_norm=1.0), {}, "max_norm, which changes its frozen"),
        (Offset(9, 6), {}, "Offset does more than look ids up"),
        (Normed(9, 6), {}, "Normed does more than look ids up"),
    ],
)
def test_what_cannot_be_right_is_refused(
    emb: nn.Module, experts: Any, message: str
) -> None:
    with pytest.raises(WrapError, match=f"layer 'emb': .*{message}"):
        wrapped(emb, **experts)


def test_a_router_that_compares_tokens_with_rows_of_a_is_refused() -> None:
    with pytest.raises(ConfigError, match="arrow.* reads ids"):
        wrapped(nn.Embedding(9, 6), {"kind": "arrow"}, num_experts=4, r=2)


def test_routing_by_task() -> None:
    model, _ = wrapped(
        nn.Embedding(9, 6),
        {"kind": "soft", "input": "task", "tasks": ["a", "b"]},
        num_experts=2,
        r=2,
    )
    fill(model)
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    with molora.tasks(model, ["a", "b"]):
        y = model(ids)
    with molora.tasks(model, ["b", "a"]):
        other = model(ids)
    assert torch.equal(y, other.flip(0)) and not torch.equal(y, other)
    with pytest.raises(RoutingError, match="task of every row"):
        model(ids)


CONFIG: dict[str, Any] = {
    "target_modules": ["embed_tokens", "q_proj"],
    "experts": {"kind": "lora", "num_experts": 3, "r": 2},
    "router": {"kind": "topk"},
    "balance": [{"kind": "switch", "weight": 0.01}],
}


def test_a_llama_learns_is_saved_and_generates(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(CONFIG))
    plain: Any = tiny_llama()
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 2, 1]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    told = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    assert torch.equal(model(**told).logits, plain(**told).logits)
    model.train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1.0
    )
    losses, grads = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer.zero_grad()
        loss = model(**told).loss
        loss.backward()
        losses.append(loss.item())
        site: Any = sites(model)["model.embed_tokens"]
        grads.append(site.experts.A.grad.clone())
    assert losses[0] == losses[1] and torch.allclose(grads[0], grads[1], atol=1e-7)
    assert grads[0].any()
    optimizer.step()
    assert model(**told).loss.item() < losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    again: Any = molora.load(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(**told).logits, model(**told).logits)
    assert not torch.allclose(again(**told).logits, plain(**told).logits)
    prompt: dict[str, Any] = {
        "input_ids": ids[1:],
        "max_new_tokens": 5,
        "do_sample": False,
    }
    cached = again.generate(**prompt)
    assert torch.equal(cached, again.generate(**prompt, use_cache=False))


def test_what_is_saved_while_merged_fits_the_base(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    raw = {"target_modules": ["embed_tokens"], "experts": {"kind": "lora", "r": 2}}
    model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    fill(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    want = model(input_ids=ids).logits
    table = fingerprint(model, {}).embedding
    molora.merge(model)
    assert fingerprint(model, {}).embedding == table
    model.save_pretrained(tmp_path)
    again: Any = molora.load(tiny_llama(), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, want)
    other: Any = tiny_llama(seed=1)
    with pytest.raises(CheckpointError, match="other weights"):
        molora.load(other, tmp_path)


def test_one_routing_for_all_layers(tiny_llama: Factory) -> None:
    raw = CONFIG | {"router": {"kind": "topk", "scope": "model"}}
    model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    fill(model)
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 2, 1]])
    with molora.record_routing(model) as trace:
        loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    first, *others = trace.sites.values()
    assert len(others) == 2
    assert all(torch.equal(first.gates[0], other.gates[0]) for other in others)
    site: Any = sites(model)["model.embed_tokens"]
    assert site.router.gate.weight.shape == (3, 32)
    assert site.router.gate.weight.grad.any()
    assert others and sites(model)["model.layers.0.self_attn.q_proj"].router is None


def test_a_block_that_begins_with_an_embedding_routes_as_the_site_alone() -> None:
    outputs = []
    for scope in ("site", "block"):
        router = {"kind": "topk", "top_k": 2, "scope": scope}
        model, _ = wrapped(nn.Embedding(11, 6), router, num_experts=3, r=2)
        torch.manual_seed(0)
        model.emb.base.weight.data.normal_()
        fill(model)
        outputs.append(model(torch.tensor([[1, 5, 10], [0, 2, 2]])))
    assert outputs[0].abs().sum() > 0 and torch.equal(*outputs)


def test_positions_looked_up_once_for_all_rows_have_no_task() -> None:
    context = ForwardContext(tasks=("sql", "chat"), rows=2, positions=6)
    for shape in [(1, 6, 8), (6, 8)]:
        with pytest.raises(RoutingError, match="does not line up with the 2 rows"):
            context.token_rows(shape, "wpe")
    assert context.token_rows((12, 8), "up").tasks == ("sql", "chat")
    alone = ForwardContext(tasks=("sql",), rows=1, positions=6)
    assert alone.token_rows((1, 6, 8), "wpe").tasks == ("sql",)


def test_a_shared_factor_that_began_at_zero_cannot_grow() -> None:
    router = {"kind": "topk", "top_k": 2}
    model, _ = wrapped(nn.Embedding(11, 6), router, num_experts=3, r=2, shared=["A"])
    with pytest.raises(WrapError, match="'emb'.*would not start at zero"):
        molora.grow(model)


def test_a_table_at_two_places_is_refused() -> None:
    model = Words(nn.Embedding(9, 6))
    model.twin = model.emb
    raw = {"target_modules": ["emb"], "experts": {"kind": "lora", "r": 2}}
    with pytest.raises(WrapError, match="'emb' is the same module as 'twin'"):
        molora.wrap(model, molora.AdapterConfig.from_dict(raw))


def test_all_linear_matches_no_embedding(tiny_llama: Factory) -> None:
    raw = CONFIG | {"target_modules": "all-linear"}
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    assert len(sites(model)) == 14
    assert "model.embed_tokens" not in sites(model)


def test_a_tied_table_is_not_merged(tiny_llama: Factory) -> None:
    raw = {"target_modules": ["embed_tokens"], "experts": {"kind": "lora", "r": 2}}
    model = molora.wrap(
        tiny_llama(tie_word_embeddings=True), molora.AdapterConfig.from_dict(raw)
    )
    with pytest.raises(WrapError, match=r"'model\.embed_tokens': its weight is tied"):
        molora.merge(model)
    assert not sites(model)["model.embed_tokens"].merged


def test_mixtures_collapse_by_their_weights(tiny_llama: Factory) -> None:
    raw = {k: v for k, v in CONFIG.items() if k != "balance"}
    model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    fill(model)
    experts: Any = sites(model)["model.embed_tokens"].experts
    want = sum(experts.delta_weight(e) for e in range(3)) / 3
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(WrapError, match="embed_tokens.*reads ids.*without cal"):
        molora.collapse(model, "calibrated", rank=6, calibration=[batch] * 4)
    molora.collapse(model, "linear", rank=6)
    site = sites(model)["model.embed_tokens"]
    assert near(site.delta_weight().detach(), want.detach())


def test_peft_reads_and_writes_the_same(tiny_llama: Factory, tmp_path: Path) -> None:
    raw = {"target_modules": ["embed_tokens", "q_proj"], "experts": {"r": 2}}
    raw["experts"]["kind"] = "lora"
    model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw)).eval()
    fill(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    want = model(input_ids=ids).logits
    molora.export_peft(model, tmp_path / "ours")
    theirs: Any = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert torch.allclose(theirs(input_ids=ids).logits, want, atol=1e-5)
    # PEFT writes the frozen table as well
    named = LoraConfig(r=2, lora_alpha=2, target_modules=["embed_tokens", "q_proj"])
    twin: Any = get_peft_model(tiny_llama(), named)  # type: ignore[arg-type]
    state = {k: v for k, v in theirs.state_dict().items() if "lora_" in k}
    twin.load_state_dict(state, strict=False)
    twin.save_pretrained(tmp_path / "theirs")
    keys = load_file(tmp_path / "theirs/adapter_model.safetensors").keys()
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys
    back: Any = molora.import_peft(tiny_llama(), [tmp_path / "theirs"]).eval()
    assert torch.allclose(back(input_ids=ids).logits, want, atol=1e-5)
    other: Any = tiny_llama()
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(CheckpointError, match="embed_tokens that is not the model.s"):
        molora.import_peft(other, [tmp_path / "theirs"])
    mixture: Any = molora.import_peft(
        tiny_llama(),
        [tmp_path / "ours", tmp_path / "theirs"],
        router={"kind": "soft"},
    )
    written = molora.export_peft_experts(mixture, tmp_path / "both")
    single: Any = PeftModel.from_pretrained(tiny_llama(), written[1]).eval()
    assert torch.allclose(single(input_ids=ids).logits, want, atol=1e-5)
