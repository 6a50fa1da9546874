"""Settings of a saved adapter with some of them replaced, its values being kept."""

from collections.abc import Mapping
from typing import Any

from molora.config import AdapterConfig
from molora.errors import ConfigError
from molora.routers import ROUTERS
from molora.routers.base import RouterConfig

_MAY_CHANGE = ("router", "balance", "train")


def continued(
    config: AdapterConfig, changes: Mapping[str, Any], where: str = "adapter"
) -> AdapterConfig:
    """Replace what may differ from what was saved: router, balance, train.

    A router of the same kind keeps its other settings. One of another kind keeps scope,
    input, mix and tasks, and starts from its own defaults elsewhere; the objectives go
    with the old router unless ``balance`` names them.

    Args:
        config: Settings as saved.
        changes: Fields of AdapterConfig.
        where: Dotted path of the changes, for messages.

    Raises:
        ConfigError: A field that belongs to the saved values, or settings that mean
            nothing.
    """
    fixed = [name for name in changes if name not in _MAY_CHANGE]
    if fixed:
        raise ConfigError(
            f"{where}.{fixed[0]}: belongs to the saved adapter; only "
            f"{', '.join(_MAY_CHANGE)} can be replaced"
        )
    raw = {**config.to_dict(), **changes}
    if "router" in changes:
        raw["router"] = _router(config, changes["router"], f"{where}.router")
        other = raw["router"]["kind"] != config.router.kind
        if other and "balance" not in changes:
            raw["balance"] = []
    return AdapterConfig.from_dict(raw, where)


def _router(config: AdapterConfig, changes: Any, where: str) -> dict[str, Any]:
    if not isinstance(changes, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, got {changes!r}")
    if any(override.router for override in config.overrides):
        raise ConfigError(
            f"{where}: the saved adapter has routers of several settings (overrides), "
            "which one block cannot replace; load it as it is"
        )
    saved = config.router.model_dump(mode="json", exclude_unset=True)
    kind = changes.get("kind", config.router.kind)
    if kind != config.router.kind:
        known = ROUTERS[str(kind)].Config.model_fields
        common = [n for n in RouterConfig.model_fields if n in known]
        saved = {n: v for n, v in saved.items() if n in common}
    return {**saved, "kind": kind, **changes}
