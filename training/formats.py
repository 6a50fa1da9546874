"""Rows of the four data formats, checked and brought into one form: turns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from molora.errors import DataError
from molora.schema import nearest

ROLES = ("system", "user", "assistant", "tool")

SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

# the columns that a format cannot do without
COLUMNS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}


class Turn(NamedTuple):
    """What one speaker says."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One example.

    Args:
        where: File and line, or data set and row, for messages.
        turns: The conversation; at least one assistant turn, never the first.
        is_dialogue: Whether the row came as a conversation, which only a chat template
            can write, or as a prompt (user turn) and a completion (assistant turn).
    """

    where: str
    turns: tuple[Turn, ...]
    is_dialogue: bool


def detect_format(raw: Any, where: str) -> str:
    """Tell the format of a row from its columns.

    Args:
        raw: The row as read.
        where: Its place, for messages.

    Returns:
        A key of ``COLUMNS``.

    Raises:
        DataError: No format fits, or more than one.
    """
    row = _mapping(raw, where)
    fitting = [
        name for name, columns in COLUMNS.items() if all(c in row for c in columns)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(
            f"{where}: the columns fit several formats ({', '.join(fitting)}); "
            "set the task's format to one of them"
        )
    wanted = "; ".join(f"{name}: {', '.join(c)}" for name, c in COLUMNS.items())
    raise DataError(
        f"{where}: columns {', '.join(map(str, row))} fit no format. Wanted: {wanted}"
    )


def parse_row(raw: Any, format_name: str, where: str) -> Row:
    """Check one raw row and bring it into turns.

    Args:
        raw: The row as read.
        format_name: A key of ``COLUMNS``.
        where: Its place, for messages.

    Returns:
        The row. An alpaca row's ``input``, if any, follows its instruction after a
        blank line.

    Raises:
        DataError: A column is missing or ill-typed, a text is empty or no valid
            Unicode, a role is unknown, or no assistant turn is there to learn.
    """
    row = _mapping(raw, where)
    missing = [column for column in COLUMNS[format_name] if column not in row]
    if missing:
        raise DataError(
            f"{where}: missing column {missing[0]!r} of format {format_name}."
            f"{nearest(missing[0], map(str, row))} "
            f"Columns there: {', '.join(map(str, row)) or 'none'}"
        )
    if format_name in ("messages", "sharegpt"):
        return Row(where, _dialogue(row, format_name, where), True)
    if format_name == "alpaca":
        prompt = _text(row["instruction"], "instruction", where)
        if row.get("input"):
            prompt += "\n\n" + _text(row["input"], "input", where)
        completion = _text(row["output"], "output", where)
    else:
        prompt = _text(row["prompt"], "prompt", where)
        completion = _text(row["completion"], "completion", where)
    return Row(where, (Turn("user", prompt), Turn("assistant", completion)), False)


def _mapping(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise DataError(
            f"{where}: expected an object with named columns, got {type(raw).__name__}"
        )
    return raw


def _text(value: Any, name: str, where: str) -> str:
    """Return value if it is text that a tokenizer can read and a model can learn."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be text, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: {name} is empty; fill it in or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name} holds a lone surrogate "
            f"(U+{ord(value[error.start]):04X} at character {error.start}), "
            "which is not valid Unicode; repair or remove the row"
        ) from None
    return value


def _dialogue(row: Mapping[str, Any], format_name: str, where: str) -> tuple[Turn, ...]:
    column = COLUMNS[format_name][0]
    items = row[column]
    if not isinstance(items, list):
        raise DataError(
            f"{where}: {column} must be a list of turns, got {type(items).__name__}"
        )
    role_key, text_key = (
        ("role", "content") if format_name == "messages" else ("from", "value")
    )
    roles = (
        {role: role for role in ROLES} if format_name == "messages" else SHAREGPT_ROLES
    )
    turns = tuple(
        _turn(item, role_key, text_key, roles, f"{where}: {column}[{index}]")
        for index, item in enumerate(items)
    )
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: no assistant turn, so nothing to learn")
    if turns[0].role == "assistant":
        raise DataError(f"{where}: the first turn must not be the assistant's")
    return turns


def _turn(
    item: Any, role_key: str, text_key: str, roles: Mapping[str, str], where: str
) -> Turn:
    item = _mapping(item, where)
    for key in (role_key, text_key):
        if key not in item:
            raise DataError(f"{where}: missing key {key!r}")
    extra = [
        key
        for key, value in item.items()
        if key not in (role_key, text_key) and value is not None
    ]
    if extra:
        raise DataError(
            f"{where}: key {extra[0]!r} is not supported and would be ignored; "
            f"keep only {role_key!r} and {text_key!r}"
        )
    role = item[role_key]
    if not isinstance(role, str) or role not in roles:
        raise DataError(
            f"{where}: unknown role {role!r}.{nearest(str(role), roles)} "
            f"Known roles: {', '.join(roles)}"
        )
    return Turn(roles[role], _text(item[text_key], text_key, where))
