"""Token masks from what a forward was called with, tasks of rows, recorded routes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import molora
from molora.context import (
    ForwardContext,
    Runtime,
    forward_context,
    mask_from_labels,
    mask_from_positions,
)
from molora.errors import RoutingError, WrapError
from molora.model import adapter_parameters, sites
from molora.records import SiteStats

Factory = Callable[..., PreTrainedModel]


def mask_of(**arguments: Any) -> Any:
    mask = forward_context(arguments, Runtime(), False).mask_BS
    return None if mask is None else mask.int().tolist()


def ints(*rows: str) -> Tensor:
    return torch.tensor([[int(c) for c in row] for row in rows])


def test_attention_mask_of_either_side() -> None:
    ids = torch.zeros(2, 4, dtype=torch.long)
    padded = ints("0111", "1100")
    assert mask_of(input_ids=ids, attention_mask=padded) == padded.tolist()
    assert mask_of(input_ids=ids, attention_mask=padded.bool()) == padded.tolist()
    assert mask_of(attention_mask=padded.float()) == padded.tolist()
    assert mask_of(input_ids=ids) is None


def test_with_a_cache_the_last_columns_belong_to_the_input() -> None:
    padded = ints("00111", "11111")
    one = torch.zeros(2, 1, dtype=torch.long)
    assert mask_of(input_ids=one, attention_mask=padded) == [[1], [1]]
    embeds = torch.zeros(2, 3, 8)
    got = mask_of(inputs_embeds=embeds, attention_mask=ints("00101", "11110"))
    assert got == [[1, 0, 1], [1, 1, 0]]


def test_four_dimensional_masks_are_read_on_the_diagonal() -> None:
    # row 0: two real tokens and a padding; row 1: all three are real
    allowed = torch.ones(3, 3).tril().expand(2, 1, 3, 3).clone()
    allowed[0, :, 2] = 0
    allowed[0, :, :, 2] = 0
    additive = torch.where(allowed > 0, 0.0, torch.finfo(torch.float32).min)
    for mask in (allowed.bool(), additive, allowed.long(), additive.double()):
        assert mask_of(attention_mask=mask) == [[1, 1, 0], [1, 1, 1]]
    # one new token after four cached ones
    cached = torch.tensor([[[[1, 1, 1, 1, 1]]], [[[1, 1, 1, 1, 0]]]]).bool()
    assert mask_of(attention_mask=cached) == [[1], [0]]
    with pytest.raises(RoutingError, match=r"shape \(2, 3, 3\); routing reads a 2-D"):
        mask_of(attention_mask=torch.ones(2, 3, 3))


@pytest.mark.parametrize(
    ("positions", "real"),
    [
        ("012012", "111111"),
        ("01201200", "11111100"),
        # rows packed with gaps that align them to multiples of four
        ("01200123", "11101111"),
        ("01000012", "11000111"),
        ("34567", "11111"),
        ("01234444", "11111000"),
        ("0120", "1110"),
        # documented: a sequence of one token looks like padding
        ("00120", "01110"),
    ],
)
def test_position_ids_of_packed_rows(positions: str, real: str) -> None:
    assert mask_from_positions(ints(positions)).int().tolist() == ints(real).tolist()


def test_position_ids_of_one_step_and_negative_ones() -> None:
    assert mask_from_positions(torch.tensor([[7], [0], [-1]])).flatten().tolist() == [
        True,
        True,
        False,
    ]
    got = mask_from_positions(torch.tensor([[-1, -1, 0, 1], [-2, -1, 0, 1]]))
    assert got.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_labels_mark_everything_up_to_the_last_supervised_token() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100], [1, 2, 3, 4, 5], [-100] * 5])
    want = [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert mask_from_labels(labels).int().tolist() == want


def test_the_first_source_that_is_given_counts() -> None:
    labels = torch.tensor([[5, -100, -100]])
    positions = torch.tensor([[0, 1, 0]])
    attention = torch.tensor([[1, 1, 1]])
    assert mask_of(labels=labels) == [[1, 0, 0]]
    assert mask_of(labels=labels, position_ids=positions) == [[1, 1, 0]]
    everything: dict[str, Any] = {"labels": labels, "position_ids": positions}
    assert mask_of(**everything, attention_mask=attention) == [[1, 1, 1]]
    # positions with a leading axis, as of vision models, are not read
    assert mask_of(labels=labels, position_ids=positions[None]) == [[1, 0, 0]]


def flat(mask: str | list[str], shape: tuple[int, ...]) -> Any:
    rows = [mask] if isinstance(mask, str) else mask
    context = ForwardContext(ints(*rows).bool(), mask_source="attention_mask")
    found = context.token_mask(shape, "m.up")
    assert found is not None
    return "".join(str(int(v)) for v in found)


def test_lining_the_mask_up_with_the_input_of_a_site() -> None:
    assert ForwardContext().token_mask((2, 3, 8), "m") is None
    assert flat(["110", "011"], (2, 3, 8)) == "110011"
    assert flat(["110", "011"], (6, 8)) == "110011"
    assert flat(["110", "011"], (1, 6, 8)) == "110011"
    # a head that computes the last positions only
    assert flat(["110", "011"], (2, 1, 8)) == "01"
    # position_ids may have one row for the whole batch
    assert flat("110", (2, 3, 8)) == "110110"


@pytest.mark.parametrize("shape", [(3, 2, 8), (5, 8), (2, 4, 8), (4, 3, 8), (3, 8)])
def test_an_input_that_does_not_fit_the_mask(shape: tuple[int, ...]) -> None:
    # (3, 2, 8) has as many tokens, but with the axes swapped
    with pytest.raises(RoutingError) as caught:
        flat(["110", "011"], shape)
    assert "site 'm.up'" in str(caught.value)
    assert f"{shape} does not line up with the attention_mask" in str(caught.value)
    assert "exclude_modules" in str(caught.value)


def test_tasks_of_rows_and_beams() -> None:
    context = ForwardContext(tasks=("sql", "chat"))
    assert context.row_tasks(2) == ("sql", "chat")
    assert context.row_tasks(6) == ("sql",) * 3 + ("chat",) * 3
    assert ForwardContext().row_tasks(2) is None
    with pytest.raises(RoutingError, match="got 2 tasks for a batch of 3 rows"):
        context.row_tasks(3)


def wrapped(make: Factory, **kw: Any) -> Any:
    raw = {
        "target_modules": ["q_proj", "up_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "topk"},
        "balance": [{"kind": "switch", "weight": 0.5}],
    }
    config = molora.AdapterConfig.from_dict(raw | kw)
    model: Any = molora.wrap(make(), config).double().train()
    g = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 1.0 if "router" in name else 0.2, generator=g)
    return model


def rows() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (n,), generator=g) for n in (7, 4, 5)]


def statistics(model: Any, *batches: dict[str, Tensor]) -> dict[str, SiteStats]:
    model.molora_runtime.stats = {}
    for data in batches:
        model(**data)
    stats: dict[str, SiteStats] = model.molora_runtime.stats
    return stats


def padded(seqs: list[Tensor], side: str, width: int = 9) -> dict[str, Tensor]:
    ids = torch.full((len(seqs), width), 9)
    mask = torch.zeros_like(ids)
    for i, seq in enumerate(seqs):
        span = slice(0, len(seq)) if side == "right" else slice(width - len(seq), None)
        ids[i, span], mask[i, span] = seq, 1
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}


@pytest.mark.parametrize("how", ["left", "right", "labels", "packed", "aligned"])
def test_statistics_and_balance_do_not_see_padding(
    how: str, tiny_llama: Factory
) -> None:
    model, seqs = wrapped(tiny_llama), rows()
    single = [{"input_ids": seq[None]} for seq in seqs]
    want = statistics(model, *single)
    if how in ("left", "right"):
        data = padded(seqs, how)
    elif how == "labels":
        data = padded(seqs, "right")
        labels = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
        data = {"input_ids": data["input_ids"], "labels": labels}
    else:
        gap = [0, 0, 0, 0] if how == "packed" else [0, 1, 4, 3]
        ids, positions = [], []
        for seq, pad in zip(seqs, gap, strict=False):
            ids += [seq, torch.full((pad,), 9)]
            positions += [torch.arange(len(seq)), torch.zeros(pad, dtype=torch.long)]
        data = {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat(positions)[None],
            # only then does transformers keep packed rows apart in attention
            "use_cache": False,
        }
    got = statistics(model, data)
    assert list(got) == list(want) == list(sites(model))
    for path, stats in got.items():
        assert float(stats.tokens) == float(want[path].tokens) == 16
        assert torch.allclose(stats.gate_sum_E, want[path].gate_sum_E, atol=1e-4)
        assert torch.equal(stats.chosen_sum_E, want[path].chosen_sum_E)
        assert stats.forwards == 1
        assert want[path].forwards == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_balance_gradient_does_not_see_padding(side: str, tiny_llama: Factory) -> None:
    grads = []
    for width in (7, 12):
        model = wrapped(tiny_llama)
        (model(**padded(rows(), side, width)).logits * 0).sum().backward()
        grads.append(
            [p.grad for n, p in adapter_parameters(model).items() if "router" in n]
        )
    for short, long in zip(*grads, strict=True):
        assert short.abs().max() > 1e-6
        assert torch.allclose(short, long, atol=1e-7)


def test_positional_arguments_and_the_bare_decoder(tiny_llama: Factory) -> None:
    model, data = wrapped(tiny_llama), padded(rows(), "right")
    want = statistics(model, data)
    ids, mask, positions = data.values()
    for call in (
        lambda: model(ids, mask, positions),
        lambda: model.model(ids, mask, positions),
        lambda: model.model(input_ids=ids, attention_mask=mask),
    ):
        model.molora_runtime.stats = {}
        call()
        got = model.molora_runtime.stats
        assert [float(s.tokens) for s in got.values()] == [16.0] * 4
        for path, stats in got.items():
            assert torch.equal(stats.chosen_sum_E, want[path].chosen_sum_E)
    assert model.molora_runtime.current is None


def test_a_head_behind_logits_to_keep_sees_the_last_tokens(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama, target_modules=["q_proj", "lm_head"])
    data = padded(rows(), "left")
    model.molora_runtime.stats = {}
    model(**data, logits_to_keep=5)
    tokens = {p: float(s.tokens) for p, s in model.molora_runtime.stats.items()}
    assert tokens["lm_head"] == 14.0
    assert tokens["model.layers.0.self_attn.q_proj"] == 16.0


def test_the_context_ends_with_its_forward(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama)
    runtime = model.molora_runtime

    def fail(error: type[BaseException], *where: Any) -> Any:
        def hook(*args: Any) -> None:
            assert runtime.current is not None
            raise error("planted")

        return model.model.layers[1].register_forward_pre_hook(hook)

    handle = fail(ValueError)
    with pytest.raises(ValueError, match="planted"):
        model(**padded(rows(), "right"))
    assert runtime.current is None
    handle.remove()
    handle = fail(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**padded(rows(), "right"))
    handle.remove()
    # the next forward must not see the mask of the one that was interrupted
    stats = statistics(model, padded(rows()[:2], "right", 8))
    assert [float(s.tokens) for s in stats.values()] == [11.0] * 4
    assert runtime.current is None


def test_recorded_routes_against_gates_by_hand(tiny_llama: Factory) -> None:
    model, data = wrapped(tiny_llama).eval(), padded(rows(), "right")
    inputs: dict[str, Tensor] = {}
    for path, site in sites(model).items():
        site.register_forward_pre_hook(
            lambda m, args, path=path: inputs.update({path: args[0].detach()})
        )
    with (
        molora.tasks(model, ["sql", "chat", "sql"]),
        molora.record_routing(model) as trace,
    ):
        model(**data)
    real = data["attention_mask"].bool()
    assert list(trace.sites) == list(sites(model))
    for path, record in trace.sites.items():
        site: Any = sites(model)[path]
        p = torch.softmax(inputs[path] @ site.router.gate.weight.t(), -1)
        gates = p * torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0)
        gates = (gates / gates.sum(-1, keepdim=True)).detach()
        assert torch.allclose(record.gates[0], gates.float(), atol=1e-6)
        assert record.masks[0] is not None
        assert torch.equal(record.masks[0], real)
        assert record.tokens == {"sql": 12, "chat": 4}
        for task, picked in (("sql", [0, 2]), ("chat", [1])):
            kept = gates[picked][real[picked]]
            assert torch.allclose(record.gate_sum[task], kept.sum(0), atol=1e-5)
            assert torch.equal(record.chosen_sum[task], (kept > 0).double().sum(0))
    with molora.record_routing(model, keep_tokens=False) as sums:
        model(**data)
        model(**data)
    record = sums.sites["model.layers.0.self_attn.q_proj"]
    assert (record.gates, record.masks, record.tokens) == ([], [], {"": 32})
    both = trace.sites["model.layers.0.self_attn.q_proj"].gate_sum
    total = both["sql"] + both["chat"]
    assert torch.allclose(record.gate_sum[""], 2 * total, atol=1e-5)
    assert model.molora_runtime.trace is None


def test_recording_and_tasks_name_their_mistakes(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama)
    for names in ("sql", []):
        with (
            pytest.raises(WrapError, match="give a list with the task of each row"),
            molora.tasks(model, names),
        ):
            raise AssertionError
    plain = nn.Sequential(nn.Linear(3, 3))
    for manager in (molora.disabled, molora.record_routing):
        with (
            pytest.raises(WrapError, match="carries no molora adapter"),
            manager(plain),
        ):
            raise AssertionError
    one = {"experts": {"kind": "lora"}, "router": {"kind": "none"}, "balance": []}
    single = wrapped(tiny_llama, **one)
    with (
        pytest.raises(WrapError, match="no site of this model has a router"),
        molora.record_routing(single),
    ):
        raise AssertionError
    with molora.tasks(model, ["a"]), molora.record_routing(model) as outer:
        with molora.tasks(model, ["b"]), molora.record_routing(model) as inner:
            model(input_ids=rows()[0][None])
        model(input_ids=rows()[0][None])
    assert {t for r in inner.sites.values() for t in r.tokens} == {"b"}
    assert {t for r in outer.sites.values() for t in r.tokens} == {"a"}
    assert model.molora_runtime.tasks is None
    with (
        molora.tasks(model, ["a", "b"]),
        molora.record_routing(model),
        pytest.raises(RoutingError, match="got 2 tasks for a batch of 3 rows"),
    ):
        model(**padded(rows(), "right"))
