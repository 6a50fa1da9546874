"""Which layers of a model share which tensors of their experts; see experts/factors.py.

Legend: I in features   O out features
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from molora.config import SiteConfig
from molora.errors import WrapError
from molora.experts import AbstractExperts, FactorConfig, Place, SharedConfig
from molora.experts.base import ExpertsConfig
from molora.hosts import sizes

Group = tuple[str, str, str, str]
"""Kind of experts, tensor, scope, and what the layers have in common in their path."""


def generator_of(seed: int, path: str) -> torch.Generator:
    """Generator seeded by the seed and the module path."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Sharing:
    """The tensors that several layers of a model share, while its banks are made.

    Args:
        targets: Target layers by path, in model order.
        settings: Theirs.
        seed: Seed of the initial values.

    Raises:
        WrapError: Layers that share a tensor differ in what it is, stand on different
            devices, a target belongs to no numbered layer, or a scope that was asked
            for finds no two layers.
    """

    def __init__(
        self,
        targets: Mapping[str, nn.Module],
        settings: Mapping[str, SiteConfig],
        seed: int,
    ):
        self.settings, self.seed = settings, seed
        self.features: dict[Group, int] = {}
        self.owners: dict[Group, tuple[str, AbstractExperts]] = {}
        self._starts: dict[tuple[str, str], int] = {}
        self._sizes = {path: sizes(base) for path, base in targets.items()}
        self._seeded: dict[tuple[str, ...], torch.Generator] = {}
        first: dict[Group, str] = {}
        several: set[Group] = set()
        for path, base in targets.items():
            for name, group in self._groups(path).items():
                before = first.setdefault(group, path)
                several |= {group} if before != path else set()
                _check_same(name, before, path, settings)
                setting = self._config(path).SHARED_BY
                _check_device(setting, name, before, path, targets[before], base)
                wide, own = self.features.get(group, 0), self._own(path, name)
                if self._config(path).TENSORS[name] == "entries":
                    self._starts[path, name] = wide
                    self.features[group] = wide + own
                else:
                    self.features[group] = max(wide, own)
        for group, path in first.items():
            if not any(group[:3] == other[:3] for other in several):
                _check_asked(group, settings[path].experts.adapted())

    def places(self, path: str) -> dict[str, Place]:
        """Of the tensors of a layer that are shared with others or seeded.

        Args:
            path: Module path of the layer; those before it in the model are made.
        """
        config = self.settings[path].experts.adapted()
        if not isinstance(config, SharedConfig):
            return {}
        groups, found = self._groups(path), {}
        for name in config.TENSORS:
            group, seeded = groups.get(name), False
            if isinstance(config, FactorConfig):
                seeded = config.trainability.get(name) == "seeded"
            if group is None and not seeded:
                continue
            if seeded:
                assert isinstance(config, FactorConfig)
                generator = self._seeded_generator(config, name, path, group)
            else:
                generator = generator_of(self.seed, ":".join(group or ()))
            found[name] = Place(
                path,
                None if group is None else self.owners.get(group),
                self._own(path, name) if group is None else self.features[group],
                generator,
                self._starts.get((path, name), 0),
            )
        return found

    def made(self, path: str, experts: AbstractExperts) -> None:
        """Note a bank, which owns what no layer before it did."""
        for group in self._groups(path).values():
            self.owners.setdefault(group, (path, experts.adapted()))

    def _config(self, path: str) -> SharedConfig:
        """Settings of a layer that shares tensors."""
        config = self.settings[path].experts.adapted()
        assert isinstance(config, SharedConfig)
        return config

    def _groups(self, path: str) -> dict[str, Group]:
        """Group of every tensor that a layer shares with others."""
        config = self.settings[path].experts.adapted()
        if not isinstance(config, SharedConfig):
            return {}
        return {
            name: (config.kind, name, scope, _common(path, scope, config.SHARED_BY))
            for name, scope in config.scopes().items()
            if scope != "experts"
        }

    def _own(self, path: str, name: str) -> int:
        """I, O or I O of a layer, or 0 for a tensor along the rank."""
        wide_in, wide_out = self._sizes[path]
        sizes = {"in": wide_in, "out": wide_out, "entries": wide_in * wide_out}
        return sizes.get(self._config(path).TENSORS[name], 0)

    def _seeded_generator(
        self, config: FactorConfig, name: str, path: str, group: Group | None
    ) -> torch.Generator:
        """One for all tensors of a group, which draw from it one after the other."""
        key = config.projection_prng_key or 0
        where = ("", path) if group is None else group[2:]
        index = (str(key), config.kind, *where)
        if index not in self._seeded:
            # for the whole model as PEFT does for VeRA
            self._seeded[index] = (
                torch.Generator().manual_seed(key)
                if where == ("model", "")
                else generator_of(key, where[1])
            )
        return self._seeded[index]


def _common(path: str, scope: str, setting: str) -> str:
    """What the paths of the layers of one group have in common.

    Raises:
        WrapError: The path names no layer.
    """
    parts = path.split(".")
    if scope == "model":
        return ""
    if scope == "type":
        return ".".join("*" if part.isdigit() else part for part in parts)
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        raise WrapError(
            f"experts.{setting}: target {path!r} belongs to no numbered layer, so it "
            "shares nothing with the scope layer; add it to exclude_modules"
        )
    return ".".join(parts[: number + 1])


def _check_asked(group: Group, config: ExpertsConfig) -> None:
    """Refuse a scope with which no two layers share; the family's own is no wish."""
    kind, name, scope, _ = group
    assert isinstance(config, SharedConfig)
    setting = config.SHARED_BY
    if getattr(config, setting) == type(config).model_fields[setting].default:
        return
    alone = ""
    if isinstance(config, FactorConfig):
        alone = f"list it (shared: [{name}]) to share it among the experts of a layer, "
    raise WrapError(
        f"experts.{setting}: no two target layers of {kind} have one {name} with the "
        f"scope {scope}; {alone}set a scope that joins layers, or leave it out"
    )


def _check_same(
    name: str, first: str, path: str, settings: Mapping[str, SiteConfig]
) -> None:
    """Refuse layers that would train one tensor in different ways."""
    one, two = (settings[p].experts.adapted() for p in (first, path))
    assert isinstance(one, SharedConfig) and isinstance(two, SharedConfig)
    theirs = one.alike(name)
    for field, mine in two.alike(name).items():
        if mine != theirs[field]:
            raise WrapError(
                f"sites {first!r} and {path!r} share {name} (experts.{two.SHARED_BY}) "
                f"and have different settings of {field}; give them the same"
            )


def _check_device(
    setting: str, name: str, first: str, path: str, one: nn.Module, two: nn.Module
) -> None:
    devices = [base.get_parameter("weight").device for base in (one, two)]
    if devices[0] != devices[1]:
        raise WrapError(
            f"sites {first!r} on {devices[0]} and {path!r} on {devices[1]} share "
            f"{name} (experts.{setting}), which can be on one device; put the model on "
            "one, or use a narrower scope"
        )
