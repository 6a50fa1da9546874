"""Generation and batching: the same tokens whatever the batch, cache or padding.

Every expert family and every router that is registered is run, all pairs of them in
test_families.py; routers that read the prompt depend on where it ends, and are run in
routers/test_scopes_inputs.py.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.experts import EXPERTS
from molora.model import adapter_parameters, sites
from molora.routers import ROUTERS
from tests.registered import family_settings, router_settings, takes

Factory = Callable[..., PreTrainedModel]
KINDS = [
    (family, router)
    for family in EXPERTS.names()
    for router in ROUTERS.names()
    if not ROUTERS[router].reads_prompt
    and (family == "lora" or router in ("none", "soft", "topk"))
]
WHERE = {
    "": {},
    "block": {"scope": "block"},
    "model": {"scope": "model"},
    "task": {"input": "task", "tasks": ["scan", "sentiment"]},
}
KINDS += [
    ("lora", f"{router}@{where}")
    for router in ROUTERS.names()
    for where, settings in WHERE.items()
    if where and not ROUTERS[router].reads_prompt and takes(router, **settings)
]
GENERATED = [
    (family, router)
    for family, router in KINDS
    # a step of generation is a forward with a cache, which all of them pass above
    if "@" not in router and (family == "lora" or router == "topk")
]
"""What also generates: every router with LoRA, every family with one router."""
TASKS = ["scan", "sentiment", "scan"]
"""Names that the routers of the files in configs/ know."""
SIZES = {"bitfit": 0.005}
"""Of the random values, where 0.3 would leave nothing of what a token says."""


def build(make: Factory, family: str, router: str) -> Any:
    """A model whose adapter changes its outputs a lot."""
    kind, _, where = router.partition("@")
    raw = {
        "target_modules": "all-linear",
        "experts": family_settings(family, 1 if router == "none" else 4),
        "router": router_settings(kind, **WHERE[where]),
    }
    model: Any = molora.wrap(make(), molora.AdapterConfig.from_dict(raw))
    g = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        size = 1.0 if "router" in name else SIZES.get(family, 0.3)
        p.data.normal_(0, size, generator=g)
    return model.eval()


def prompts() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (n,), generator=g) for n in (7, 3, 5)]


def left(seqs: list[Tensor]) -> dict[str, Tensor]:
    width = max(map(len, seqs))
    ids = torch.zeros(len(seqs), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, seq in enumerate(seqs):
        ids[i, width - len(seq) :], mask[i, width - len(seq) :] = seq, 1
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def tasks(model: Any, *names: str) -> Iterator[None]:
    """Tasks are always given; routers that do not ask do not look."""
    with ExitStack() as stack:
        stack.enter_context(molora.tasks(model, names))
        stack.enter_context(torch.no_grad())
        yield


def near(a: Tensor, b: Tensor) -> bool:
    assert a.dtype == b.dtype == torch.float64
    return bool((a - b).abs().max() <= 1e-10 * (1 + b.abs().max()))


@pytest.mark.parametrize(("family", "router"), KINDS)
def test_batch_prefix_and_cache_do_not_change_a_row(
    family: str, router: str, tiny_llama: Factory
) -> None:
    # in float64, as float32 rounds by the shape of a product and the layers amplify it
    model, seqs = build(tiny_llama, family, router).double(), prompts()
    alone = []
    for seq, task in zip(seqs, TASKS, strict=True):
        with tasks(model, task):
            alone.append(model(input_ids=seq[None]).logits[0])
    with molora.disabled(model), torch.no_grad():
        assert not near(model(input_ids=seqs[0][None]).logits[0], alone[0])
    # rows in a batch, padded on either side
    data = left(seqs)
    positions = (data["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with tasks(model, *TASKS):
        batch = model(**data, position_ids=positions).logits
        for i, seq in enumerate(seqs):
            assert near(batch[i, 7 - len(seq) :], alone[i])
    right = torch.nn.utils.rnn.pad_sequence(seqs, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([s * 0 + 1 for s in seqs], batch_first=True)
    with tasks(model, *TASKS):
        batch = model(input_ids=right, attention_mask=mask).logits
        for i, seq in enumerate(seqs):
            assert near(batch[i, : len(seq)], alone[i])
    # a prefix, and one token after the other from the cache
    with tasks(model, TASKS[0]):
        assert near(model(input_ids=seqs[0][None, :4]).logits[0], alone[0][:4])
        cache, steps = None, []
        for token in seqs[0]:
            out = model(
                input_ids=token.view(1, 1), past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            steps.append(out.logits[0, 0])
        assert near(torch.stack(steps), alone[0])


@pytest.mark.parametrize(("family", "router"), GENERATED)
def test_greedy_generation(family: str, router: str, tiny_llama: Factory) -> None:
    model, seqs = build(tiny_llama, family, router), prompts()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    single = []
    for seq, task in zip(seqs, TASKS, strict=True):
        with tasks(model, task):
            single.append(model.generate(seq[None], **settings)[0, len(seq) :])
            # by hand: the full forward of everything so far, each time
            so_far = seq[None]
            for _ in range(8):
                logits = model(input_ids=so_far).logits[0, -1]
                logits[2] = -torch.inf
                so_far = torch.cat([so_far, logits.argmax().view(1, 1)], dim=1)
        assert torch.equal(single[-1], so_far[0, len(seq) :])
    with tasks(model, *TASKS):
        batch = model.generate(**left(seqs), **settings)[:, 7:]
    assert torch.equal(batch, torch.stack(single))
    assert len({tuple(row.tolist()) for row in batch}) > 1


@pytest.mark.parametrize(("family", "router"), GENERATED)
def test_beams(family: str, router: str, tiny_llama: Factory) -> None:
    model, seqs = build(tiny_llama, family, router), prompts()
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "num_beams": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    found = []
    for seq, task in zip(seqs, TASKS, strict=True):
        with tasks(model, task):
            out = model.generate(seq[None], **settings)
            tokens = out.sequences[:, len(seq) :]
            # the score is the mean log-likelihood under the full forward
            full = model(input_ids=out.sequences).logits.log_softmax(-1)
        path = full[0, len(seq) - 1 : -1].gather(-1, tokens[0, :, None])
        assert abs(float(path.mean() - out.sequences_scores[0])) < 1e-4
        found.append(tokens[0])
    with tasks(model, *TASKS):
        batch = model.generate(**left(seqs), **settings).sequences[:, 7:]
    assert torch.equal(batch, torch.stack(found))


def test_tasks_follow_their_rows_through_beams(tiny_llama: Factory) -> None:
    model, seqs = build(tiny_llama, "lora", "topk"), prompts()
    with tasks(model, *TASKS), molora.record_routing(model) as trace:
        model.generate(**left(seqs), max_new_tokens=3, min_new_tokens=3, num_beams=4)
    record = trace.sites["model.layers.0.self_attn.q_proj"]
    # four beams of a prompt, then two more tokens: the last one is not read again
    want = {"scan": 4 * (7 + 5 + 2 * 2), "sentiment": 4 * (3 + 2)}
    assert record.tokens == want
    for task, tokens in want.items():
        assert int(record.chosen_sum[task].sum()) == 2 * tokens
        assert float(record.gate_sum[task].sum()) == pytest.approx(tokens, rel=1e-5)
    assert [tuple(g.shape) for g in record.gates] == [
        (12, 7, 4),
        (12, 1, 4),
        (12, 1, 4),
    ]


def test_mixed_layers_generate_alike(tiny_gpt2: Factory) -> None:
    """Layer-varying counts on Conv1D layers, one expert among them."""
    raw = {
        "target_modules": ["c_attn", "c_fc", "c_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": [1, 2, 3, 4]},
        "router": {"kind": "topk"},
        "overrides": [
            {"match": "c_fc", "experts": {"num_experts": 2, "r": 5}},
            {
                "match": r"h\.1\.",
                "experts": {"num_experts": 1, "r": 2},
                "router": {"kind": "none"},
            },
        ],
    }
    model: Any = molora.wrap(tiny_gpt2(), molora.AdapterConfig.from_dict(raw))
    g = torch.Generator().manual_seed(3)
    for p in adapter_parameters(model).values():
        p.data.normal_(0, 0.3, generator=g)
    counts = [site.experts.num_experts for site in sites(model).values()]
    # the first override that matches wins
    assert counts == [4, 4, 2, 4, 1, 1, 2, 1]
    seqs = prompts()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    single = [model.generate(s[None], **settings)[0, len(s) :] for s in seqs]
    batch = model.generate(**left(seqs), **settings)[:, 7:]
    assert torch.equal(batch, torch.stack(single))


def test_a_static_cache_changes_neither_tokens_nor_records(tiny_llama: Factory) -> None:
    model = build(tiny_llama, "lora", "topk")
    outs, records = [], []
    for kind in ("dynamic", "static"):
        with tasks(model, *TASKS), molora.record_routing(model) as trace:
            outs.append(
                model.generate(
                    **left(prompts()),
                    max_new_tokens=4,
                    min_new_tokens=4,
                    do_sample=False,
                    cache_implementation=kind,
                )
            )
        records.append(trace.sites["model.layers.1.mlp.up_proj"])
    assert torch.equal(*outs)
    # prompts of 7, 3 and 5 tokens and three new ones that are read again
    assert records[0].tokens == records[1].tokens == {"scan": 18, "sentiment": 6}
    for task in ("scan", "sentiment"):
        sums = [record.gate_sum[task] for record in records]
        assert torch.allclose(*sums, atol=1e-4)
