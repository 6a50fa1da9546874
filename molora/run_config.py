"""RunConfig: one YAML with model, adapter, data, training and collapse of a run."""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from molora.collapse import COLLAPSERS
from molora.config import AdapterConfig, read_yaml
from molora.continuing import continued
from molora.errors import ConfigError
from molora.routers import OBJECTIVES, ROUTERS
from molora.saved import read_settings
from molora.schema import Schema, nearest
from molora.training.arguments import build_arguments
from molora.training.data import DataConfig
from molora.training.recipes import RECIPES
from molora.training.sources import is_local_file

_OF_BITSANDBYTES = re.compile("paged_|lion_|ademamix|adamw_8bit|.*_bnb")


class ModelSettings(Schema):
    """The base model."""

    name: str = "smollm2"
    """The embedded default, a folder, or the id of a model on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights; auto keeps what is stored."""
    device: str | None = None
    """Where the model goes, for example cuda; the CPU by default."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """How the linear layers of the frozen base are held: nf4 is 4 bits with double
    quantisation, computing in ``dtype``; none keeps what is stored."""


class CollapseSettings(Schema):
    """How the mixture becomes one adapter: a method, and the method's own settings."""

    model_config = pydantic.ConfigDict(extra="allow")

    method: str = "calibrated"
    """Registered name; its settings stand beside it, for example rank."""
    calibration_rows: int = pydantic.Field(default=256, ge=1)
    """Training rows, drawn as for an epoch, that the mixture is measured on."""

    @property
    def options(self) -> dict[str, Any]:
        """Settings of the method that were given."""
        given = dict(self.model_extra or {})
        if given.get("rank", 0) is None:
            # collapse.rank=null takes back a rank, for methods that read none
            del given["rank"]
        return given

    @pydantic.model_validator(mode="after")
    def _fits_method(self) -> Self:
        try:
            schema = COLLAPSERS[self.method].Config
        except ConfigError as error:
            raise ConfigError(f"method: {error}") from None
        own = [name for name in type(self).model_fields if name != "method"]
        known = sorted([*schema.model_fields, *own])
        for name in self.options:
            if name not in schema.model_fields and name != "rank":
                raise ConfigError(
                    f"{name}: unknown field.{nearest(name, known)} Known fields with "
                    f"method {self.method!r}: {', '.join(known)}"
                )
        schema.from_dict(self.options)
        return self


