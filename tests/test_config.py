"""AdapterConfig: what it accepts, keeps and refuses, and in which words."""

import json
import math
from pathlib import Path
from typing import Any

import pydantic
import pytest

import molora
from molora.config import read_yaml
from molora.errors import ConfigError
from molora.experts import LoRAExperts
from molora.routers import SoftRouter

GOOD: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "experts": {"kind": "lora", "num_experts": 4},
    "router": {"kind": "topk"},
}
E4 = {"kind": "lora", "num_experts": 4}


def build(**changes: Any) -> molora.AdapterConfig:
    raw = {k: v for k, v in {**GOOD, **changes}.items() if v is not ...}
    return molora.AdapterConfig.from_dict(raw)


BAD: list[tuple[dict[str, Any], list[str]]] = [
    # keys
    ({"target_module": ["q"]}, ["target_module: unknown field.", "'target_modules'?"]),
    ({"experts": {**E4, "lora_alfa": 2.0}}, ["experts.lora_alfa: unknown", "'lora_al"]),
    ({"experts": {**E4, "rank": 2}}, ["experts.rank: unknown field", "Known fields:"]),
    ({"router": {"kind": "topk", "topk": 2}}, ["router.topk: unknown", "'top_k'?"]),
    ({"router": {"kind": "soft", "top_k": 2}}, ["router.top_k: unknown field"]),
    (
        {"balance": [{"kind": "z", "weight": 1.0, "wieght": 2}]},
        ["balance[0].wieght: unknown field.", "'weight'?"],
    ),
    (
        {"overrides": [{"match": "q", "exprts": {"r": 2}}]},
        ["overrides.0.exprts: unknown field.", "'experts'?"],
    ),
    (
        {"overrides": [{"match": "q", "experts": {"numexperts": 2}}]},
        ["overrides[0].experts.numexperts: unknown field.", "'num_experts'?"],
    ),
    ({"experts": {**E4, "lora-alpha": 2.0}}, ["experts.lora-alpha: unknown", "'lora_"]),
    ({"int": 1}, ["int: unknown field.", "Known fields: balance"]),
    ({"r[0]": 1}, ["r[0]: unknown field"]),
    ({"target_modules": ...}, ["target_modules: this field is required"]),
    ({"experts": ...}, ["experts: this field is required"]),
    # kinds
    ({"experts": {**E4, "kind": "lorra"}}, ["experts.kind: unknown expert", "'lora'?"]),
    ({"experts": {"num_experts": 4}}, ["experts.kind: this field is required", "lora"]),
    ({"router": {"kind": "topkk"}}, ["router.kind: unknown router", "'topk'?"]),
    ({"router": {"kind": 3}}, ["router.kind: unknown router '3'"]),
    (
        {"balance": [{"kind": "swich", "weight": 1.0}]},
        ["balance[0].kind: unknown balance objective 'swich'.", "'switch'?"],
    ),
    # every wrong block is named at once
    (
        {
            "experts": {**E4, "rr": 2},
            "router": {"kind": "tokp"},
            "balance": [{"kind": "z"}, {"kind": "swich", "weight": 1.0}],
            "exclude_module": [],
        },
        [
            "experts.rr: unknown field",
            "router.kind: unknown router 'tokp'",
            "balance[0].weight: this field is required",
            "balance[1].kind: unknown balance objective 'swich'",
            "exclude_module: unknown field",
        ],
    ),
    # types
    ({"experts": {**E4, "num_experts": "four"}}, ["experts.num_experts:", "'four'"]),
    ({"experts": {**E4, "num_experts": True}}, ["experts.num_experts:", "True"]),
    ({"experts": {**E4, "num_experts": 4.5}}, ["experts.num_experts:", "4.5"]),
    ({"experts": {**E4, "r": "8"}}, ["experts.r:", "'8'"]),
    ({"experts": {**E4, "lora_alpha": "big"}}, ["experts.lora_alpha:", "'big'"]),
    ({"experts": {**E4, "use_rslora": "perhaps"}}, ["experts.use_rslora:"]),
    ({"experts": {**E4, "shared": "A"}}, ["experts.shared:", "list"]),
    ({"experts": {**E4, "shared": ["C"]}}, ["experts.shared:", "'C'"]),
    ({"experts": [4]}, ["experts:"]),
    ({"experts": None}, ["experts:"]),
    ({"router": None}, ["router:"]),
    ({"balance": {"kind": "switch", "weight": 1.0}}, ["balance:", "list"]),
    ({"target_modules": 3}, ["target_modules:"]),
    ({"target_modules": [3]}, ["target_modules.0:", "string"]),
    ({"target_modules": [True]}, ["(got True); put quotes around it, YAML reads yes"]),
    ({"router": {"kind": "topk", "scope": "blok"}}, ["router.scope:", "'blok'"]),
    # ranges
    ({"experts": {**E4, "r": 0}}, ["experts.r: Input should be greater", "got 0"]),
    ({"experts": {**E4, "r": -3}}, ["experts.r:", "got -3"]),
    ({"experts": {**E4, "r": [2, 0, 2, 2]}}, ["experts.r.1:", "got 0"]),
    ({"experts": {**E4, "r": [2, 2]}}, ["r lists 2 values for num_experts=4"]),
    ({"experts": {**E4, "lora_alpha": [1.0]}}, ["lora_alpha lists 1 values"]),
    ({"experts": {**E4, "num_experts": 0}}, ["experts.num_experts:", "got 0"]),
    ({"experts": {**E4, "lora_alpha": math.inf}}, ["experts.lora_alpha:", "finite"]),
    ({"experts": {**E4, "lora_alpha": math.nan}}, ["experts.lora_alpha:", "finite"]),
    ({"experts": {**E4, "lora_alpha": 0.0}}, ["experts.lora_alpha:", "greater than 0"]),
    (
        {"experts": {**E4, "lora_alpha": [1.0, 2.0, math.nan, 1.0]}},
        ["experts.lora_alpha.2:", "finite"],
    ),
    (
        {"experts": {**E4, "lora_dropout": 1.0}},
        ["experts.lora_dropout:", "less than 1"],
    ),
    ({"experts": {**E4, "lora_dropout": -0.1}}, ["experts.lora_dropout:"]),
    (
        {"router": {"kind": "topk", "top_k": 5}},
        ["router.top_k=5 exceeds num_experts=4"],
    ),
    ({"router": {"kind": "topk", "top_k": 0}}, ["router.top_k:", "got 0"]),
    ({"router": {"kind": "soft", "temperature": 0.0}}, ["router.temperature:"]),
    ({"router": {"kind": "soft", "noise": -1.0}}, ["router.noise:"]),
    ({"balance": [{"kind": "switch", "weight": 0.0}]}, ["balance[0].weight:"]),
    ({"balance": [{"kind": "switch"}]}, ["balance[0].weight: this field is required"]),
    # combinations
    (
        {"router": {"kind": "topk", "top_k": 1}},
        ["router.top_k=1 with renormalize: true", "set renormalize: false"],
    ),
    ({"router": {"kind": "none"}}, ["'none' cannot choose among num_experts=4"]),
    ({"router": ...}, ["'none' cannot choose among num_experts=4"]),
    (
        {"experts": {"kind": "lora"}, "router": {"kind": "soft"}},
        ["'soft' with num_experts=1: one expert needs no router"],
    ),
    (
        {"experts": {**E4, "shared": ["A", "B"]}},
        ["experts: shared: experts that share A and B would all be the same"],
    ),
    (
        {"experts": {**E4, "shared": ["A"], "r": [1, 2, 3, 4]}},
        ["shared: experts that share a factor need equal ranks"],
    ),
    (
        {"balance": [{"kind": "z", "weight": 1.0}, {"kind": "z", "weight": 2.0}]},
        ["balance: an objective is listed twice"],
    ),
    (
        {
            "experts": {"kind": "lora"},
            "router": ...,
            "balance": [{"kind": "z", "weight": 1.0}],
        },
        ["balance: there is nothing to balance", "num_experts above 1"],
    ),
    (
        {"overrides": [{"match": "q", "experts": {"num_experts": 1}}]},
        ["overrides[0].router.top_k=2 exceeds num_experts=1"],
    ),
    (
        {"overrides": [{"match": "q", "router": {"top_k": 9}}]},
        ["overrides[0].router.top_k=9 exceeds num_experts=4"],
    ),
    ({"overrides": [{"match": "q"}]}, ["overrides.0:", "needs experts or router"]),
    # patterns
    ({"target_modules": "(q"}, ["target_modules: is no regular expression", "'(q'"]),
    ({"exclude_modules": "*q"}, ["exclude_modules: is no regular expression"]),
    (
        {"overrides": [{"match": "[", "router": {"top_k": 3}}]},
        ["overrides.0.match: is no regular expression", "'['"],
    ),
    ({"target_modules": []}, ["target_modules: name at least one layer"]),
    ({"target_modules": ""}, ["target_modules: name at least one layer"]),
]


