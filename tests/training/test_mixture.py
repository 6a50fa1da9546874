"""Mixtures, the sampler, batches and evaluation sets, with numbers worked by hand."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from molora.errors import ConfigError, DataError
from molora.training.data import (
    Collator,
    DataConfig,
    MixtureSampler,
    TaskMixture,
    build_eval_sets,
    build_mixture,
    task_shares,
)
from molora.training.encoding import IGNORE, Encoded, encode
from molora.training.formats import Turn, parse_row
from molora.training.mixture import TaskRows
from molora.training.sampling import largest_remainder

Tokenizer = PreTrainedTokenizerFast

TURN = "{{ message['role'] }}: {{ message['content'] }}"
OPEN = "{% if add_generation_prompt %}assistant: {% endif %}"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def data_config(*tasks: dict[str, Any], **settings: Any) -> DataConfig:
    return DataConfig.from_dict({"tasks": list(tasks), **settings}, "data")


def test_long_rows_stop_are_cut_or_left_out(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    # tokens: 1 + 1 + 1 + 1, 2 + 4 + 1, 6 + 3 + 1
    rows = [pair("a", "b"), pair("aa", "bcd"), pair("aaaaaa", "bc")]
    write(tmp_path / "x.jsonl", *rows)
    task = {"name": "t", "train": "x.jsonl"}

    def build(limit: int, **settings: Any) -> TaskMixture:
        config = data_config(task | {"limit": limit}, max_length=5, **settings)
        return build_mixture(config, tokenizer, "train", tmp_path, False)

    with pytest.raises(
        DataError, match=r"x\.jsonl:2: 7 tokens, max_length is 5; raise"
    ):
        build(2)
    cut = build(2, on_long="truncate")
    assert tokenizer.decode(cut[1]["input_ids"]) == "aa bc"
    assert cut[1]["labels"] == [IGNORE] * 2 + cut[1]["input_ids"][2:]
    assert cut.summary.to_dict()["t"] == {
        "rows": 2,
        "tokens": 9,
        "supervised": 6,
        "share": 1.0,
        "truncated": 1,
        "dropped": 0,
    }
    with pytest.raises(
        DataError, match=r"x\.jsonl:3: 10 tokens, and cut to max_length"
    ):
        build(3, on_long="truncate")
    assert build(3, on_long="drop").summary.tasks["t"].dropped == 2
    assert "task 't': left out 2 of 3 rows above max_length 5" in caplog.text
    write(tmp_path / "x.jsonl", rows[2])
    with pytest.raises(DataError, match="task 't': all 1 rows are above max_length 5"):
        build(1, on_long="drop")


def mixture_of(*sizes: int, **settings: Any) -> TaskMixture:
    """Tasks of the given sizes; row i of all has the ids [i, i]."""
    parts, index = [], 0
    for task, size in enumerate(sizes):
        part = TaskRows(f"task{task}")
        for _ in range(size):
            labels = [IGNORE, index]
            part.add({"input_ids": [index] * 2, "labels": labels, "task_id": task})
            index += 1
        parts.append(part)
    total = sum(sizes)
    shares = settings.get("shares", [size / total for size in sizes])
    return TaskMixture(parts, shares, settings.get("epoch_size", total))


def test_a_mixture_keeps_tasks_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.jsonl", pair("a", "b"))
    write(tmp_path / "b.jsonl", pair("aa", "cc"), pair("a", "b"))
    config = data_config(
        {"name": "one", "train": "a.jsonl"},
        {"name": "unseen", "eval": "a.jsonl"},
        {"name": "two", "train": "b.jsonl", "eval": "b.jsonl"},
    )
    mixture = build_mixture(config, tokenizer, "train", tmp_path, False)
    assert mixture.task_names == ["one", "unseen", "two"]
    assert [row["task_id"] for row in mixture] == [0, 2, 2]
    assert mixture.shares == [1 / 3, 0, 2 / 3]
    assert mixture.epoch_size == 3
    # tokens: a, space, b, eos; aa, space, cc, eos
    assert [
        (task.rows, task.tokens, task.supervised)
        for task in mixture.summary.tasks.values()
    ] == [(1, 4, 3), (0, 0, 0), (2, 10, 7)]
    printed = io.StringIO()
    mixture.summary.print(Console(width=100, file=printed))
    line = next(line for line in printed.getvalue().splitlines() if "two" in line)
    assert re.findall(r"[\w.%]+", line) == ["two", "2", "10", "7", "66.7%", "0", "0"]
    evaluated = build_mixture(config, tokenizer, "eval", tmp_path, False)
    assert [row["task_id"] for row in evaluated] == [1, 2, 2]
    only_eval = data_config({"name": "x", "eval": "a.jsonl"})
    with pytest.raises(ConfigError, match="no task has train data; set train"):
        build_mixture(only_eval, tokenizer, "train", tmp_path)
    only_train = data_config({"name": "x", "train": "a.jsonl"})
    with pytest.raises(ConfigError, match="no task has eval data; set eval"):
        build_eval_sets(only_train, tokenizer, tmp_path)


def test_rows_are_trained_on_as_encoded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.jsonl", pair("a:", "b"))
    config = data_config({"name": "one", "train": "a.jsonl"})
    mixture = build_mixture(config, tokenizer, base_dir=tmp_path, show_progress=False)
    raw = parse_row(pair("a:", "b"), "prompt_completion", "")
    assert mixture[0] == encode(raw, tokenizer)


def test_shares_by_size_temperature_and_weight() -> None:
    tasks = [{"name": name, "train": "x.jsonl"} for name in "ab"]
    assert task_shares(data_config(*tasks), [100, 4]) == [100 / 104, 4 / 104]
    # square roots: 10 to 2
    assert task_shares(data_config(*tasks, temperature=2), [100, 4]) == [
        10 / 12,
        2 / 12,
    ]
    weighted = data_config(tasks[0] | {"weight": 3}, tasks[1] | {"weight": 1})
    assert task_shares(weighted, [100, 4]) == [0.75, 0.25]


@pytest.mark.parametrize(
    ("shares", "total", "counts"),
    [
        ([1, 1, 1], 100, [34, 33, 33]),
        ([3, 1], 8, [6, 2]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        # quotas 1.5, 2.25, 1.25: the only missing row goes to the largest remainder
        ([6, 9, 5], 5, [2, 2, 1]),
        ([0.0, 1.0], 3, [0, 3]),
    ],
)
def test_counts_by_largest_remainder(
    shares: list[float], total: int, counts: list[int]
) -> None:
    assert largest_remainder(shares, total) == counts


def test_an_epoch_holds_the_counts_and_passes() -> None:
    mixture = mixture_of(3, 10, shares=[0.7, 0.3], epoch_size=10)
    sampler = MixtureSampler(mixture, seed=5)
    drawn = list(sampler)
    assert len(sampler) == len(drawn) == 10
    small = Counter(index for index in drawn if index < 3)
    # 7 draws of 3 rows: two whole passes and one row more
    assert sorted(small.values()) == [2, 2, 3]
    large = [index for index in drawn if index >= 3]
    assert len(large) == len(set(large)) == 3
    # tasks interleave: they do not stand one after the other
    assert [i < 3 for i in drawn] != sorted([i < 3 for i in drawn], reverse=True)


def test_the_default_epoch_is_every_row_once() -> None:
    sampler = MixtureSampler(mixture_of(5, 7))
    assert sorted(sampler) == list(range(12))
    assert list(sampler) != list(range(12))


def test_epochs_depend_on_seed_and_epoch_alone() -> None:
    mixture = mixture_of(20, 20, epoch_size=12)
    first = MixtureSampler(mixture, seed=1)
    torch.manual_seed(99)
    second = MixtureSampler(mixture, seed=1)
    state = torch.get_rng_state()
    epochs = []
    for epoch in (0, 1, 2):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        assert list(first) == list(second) == list(first)
        epochs.append(tuple(first))
    assert len(set(epochs)) == 3
    # other rows, not only another order
    assert len({frozenset(epoch) for epoch in epochs}) == 3
    assert tuple(MixtureSampler(mixture, seed=2)) not in epochs
    assert torch.equal(state, torch.get_rng_state())


def test_draws_are_equal_in_every_process() -> None:
    # written down in another process: Python's salted hash must not take part, and a
    # torch that shuffles otherwise would break resuming
    sampler = MixtureSampler(mixture_of(3, 7, epoch_size=8), seed=7)
    assert sampler.draw(0) == [3, 4, 6, 5, 2, 9, 8, 0]
    assert sampler.draw(4) == [6, 7, 9, 8, 2, 3, 1, 4]


def test_a_task_that_would_never_come_is_refused() -> None:
    mixture = mixture_of(3, 3, shares=[0.99, 0.01], epoch_size=6)
    with pytest.raises(ConfigError, match="task 'task1' would get no row of the 6"):
        MixtureSampler(mixture)


def test_batches_mask_by_length_not_by_id() -> None:
    rows: list[Encoded] = [
        {"input_ids": [5, 6, 0], "labels": [IGNORE, 6, 0], "task_id": 1},
        {"input_ids": [7, 0], "labels": [IGNORE, 0], "task_id": 0},
    ]
    batch = Collator(pad_token_id=0)(rows)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 0], [7, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[IGNORE, 6, 0], [IGNORE, 0, IGNORE]],
        "task_ids": [1, 0],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())
    wide = Collator(pad_token_id=9, pad_to_multiple_of=4)(rows)
    assert wide["input_ids"].tolist() == [[5, 6, 0, 9], [7, 0, 9, 9]]
    assert wide["attention_mask"].sum().item() == 5


def test_eval_rows_carry_prompt_answer_and_candidates(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write(tmp_path / "a.jsonl", pair("x:", "no"), pair("y:", "yes"))
    task = {"name": "t", "eval": "a.jsonl", "labels": ["yes", "no"]}
    for template in ("plain", "chat"):
        config = data_config(task, template=template)
        rows = build_eval_sets(config, tokenizer, tmp_path, False)["t"].rows
        assert [row.gold for row in rows] == [1, 0]
        assert [row.answer for row in rows] == ["no", "yes"]
        space = " " if template == "plain" else ""
        for row in rows:
            assert [tokenizer.decode(ids) for ids in row.candidates] == [
                f"{space}yes<|im_end|>",
                f"{space}no<|im_end|>",
            ]
            whole = row.prompt_ids + row.candidates[row.gold]
            assert whole == row.encoded["input_ids"]
            assert row.end_id == 0


def test_eval_rows_that_cannot_be_scored_are_named(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    def build(raw: dict[str, Any], **settings: Any) -> None:
        write(tmp_path / "a.jsonl", raw)
        config = data_config({"name": "t", "eval": "a.jsonl", **settings})
        build_eval_sets(config, tokenizer, tmp_path, False)

    with pytest.raises(DataError, match=r"a\.jsonl:1: completion 'maybe' is none of"):
        build(pair("x", "maybe"), labels=["yes", "no"])
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    raw = {"messages": [turn._asdict() for turn in turns]}
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*must be the assistant's"):
        build(raw, exact_match=True)
    build(raw)
    tokenizer.chat_template = (
        "{% for message in messages %}" + TURN + "\n{% endfor %}" + OPEN
    )
    raw["messages"].pop()
    with pytest.raises(DataError, match="cannot tell where a generated answer ends"):
        build(raw, exact_match=True)


def rows_of(mixture: TaskMixture) -> list[tuple[int, list[int]]]:
    rows = (mixture[i] for i in range(len(mixture)))
    return [(row["task_id"], row["input_ids"]) for row in rows]


def test_rows_are_held_out_task_by_task() -> None:
    parts = [TaskRows("a"), TaskRows("b")]
    for task, count in enumerate([10, 3]):
        for i in range(count):
            ids = [100 * task + i, 7, 8]
            parts[task].add({"input_ids": ids, "labels": ids, "task_id": task})
    mixture = TaskMixture(parts, [0.3, 0.7], 40)
    rest, held = mixture.split(0.2, seed=1)
    assert (rest.sizes, held.sizes) == ([8, 2], [2, 1])
    assert (rest.shares, rest.epoch_size) == ([0.3, 0.7], 32)
    assert held.shares == [2 / 3, 1 / 3] and held.epoch_size == 3
    assert sorted(rows_of(rest) + rows_of(held)) == rows_of(mixture)
    assert rest[9]["labels"] == rest[9]["input_ids"] and rest[9]["task_id"] == 1
    assert rest.summary.tasks["a"].tokens == 24
    assert rows_of(mixture.split(0.2, seed=1)[1]) == rows_of(held)
    assert any(
        rows_of(mixture.split(0.2, seed=s)[1]) != rows_of(held) for s in range(5)
    )
    with pytest.raises(
        DataError, match="task 'b' has 3 rows, of which 3 are to be held"
    ):
        mixture.split(0.9)
