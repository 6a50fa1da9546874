"""What the routers do, as one web page that needs nothing but itself.

Data stands in the page as JSON, in which ``<``, ``>`` and ``&`` are written as escapes,
and reaches the document as text only; the page's policy lets no other script run and
nothing be fetched.

The numbers are defined in usage.py, training/monitor.py and similarity.py.

Legend: S tokens   E experts
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from molora.atomic import atomic_text
from molora.errors import ConfigError
from molora.model import sites
from molora.page.similarity import expert_similarity as expert_similarity
from molora.records import RoutingTrace
from molora.report import OVERALL, RoutingReport
from molora.token_strip import token_gates
from molora.training.routing_log import read_log
from molora.usage import TaskUse, Use, layer_of

LOG_STEPS = 200
"""Most steps of the training log that a page shows."""

LOG_NUMBERS = 1_000_000
"""Most numbers of the training log that a page holds, as long as 20 steps fit."""

DIGITS = 6
"""Significant digits of the numbers in a page."""


@dataclass(frozen=True)
class Prompts:
    """Texts and how their tokens were routed.

    Attributes:
        trace: A recording with ``keep_tokens``; one forward of one row per text.
        tokens: Of each text, its S tokens as text.
    """

    trace: RoutingTrace
    tokens: Sequence[Sequence[str]]


def save_page(
    path: str | Path,
    model: nn.Module,
    trace: RoutingTrace,
    *,
    title: str,
    log: Path,
    prompts: Prompts | None = None,
) -> None:
    """Write a page of use by task, use in training, texts by token, expert similarity.

    The page grows with sites x experts x (tasks + tokens of the texts + log steps); of
    a long training log some steps are left out, and the page says so.

    Args:
        path: File to write, whole or not at all.
        model: The wrapped model, for the similarity of its experts.
        trace: A recording, by task where it named tasks.
        title: Heading.
        log: What training wrote about its routers (``routing_log.jsonl``); the page
            says so where there is no such file.
        prompts: Texts to show token by token.

    Raises:
        RoutingError: Nothing was recorded.
        DataError: The log is damaged.
        ConfigError: The file cannot be written, or is no regular file.
    """
    data = page_data(model, trace, title=title, log=log, prompts=prompts)
    try:
        atomic_text(Path(path), render(data))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def page_data(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    title: str,
    log: Path,
    prompts: Prompts | None = None,
) -> dict[str, Any]:
    """All that a page shows, JSON-ready; arguments as in ``save_page``.

    What belongs to sites or layers is in lists in the order of ``places`` and
    ``layers``, with None where there is nothing.
    """
    report = RoutingReport(trace)
    paths = list(trace.sites)
    layers = list(dict.fromkeys(layer_of(path) for path in paths))
    uses = {OVERALL: report.overall, **report.tasks}
    modules = sites(model)
    return {
        "title": title,
        "layers": layers,
        "places": _places(paths, layers),
        "tasks": [_task(name, use, paths, layers) for name, use in uses.items()],
        "log": _log(log, paths),
        "texts": [] if prompts is None else _texts(prompts, paths),
        "similarity": [expert_similarity(modules[path]).tolist() for path in paths],
    }


def render(data: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        data: What ``page_data`` returned.
    """
    shown = json.dumps(_plain(data), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        shown = shown.replace(sign, f"\\u{ord(sign):04x}")
    script = _asset("parts.js") + _asset("page.js")
    style = _asset("page.css")
    # in one pass, so that nothing is looked for in what was put in
    before, *rest = _asset("page.html").split("@@")
    parts = {
        # half of a surrogate pair, as in a folder's name that is no UTF-8, becomes "?"
        "TITLE": html.escape(data["title"].encode("utf-8", "replace").decode()),
        "POLICY": (
            f"default-src 'none'; script-src '{_sha256(script)}'; "
            f"style-src '{_sha256(style)}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        ),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": shown,
    }
    return before + "".join(parts.get(piece, piece) for piece in rest)


def _asset(name: str) -> str:
    return (files("molora.page") / name).read_text("utf-8")


def _sha256(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _places(paths: Sequence[str], layers: Sequence[str]) -> list[dict[str, Any]]:
    """Of each site its path, the index of its layer, and the module without it."""
    modules = []
    for path in paths:
        head, _, tail = f".{path}.".partition(f".{layer_of(path)}.")
        modules.append((head.strip("."), tail.strip(".")))
    tails: dict[str, set[str]] = {}
    for head, tail in modules:
        tails.setdefault(tail, set()).add(head)
    places = []
    for path, (head, tail) in zip(paths, modules, strict=True):
        # layers of encoder and decoder, for example, have numbers in common
        name = tail if tail and len(tails[tail]) == 1 else f"{head}.*.{tail}"
        if layer_of(path) == path:
            name = path
        layer = layers.index(layer_of(path))
        places.append({"path": path, "layer": layer, "module": name})
    return places


def _task(
    name: str, use: TaskUse, paths: Sequence[str], layers: Sequence[str]
) -> dict[str, Any]:
    means = use.layers()
    return {
        "name": name,
        "tokens": use.tokens,
        "sites": [_use(use.sites.get(path)) for path in paths],
        "layers": [_use(means.get(layer)) for layer in layers],
    }


def _use(use: Use | None) -> dict[str, Any] | None:
    return None if use is None else asdict(use)


def _log(file: Path, paths: Sequence[str]) -> dict[str, Any]:
    """Weight, share and entropy by step; where there are none, the reason."""
    rows = read_log(file) if file.is_file() else None
    # the page may be shown to others, whom the rest of the path does not concern
    name = f"{file.resolve().parent.name}/{file.name}"
    if not rows:
        return {"missing": f"{name} is {'not there' if rows is None else 'empty'}"}
    logged = list(dict.fromkeys(row["step"] for row in rows))
    at_step = sum(2 * len(row["share"]) + 1 for row in rows) / len(logged)
    most = max(20, min(LOG_STEPS, int(LOG_NUMBERS / at_step)))
    every = math.ceil(len(logged) / most)
    # the last step always, and evenly spaced ones before it
    steps = logged[::-1][::every][::-1]
    by_site: dict[str, dict[int, dict[str, Any]]] = {}
    entropies: dict[int, list[float]] = {}
    for row in rows:
        by_site.setdefault(row["site"], {})[row["step"]] = row
        entropies.setdefault(row["step"], []).append(row["entropy"])
    return {
        "file": name,
        "logged": len(logged),
        "steps": steps,
        "entropy": [_mean(entropies[step]) for step in steps],
        "sites": [
            {
                key: [by_site[path].get(step, {}).get(key) for step in steps]
                for key in ("mean_weight", "share", "entropy")
            }
            if path in by_site
            else None
            for path in paths
        ],
    }


def _mean(values: Sequence[float]) -> float:
    """NaN where a value is not finite, as after a run that diverged."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return math.fsum(values) / len(values)


def _texts(prompts: Prompts, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Tokens of each text, and their gates [S, E] by site."""
    sites_seen = prompts.trace.sites
    texts = []
    for number, tokens in enumerate(prompts.tokens):
        gates: list[list[list[float]] | None] = []
        for path in paths:
            if path not in sites_seen:
                gates.append(None)
                continue
            gates_SE = token_gates(prompts.trace, number, 0, path)
            # a site may have seen only the last tokens
            gates.append(gates_SE.tolist() if len(gates_SE) == len(tokens) else None)
        texts.append({"tokens": list(tokens), "gates": gates})
    return texts


def _plain(value: Any) -> Any:
    """Numbers with few digits; None for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
