"""Settings with which every registered family, router and objective can be built.

Fields that have no default come from the first file in configs/ that names the kind, so
that a new one is covered by its YAML.
"""

from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from molora.config import read_yaml
from molora.context import TokenRows
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
    "superlora": {"scope": "model", "groups": 3},
    "sum": {
        "parts": [
            {"kind": "lora", "r": 2},
            {"kind": "sparse", "density": 0.2, "exact": True},
        ]
    },
}
"""Settings that a family needs on small layers."""


def family_settings(kind: str, num_experts: int = 1) -> dict[str, Any]:
    """The experts block of a config."""
    return {"kind": kind, "num_experts": num_experts, **FAMILIES.get(kind, {})}


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
