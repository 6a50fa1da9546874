"""molora inspect, molora validate and molora methods."""

import re
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from molora.checkpoint import verify
from molora.collapse import COLLAPSERS
from molora.commands import session
from molora.errors import ConfigError, DataError
from molora.experts import EXPERTS
from molora.registry import Registry
from molora.routers import OBJECTIVES, ROUTERS
from molora.run_config import RunConfig
from molora.saved import SavedAdapter, read_adapter
from molora.systems import SYSTEMS
from molora.training.data import build_mixture, load_task_rows
from molora.training.recipes import RECIPES
from molora.training.tasks import Split
from molora.usage import layer_of

REGISTRIES: dict[str, Registry[Any]] = {
    "experts": EXPERTS,
    "router": ROUTERS,
    "balance": OBJECTIVES,
    "collapse": COLLAPSERS,
    "training.recipe": RECIPES,
}
"""Every table of names, by the section of the YAML that names them."""


def methods() -> None:
    """Print every registered name, and systems made of them, with their papers."""
    table = Table(title="Registered methods")
    for head in ("where", "name", "paper", "what, and its limitations"):
        table.add_column(head, overflow="fold", no_wrap=head in ("where", "name"))
    for kind, registry in REGISTRIES.items():
        for name, entry in registry.entries().items():
            what = _what(entry.summary, entry.limitations)
            table.add_row(kind, name, entry.paper, what)
        table.add_section()
    for system in SYSTEMS:
        made = system.made_of + (f" (configs/{system.config})" if system.config else "")
        what = _what(made, system.limitations)
        table.add_row("system", system.name, system.paper, what)
    session.out.print(table)


def _what(summary: str, limitations: str) -> Text:
    """A cell: what it is, and fainter what it is not."""
    text = Text(summary)
    if limitations:
        text.append(f"\n{limitations}", style="dim")
    return text


def inspect(folder: Path) -> None:
    """Check an adapter's files and print what is in them.

    Args:
        folder: What ``model.save_pretrained`` wrote, or a checkpoint.

    Raises:
        CheckpointError: It is no adapter, or not whole.
    """
    session.require_adapter(folder)
    manifest = verify(folder)
    saved = read_adapter(folder)
    shown = yaml.safe_dump(saved.file.adapter, sort_keys=False, default_flow_style=None)
    session.say(f"{folder}: whole, every checksum matches")
    session.say(f"base model: {saved.file.base_model_name_or_path}")
    versions = (f"{name} {version}" for name, version in manifest["versions"].items())
    session.say(f"format {manifest['format_version']}, {', '.join(versions)}")
    session.say(shown.rstrip())
    session.out.print(_sites_table(saved))
    for part in ("experts", "router"):
        values = sum(
            tensor.numel()
            for name, tensor in saved.tensors.items()
            if f".{part}." in name
        )
        session.say(f"values in {part}: {values:,}")


def _sites_table(saved: SavedAdapter) -> Table:
    """Sites that are alike in one line each."""
    values: dict[str, int] = {}
    for name, tensor in saved.tensors.items():
        path = re.split(r"[.](?:experts|router)[.]", name)[0]
        values[path] = values.get(path, 0) + tensor.numel()
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, count in values.items():
        site = saved.config.site(path)
        experts = site.experts.adapted().to_dict()
        routed = site.router.kind if site.experts.num_experts > 1 else "none"
        key = (
            path.rpartition(".")[2],
            str(site.experts.num_experts),
            # 0 and null leave the size to another setting
            str(experts.get("r", experts.get("init_r")) or "-"),
            routed,
            f"{count:,}",
        )
        groups.setdefault(key, []).append(path)
    table = Table(title=f"{len(values)} target layers")
    for head in ("module", "experts", "rank", "router", "values each", "layers"):
        table.add_column(head, justify="left" if head == "module" else "right")
    for cells, paths in groups.items():
        table.add_row(*cells, _spans([layer_of(path) for path in paths]))
    return table


def _spans(layers: list[str]) -> str:
    """Layer numbers with runs shortened: 0-3, 7."""
    if not all(layer.isdigit() for layer in layers):
        return ", ".join(layers)
    spans: list[list[int]] = []
    for layer in sorted(map(int, layers)):
        if spans and layer <= spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans)


def validate(config: RunConfig, deep: bool) -> None:
    """Check a run beyond its settings, which were checked when it was read.

    Args:
        config: The run.
        deep: Also load the base model, wrap it and encode every row.

    Raises:
        MoloraError: What does not fit; all problems of the data in one message.
    """
    session.out.print(_data_table(config))
    if deep:
        model, tokenizer = session.base(config)
        session.give_adapter(config, model)
        build_mixture(config.data, tokenizer).summary.print(session.out)
        session.eval_sets(config, tokenizer)
    else:
        session.note("--deep also loads the base model, wraps it and reads every row")
    session.say("valid")


def _data_table(config: RunConfig) -> Table:
    """Rows of every task by split; reads all of them."""
    table = Table(title="Data")
    table.add_column("task")
    for split in ("train", "eval"):
        table.add_column(f"{split} rows", justify="right")
    problems = []
    tasks = config.data.tasks
    for task in session.progress(tasks, "Reading"):
        counts = []
        splits: list[tuple[Split, str | None]] = [
            ("train", task.train),
            ("eval", task.eval),
        ]
        for split, source in splits:
            try:
                rows = load_task_rows(task, split) if source else []
            except (ConfigError, DataError) as error:
                problems.append(str(error))
                rows = []
            counts.append(f"{len(rows):,}" if source else "-")
        table.add_row(task.name, *counts)
    if problems:
        raise DataError("\n".join(problems))
    return table
