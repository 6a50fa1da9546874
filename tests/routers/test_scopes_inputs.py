"""Scopes block and model, inputs sequence and task: against sums worked out apart.

The wanted outputs come from the wrapped layers' own parameters, put together here in
float64 by the definitions in molora/route.py and molora/prompt.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import molora
from molora.context import ForwardContext
from molora.errors import ConfigError, RoutingError, WrapError
from molora.model import adapter_parameters, sites

Factory = Callable[..., PreTrainedModel]
E, N = 4, 2
NAMES = ["sql", "chat"]
PROMPT_READERS = [{"input": "sequence"}, {"kind": "hmora"}]


def build(make: Factory, targets: Any = "all-linear", **router: Any) -> Any:
    raw = {
        "target_modules": targets,
        "experts": {"kind": "lora", "num_experts": E, "r": 2},
        "router": {"kind": "topk", **router},
        "balance": [{"kind": "switch", "weight": 0.5}],
    }
    model: Any = molora.wrap(make(), molora.AdapterConfig.from_dict(raw)).double()
    g = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 1.0 if "router" in name else 0.3, generator=g)
    return model.eval()


def ids(rows: int = 3, width: int = 6, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (rows, width), generator=g)


def inputs_of(model: Any) -> dict[str, Tensor]:
    """What every site reads, filled by the next forward."""
    seen: dict[str, Tensor] = {}
    for path, site in sites(model).items():
        site.register_forward_pre_hook(
            lambda m, args, path=path: seen.update({path: args[0]})
        )
    return seen


def topk(rows: Tensor, weight: Tensor) -> Tensor:
    p = torch.softmax(rows.double() @ weight.double().t(), -1)
    kept = torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0) * p
    return kept / kept.sum(-1, keepdim=True)


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-9 * (1 + b.abs().max()))


@pytest.mark.parametrize("scope", ["block", "model"])
def test_layers_follow_the_first_of_their_scope(
    scope: str, tiny_llama: Factory
) -> None:
    model = build(tiny_llama, scope=scope)
    found = sites(model)
    owners = [path for path, site in found.items() if site.router is not None]
    assert len(owners) == (4 if scope == "block" else 1)
    seen = inputs_of(model)
    with torch.no_grad(), molora.record_routing(model) as trace:
        model(ids())
    for path, record in trace.sites.items():
        block, _, name = path.rpartition(".")
        first = "q_proj" if block.endswith("attn") else "gate_proj"
        leader = f"{block}.{first}" if scope == "block" else next(iter(found))
        want = topk(seen[leader], found[leader].router.gate.weight)
        assert near(record.gates[0].double(), want.float().double()), path
    assert len(trace.sites) == len(found)


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_all_followers_reach_the_leader(
    scope: str, checkpointing: bool, tiny_llama: Factory
) -> None:
    """Against a model of as many routers with the same weights, gradients summed."""
    shared = build(tiny_llama, ["q_proj", "k_proj"], scope=scope).train()
    apart = build(tiny_llama, ["q_proj", "k_proj"]).train()
    leader_of = {path: site.leader or site for path, site in sites(shared).items()}
    _copy_values(shared, apart, leader_of)
    if scope == "model":
        seen = inputs_of(apart)
        for site in sites(apart).values():
            site.router.forward = _reading(site.router, seen, next(iter(leader_of)))
    if checkpointing:
        shared.activation_checkpointing_enable({"use_reentrant": False})
    for model in (shared, apart):
        for site in sites(model).values():
            site.objectives = []
        model(input_ids=ids(), labels=ids()).loss.backward()
    for leader in set(leader_of.values()):
        followers = [
            sites(apart)[path].router.gate.weight.grad
            for path, other in leader_of.items()
            if other is leader
        ]
        assert len(followers) == (2 if scope == "block" else 4)
        want = torch.stack(followers).sum(0)
        worst = (leader.router.gate.weight.grad - want).abs().max()
        # Llama's norms round to float32
        assert worst < 1e-7 * (1 + want.abs().max()) and want.abs().max() > 1e-4


@torch.no_grad()
def _copy_values(shared: Any, apart: Any, leader_of: dict[str, Any]) -> None:
    own = adapter_parameters(apart)
    for name, p in adapter_parameters(shared).items():
        own[name].copy_(p)
    for path, site in sites(apart).items():
        site.router.gate.weight.copy_(leader_of[path].router.gate.weight)


def _reading(router: Any, seen: dict[str, Tensor], first: str) -> Any:
    """The forward of a router that reads the input of the first layer."""
    own = type(router).forward

    def forward(x: Tensor, context: ForwardContext) -> Any:
        return own(router, seen[first].flatten(0, 1), context)

    return forward


def test_balance_is_counted_once_per_router(tiny_llama: Factory) -> None:
    shared = build(tiny_llama, scope="block")
    shared.molora_runtime.stats = {}
    shared.train()(input_ids=ids(), labels=ids())
    assert len(shared.molora_runtime.stats) == 4
    weights = {w for s in sites(shared).values() for _, w in s.objectives}
    assert weights == {0.5 / 4}


def test_a_reentrant_checkpoint_is_refused(tiny_llama: Factory) -> None:
    model = build(tiny_llama, scope="model").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RoutingError, match="use_reentrant: false"):
        model(input_ids=ids(), labels=ids()).loss.backward()


def test_what_cannot_share_is_refused(tiny_llama: Factory) -> None:
    raw = {
        "target_modules": ["q_proj", "k_proj"],
        "experts": {"kind": "lora", "num_experts": 2},
        "router": {"kind": "soft", "scope": "block"},
        "overrides": [{"match": "k_proj", "experts": {"num_experts": 3}}],
    }
    with pytest.raises(WrapError, match=r"layers\.0.*q_proj.*k_proj.*num_experts"):
        molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    with pytest.raises(ConfigError, match="reads the experts of its own layer"):
        build(tiny_llama, kind="arrow", scope="block")
    with pytest.raises(ConfigError, match="tasks: has no effect with input: token"):
        build(tiny_llama, tasks=["a"])
    with pytest.raises(ConfigError, match="tasks: names no task"):
        build(tiny_llama, input="task")


def test_a_follower_alone_is_refused(tiny_llama: Factory) -> None:
    model = build(tiny_llama, scope="block")
    with pytest.raises(RoutingError, match="has not run before it"):
        model.model.layers[0].self_attn.k_proj(torch.zeros(1, 3, 32).double())


def test_task_input_is_a_table(tiny_llama: Factory) -> None:
    model = build(tiny_llama, ["q_proj"], input="task", tasks=NAMES)
    path, site = next(iter(sites(model).items()))
    assert site.router.gate.weight.shape == (E, N)
    order = ["chat", "sql", "chat"]
    with (
        torch.no_grad(),
        molora.tasks(model, order),
        molora.record_routing(model) as trace,
    ):
        model(ids())
    gates = trace.sites[path].gates[0].double()
    table = topk(torch.eye(N).double(), site.router.gate.weight)
    want = table[[NAMES.index(t) for t in order]][:, None].expand(-1, 6, -1)
    assert near(gates, want.float().double())
    for wrong in (["poem"] * 3, None):
        with pytest.raises(RoutingError, match="needs the task of every row"):
            if wrong is None:
                model(ids())
            else:
                with molora.tasks(model, wrong):
                    model(ids())


def test_one_task_collapses_exactly(tiny_llama: Factory) -> None:
    model = build(tiny_llama, ["q_proj", "up_proj"], input="task", tasks=NAMES)
    with torch.no_grad(), molora.tasks(model, ["chat"] * 3):
        want = model(ids()).logits
    batches = [{"input_ids": ids(), "tasks": ["chat"] * 3}]
    result = molora.collapse(model, method="concat", calibration=batches)
    with torch.no_grad():
        got = model(ids()).logits
    assert (got - want).abs().max() < 1e-6 * want.abs().max()
    assert result.report.mean_error < 1e-6


def data(prompt: int = 3) -> dict[str, Tensor]:
    labels = ids().clone()
    labels[:, :prompt] = -100
    mask = torch.ones_like(labels)
    mask[0, 0] = 0
    return {"input_ids": ids(), "attention_mask": mask, "labels": labels}


def test_sequence_input_is_the_mean_of_the_prompt(tiny_llama: Factory) -> None:
    model = build(tiny_llama, ["q_proj"], input="sequence")
    seen = inputs_of(model)
    with torch.no_grad(), molora.record_routing(model) as trace:
        model(**data())
    for path, site in sites(model).items():
        x = seen[path]
        means = torch.stack([x[0, 1:3].mean(0), x[1, :3].mean(0), x[2, :3].mean(0)])
        want = topk(means, site.router.gate.weight)[:, None].expand(-1, 6, -1)
        assert near(trace.sites[path].gates[0].double(), want.float().double())


def test_sequence_gradient_is_that_of_the_definition(tiny_llama: Factory) -> None:
    model = build(tiny_llama, ["q_proj"], input="sequence").train()
    site = next(iter(sites(model).values()))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).double()
    c = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).double()
    prompt = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()

    def ours(x: Tensor) -> Tensor:
        context = molora.context.forward_context(
            {"input_ids": torch.zeros(2, 5, dtype=torch.long)}, runtime, True
        )
        with runtime.use(context, 0):
            y: Tensor = site(x)
        return y

    def wanted(x: Tensor) -> Tensor:
        mean = (x * prompt[..., None]).sum(1) / prompt.sum(1, keepdim=True)
        p = torch.softmax(mean @ site.router.gate.weight.t(), -1)
        kept = torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0) * p
        gates = kept / kept.sum(-1, keepdim=True)
        A, Bt, scale = site.experts.factors()
        z = torch.einsum("bsi,eri->bser", x, A) * gates[:, None, :, None]
        return site.base(x) + scale * torch.einsum("bser,ero->bso", z, Bt)

    runtime = model.molora_runtime
    runtime.prompts = prompt
    site.objectives = []
    found = []
    for function in (ours, wanted):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        y = function(leaf)
        (y * c).sum().backward()
        found.append((y.detach(), leaf.grad, site.router.gate.weight.grad.clone()))
    for got, want in zip(*found, strict=True):
        assert near(got, want) and want.abs().max() > 1e-3


@pytest.mark.parametrize("router", PROMPT_READERS)
def test_the_cache_keeps_the_prompt(router: Any, tiny_llama: Factory) -> None:
    """Prefill and single steps equal one forward with the prompt named."""
    model = build(tiny_llama, **router, scope="block")
    tokens, prompt = ids(), 4
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, :prompt] = True
    with torch.no_grad():
        with molora.prompts(model, mask):
            want = model(tokens).logits
        out = model(tokens[:, :prompt], use_cache=True)
        steps = [out.logits]
        for i in range(prompt, tokens.shape[1]):
            out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values)
            steps.append(out.logits)
        assert near(torch.cat(steps, 1), want)
        assert not near(model(tokens).logits[:, -1], want[:, -1])


@pytest.mark.parametrize("router", PROMPT_READERS)
def test_the_prompt_follows_the_rows_of_the_cache(
    router: Any, tiny_llama: Factory
) -> None:
    model = build(tiny_llama, **router)
    tokens = ids()
    with torch.no_grad():
        out = model(tokens[:, :4], use_cache=True)
        out.past_key_values.batch_repeat_interleave(2)
        rows = torch.tensor([5, 0, 2])
        out.past_key_values.reorder_cache(rows)
        got = model(tokens[[2, 0, 1], 4:5], past_key_values=out.past_key_values)
        out = model(tokens[:, :4], use_cache=True)
        want = model(tokens[:, 4:5], past_key_values=out.past_key_values)
    assert near(got.logits, want.logits[[2, 0, 1]])


@pytest.mark.parametrize("router", PROMPT_READERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_rows_alone(
    router: Any, beams: int, tiny_llama: Factory
) -> None:
    model = build(tiny_llama, **router, scope="model")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams}
    settings |= {"do_sample": False, "pad_token_id": 0}
    rows = [ids()[0], ids()[1, :4], ids()[2, :2]]
    alone = [model.generate(row[None], **settings)[0, len(row) :] for row in rows]
    batch = torch.zeros(3, 6, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for i, row in enumerate(rows):
        batch[i, 6 - len(row) :], mask[i, 6 - len(row) :] = row, 1
    got = model.generate(batch, attention_mask=mask, **settings)[:, 6:]
    assert torch.equal(got, torch.stack(alone))


def test_an_unknown_prompt_is_refused(tiny_llama: Factory) -> None:
    model = build(tiny_llama, input="sequence")
    with torch.no_grad():
        with molora.disabled(model):
            cache = model(ids(), past_key_values=DynamicCache(), use_cache=True)
        with pytest.raises(RoutingError, match="cache was filled without"):
            model(ids()[:, :1], past_key_values=cache.past_key_values)
        packed = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(3, -1)
        with pytest.raises(RoutingError, match="packed"):
            model(ids(), position_ids=packed)
        with pytest.raises(RoutingError, match="a row has no prompt"):
            model(**data(prompt=0))
        with pytest.raises(RoutingError, match="call the model itself"):
            model.model.layers[0].self_attn.q_proj(torch.zeros(1, 3, 32).double())
        with (
            pytest.raises(WrapError, match="bool tensor"),
            molora.prompts(model, ids()),
        ):
            raise AssertionError
    model.train()
    with pytest.raises(RoutingError, match="in training"):
        model(ids())


@pytest.mark.parametrize("router", [{"scope": "block"}, *PROMPT_READERS])
def test_saved_and_loaded(router: Any, tiny_llama: Factory, tmp_path: Any) -> None:
    model = build(tiny_llama, **router).float()
    model.save_pretrained(tmp_path / "a")
    again = molora.load(tiny_llama(), tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)


WAYS: dict[str, dict[str, Any]] = {
    "without a cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("kind", ["topk", "hmora"])
@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_to_generate_has_the_same_prompt(
    way: str, kind: str, tiny_llama: Factory
) -> None:
    router = {"input": "sequence"} if kind == "topk" else {"epsilon": 0}
    model = build(tiny_llama, kind=kind, **router)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompt = ids()[:1].repeat(1, 2)
    want = model.generate(prompt, pad_token_id=0, **settings)
    got = model.generate(prompt, pad_token_id=0, **settings, **WAYS[way])
    assert torch.equal(got, want)


def test_chunks_of_a_prompt_are_refused(tiny_llama: Factory) -> None:
    model = build(tiny_llama, input="sequence")
    with pytest.raises(RoutingError, match="filled in chunks"):
        model.generate(ids()[:1], max_new_tokens=2, prefill_chunk_size=2)


def test_named_prompts_follow_beams(tiny_llama: Factory) -> None:
    model = build(tiny_llama, input="sequence")
    mask = torch.ones(2, 6, dtype=torch.bool)
    settings = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False}
    want = model.generate(ids(2), pad_token_id=0, **settings)
    with molora.prompts(model, mask):
        assert torch.equal(model.generate(ids(2), pad_token_id=0, **settings), want)


def test_a_collapsed_model_asks_for_no_prompt(tiny_llama: Factory) -> None:
    model = build(tiny_llama, input="sequence")
    molora.collapse(model, method="linear", rank=2, show_progress=False)
    assert model.generate(ids()[:1], max_new_tokens=4, pad_token_id=0).shape[1] > 6
    assert model.train()(ids()).logits.shape == (3, 6, 128)


def test_caches_of_other_adapters_are_refused(tiny_llama: Factory) -> None:
    model, other = (build(tiny_llama, input="sequence") for _ in range(2))
    with torch.no_grad():
        cache = other(ids(), use_cache=True).past_key_values
        with pytest.raises(RoutingError, match="cache was filled without"):
            model(ids()[:, :1], past_key_values=cache)
        # outputs as a tuple keep the prompt as well
        parts = model(ids(), use_cache=True, return_dict=False)
        assert model(ids()[:, :1], past_key_values=parts[1]).logits.shape[1] == 1


def test_a_site_behind_a_slice_is_refused(tiny_llama: Factory) -> None:
    model = build(tiny_llama, ["q_proj", "lm_head"], input="sequence")
    with torch.no_grad():
        assert model(ids()).logits.shape[1] == 6
        with pytest.raises(RoutingError, match="lm_head.*sees 1 of the 6 positions"):
            model(ids(), logits_to_keep=1)


def test_an_interrupted_forward_leaves_nothing(tiny_llama: Factory) -> None:
    model = build(tiny_llama, input="sequence")
    with torch.no_grad():
        want = model.model(ids()).last_hidden_state

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        mask = torch.zeros(3, 6, dtype=torch.bool)
        mask[:, :2] = True
        with pytest.raises(KeyboardInterrupt), molora.prompts(model, mask):
            model(ids())
        hook.remove()
        assert near(model.model(ids()).last_hidden_state, want)


def test_two_streams_of_tokens_are_refused() -> None:
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    raw = {
        "target_modules": ["q", "k"],
        "experts": {"kind": "lora", "num_experts": 2},
        "router": {"kind": "soft", "scope": "block"},
    }
    settings = molora.AdapterConfig.from_dict(raw)
    with pytest.raises(WrapError, match="has an encoder beside its decoder"):
        molora.wrap(T5ForConditionalGeneration(config), settings)
