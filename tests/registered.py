"""Settings with which every registered family, router and objective can be built.

Fields that have no default come from the first file in configs/ that names the kind, so
that a new one is covered by its YAML.
"""

from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from molora.config import read_yaml
from molora.context import TokenRows
from molora.experts import EXPERTS, AbstractExperts
from molora.registry import Registry
from molora.routers import OBJECTIVES, ROUTERS, Routing
from molora.routers.balance import Steering
from molora.routers.base import LinearGateRouter

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ROUTED = [name for name in ROUTERS.names() if name != "none"]


def inputs(kind: str) -> tuple[str, ...]:
    """What router.input may be for a router."""
    return get_args(ROUTERS[kind].Config.model_fields["input"].annotation)


GATED = [
    name
    for name in ROUTED
    if issubclass(ROUTERS[name], LinearGateRouter)
    and ROUTERS[name].has_probs
    and "token" in inputs(name)
]
LOSSES = [n for n in OBJECTIVES.names() if not issubclass(OBJECTIVES[n], Steering)]
TASKS = ["sentiment", "text2sql", "scan"]
"""Tasks that the files in configs/ know."""


def _blocks() -> list[dict[str, Any]]:
    adapters = [read_yaml(file)["adapter"] for file in sorted(CONFIGS.glob("*.yaml"))]
    routers = [adapter["router"] for adapter in adapters if "router" in adapter]
    return routers + [
        item for adapter in adapters for item in adapter.get("balance", [])
    ]


BLOCKS = _blocks()


def _settings(
    registry: Registry[Any], kind: str, given: dict[str, Any]
) -> dict[str, Any]:
    raw = {"kind": kind, **given}
    for name, field in registry[kind].Config.model_fields.items():
        if field.is_required() and name not in raw:
            examples = [b[name] for b in BLOCKS if b["kind"] == kind and name in b]
            assert examples, f"no file in configs/ shows {kind}.{name}"
            raw[name] = examples[0]
    return raw


def router_settings(kind: str, **given: Any) -> dict[str, Any]:
    """The router block of a config."""
    return _settings(ROUTERS, kind, given)


FAMILIES: dict[str, dict[str, Any]] = {
    "boft": {"boft_block_size": 4},
    "oft": {"oft_block_size": 4},
    "sparse": {"density": 0.2, "exact": True},
    "sum": {
        "parts": [
            {"kind": "lora", "r": 2},
            {"kind": "sparse", "density": 0.2, "exact": True},
        ]
    },
}
"""Settings that a family needs on small layers."""


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"mora {n}": {"kind": "mora", "mora_type": n} for n in (1, 2, 3, 4)},
    "lokr whole": {"kind": "lokr", "r": None, "alpha": 4.0},
    "lokr both": {"kind": "lokr", "r": 2, "decompose_both": True},
    "lokr factor": {"kind": "lokr", "r": 2, "decompose_factor": 4},
    "lora shared A": {"kind": "lora", "shared": ["A"]},
    "lora shared B": {"kind": "lora", "shared": ["B"]},
    "lora frozen": {"kind": "lora", "trainability": {"A": "frozen"}},
    "lora seeded": {"kind": "lora", "trainability": {"A": "seeded"}},
    "lora masked": {"kind": "lora", "trainability": {"B": "masked"}, "density": 0.5},
    **{
        f"lora {init}": {"kind": "lora", "r": 4, "init_lora_weights": init}
        for init in ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")
    },
    "oft r": {"kind": "oft", "oft_block_size": 0, "r": 2},
    "oft coft": {"kind": "oft", "oft_block_size": 4, "coft": True, "eps": 0.5},
    "oft block share": {"kind": "oft", "oft_block_size": 4, "block_share": True},
    "oft cayley": {"kind": "oft", "oft_block_size": 4, "use_cayley_neumann": False},
    "oft output": {"kind": "oft", "oft_block_size": 2, "side": "output"},
    "boft 2": {"kind": "boft", "boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "vera alone": {"kind": "vera", "r": 6, "shared": []},
    "ia3 input": {"kind": "ia3", "position": "input"},
    "sparse r": {"kind": "sparse", "r": 2},
    "superlora groups": {"kind": "superlora", "groups": 2},
    "serial": {"kind": "bottleneck", "position": "serial"},
    "loda mixers": {"kind": "loda", "mixers": 2},
    "lora bias": {"kind": "sum", "parts": [{"kind": "lora"}, {"kind": "bitfit"}]},
    "dora of lokr": {"kind": "dora", "inner": {"kind": "lokr", "r": 2}},
    "dora of sum": {"kind": "dora", "inner": {"kind": "sum", **FAMILIES["sum"]}},
}
"""Settings other than the default ones with which a family is something else."""

SCOPES: dict[str, dict[str, Any]] = {
    "lora A by layer": {"kind": "lora", "shared": {"A": "layer"}},
    "lora B by type": {"kind": "lora", "shared": {"B": "type"}},
    "lora A by model": {"kind": "lora", "shared": {"A": "model"}},
    "lotr by layer": {"kind": "lotr", "shared": {"A": "layer", "B": "layer"}},
    "superlora of the model": {"kind": "superlora", "scope": "model", "groups": 3},
    "superlora by type": {"kind": "superlora", "scope": "type", "fold": "weight"},
    "dora A by type": {
        "kind": "dora",
        "inner": {"kind": "lora", "shared": {"A": "type"}},
    },
}
"""Settings that need several layers."""


def family_settings(name: str, num_experts: int = 1) -> dict[str, Any]:
    """The experts block of a config, of a family or a variant of one."""
    settings = {"kind": name, **FAMILIES.get(name, {})}
    settings = (VARIANTS | SCOPES).get(name, settings)
    return {**settings, "num_experts": num_experts}


def family_of(name: str) -> type[AbstractExperts]:
    """The family of a name that ``family_settings`` takes."""
    return EXPERTS[family_settings(name)["kind"]]


def objective_settings(kind: str, weight: float = 1.0) -> dict[str, Any]:
    """One entry of the balance block of a config."""
    return _settings(OBJECTIVES, kind, {"weight": weight})


def takes(kind: str, num_experts: int = 4, **given: Any) -> bool:
    """Whether a router means something with these settings of every router."""
    if given.get("input", inputs(kind)[0]) not in inputs(kind):
        return False
    cls = ROUTERS[kind]
    made = cls.Config.from_dict(router_settings(kind, **given))
    return cls.check(made, num_experts) is None


def value(objective: Any, routing: Routing, weight_T: Tensor | None) -> Tensor:
    """An objective on tokens of one row, whose task is given where it is read."""
    rows = TokenRows(1, (TASKS[0],)) if objective.needs_tasks else None
    result: Tensor = objective(routing, weight_T, rows)
    return result


def objective(kind: str, weight: float = 1.0) -> Any:
    """A registered objective."""
    cls = OBJECTIVES[kind]
    return cls(cls.Config.from_dict(objective_settings(kind, weight)))
