"""Strict, immutable settings and the one place that words their errors.

Every settings class derives from ``Schema``. A field exists only where code reads it;
an unknown key is an error that offers the nearest name.
"""

import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Self

import pydantic

from molora.errors import ConfigError


class Schema(pydantic.BaseModel):
    """Parent of all settings: keyword-only, frozen, strict about unknown keys."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "") -> Self:
        """Build from parsed YAML.

        Args:
            raw: Field values by name; absent fields take their defaults.
            where: Dotted path of this block, put before field names in messages.

        Raises:
            ConfigError: Unknown, missing, ill-typed or out-of-range fields, all of
                them in one message.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(
                f"{where or cls.__name__}: expected a mapping of settings, "
                f"got {type(raw).__name__} {raw!r}"
            )
        try:
            return cls.model_validate(dict(raw))
        except pydantic.ValidationError as error:
            raise ConfigError(explain(cls, error, where)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; ``from_dict`` rebuilds an equal object from them."""
        return self.model_dump(mode="json")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known name, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def explain(
    cls: type[pydantic.BaseModel], error: pydantic.ValidationError, where: str = ""
) -> str:
    """Word a pydantic error for the person who wrote the YAML.

    Args:
        cls: The class that was being built; its fields supply the nearest names.
        error: What pydantic found.
        where: Dotted path put before every location.

    Returns:
        One line per problem, each with the full path of the field.
    """
    lines = []
    problems = error.errors(include_url=False)
    for item in _likeliest(problems):
        loc = _place(item)
        path = ".".join([p for p in [where, *loc] if p]) or cls.__name__
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            # already worded, each line with its own path
            told = str(cause).split("\n")
            lines += [f"{where}.{line}" if where else line for line in told]
        elif item["type"] == "extra_forbidden":
            names = sorted(_fields_at(cls, item["loc"][:-1]))
            lines.append(
                f"{path}: unknown field.{nearest(loc[-1], names)} "
                f"Known fields: {', '.join(names)}"
            )
        elif item["type"] == "missing":
            lines.append(f"{path}: this field is required")
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = item["input"]
            shown = "" if isinstance(got, Mapping) else f" (got {got!r})"
            if item["type"] == "string_type" and isinstance(got, bool):
                shown += (
                    "; put quotes around it, YAML reads yes, no, on and off as "
                    "true or false"
                )
            lines.append(f"{path}: {message}{shown}")
    return "\n".join(dict.fromkeys(lines))


def _is_union_tag(part: object) -> bool:
    """Tell pydantic's names of union members ("int", "list[str]") from field names."""
    return isinstance(part, str) and (
        "[" in part or "-" in part or part in {"int", "float", "str", "bool", "none"}
    )


def _place(item: Any) -> tuple[str, ...]:
    """Path of the field, without union members; an unknown key stays as written."""
    loc = list(item["loc"])
    key = loc[-1:] if item["type"] == "extra_forbidden" else []
    outer = loc[: len(loc) - len(key)]
    return tuple(str(p) for p in [p for p in outer if not _is_union_tag(p)] + key)


def _likeliest(problems: list[Any]) -> list[Any]:
    """Of the complaints of a union's members, keep those of the member that was meant.

    A number out of range under ``int | list[int]`` is told as such, not also as being
    no list.
    """
    specific = {_place(p) for p in problems if not p["type"].endswith("_type")}
    return [
        p
        for p in problems
        if not (p["type"].endswith("_type") and _place(p) in specific)
    ]


def _fields_at(cls: type[pydantic.BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Field names of the settings class that sits at loc inside cls."""
    for part in loc:
        field = cls.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        for candidate in _members(field.annotation):
            if isinstance(candidate, type) and issubclass(
                candidate, pydantic.BaseModel
            ):
                cls = candidate
                break
    return list(cls.model_fields)


def _members(annotation: Any) -> list[Any]:
    """Flatten unions and containers to the types they hold."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple):
        return [m for arg in typing.get_args(annotation) for m in _members(arg)]
    return [annotation]
