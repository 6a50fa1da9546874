"""Passes of the uncollapsed model over the calibration rows: which sites, and how.

Sites are taken in groups whose sums fit into the memory budget; each group costs one
pass. Sites that read one and the same tensor (q, k and v; gate and up) share the
covariance of their inputs; the first batch tells which do.

Shape legend: see factors.py.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from molora.collapse.calibration import Batch
from molora.collapse.factors import SiteFactors
from molora.errors import ConfigError
from molora.layer import MoloraLinear
from molora.model import prompts, sites, tasks
from molora.prompt import prompt_from_labels


def shared_inputs(model: nn.Module, batch: Batch) -> dict[str, str]:
    """Run one batch and find the sites that read the same tensor.

    Returns:
        For every site that was reached, the first of those with the same input: itself
        or an earlier site.
    """
    leaders: dict[str, str] = {}
    last: tuple[Tensor | None, int, str] = (None, 0, "")

    def watch(site: MoloraLinear, args: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal last
        x, path = args[0], site.path
        if x is not last[0] or x._version != last[1]:
            last = (x, x._version, path)
        # a site that runs twice with other neighbours shares with none
        again = leaders.get(path, last[2]) != last[2]
        leaders[path] = path if again else last[2]

    with hooked(model, sites(model), watch):
        forward(model, batch)
    return leaders


def plan(
    factors: dict[str, SiteFactors],
    leaders: dict[str, str],
    parts: int,
    budget_mb: int,
) -> list[list[str]]:
    """Divide the sites into groups whose sums fit into the budget.

    Args:
        factors: Experts of each site.
        leaders: What ``shared_inputs`` found.
        parts: For how many parts of the rows moments are kept.
        budget_mb: MiB for one group: its sums, and two covariances to work in.

    Raises:
        ConfigError: Sites that share an input do not fit by themselves.
    """
    units: dict[str, list[str]] = {}
    for path in factors:
        units.setdefault(leaders.get(path, path), []).append(path)
    groups: list[list[str]] = []
    total, widest = 0, 0
    for unit in units.values():
        wide = factors[unit[0]].A_RI.shape[1]
        rows = [factors[path].Bt_QO.shape[0] for path in unit]
        size = 8 * parts * (wide**2 + sum(q * (wide + q) for q in rows))
        needed = size + 16 * wide**2
        if needed > budget_mb * 2**20:
            raise ConfigError(
                f"collapse.memory_budget_mb={budget_mb}: site {unit[0]!r} alone needs "
                f"{-(-needed // 2**20)}"
            )
        widest = max(widest, wide)
        if not groups or total + size + 16 * widest**2 > budget_mb * 2**20:
            groups.append([])
            total, widest = 0, wide
        groups[-1] += unit
        total += size
    return groups


def forward(model: nn.Module, batch: Batch, labels: Tensor | None = None) -> Any:
    """Run the model on a batch, with the names of its tasks if it has them.

    Args:
        model: A wrapped model.
        batch: Calibration rows.
        labels: [B, S], where the loss is wanted.

    Returns:
        The model's output.
    """
    device = next(model.parameters()).device
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.inputs.items()
    }
    if _logits_are_unread(model) and "labels" not in inputs and labels is None:
        # nobody looks at the logits, which cost as much as several layers
        inputs["logits_to_keep"] = 1
    if labels is not None:
        inputs["labels"] = labels.to(device)
    with contextlib.ExitStack() as stack:
        if batch.names:
            stack.enter_context(tasks(model, batch.names))
        if batch.labels is not None:
            stack.enter_context(prompts(model, prompt_from_labels(batch.labels)))
        return model(**inputs)


def _logits_are_unread(model: nn.Module) -> bool:
    """Whether the model can leave out logits, and no site is behind them."""
    takes = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    body = getattr(model, "base_model", model)
    if not takes or body is model:
        return False
    inside = set(body.modules())
    return all(site in inside for site in sites(model).values())


@contextlib.contextmanager
def hooked(
    model: nn.Module, found: dict[str, MoloraLinear], hook: Callable[..., None]
) -> Iterator[None]:
    """Call hook(site, inputs, output) after the forward of each of the sites.

    Not while the adapter is off, as it is in the first pass of a forward.
    """

    def adapted(site: MoloraLinear, args: tuple[Tensor, ...], y: Tensor) -> None:
        if not site.runtime.disabled:
            hook(site, args, y)

    with contextlib.ExitStack() as stack:
        for site in found.values():
            stack.callback(site.register_forward_hook(adapted).remove)
        yield


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; every module's mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