@pytest.mark.parametrize(("changes", "parts"), BAD)
def test_a_wrong_setting_names_the_field_and_the_fix(
    changes: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**changes)
    for part in parts:
        assert part in str(caught.value)


def test_every_problem_of_a_block_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build(experts={**E4, "r": 0, "lora_alpha": -1.0, "lora_dropot": 0.1})
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "experts.r",
        "experts.lora_alpha",
        "experts.lora_dropot",
    ]


@pytest.mark.parametrize("raw", [None, 3, "lora", [GOOD]])
def test_what_is_no_mapping_is_no_config(raw: Any) -> None:
    with pytest.raises(ConfigError, match="AdapterConfig: expected a mapping"):
        molora.AdapterConfig.from_dict(raw)


def test_defaults_are_the_documented_ones() -> None:
    config = molora.AdapterConfig.from_dict(
        {"target_modules": "all-linear", "experts": {"kind": "lora"}}
    )
    experts: Any = config.experts
    assert (experts.num_experts, experts.r, experts.lora_alpha) == (1, 8, 16.0)
    assert (experts.use_rslora, experts.lora_dropout, experts.shared) == (False, 0, [])
    assert config.router.kind == "none"
    assert (config.exclude_modules, config.balance, config.overrides) == ([], [], [])
    router: Any = build().router
    assert (router.top_k, router.renormalize, router.temperature) == (2, True, 1.0)
    assert (router.noise, router.scope, router.input) == (0.0, "site", "token")


