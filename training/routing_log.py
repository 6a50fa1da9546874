"""Where routing statistics go: a few numbers to print, all of them to files.

The numbers are defined in monitor.py.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import pydantic

from molora.errors import DataError
from molora.training.monitor import SiteUse

LOG_NAME = "routing_log.jsonl"
"""File in the run folder."""


def summary(uses: Mapping[str, SiteUse]) -> dict[str, float]:
    """The few numbers that are printed: mean and extremes over sites."""
    if not uses:
        return {}
    entropies = [use.entropy for use in uses.values()]
    numbers = {
        "routing/entropy_mean": math.fsum(entropies) / len(entropies),
        "routing/entropy_min": min(entropies),
        "routing/live_experts_min": min(use.live_experts for use in uses.values()),
        "routing/max_mean_weight": max(max(u.mean_weight) for u in uses.values()),
    }
    for kind in dict.fromkeys(k for use in uses.values() for k in use.balance):
        values = [use.balance[kind] for use in uses.values() if kind in use.balance]
        numbers[f"routing/balance_{kind}"] = math.fsum(values) / len(values)
    return numbers


def scalars(uses: Mapping[str, SiteUse]) -> dict[str, float]:
    """The numbers of every site, one scalar each, for TensorBoard."""
    numbers: dict[str, float] = {}
    for path, use in uses.items():
        name = f"routing_sites/{path}"
        numbers[f"{name}/max_mean_weight"] = max(use.mean_weight)
        numbers[f"{name}/max_share"] = max(use.share)
        numbers[f"{name}/entropy"] = use.entropy
        numbers[f"{name}/live_experts"] = use.live_experts
        for kind, value in use.balance.items():
            numbers[f"{name}/balance_{kind}"] = value
    return numbers


class RoutingLog:
    """JSON lines, one per site and log step.

    Args:
        path: The file. Lines of steps after the given one are dropped, and so is a line
            that a kill cut short.
        step: Step at which the run begins or goes on.

    Raises:
        DataError: The file holds something else; it is left as it is.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            try:
                kept = [line for line in path.read_text("utf-8").split("\n") if line]
                kept = [line for line in kept if _step(line) <= step]
            except (UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}: is no routing log ({type(error).__name__}: {error}); "
                    "move it away to go on with a new one"
                ) from None
            fresh = path.with_name(path.name + ".tmp")
            fresh.write_text("".join(f"{line}\n" for line in kept), "utf-8")
            fresh.replace(path)

    def write(self, step: int, uses: Mapping[str, SiteUse]) -> None:
        """Append the numbers of all sites."""
        lines = [
            json.dumps({"step": step, "site": path, **_rounded(asdict(use))})
            for path, use in uses.items()
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log; one at the end that a kill cut short is left out.

    Numbers may be NaN or infinite, as a run that diverges writes them.

    Raises:
        DataError: The file cannot be read; another line is no JSON in UTF-8; its step,
            site, mean_weight, share or entropy is missing or of another type;
            mean_weight and share differ in length.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError:
            if number == len(lines):
                break
            raise _damaged(path, number, "is no JSON in UTF-8") from None
        try:
            _Line.model_validate(row)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            wrong = f"{field}: {first['msg']}" if field else first["msg"]
            raise _damaged(path, number, wrong) from None
        found.append(row)
    return found


class _Line(pydantic.BaseModel):
    """What readers of a log rely on."""

    model_config = pydantic.ConfigDict(strict=True)

    step: int
    site: str
    mean_weight: list[float] = pydantic.Field(min_length=1)
    share: list[float]
    entropy: float

    @pydantic.model_validator(mode="after")
    def _same_experts(self) -> Self:
        if len(self.mean_weight) != len(self.share):
            raise ValueError("mean_weight and share differ in length")
        return self


def _damaged(path: Path, number: int, wrong: str) -> DataError:
    return DataError(
        f"{path}, line {number}: is no line of a routing log: {wrong}; move the file "
        "away or remove the line"
    )


def _step(line: str) -> float:
    """Step of a line; infinite where a kill cut it short."""
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return math.inf


def _rounded(value: Any) -> Any:
    """Six significant digits are enough to read and keep the file small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