class RunConfig(Schema):
    """Everything that a run is made of, from one YAML file."""

    model: ModelSettings = ModelSettings()
    """The base model."""
    start_from: str | None = None
    """Folder of an adapter to train on, for example an imported or grown one; what
    ``adapter`` says then replaces its router, balance or train."""
    adapter: AdapterConfig
    """The mixture that it gets."""
    load_router: dict[str, Any] = {}
    """Router settings that evaluate, generate, routes, collapse and the scores after
    training use in place of the saved ones, for example kind: phatgoose for vectors
    that sigmoid learned."""
    data: DataConfig
    """Tasks to train on and to evaluate."""
    training: dict[str, Any] = {}
    """Arguments of the trainer, by the names of transformers' TrainingArguments."""
    collapse: CollapseSettings = CollapseSettings()
    """How ``molora collapse`` makes one adapter of the mixture."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Seed of the adapter's initial values, of the order of the rows, and of dropout
    and noise; also the trainer's."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _seed_the_trainer(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        seed, training = raw.get("seed", 0), raw.get("training", {})
        # a wrong seed is told once, where it stands
        if not isinstance(training, Mapping) or not isinstance(seed, int) or seed < 0:
            return raw
        return {**raw, "training": {"seed": seed, **training}}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _continue(cls, raw: Any) -> Any:
        start = raw.get("start_from") if isinstance(raw, Mapping) else None
        changes = raw.get("adapter", {}) if start else None
        # what is no folder or no mapping is told where its field is read
        if not isinstance(start, str) or not isinstance(changes, Mapping):
            return raw
        return {**raw, "adapter": continued(read_settings(Path(start)), changes)}

    @pydantic.field_validator("model", "adapter", "data", "collapse", mode="before")
    @classmethod
    def _build(cls, raw: Any, info: pydantic.ValidationInfo) -> Any:
        """Build a section; its errors carry their whole path."""
        section = str(info.field_name)
        schema = cls.model_fields[section].annotation
        assert isinstance(schema, type) and issubclass(schema, Schema)
        if isinstance(raw, schema):
            return raw
        try:
            return schema.from_dict(raw, section)
        except ConfigError as error:
            raise ConfigError(_located(str(error), section)) from None

    @pydantic.field_validator("training", mode="after")
    @classmethod
    def _arguments_fit(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if "output_dir" not in raw:
            raise ConfigError("training.output_dir: this field is required")
        build_arguments(raw, "training")
        optim = str(raw.get("optim", ""))
        if _OF_BITSANDBYTES.match(optim) and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"training.optim: {optim!r} needs bitsandbytes. Run: "
                "pip install 'molora[quantized]', or take adamw_torch"
            )
        return raw

    @pydantic.model_validator(mode="after")
    def _tasks_are_known(self) -> Self:
        names = [task.name for task in self.data.tasks]
        for i, objective in enumerate(self.adapter.balance):
            reason = OBJECTIVES[objective.kind].check_tasks(objective, names)
            if reason:
                raise ConfigError(f"adapter.balance[{i}]: {reason}")
        for router in self.adapter.routers():
            known = ROUTERS[router.kind].known_tasks(router)
            unknown = [name for name in names if known and name not in known]
            if unknown:
                raise ConfigError(
                    f"adapter.router: {router.kind} knows no expert for the tasks "
                    f"{unknown} of data.tasks; it knows {sorted(known)}"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _recipe_fits(self) -> Self:
        arguments, settings = build_arguments(self.training)
        if settings.recipe is not None:
            recipe = RECIPES[settings.recipe.kind]
            reason = recipe.check(settings.recipe, self.adapter)
            if not reason and arguments.max_steps > 0:
                reason = settings.recipe.check_steps(arguments.max_steps)
            if reason:
                raise ConfigError(f"training.recipe: {reason}")
        return self

    @pydantic.model_validator(mode="after")
    def _one_seed(self) -> Self:
        seed = self.training["seed"]
        if seed != self.seed:
            raise ConfigError(
                f"training.seed: {seed} differs from the seed of the run, {self.seed}; "
                "set the top-level seed only"
            )
        return self

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.training["output_dir"])


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML of a run.

    Files named in ``data`` are relative to the folder of the YAML; ``output_dir`` and
    ``model.name`` are relative to the working folder.

    Args:
        path: The YAML file.
        overrides: ``key.path=value``; list items by index (``data.tasks.0.weight=2``),
            values in YAML. A value replaces what was there, whole.

    Returns:
        The settings; data files are absolute.

    Raises:
        ConfigError: The file or an override cannot be read, or settings are wrong; one
            line per problem, each with the full path of the field.
    """
    raw = _overridden(path, overrides)
    try:
        return RunConfig.from_dict(_placed(raw, Path(path).absolute().parent))
    except ConfigError as error:
        raise ConfigError(f"{path}: wrong settings\n{error}") from None


def _located(message: str, section: str) -> str:
    """Make every line of a section's errors start with the section."""
    return "\n".join(
        line if line.startswith(section) else f"{section}.{line}"
        for line in message.split("\n")
    )


def _overridden(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of the file with the overrides applied."""
    plain = read_yaml(path)
    if not overrides:
        return plain
    # read once more, unresolved: what interpolates an overridden key must follow it
    tree = OmegaConf.load(path)
    assert isinstance(tree, DictConfig)
    for override in overrides:
        _apply(tree, override)
    try:
        raw: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from None
    return {str(key): value for key, value in raw.items()}


def _apply(tree: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"override {override!r}: expected key.path=value, for example "
            "training.max_steps=100"
        )
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])
        value = OmegaConf.to_container(parsed)["value"]  # type: ignore
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML: {error}"
        ) from None
    try:
        OmegaConf.update(tree, key, value, merge=False, force_add=True)
    # omegaconf answers a name where a list wants an index with a TypeError
    except (OmegaConfBaseException, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"override {override!r}: {reason}") from None


def _placed(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Put the folder of the YAML before the data files that are relative to it."""
    data = raw.get("data")
    tasks = data.get("tasks") if isinstance(data, dict) else None
    if not isinstance(tasks, list):
        return raw
    for task in tasks:
        for split in ("train", "eval"):
            source = task.get(split) if isinstance(task, dict) else None
            if isinstance(source, str) and is_local_file(source):
                task[split] = str(folder / Path(source).expanduser())
    return raw