FULL: dict[str, Any] = {
    "target_modules": ["q_proj", "up_proj"],
    "exclude_modules": r".*layers\.0\..*",
    "experts": {
        "kind": "lora",
        "num_experts": 4,
        "r": [1, 2, 3, 4],
        "lora_alpha": 3,
        "use_rslora": True,
        "lora_dropout": 0.05,
    },
    "router": {"kind": "topk", "top_k": 3, "renormalize": False, "noise": 0.1},
    "balance": [{"kind": "switch", "weight": 0.01}, {"kind": "z", "weight": 1e-3}],
    "overrides": [
        {"match": r"layers\.1\.", "experts": {"r": 2, "lora_alpha": [1, 2, 3, 4]}},
        {
            "match": "up",
            "experts": {"num_experts": 1, "r": 5},
            "router": {"kind": "none"},
        },
        {"match": "q_proj", "router": {"kind": "soft", "temperature": 2.0}},
    ],
}


def test_it_survives_its_own_json() -> None:
    config = molora.AdapterConfig.from_dict(FULL)
    text = json.dumps(config.to_dict())
    again = molora.AdapterConfig.from_dict(json.loads(text))
    assert again == config
    assert json.dumps(again.to_dict()) == text
    for path in ("m.layers.1.q_proj", "m.layers.2.up_proj", "m.layers.2.q_proj", "x"):
        assert again.site(path) == config.site(path)


