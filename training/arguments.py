"""The ``training:`` block: fields of TrainingArguments by name, and our own settings.

transformers' dataclass neither knows misspelt names kindly nor checks types; both are
done here, so that a mistake is told before anything is loaded.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

import pydantic
import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from molora.config import build_block
from molora.errors import ConfigError
from molora.schema import Schema, nearest
from molora.training.recipes import RECIPES, RecipeConfig

DEFAULTS: dict[str, Any] = {
    "label_names": ["labels"],
    "logging_nan_inf_filter": False,
    "remove_unused_columns": False,
    "report_to": ["tensorboard"],
}
"""Where our defaults differ from those of transformers."""

UNUSED = ("do_train", "do_eval", "do_predict", "resume_from_checkpoint")
"""Fields that transformers leaves to scripts; here the commands decide."""

POSITIVE = (
    "gradient_accumulation_steps",
    "logging_steps",
    "num_train_epochs",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
)
NOT_NEGATIVE = (
    "learning_rate",
    "max_grad_norm",
    "save_steps",
    "seed",
    "warmup_steps",
    "weight_decay",
)


class MoloraTrainingSettings(Schema):
    """Settings of training that transformers does not have."""

    max_skipped_steps: int = pydantic.Field(default=10, ge=1)
    """Stop after so many steps in a row whose gradient was not finite. Each of them is
    left out and counted."""
    collapse_window: int = pydantic.Field(default=50, ge=0)
    """Warn when a router has collapsed over so many steps; 0 never warns."""
    collapse_weight: float = pydantic.Field(default=0.8, gt=0, lt=1)
    """A router of three or more experts has collapsed when one of them has more than
    this part of the weight."""
    recipe: pydantic.SerializeAsAny[RecipeConfig] | None = None
    """What training does beside minimising the loss, by ``kind``: prune ranks, freeze
    tensors and the like; see molora methods."""

    @pydantic.field_validator("recipe", mode="before")
    @classmethod
    def _build_recipe(cls, raw: Any) -> Any:
        return build_block(RECIPES, raw, "recipe") if isinstance(raw, Mapping) else raw


def build_arguments(
    raw: Mapping[str, Any], where: str = "training"
) -> tuple[TrainingArguments, MoloraTrainingSettings]:
    """Build the arguments of a trainer.

    Args:
        raw: Fields of TrainingArguments and of MoloraTrainingSettings, by name.
        where: Dotted path of the block, for messages.

    Returns:
        Both, with our defaults where raw is silent.

    Raises:
        ConfigError: A field is unknown, ill-typed, out of range, or refused by
            transformers.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, got {raw!r}")
    ours = {k: v for k, v in raw.items() if k in MoloraTrainingSettings.model_fields}
    settings = MoloraTrainingSettings.from_dict(ours, where)
    hints = typing.get_type_hints(TrainingArguments)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    problems: list[str] = []
    values: dict[str, Any] = {
        **DEFAULTS,
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    for name, value in raw.items():
        if name in ours:
            continue
        if name not in known:
            near = nearest(name, known | set(MoloraTrainingSettings.model_fields))
            problems.append(f"{where}.{name}: unknown field.{near}")
            continue
        try:
            values[name] = _checked(name, value, hints[name])
        except ConfigError as error:
            problems.append(f"{where}.{name}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return TrainingArguments(**values), settings
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Convert one value to its field's type, or say what is wrong with it."""
    if name in UNUSED:
        raise ConfigError(
            "has no effect; commands (molora train, molora evaluate) and their options "
            "decide what is run"
        )
    if value is False and "no" in _choices(hint):
        # YAML reads a bare no as false
        value = "no"
    try:
        typed = pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        reasons = dict.fromkeys(item["msg"] for item in error.errors())
        raise ConfigError(f"{'; '.join(reasons)} (got {value!r})") from None
    _check_number(name, typed)
    _check_choice(typed, hint)
    if name == "report_to":
        chosen = [typed] if isinstance(typed, str) else typed or []
        for target in chosen:
            _one_of(target, ["all", "none", *INTEGRATION_TO_CALLBACK])
    if name == "logging_nan_inf_filter" and typed:
        raise ConfigError(
            "must be false: it would replace a NaN loss in the log by an average of "
            "others. Steps with a gradient that is not finite are left out anyway."
        )
    return typed


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"must be finite (got {value!r})")
    if name in POSITIVE and value <= 0:
        raise ConfigError(f"must be above 0 (got {value!r})")
    if name in NOT_NEGATIVE and value < 0:
        raise ConfigError(f"must not be negative (got {value!r})")


def _check_choice(value: Any, hint: Any) -> None:
    """Check a string that transformers will look up in an enum."""
    choices = _choices(hint)
    if choices and isinstance(value, str) and not isinstance(value, Enum):
        _one_of(value, choices)


def _choices(hint: Any) -> list[str]:
    """Values of the enum that a field's type names, if it names one."""
    for member in typing.get_args(hint) or [hint]:
        if isinstance(member, type) and issubclass(member, Enum):
            return [str(choice.value) for choice in member]
    return []


def _one_of(value: str, choices: list[str]) -> None:
    if value not in choices:
        raise ConfigError(
            f"unknown value {value!r}.{nearest(value, choices)} "
            f"One of {', '.join(sorted(choices))}"
        )
