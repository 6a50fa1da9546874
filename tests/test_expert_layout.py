"""Expert counts by depth: shapes at any depth, overrides, saving, mistakes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, WrapError
from molora.layout import Layout, group_of
from molora.model import sites

Factory = Callable[..., PreTrainedModel]
SHAPES = {
    "triangle": [8, 6, 4, 2],
    "inverted_triangle": [2, 4, 6, 8],
    "hourglass": [8, 6, 4, 2, 2, 4, 6, 8],
}


def config(shape: str = "inverted_triangle", counts: Any = (2, 3), **more: Any) -> Any:
    raw = {
        "target_modules": ["q_proj", "up_proj"],
        "layout": {"shape": shape, "counts": list(counts)},
        "experts": {"kind": "lora", "r": 2},
        "router": {"kind": "soft"},
    }
    return molora.AdapterConfig.from_dict(raw | more)


def counts(model: Any) -> dict[str, int]:
    return {path: site.experts.num_experts for path, site in sites(model).items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_papers_32_layers(shape: str) -> None:
    layout = Layout.from_dict({"shape": shape, "counts": [2, 4, 6, 8], "layers": 32})
    got = [layout.count(f"model.layers.{i}.mlp.up_proj") for i in range(32)]
    width = 32 // len(SHAPES[shape])
    assert got == [count for count in SHAPES[shape] for _ in range(width)]


def test_groups_are_even_and_mirrored_at_every_depth() -> None:
    for groups in range(1, 9):
        for layers in range(groups, 70):
            got = [group_of(i, layers, groups) for i in range(layers)]
            assert got == sorted(got)
            sizes = [got.count(group) for group in range(groups)]
            assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 2
            # an odd number of layers in an even number of groups has no mirror
            if layers % 2 == 0 or groups % 2:
                assert sizes == sizes[::-1], (layers, groups)


def test_it_follows_the_depth_of_the_model_and_of_part_of_it(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    deep = tiny_llama(num_hidden_layers=5)
    model = molora.wrap(deep, config("hourglass", (2, 3)))
    by_layer = [counts(model)[f"model.layers.{i}.mlp.up_proj"] for i in range(5)]
    assert by_layer == [3, 2, 2, 2, 3]
    assert model.molora_config.layout.layers == 5
    model.save_pretrained(tmp_path / "out")
    again = molora.load(tiny_llama(num_hidden_layers=5), tmp_path / "out")
    assert counts(again) == counts(model)
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    # targets in the upper layers alone keep the depth of the model
    upper = config(target_modules=r".*layers\.[34]\..*q_proj")
    assert set(counts(molora.wrap(molora.unwrap(again), upper)).values()) == {3}


def test_overrides_win(tiny_llama: Factory) -> None:
    overrides = [
        {"match": r"0\..*q_proj", "experts": {"num_experts": 7}},
        {"match": "q_proj", "experts": {"r": 5}, "router": {"temperature": 2.0}},
    ]
    model = molora.wrap(tiny_llama(), config(overrides=overrides))
    got = {p[13:]: tuple(s.experts.A.shape[:2]) for p, s in sites(model).items()}
    assert got == {
        "0.self_attn.q_proj": (7, 2),
        "0.mlp.up_proj": (2, 2),
        "1.self_attn.q_proj": (3, 5),
        "1.mlp.up_proj": (3, 2),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": {"shape": "pyramid", "counts": [2]}}, "layout.shape"),
        ({"layout": {"shape": "triangle", "counts": [4, 2]}}, r"ascending.*\[2, 4\]"),
        ({"layout": {"shape": "triangle", "counts": [2, 2]}}, "each number once"),
        ({"layout": {"shape": "triangle", "counts": [2]}}, "several numbers"),
        ({"layout": {"shape": "rectangle", "counts": [2, 4]}}, "one number"),
        ({"layout": {"shape": "triangle", "counts": [0, 2]}}, "layout.counts"),
        ({"layout": {"shape": "triangle", "count": [1, 2]}}, "'counts'"),
        ({"experts": {"kind": "lora", "num_experts": 4}}, "no effect beside layout"),
        ({"router": {"kind": "topk", "top_k": 3}}, r"layout\.counts: router\.top_k=3"),
        (
            {"overrides": [{"match": "q", "router": {"kind": "topk", "top_k": 9}}]},
            r"overrides\[0\]\.router\.top_k=9",
        ),
    ],
)
def test_mistakes_in_the_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_mistakes_that_the_model_shows(tiny_llama: Factory) -> None:
    for change, message in (
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head.*exclude_modules"),
        ({"target_modules": ["lm_head"]}, "one stack of layers"),
        ({"counts": [2, 3, 4]}, "3 groups of layers, but the model has 2"),
        (
            {"layout": {"shape": "rectangle", "counts": [2], "layers": 9}},
            r"layout\.layers=9: the model has 2",
        ),
    ):
        base = tiny_llama()
        with pytest.raises(WrapError, match=message):
            molora.wrap(base, config(**change))
        assert not any(type(m) is molora.layer.MoloraLinear for m in base.modules())  # type: ignore[attr-defined]
