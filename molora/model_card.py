"""README.md of a saved adapter: what it is, and what was measured about it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn

from molora.config import AdapterConfig, SiteConfig
from molora.layer import MoloraLinear
from molora.model import sites

MARK = "<!-- written by molora, which writes it anew unless this line is removed -->"

_USE = """```python
import molora
from molora.base_models import load_base

base, tokenizer = load_base("{base}")
model = molora.load(base, "path/of/this/folder")
```"""


def model_card(model: nn.Module, base: str | None) -> str:
    """Text of the card; the same for the same adapter.

    Args:
        model: A wrapped model. The numbers of a collapse are taken from its
            ``molora_report`` if it has one.
        base: Name of the base model.
    """
    found = sites(model)
    parts = [
        f"---\n{_header(model, base)}\n---",
        MARK,
        "# Adapter for " + (f"`{base}`" if base else "a model without a name"),
        _what(found),
        _table(model),
        "To use it:",
        _USE.format(base=base or "path/of/the/base"),
    ]
    report = getattr(model, "molora_report", None)
    if isinstance(report, Mapping):
        parts += ["## Collapse", *_collapse(report)]
    return "\n\n".join(parts) + "\n"


def is_generated(card: Path) -> bool:
    """Whether a card may be written anew."""
    return MARK in card.read_text("utf-8", errors="replace")


def _header(model: nn.Module, base: str | None) -> str:
    """Metadata of the card as YAML."""
    can_generate = getattr(model, "can_generate", lambda: False)()
    # a folder of one machine means nothing to the hub
    is_local = base is None or base.startswith(("/", ".", "~")) or Path(base).exists()
    data = ModelCardData(
        library_name="molora",
        pipeline_tag="text-generation" if can_generate else None,
        tags=["molora", "adapter", "lora", "mixture-of-experts"],
        base_model=None if is_local else base,
        base_model_relation=None if is_local else "adapter",
    )
    return str(data.to_yaml())


def _what(found: Mapping[str, MoloraLinear]) -> str:
    trained = sum(
        site.experts.count()
        + sum(p.numel() for p in (site.router.parameters() if site.router else ()))
        for site in found.values()
    )
    if any(site.experts.num_experts > 1 for site in found.values()):
        kind = "A mixture of experts, which routers at the layers below weigh by token."
    else:
        kind = "One adapter, the same for every token."
    return f"{kind} {trained:,} trained parameters at {len(found)} layers."


def _table(model: nn.Module) -> str:
    """Layers of one name and setting in a row."""
    config = model.molora_config
    assert isinstance(config, AdapterConfig)
    rows = Counter(
        (path.rpartition(".")[2], *_settings(config.site(path)))
        for path in sites(model)
    )
    lines = ["| layer | number | experts | rank | router |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {number} | {experts} | {rank} | {router} |"
        for (name, experts, rank, router), number in rows.items()
    ]
    return "\n".join(lines)


def _settings(site: SiteConfig) -> tuple[str, str, str]:
    """Experts, rank and router of a layer in words."""
    number = site.experts.num_experts
    rank = getattr(site.experts, "r", "-")
    top = f", top {site.router.top_k}" if hasattr(site.router, "top_k") else ""
    router = site.router.kind + top if number > 1 else "none"
    return f"{number} {site.experts.kind}", str(rank), router


def _collapse(report: Mapping[str, Any]) -> list[str]:
    """Numbers of a collapse, those that were measured."""
    parts = [f"Made by the method `{report['method']}`."]
    if report.get("mean_error") is not None:
        parts.append(
            f"Relative error of a layer's update on {report['tokens_held']} held-out "
            f"tokens: mean {report['mean_error']:.4f}, worst "
            f"{report['worst_error']:.4f} (`{report['worst_site']}`)."
        )
    if report.get("losses"):
        head = ["| task | loss before | loss after |", "|---|---|---|"]
        rows = [
            f"| {task} | {loss['before']:.4f} | {loss['after']:.4f} |"
            for task, loss in report["losses"].items()
        ]
        parts.append("\n".join([*head, *rows]))
    return parts
