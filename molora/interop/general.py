"""GenKnowSub: what adapters of general knowledge say is taken from every expert.

    delta:   W_e = s_e B_e A_e - 1/G sum_g s_g B_g A_g            rank r_e + sum_g r_g
    factors: W_e = s_e (B_e - 1/G sum_g B_g) (A_e - 1/G sum_g A_g)             rank r_e

``delta`` is the difference of the updates, exactly. ``factors`` is what PEFT computes:
its product holds cross terms, and is another update than the difference. Factors stored
in half precision are computed with in float32.

Reference: GenKnowSub, 2025, https://aclanthology.org/2025.acl-short.54
Shape legend: E experts; G general adapters; I in features, O out features, r rank.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from molora.errors import CheckpointError
from molora.interop.peft_folder import PeftLora

Subtract = Literal["delta", "factors"]


def subtract_general(
    lora: PeftLora, general: Sequence[PeftLora], form: Subtract
) -> PeftLora:
    """Take the mean of general adapters from an adapter.

    Args:
        lora: An expert.
        general: Adapters with the same layers, at least one.
        form: Which difference; see the top of this file.

    Raises:
        CheckpointError: Under ``factors``, ranks differ.
    """
    made = {}
    for path in lora.factors:
        a_rI, b_Or = _wide(lora, path)
        others = [_wide(g, path) for g in general]
        if form == "factors":
            made[path] = _apart(lora, path, others)
            continue
        # the expert's scale is applied to the whole
        shares = [-g.scales[path] / (len(general) * lora.scales[path]) for g in general]
        b_OR = [b_Or, *(s * b for s, (_, b) in zip(shares, others, strict=True))]
        made[path] = torch.cat([a_rI, *(a for a, _ in others)]), torch.cat(b_OR, 1)
    return dataclasses.replace(lora, factors=made)


def _wide(lora: PeftLora, path: str) -> tuple[Tensor, Tensor]:
    """A and B of a layer in at least float32."""
    a_rI, b_Or = lora.factors[path]
    dtype = torch.promote_types(a_rI.dtype, torch.float32)
    return a_rI.to(dtype), b_Or.to(dtype)


def _apart(
    lora: PeftLora, path: str, others: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    a_rI, b_Or = _wide(lora, path)
    if any(a.shape != a_rI.shape for a, _ in others):
        ranks = [len(a_rI), *(len(a) for a, _ in others)]
        raise CheckpointError(
            f"import_peft: general_form 'factors' subtracts A and B row by row, but "
            f"{lora.folder} and the general adapters have ranks {ranks} at {path}; "
            "set it to 'delta'"
        )
    mean_rI = torch.stack([a for a, _ in others]).mean(0)
    mean_Or = torch.stack([b for _, b in others]).mean(0)
    return a_rI - mean_rI, b_Or - mean_Or
