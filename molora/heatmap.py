"""The use of the experts as a picture: experts by layers, one panel per task."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from molora.errors import ConfigError
from molora.usage import TaskUse

COLUMNS = 2
"""Panels side by side."""

TICKS = 16
"""Most labels on one axis."""


def draw(panels: Mapping[str, TaskUse], path: str | Path) -> None:
    """Draw mean gates, experts by layers, and save them as PNG.

    All panels share one colour scale, which starts at 0. An expert that a layer does
    not have is left white.

    Args:
        panels: Use by title.
        path: File to write.

    Raises:
        ConfigError: The file cannot be written.
    """
    # the tasks of a recording may have reached different layers
    layers = list(dict.fromkeys(n for use in panels.values() for n in use.layers()))
    grids = {title: _grid(use, layers) for title, use in panels.items()}
    experts = max(len(grid) for grid in grids.values())
    figure, axes = _canvas(len(panels), len(layers), experts)
    top = max(float(numpy.nanmax(grid)) for grid in grids.values())
    for axis, (title, grid) in zip(axes, grids.items(), strict=False):
        image = axis.imshow(
            grid, vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="none"
        )
        axis.set_title(f"{title} ({panels[title].tokens:,} tokens)", fontsize=10)
        _label(axis, layers, len(grid))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label="mean gate")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def _canvas(panels: int, layers: int, experts: int) -> tuple[Figure, list[Axes]]:
    """A figure without a display, large enough for every label."""
    columns = min(COLUMNS, panels)
    rows = math.ceil(panels / columns)
    width = min(max(3.4, 0.25 * min(layers, TICKS) + 1.4), 6.0)
    height = min(max(2.0, 0.22 * min(experts, TICKS) + 1.1), 5.0)
    figure = Figure(
        figsize=(columns * width + 1.0, rows * height + 0.3),
        dpi=150,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _grid(use: TaskUse, layers: list[str]) -> Any:
    """Mean gates [experts, layers]; NaN where a layer lacks an expert."""
    means = use.layers()
    experts = max(len(mean.gate) for mean in means.values())
    grid = numpy.full((experts, len(layers)), numpy.nan)
    for column, layer in enumerate(layers):
        if layer in means:
            gate = means[layer].gate
            grid[: len(gate), column] = gate
    return grid


def _label(axis: Axes, layers: list[str], experts: int) -> None:
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("expert", fontsize=9)
    axis.set_xticks(*_ticks(layers), fontsize=8)
    axis.set_yticks(*_ticks([str(expert) for expert in range(experts)]), fontsize=8)


def _ticks(names: list[str]) -> tuple[range, list[str]]:
    """Positions and labels, thinned to what is readable."""
    places = range(0, len(names), math.ceil(len(names) / TICKS))
    return places, [names[i] for i in places]
