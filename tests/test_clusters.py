"""Numbers of experts from hand-made clusters, and the embedding of rows."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.clusters import choose_num_experts, elbow, embed
from molora.errors import ConfigError, DataError

Factory = Callable[..., PreTrainedModel]


def blobs(count: int, rows: int = 12, spread: float = 0.05) -> Tensor:
    """Rows around the corners of a simplex, which are all equally far apart."""
    generator = torch.Generator().manual_seed(count)
    centres = torch.eye(10)[:count].repeat_interleave(rows, 0)
    return centres + spread * torch.randn(centres.shape, generator=generator)


@pytest.mark.parametrize("rule", ["elbow", "silhouette"])
@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_hand_made_clusters_are_counted(count: int, rule: Any) -> None:
    choice = choose_num_experts(blobs(count), rule=rule, largest=10, restarts=3)
    assert choice.num_experts == count
    assert choice.sizes == [12] * count
    assert list(choice.inertia) == list(range(1, 11))
    assert list(choice.silhouette) == list(range(2, 11))


def test_the_scores_by_hand() -> None:
    # two pairs on a line: 0, 2 and 10, 12
    points = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    choice = choose_num_experts(points, rule="silhouette", largest=3)
    # one centre at 6; two at 1 and 11; three leave one pair together
    assert choice.inertia == pytest.approx({1: 36 + 16 + 16 + 36, 2: 4, 3: 2})
    # a = 2 for all; b = 11 outside, 9 inside
    assert choice.silhouette[2] == pytest.approx((9 / 11 + 7 / 9) / 2)
    # singletons count 0; the pair 0, 2: b = 10 and 8, or 12, 10 mirrored
    assert choice.silhouette[3] == pytest.approx((8 / 10 + 6 / 8) / 4)
    assert choice.num_experts == 2


def test_the_elbow_by_hand() -> None:
    # below the chord from (1, 10) to (5, 2): 0, 0.5, 0.375, 0.1875, 0
    assert elbow({1: 10.0, 2: 4.0, 3: 3.0, 4: 2.5, 5: 2.0}) == 2
    assert elbow({1: 10.0, 2: 7.0, 3: 3.0, 4: 2.5, 5: 2.0}) == 3
    assert elbow({1: 8.0, 2: 6.0, 3: 4.0, 4: 2.0}) == 1
    assert elbow({1: 0.0}) == 1


def test_equal_rows_ask_for_one_expert() -> None:
    assert choose_num_experts(torch.ones(20, 3), largest=4).num_experts == 1
    two = torch.tensor([[0.0], [1.0]]).repeat(10, 1)
    assert choose_num_experts(two, largest=4).num_experts <= 2


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    points = blobs(3)
    for wrong, message in (
        ({"rule": "best"}, "none of elbow, silhouette"),
        ({"largest": 1}, "largest=1"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_num_experts(points, **wrong)  # type: ignore
    for bad, message in (
        (points[:5], "5 rows cannot show up to 16"),
        (points * float("nan"), "finite"),
        (points[0], "shape"),
    ):
        with pytest.raises(DataError, match=message):
            choose_num_experts(bad)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match=r"pip install molora\[clusters\]"):
        choose_num_experts(points)


def test_rows_are_embedded_each_for_itself(tiny_llama: Factory) -> None:
    model: Any = tiny_llama()
    ids = torch.arange(1, 25).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    got = embed(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    with torch.no_grad():
        for row, length in ((0, 12), (1, 7)):
            hidden = model(ids[row : row + 1, :length], output_hidden_states=True)
            want = hidden.hidden_states[-1][0].mean(0)
            assert (got[row] - want / want.norm()).abs().max() < 1e-5
    mask[1] = 0
    with pytest.raises(DataError, match="no token"):
        embed(model, [{"input_ids": ids, "attention_mask": mask}])
    with pytest.raises(DataError, match="no rows"):
        embed(model, [])
    assert molora.choose_num_experts is choose_num_experts
