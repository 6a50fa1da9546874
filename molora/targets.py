"""Finding the layers of a model that get a bank."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from molora.config import AdapterConfig
from molora.errors import WrapError
from molora.hosts import LINEAR, find_host, host_names
from molora.quantized import bits_of
from molora.schema import nearest


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """Find the target layers of a model.

    Args:
        model: A base model.
        config: Its target_modules, exclude_modules and overrides are applied.

    Returns:
        Module by path, in model order.

    Raises:
        WrapError: A pattern matches nothing, or a module on which no adapter can sit;
            the message names the pattern and close names that exist.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    modules.pop("", None)
    if config.target_modules == "all-linear":
        paths = _all_linear(model, modules)
    else:
        paths = _matches(modules, config.target_modules, "target_modules")
    if config.exclude_modules:
        excluded = set(_matches(modules, config.exclude_modules, "exclude_modules"))
        paths = [path for path in paths if path not in excluded]
    if not paths:
        raise WrapError("exclude_modules leaves no target layer")
    _check_overrides(config, paths)
    targets = {path: modules[path] for path in paths}
    _check_types(targets)
    _check_aliases(targets, modules)
    return targets


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Every linear layer but the output embedding."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    paths = [
        path
        for path, module in modules.items()
        if isinstance(module, LINEAR) and module is not output
    ]
    if not paths:
        names = " or ".join(cls.__name__ for cls in LINEAR)
        raise WrapError(f"target_modules: all-linear finds no {names} in this model")
    return paths


def _matches(
    modules: dict[str, nn.Module], patterns: Sequence[str] | str, field: str
) -> list[str]:
    """Paths that match a regular expression, or any of several suffixes."""
    if isinstance(patterns, str):
        paths = [path for path in modules if re.fullmatch(patterns, path)]
        if not paths:
            raise WrapError(
                f"{field}: the expression {patterns!r} matches no module path; it must "
                f"match a whole path such as {list(modules)[-1]!r}"
            )
        return paths
    found: set[str] = set()
    for suffix in patterns:
        hits = [p for p in modules if p == suffix or p.endswith("." + suffix)]
        if not hits:
            names = {path.split(".")[-1] for path in modules}
            able = {
                path.split(".")[-1]
                for path, module in modules.items()
                if find_host(module) is not None
            }
            raise WrapError(
                f"{field}: {suffix!r} matches no module.{nearest(suffix, names)} "
                f"Layers that can host experts: {', '.join(sorted(able))}"
            )
        found.update(hits)
    return [path for path in modules if path in found]


def _check_overrides(config: AdapterConfig, paths: list[str]) -> None:
    """An override that no target uses is a typo, or stands behind another one."""
    hits = {
        i: [path for path in paths if re.search(override.match, path)]
        for i, override in enumerate(config.overrides)
    }
    taken: dict[str, int] = {}
    for i, matched in hits.items():
        pattern = config.overrides[i].match
        if not matched:
            raise WrapError(
                f"overrides[{i}].match: {pattern!r} matches none of the "
                f"{len(paths)} target layers, for example {paths[0]!r}"
            )
        if all(path in taken for path in matched):
            raise WrapError(
                f"overrides[{i}].match: {pattern!r} has no effect, since the first "
                f"match wins and overrides[{taken[matched[0]]}] comes before it; put "
                "the narrower one first"
            )
        for path in matched:
            taken.setdefault(path, i)


def _check_aliases(
    targets: dict[str, nn.Module], modules: dict[str, nn.Module]
) -> None:
    """Refuse an embedding or a convolution that stays as it is at another path."""
    paths = {id(module): path for path, module in targets.items()}
    for path, module in modules.items():
        target, host = paths.get(id(module), path), find_host(module)
        if target != path and host is not None and not host.by_token:
            raise WrapError(
                f"target {target!r} is the same module as {path!r}, where it would "
                "be called without experts; exclude it"
            )


def _check_types(targets: dict[str, nn.Module]) -> None:
    """Refuse modules that cannot host a bank, and one layer under two paths."""
    seen: dict[int, str] = {}
    for path, module in targets.items():
        if find_host(module) is None:
            raise WrapError(
                f"target_modules matches {path!r}, a {type(module).__name__}; "
                f"experts can sit on {host_names()} only. Narrow the pattern or "
                "exclude the module."
            )
        if isinstance(module, NonDynamicallyQuantizableLinear):
            raise WrapError(
                f"target {path!r} is part of nn.MultiheadAttention, which reads its "
                "weight and never calls it, so experts there would have no effect; "
                "exclude it"
            )
        weight: Any = module.weight
        if not weight.is_floating_point() and bits_of(module) is None:
            raise WrapError(
                f"target {path!r} holds quantised weights ({weight.dtype}) that "
                "are none of bitsandbytes; load the base with quantization nf4, int8 "
                "or none"
            )
        if id(module) in seen:
            raise WrapError(
                f"targets {seen[id(module)]!r} and {path!r} are one shared module; "
                "exclude one of them"
            )
        seen[id(module)] = path