def test_overrides_replace_fields_and_the_first_match_wins() -> None:
    config = molora.AdapterConfig.from_dict(FULL)
    first: Any = config.site("m.layers.1.up_proj")
    assert first.experts.r == 2
    assert first.experts.scales() == pytest.approx([a / 2**0.5 for a in (1, 2, 3, 4)])
    assert first.experts.lora_dropout == 0.05
    assert first.router == config.router
    second: Any = config.site("m.layers.2.up_proj")
    assert (second.experts.num_experts, second.router.kind) == (1, "none")
    third: Any = config.site("m.layers.2.q_proj")
    assert third.experts == config.experts
    # another kind starts from its own defaults
    assert third.router.to_dict() == {
        "kind": "soft",
        "scope": "site",
        "input": "token",
        "mix": "layer",
        "tasks": [],
        "temperature": 2.0,
        "noise": 0.0,
        "init_range": 0.02,
        "expert_dropout": 0.0,
        "capacity": None,
    }
    assert config.site("m.layers.2.other").router == config.router


def test_single_experts_by_override_are_fine_with_a_balance() -> None:
    override = {"match": "q", "experts": {"num_experts": 1}}
    config = build(
        router={"kind": "soft"},
        overrides=[override],
        balance=[{"kind": "switch", "weight": 0.1}],
    )
    assert config.site("q").experts.num_experts == 1
    many = {"match": "q", "experts": {"num_experts": 4}, "router": {"kind": "soft"}}
    config = build(
        experts={"kind": "lora"},
        router=...,
        overrides=[many],
        balance=[{"kind": "switch", "weight": 0.1}],
    )
    assert config.site("q").experts.num_experts == 4


def test_configs_made_from_objects_take_overrides_too() -> None:
    config = molora.AdapterConfig(
        target_modules=["q"],
        experts=LoRAExperts.Config(num_experts=4, r=2),
        router=SoftRouter.Config(kind="soft", temperature=3.0),
        overrides=[  # type: ignore[list-item]
            {"match": "q", "experts": {"r": 3}, "router": {"noise": 0.5}}
        ],
    )
    site: Any = config.site("q")
    assert (site.experts.num_experts, site.experts.r) == (4, 3)
    assert (site.router.temperature, site.router.noise) == (3.0, 0.5)


def test_it_cannot_be_changed() -> None:
    config = build()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.target_modules = ["k_proj"]  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.experts.num_experts = 2  # type: ignore[misc]


YAML = r"""
target_modules: [gate_proj, up_proj, down_proj]
exclude_modules: []
experts: {kind: lora, num_experts: 8, r: 8, lora_alpha: 16, lora_dropout: 0.0}
router: {kind: topk, top_k: 2, scope: site, input: token}
balance: [{kind: switch, weight: 0.01}]
overrides:
  - {match: 'layers\.[0-7]\.', experts: {num_experts: 2}}
"""


def test_yaml_alone_or_under_adapter(tmp_path: Path) -> None:
    alone, under = tmp_path / "a.yaml", tmp_path / "b.yaml"
    alone.write_text(YAML)
    lines = "".join(f"  {line}\n" for line in YAML.splitlines())
    under.write_text(f"model: {{name: x}}\nadapter:\n{lines}")
    config = molora.AdapterConfig.from_yaml(alone)
    assert config == molora.AdapterConfig.from_yaml(str(under))
    assert config.site("model.layers.3.mlp.up_proj").experts.num_experts == 2
    assert config.site("model.layers.13.mlp.up_proj").experts.num_experts == 8
    under.write_text("adapter: {target_modules: [q], experts: {kind: lora, rr: 2}}")
    with pytest.raises(ConfigError, match=r"adapter\.experts\.rr: unknown field"):
        molora.AdapterConfig.from_yaml(under)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "expected a mapping of settings at the top level"),
        ("a: 1\na: 2", "not valid YAML.*duplicate key a"),
        ("a: ${b}", "not valid YAML.*'b' not found"),
        ("", "target_modules: this field is required"),
    ],
)
def test_broken_yaml(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mola.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="(?s)" + message):
        molora.AdapterConfig.from_yaml(path)


def test_missing_yaml(tmp_path: Path) -> None:
    (tmp_path / "mola.yaml").write_text(YAML)
    with pytest.raises(ConfigError, match=r"no such file. Did you mean 'mola\.yaml'"):
        read_yaml(tmp_path / "moal.yaml")
    with pytest.raises(ConfigError, match="is a folder, expected a YAML file"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "binary.yaml")
