"""AdapterConfig: which layers get a bank, of which experts, behind which router.

Strict, immutable, serialisable. Everything that can be refused without the model is
refused when the config is built; what needs the model (targets) when it is wrapped.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from molora.errors import ConfigError
from molora.experts import EXPERTS
from molora.experts.base import ExpertsConfig
from molora.layout import Layout
from molora.routers import OBJECTIVES, ROUTERS
from molora.routers.balance import ObjectiveConfig
from molora.routers.base import RouterConfig
from molora.schema import Schema, nearest


class Override(Schema):
    """Other settings for the target layers whose module path matches."""

    match: str
    """Regular expression, searched in the module path."""
    experts: dict[str, Any] = {}
    """Fields of ``experts`` to replace."""
    router: dict[str, Any] = {}
    """Fields of ``router`` to replace."""

    @pydantic.field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        return _regex(value)

    @pydantic.model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.experts and not self.router:
            raise ValueError("an override needs experts or router settings to replace")
        return self


class SiteConfig(Schema):
    """Settings of one target layer, overrides applied."""

    experts: pydantic.SerializeAsAny[ExpertsConfig]
    """Settings of the expert family."""
    router: pydantic.SerializeAsAny[RouterConfig]
    """Settings of the router."""


class AdapterConfig(Schema):
    """A mixture: target layers, experts, router, balance objectives.

    A YAML of this form, or one that holds it under ``adapter:``, is read by
    ``from_yaml``.
    """

    target_modules: list[str] | str
    """Module path suffixes, or one regular expression for whole paths, or
    all-linear. Embeddings and convolutions are targets by name only."""
    exclude_modules: list[str] | str = []
    """What to leave out: suffixes, or one regular expression."""
    experts: pydantic.SerializeAsAny[ExpertsConfig]
    """Expert family, its size and scale."""
    router: pydantic.SerializeAsAny[RouterConfig] = pydantic.Field(
        default_factory=lambda: ROUTERS["none"].Config(kind="none")
    )
    """How tokens choose experts."""
    balance: list[pydantic.SerializeAsAny[ObjectiveConfig]] = []
    """Objectives added to the loss, per routed site."""
    train: Literal["all", "router", "newest"] = "all"
    """What is trained: all, the routers over frozen experts, or only the newest expert
    of each layer with its row of the router."""
    layout: Layout | None = None
    """num_experts by depth (MoLA), instead of one number for all layers."""
    overrides: list[Override] = []
    """Other settings for some layers; the first match wins, and wins over layout."""

    @pydantic.field_validator("experts", "router", mode="before")
    @classmethod
    def _build_block(cls, raw: Any, info: pydantic.ValidationInfo) -> Any:
        registry = EXPERTS if info.field_name == "experts" else ROUTERS
        if not isinstance(raw, Mapping):
            return raw
        return build_block(registry, raw, str(info.field_name))

    @pydantic.field_validator("balance", mode="before")
    @classmethod
    def _build_balance(cls, raw: Any) -> Any:
        if not isinstance(raw, list):
            return raw
        built, problems = [], []
        for i, item in enumerate(raw):
            try:
                is_block = isinstance(item, Mapping)
                where = f"balance[{i}]"
                built.append(build_block(OBJECTIVES, item, where) if is_block else item)
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        return built

    @pydantic.field_validator("target_modules", "exclude_modules")
    @classmethod
    def _compiles(cls, value: list[str] | str) -> list[str] | str:
        if isinstance(value, str) and value != "all-linear":
            _regex(value)
        return value

    @pydantic.model_validator(mode="after")
    def _means_something(self) -> Self:
        if not self.target_modules:
            raise ValueError("target_modules: name at least one layer, or all-linear")
        if self.layout is None:
            _check_pair(self.experts, self.router, "")
        else:
            self._check_layout(self.layout)
        kinds = [objective.kind for objective in self.balance]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"balance: an objective is listed twice: {kinds}")
        if self.train == "newest":
            for where, site in self._site_kinds():
                _check_newest(site, where)
        if self.train != "all" and not self._any_routed():
            raise ValueError(
                f"train: {self.train} leaves nothing to train, every layer has one "
                "expert; set train: all or num_experts above 1"
            )
        if self.balance and not self._any_routed():
            raise ValueError(
                "balance: there is nothing to balance, every layer has one expert; "
                "drop the balance block or set num_experts above 1"
            )
        for where, site in self._site_kinds():
            _check_objectives(self.balance, site, where)
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file that holds an adapter, alone or under ``adapter:``.

        Raises:
            ConfigError: The file is missing, is no YAML, or holds a wrong setting.
        """
        raw = read_yaml(path)
        if "adapter" in raw:
            return cls.from_dict(raw["adapter"], "adapter")
        return cls.from_dict(raw)

    def site(self, path: str) -> SiteConfig:
        """Settings of the target layer at a module path.

        Raises:
            ConfigError: An override does not fit the layer's number of experts.
            WrapError: The layout gives the layer none; see ``Layout.count``.
        """
        experts = self.experts
        if self.layout is not None:
            experts = self._with_count(self.layout.count(path))
        for i, override in enumerate(self.overrides):
            if re.search(override.match, path):
                return self._merged(override, f"overrides[{i}].", experts)
        return SiteConfig(experts=experts, router=self.router)

    def _with_count(self, count: int) -> ExpertsConfig:
        changes = {"num_experts": count}
        experts = _replace(EXPERTS, self.experts, changes, "experts")
        assert isinstance(experts, ExpertsConfig)
        return experts

    def _check_layout(self, layout: Layout) -> None:
        if self.experts.num_experts != 1:
            raise ConfigError(
                f"experts.num_experts={self.experts.num_experts} has no effect beside "
                "layout, which sets it for every layer; drop one of them"
            )
        for count in layout.counts:
            _check_pair(self._with_count(count), self.router, "layout.counts: ")

    def _merged(
        self, override: Override, where: str, before: ExpertsConfig
    ) -> SiteConfig:
        experts = _replace(EXPERTS, before, override.experts, where + "experts")
        router = _replace(ROUTERS, self.router, override.router, where + "router")
        _check_pair(experts, router, where)
        if override.router and router.kind != "none" and experts.num_experts == 1:
            raise ConfigError(
                f"{where}router: these layers have num_experts=1 and build no router; "
                "drop the router settings of this override"
            )
        return SiteConfig(experts=experts, router=router)

    def _site_kinds(self) -> list[tuple[str, SiteConfig]]:
        """Every combination of settings that a layer can have, and where it stands.

        Raises:
            ConfigError: An override fits none of the layers it might match.
        """
        bases = [self.experts]
        if self.layout is not None:
            bases = [self._with_count(count) for count in self.layout.counts]
        kinds = [("", SiteConfig(experts=base, router=self.router)) for base in bases]
        for i, override in enumerate(self.overrides):
            where, problems = f"overrides[{i}].", []
            for base in bases:
                try:
                    kinds.append((where, self._merged(override, where, base)))
                except ConfigError as error:
                    problems.append(error)
            if len(problems) == len(bases):
                raise problems[0]
        return kinds

    def routers(self) -> list[RouterConfig]:
        """Settings of every router that some layer may have."""
        kinds = [site for _, site in self._site_kinds()]
        return [site.router for site in kinds if site.experts.num_experts > 1]

    def families(self) -> list[ExpertsConfig]:
        """Settings of the experts that some layer may have."""
        return [site.experts for _, site in self._site_kinds()]

    def _any_routed(self) -> bool:
        return any(site.experts.num_experts > 1 for _, site in self._site_kinds())


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Parse a YAML mapping.

    Raises:
        ConfigError: The file is missing, is no YAML, or holds no mapping.
    """
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        near = nearest(Path(path).name, [p.name for p in Path(path).parent.glob("*")])
        raise ConfigError(f"{path}: no such file.{near}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, expected a YAML file") from None
    except PermissionError:
        raise ConfigError(f"{path}: no permission to read it") from None
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top level")
    return {str(key): value for key, value in raw.items()}


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return value


def build_block(registry: Any, raw: Mapping[str, Any], where: str) -> Any:
    """Build one registered settings block from its ``kind``."""
    if "kind" not in raw:
        names = ", ".join(registry.names())
        raise ConfigError(f"{where}.kind: this field is required; one of {names}")
    try:
        cls = registry[str(raw["kind"])]
    except ConfigError as error:
        raise ConfigError(f"{where}.kind: {error}") from None
    return cls.Config.from_dict(raw, where)


def _replace(registry: Any, base: Any, changes: dict[str, Any], where: str) -> Any:
    """Return base with the changes of an override; a new kind starts from defaults."""
    if not changes:
        return base
    before = {**base.model_dump(exclude_unset=True), "kind": base.kind}
    if changes.get("kind", base.kind) != base.kind:
        keep = {"num_experts": before["num_experts"]} if "num_experts" in before else {}
        before = keep
    return build_block(registry, {**before, **changes}, where)


def _check_pair(experts: ExpertsConfig, router: RouterConfig, where: str) -> None:
    """Refuse a router that means nothing with this number of experts."""
    reason = ROUTERS[router.kind].check(router, experts.num_experts)
    if reason:
        raise ConfigError(f"{where}{reason}")
    if experts.num_experts == 1 and router.kind != "none" and not where:
        raise ConfigError(
            f"router.kind={router.kind!r} with num_experts=1: one expert needs no "
            "router; set router.kind to none, or num_experts above 1"
        )


def _check_newest(site: SiteConfig, where: str) -> None:
    """Refuse to freeze what the newest expert would still change."""
    if site.experts.num_experts > 1 and not ROUTERS[site.router.kind].can_grow(
        site.router
    ):
        raise ConfigError(
            f"{where}train: newest keeps the other experts' outputs only under "
            "router.kind topk with renormalize: true, because the gates of "
            f"{site.router.kind!r} depend on every expert; set train: all or router"
        )


def _check_objectives(
    balance: list[ObjectiveConfig], site: SiteConfig, where: str
) -> None:
    """Refuse an objective that means nothing with a layer's router and experts."""
    experts = site.experts.num_experts
    if experts == 1:
        return
    for i, objective in enumerate(balance):
        router = ROUTERS[site.router.kind]
        reason = OBJECTIVES[objective.kind].check(objective, router, experts)
        reason = reason or router.check_balance(site.router)
        if reason:
            told = f" (at {where[:-1]})" if where else ""
            raise ConfigError(f"balance[{i}]{told}: {reason}")
