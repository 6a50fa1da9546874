"""Which rows are used, and which are held out."""

from typing import Any

import pytest
import torch

from molora.collapse.base import CollapseConfig
from molora.collapse.calibration import FIT, HELD, UNUSED, read_calibration
from molora.errors import DataError


def batches(tasks: list[list[str]], **extra: Any) -> list[dict[str, Any]]:
    return [
        {"input_ids": torch.ones(len(names), 3).long(), "tasks": names, **extra}
        for names in tasks
    ]


def rows(raw: list[dict[str, Any]], **settings: Any) -> list[tuple[Any, int]]:
    """Task and part of every row."""
    read = read_calibration(raw, CollapseConfig(**settings))
    return [
        (task, part)
        for batch in read
        for task, part in zip(batch.tasks, batch.part_B.tolist(), strict=True)
    ]


def test_every_task_is_held_out_from_however_the_rows_are_ordered() -> None:
    found = rows(batches([["a", "b", "c", "d"]] * 8))
    for task in "abcd":
        parts = [part for name, part in found if name == task]
        assert parts.count(HELD) == 2
        assert parts.count(FIT) == 6


def test_the_division_is_the_same_every_time() -> None:
    raw = batches([["a", "b", "b"], ["a", "a", "a"]])
    assert rows(raw) == rows(raw)
    whole = batches([["a", "b", "b", "a", "a", "a"]])
    assert rows(whole) == rows(raw)


def test_other_tasks_are_not_used_and_their_batches_left_out() -> None:
    raw = batches([["a", "b"], ["b", "b"], ["a", "a"]])
    read = read_calibration(raw, CollapseConfig(tasks=["a"], held_out=0.5))
    assert len(read) == 2
    assert read[0].part_B[1] == UNUSED
    parts = [int(read[0].part_B[0]), *read[1].part_B.tolist()]
    assert sorted(parts) in ([FIT, FIT, HELD], [FIT, HELD, HELD])


@pytest.mark.parametrize("held_out", [0.01, 0.99])
def test_both_parts_get_a_row(held_out: float) -> None:
    found = rows(batches([["a", "a", "a"]]), held_out=held_out)
    assert {part for _, part in found} == {FIT, HELD}
    singles = rows(batches([["a", "b"]]), held_out=held_out)
    assert {part for _, part in singles} == {FIT, HELD}


def test_task_numbers_of_a_training_batch_are_read() -> None:
    raw = [{"input_ids": torch.ones(2, 3), "task_ids": torch.tensor([3, 1])}]
    read = read_calibration(raw, CollapseConfig())
    assert read[0].tasks == [3, 1]
    assert read[0].names is None
    assert read[0].inputs.keys() == {"input_ids"}


def test_labels_stay_only_where_they_tell_padding_from_tokens() -> None:
    labels = torch.ones(2, 3).long()
    bare = batches([["a", "a"]], labels=labels)
    assert "labels" in read_calibration(bare, CollapseConfig())[0].inputs
    masked = batches([["a", "a"]], labels=labels, attention_mask=labels)
    assert "labels" not in read_calibration(masked, CollapseConfig())[0].inputs


def test_a_generator_is_read_once() -> None:
    found = read_calibration(iter(batches([["a", "a"]] * 3)), CollapseConfig())
    assert len(found) == 3


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "0 rows in use"),
        (batches([["a"]]), "1 rows in use"),
        ([[1, 2]], "batch 0 is a list"),
        ({"input_ids": torch.ones(2, 2)}, "batch 0 is a str"),
        ([{"labels": torch.ones(2, 2)}], "batch 0 has no tensor input_ids"),
        (batches([["a", "b"]])[:1] + [{"input_ids": [[1]]}], "batch 1 has no tensor"),
        (
            [{"input_ids": torch.ones(2, 2), "tasks": ["a"]}],
            "batch 0 has 2 rows and 1 tasks",
        ),
    ],
)
def test_bad_batches_are_named(raw: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_calibration(raw, CollapseConfig())


def test_a_task_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no row of the tasks \['c'\].*'a', 'b'"):
        read_calibration(batches([["a", "b"]]), CollapseConfig(tasks=["a", "c"]))
