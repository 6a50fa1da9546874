"""Adapters that rows name, trained in one forward as if each were trained by itself.

    loss = sum_a  mean of the token losses of adapter a's rows in this step

so an adapter's gradient is that of its own loss. Every adapter is handed to the
optimizer as tensors of its own, which are views of the stacked experts: without a
gradient where the step has no row of it, so that neither momentum nor weight decay
moves it. The views end at the adapter's own rank, since some optimizers (Adafactor)
scale an update by the size of its tensor. Gradients are clipped adapter by adapter.

Reference: Ye et al. 2023 (mLoRA), arXiv:2312.02515.

Shape legend
    B rows   S positions   V vocabulary   N tasks
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.errors import TrainingError
from molora.experts import LoRAExperts
from molora.layer import MoloraLinear
from molora.model import sites
from molora.routers import AdapterRouter
from molora.training.encoding import IGNORE


def is_apart(model: nn.Module) -> bool:
    """Whether the rows name their adapters at some site.

    Raises:
        TrainingError: At other sites they do not, or something that is trained is not
            of one adapter.
    """
    found = sites(model)
    named = {p: s for p, s in found.items() if isinstance(s.router, AdapterRouter)}
    if not named:
        return False
    for path, site in found.items():
        _check(path, site, next(iter(named.values())))
    stacks = {id(stack) for site in found.values() for stack in _stacks(site)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in stacks:
            raise TrainingError(
                f"{name} is trained by the rows of every adapter, which router.kind "
                "adapter keeps apart: freeze it"
            )
    return True


def _check(path: str, site: MoloraLinear, first: MoloraLinear) -> None:
    config = None if site.decider is None else site.decider.config
    assert first.router is not None
    if config is None:
        raise TrainingError(
            f"site {path!r} has one expert, which the rows of all adapters would "
            f"train; give it num_experts: {first.experts.num_experts} as "
            f"{first.path!r} has, or add it to exclude_modules"
        )
    if config != first.router.config:
        raise TrainingError(
            f"site {path!r} does not take the adapter that a row names, as "
            f"{first.path!r} does; give both the same router"
        )
    for name, values in site.experts.named_parameters():
        if values.requires_grad and values.shape[0] != site.experts.num_experts:
            raise TrainingError(
                f"site {path!r}: all adapters share {name}, so they cannot be trained "
                "apart; leave experts.shared out"
            )


def _stacks(site: MoloraLinear) -> list[nn.Parameter]:
    return [p for p in site.experts.parameters() if p.requires_grad]


def _ranks(site: MoloraLinear) -> Sequence[int | None]:
    """Rows of each adapter's tensors that are no padding; None is all of them."""
    experts = site.experts
    if isinstance(experts, LoRAExperts):
        return experts.ranks
    return [None] * experts.num_experts


class Apart(nn.Module):
    """The adapters of a model as parameters of their own, in the memory of the stacks.

    Args:
        model: A wrapped model, for which ``is_apart`` is true.

    Attributes:
        names: Of the adapters.
        parts: Parameters by adapter, as the optimizer sees them.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        found = list(sites(model).values())
        router = found[0].router
        assert isinstance(router, AdapterRouter)
        self.names = router.config.adapters
        self._wholes = [stack for site in found for stack in _stacks(site)]
        self._ranks = [_ranks(site) for site in found for _ in _stacks(site)]
        self.parts = nn.ModuleList(
            nn.ParameterList(
                nn.Parameter(stack.detach()[e, : ranks[e]])
                for stack, ranks in zip(self._wholes, self._ranks, strict=True)
            )
            for e in range(len(self.names))
        )

    def check(self) -> None:
        """Raise TrainingError when the model's parameters were moved since."""
        for part in self.parts:
            assert isinstance(part, nn.ParameterList)
            for own, whole in zip(part, self._wholes, strict=True):
                inside = whole.untyped_storage().data_ptr()
                if own.untyped_storage().data_ptr() != inside:
                    raise TrainingError(
                        "the model was moved or cast after its optimizer was made, "
                        "which would train a copy; make a new trainer"
                    )

    def hand_out(self, present: Sequence[str]) -> None:
        """Give every adapter its part of the gradients, the absent ones none.

        Args:
            present: Adapters that have a supervised token in this step.
        """
        for e, part in enumerate(self.parts):
            assert isinstance(part, nn.ParameterList)
            reached = self.names[e] in present
            for own, whole, ranks in zip(part, self._wholes, self._ranks, strict=True):
                grad = whole.grad if reached else None
                own.grad = None if grad is None else grad[e, : ranks[e]]

    def clip(self, limit: float) -> None:
        """Clip the gradient of every adapter to a norm of its own."""
        for part in self.parts:
            torch.nn.utils.clip_grad_norm_(part.parameters(), limit)


def supervised(batch: dict[str, Any], tasks: int) -> Tensor:
    """Supervised tokens of each task in a batch, int64 [N].

    Raises:
        TrainingError: The batch does not tell the tasks of its rows.
    """
    if "task_ids" not in batch or "labels" not in batch:
        raise TrainingError(
            "router.kind adapter needs the adapter of every row and its labels: train "
            "on a TaskMixture (build_mixture) whose tasks are the adapters, with "
            "molora.training.data.Collator"
        )
    count_B: Tensor = batch["labels"][:, 1:].ne(IGNORE).sum(1)
    return count_B.new_zeros(tasks).index_add_(0, batch["task_ids"], count_B)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss of each row.

    Args:
        logits: [B, S, V].
        labels: [B, S], which are shifted here.

    Returns:
        [B], at least float32.
    """
    wide_BSV = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    targets_BS = labels[:, 1:].to(logits.device)
    token_T = F.cross_entropy(
        wide_BSV.flatten(0, 1),
        targets_BS.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
    sums_B: Tensor = token_T.view(targets_BS.shape).sum(1)
    return sums_B
