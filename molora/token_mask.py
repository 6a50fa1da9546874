"""Which tokens of a batch are real, told from the arguments of a forward.

Shape legend
    B rows   S positions
"""

from typing import Any

import torch
from torch import Tensor

from molora.errors import RoutingError


def mask_from_attention(mask: Tensor, positions: int | None, cache: Any) -> Tensor:
    """Real tokens of a 2-D mask, or of the diagonal of a 4-D one.

    Args:
        mask: Attention mask [B, keys], or [B, 1, queries, keys].
        positions: S, the length of the input; None when it is not known.
        cache: Key-value cache of the forward, if any.

    Returns:
        Bool [B, S].

    Raises:
        RoutingError: The mask has another form.
    """
    if mask.dim() == 4:
        rows, _, queries, keys = mask.shape
        # a static cache has columns after those of the input; stay on the device
        start: Any = keys - queries
        if cache is not None:
            start = torch.as_tensor(cache.get_seq_length()).clamp(max=start)
        columns_S = torch.arange(queries, device=mask.device) + start
        columns_BS1 = columns_S.expand(rows, -1).unsqueeze(-1)
        diagonal = mask[:, 0].gather(-1, columns_BS1).squeeze(-1)
        return diagonal >= 0 if diagonal.is_floating_point() else diagonal.bool()
    if mask.dim() != 2:
        raise RoutingError(
            f"attention_mask has shape {tuple(mask.shape)}; routing reads a 2-D mask "
            "[rows, positions] or a 4-D one [rows, 1, positions, positions]"
        )
    real = mask.bool()
    return real if positions is None else real[:, -positions:]


def mask_from_positions(position_ids: Tensor) -> Tensor:
    """Real tokens of packed rows, told from position ids alone.

    A token is real when its position follows that of the token before it, or when it
    starts a sequence: position 0, or the first column, followed by the next position.
    Constant or negative positions are alignment padding. A sequence of one single
    token inside a longer row cannot be told from padding and counts as padding.

    Args:
        position_ids: [B, S] integers.

    Returns:
        Bool [B, S].
    """
    if position_ids.shape[1] < 2:
        return position_ids >= 0
    follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
    none = torch.zeros_like(follows[:, :1])
    continues = torch.cat([none, follows], dim=1)
    leads = torch.cat([follows, none], dim=1)
    starts = position_ids == 0
    starts[:, 0] = True
    return (continues | (starts & leads)) & (position_ids >= 0)


def mask_from_labels(labels: Tensor) -> Tensor:
    """Real tokens of right-padded rows, told from labels alone.

    Everything up to a row's last supervised token is real: the prompt, which labels
    leave out, included. A row without any supervised token is all padding.

    Args:
        labels: [B, S] integers, -100 where not supervised.

    Returns:
        Bool [B, S].
    """
    supervised = (labels != -100).int()
    return supervised.flip(1).cumsum(1).flip(1) > 0
