"""The prompt of each row, which routers with ``input: sequence`` read.

    s[b] = sum_t p[b, t] x[b, t] / sum_t p[b, t]        p = 1 at tokens of the prompt

Everything up to the first supervised token is the prompt in training, and what
``generate`` was called with at inference; in a forward by hand without labels it is
the whole input, unless ``molora.prompts`` names it. The mean stays with the key-value
cache, so that later tokens route as the prompt did; what was named for a filled cache
is not read.

Shape legend
    B rows   S positions   I in features
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DummyLayer

from molora.errors import RoutingError

Means = dict[str, Tensor]
"""Mean input [B, I] over the prompt, by the site whose router reads it."""


class PromptLayer(DummyLayer):
    """What a key-value cache keeps of the prompt: its means, in the cache's row order.

    Args:
        means: By site.
        adapter: Identity of the adapter that they belong to.
    """

    def __init__(self, means: Means, adapter: str):
        super().__init__()  # type: ignore[no-untyped-call]
        self.means, self.adapter = means, adapter

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.means = {
            site: mean_BI.index_select(0, indices.to(mean_BI.device))
            for site, mean_BI in self.means.items()
        }

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.means = {
            site: mean_BI.repeat_interleave(repeats, 0)
            for site, mean_BI in self.means.items()
        }

    def reset(self) -> None:
        """Forget the prompt; the next forward begins another one."""
        self.means = {}


@dataclass(frozen=True)
class Prompt:
    """What one forward tells of the prompt.

    Attributes:
        mask_BS: True at its tokens, as given or told by labels; None: all that is real.
        kept: Means that the cache brought along; None when this forward reads them.
        source: Where ``mask_BS`` came from, for messages.
        positions: S of the forward; None where it is not known.
    """

    mask_BS: Tensor | None
    kept: Means | None
    source: str
    positions: int | None = None

    def of_rows(
        self,
        real_BS: Tensor | None,
        shape: Sequence[int],
        device: torch.device,
        site: str,
    ) -> Tensor:
        """Tokens of the prompt that a site sees.

        Args:
            real_BS: The token mask; None when all are real.
            shape: (B, S) of the site's input.
            device: Where the site computes.
            site: Module path, for the message.

        Returns:
            Bool [B, S].

        Raises:
            RoutingError: The site does not see every position, or a row has no prompt.
        """
        rows, positions = shape
        if self.positions not in (None, positions):
            raise RoutingError(
                f"site {site!r} sees {positions} of the {self.positions} positions of "
                "a forward, and router.input: sequence reads the whole prompt; add the "
                "site to exclude_modules"
            )
        prompt_BS = torch.ones(rows, positions, dtype=torch.bool, device=device)
        for mask_BS in (self.mask_BS, real_BS):
            if mask_BS is None:
                continue
            if mask_BS.shape[1] != positions or rows % mask_BS.shape[0]:
                raise RoutingError(
                    f"router.input: sequence: the prompt {tuple(mask_BS.shape)} "
                    f"({self.source}) does not fit an input of {rows} rows by "
                    f"{positions} positions; a prompt that is filled in chunks, or "
                    "named with other rows, cannot be routed"
                )
            # beams repeat each row
            repeats = rows // mask_BS.shape[0]
            prompt_BS = prompt_BS & mask_BS.to(device).repeat_interleave(repeats, 0)
        if not prompt_BS.any(1).all():
            raise RoutingError(
                f"router.input: sequence: a row has no prompt ({self.source}); every "
                "row needs a real token before its first supervised one, or one that "
                "molora.prompts names"
            )
        return prompt_BS


def read_prompt(
    arguments: dict[str, Any],
    real_BS: Tensor | None,
    given_BS: Tensor | None,
    training: bool,
    adapter: str,
) -> Prompt:
    """Tell the prompt from the arguments of a forward, before it runs.

    Args:
        arguments: Keyword arguments of the model's forward.
        real_BS: The token mask; None when all are real.
        given_BS: What ``molora.prompts`` named; wins over labels. Positions that come
            after it are no prompt.
        training: Whether the model is in training mode.
        adapter: Identity of the adapter, which the means in a cache must carry.

    Raises:
        RoutingError: Rows are packed, the cache was filled without this adapter, or a
            forward in training tells no prompt.
    """
    cache, labels = arguments.get("past_key_values"), arguments.get("labels")
    if cache is not None and bool(cache.get_seq_length() > 0):
        kept = _kept_means(cache, adapter)
        if kept is None:
            raise RoutingError(
                "router.input: sequence: the cache was filled without this adapter, so "
                "the prompt is not known; run the prompt again with the adapter on"
            )
        return Prompt(None, kept, "the cache")
    _refuse_packed(arguments.get("position_ids"), real_BS)
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    positions = inputs.shape[1] if isinstance(inputs, Tensor) else None
    if given_BS is not None:
        later = 0 if positions is None else max(positions - given_BS.shape[1], 0)
        given_BS = F.pad(given_BS, (0, later))
        return Prompt(given_BS, None, "as given to molora.prompts", positions)
    if isinstance(labels, Tensor) and labels.dim() == 2:
        told_BS = prompt_from_labels(labels)
        return Prompt(told_BS, None, "as told by labels", positions)
    if training:
        raise RoutingError(
            "router.input: sequence: in training the prompt of a row ends where labels "
            "begin, and this forward has no labels; pass labels, or run it inside "
            "molora.prompts(model, mask)"
        )
    return Prompt(None, None, "all real tokens", positions)


def _refuse_packed(position_ids: Any, real_BS: Tensor | None) -> None:
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return
    starts_BS = position_ids == 0
    if real_BS is not None:
        starts_BS = starts_BS & real_BS.to(starts_BS.device)
    if bool((starts_BS.sum(1) > 1).any()):
        raise RoutingError(
            "router.input: sequence: several sequences are packed into one row, which "
            "have no common prompt; turn packing off"
        )


def _kept_means(cache: Any, adapter: str) -> Means | None:
    """What a cache keeps of its prompt; None where this adapter has not seen one."""
    found = [layer for layer in _prompt_layers(cache) if layer.adapter == adapter]
    return found[0].means or None if found else None


def _prompt_layers(cache: Any) -> list[PromptLayer]:
    layers = getattr(cache, "layers", None) or []
    return [layer for layer in layers if isinstance(layer, PromptLayer)]


def keep_means(cache: Any, means: Means, adapter: str) -> None:
    """Leave the means of a prompt in the cache that the prompt filled.

    Raises:
        RoutingError: The cache has another form.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise RoutingError(
            "router.input: sequence cannot keep the prompt in a "
            f"{type(cache).__name__}; use a cache of transformers that has layers, or "
            "use_cache=False"
        )
    means = {site: mean_BI.detach() for site, mean_BI in means.items()}
    found = _prompt_layers(cache)
    if found:
        found[0].means, found[0].adapter = means, adapter
    else:
        layers.append(PromptLayer(means, adapter))


def prompt_from_labels(labels: Tensor) -> Tensor:
    """Everything before the first supervised token of each row.

    Args:
        labels: [B, S] integers, -100 where not supervised.

    Returns:
        Bool [B, S]; a row without any supervised token is all prompt.
    """
    return (labels != -100).int().cumsum(1) == 0


def prompt_mean(x: Tensor, prompt_BS: Tensor) -> Tensor:
    """Mean over the prompt of each row.

    Args:
        x: [B, S, I].
        prompt_BS: 1 at tokens of the prompt, 0 elsewhere; each row has some.

    Returns:
        [B, I] in at least float32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        weight_BS = prompt_BS.to(wide)
        sum_BI = torch.einsum("bs,bsi->bi", weight_BS, x.to(wide))
        return sum_BI / weight_BS.sum(1, keepdim=True)
