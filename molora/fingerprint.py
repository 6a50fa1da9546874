"""Which base an adapter belongs to: its shape, and a sample of its weights.

A base is often trained in one dtype and run in another, so each site carries two
checksums, of the sample rounded to bfloat16 and to float16; one that agrees is enough.
Rounding goes to the nearest, ties to even, as loading does: float32 weights rounded
here equal the same file loaded as bfloat16. A base stored in float32 and loaded as
bfloat16 on one side and as float16 on the other agrees in neither.

A sample cannot tell two bases apart that differ in few values; it tells a fine-tuned
base from its parent, and any two that were trained apart.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molora.schema import Schema

SAMPLES = 4096
"""Largest number of weights looked at per site."""

# how a model is named, loaded, trained and sampled, not what it computes
_INCIDENTAL = re.compile(
    r"_.*|transformers_version|architectures|(torch_)?dtype|use_cache|return_dict|"
    r"output_.*|problem_type|id2label|label2id|chunk_size_feed_forward|.*_token_id|"
    r".*dropout|.*_pdrop|initializer_.*|quantization_config|attn_implementation|"
    r"pretraining_tp|task_specific_params|summary_.*|custom_pipelines|auto_map"
)


class SitePrint(Schema):
    """Weight of one target layer."""

    shape: list[int]
    """As the layer stores it."""
    bfloat16: str
    """Checksum of the sample in bfloat16."""
    float16: str
    """Checksum of the sample in float16."""


class Fingerprint(Schema):
    """A base, as far as an adapter depends on it."""

    config: dict[str, Any]
    """Config fields that say what the base computes."""
    sites: dict[str, SitePrint]
    """Target layers by module path."""


def fingerprint(model: nn.Module, weights: Mapping[str, Tensor]) -> Fingerprint:
    """Describe a base by its config and the weights that carry adapters.

    Args:
        model: The base, wrapped or not; its ``config`` is read if it has one.
        weights: Weight of each target layer before any merge, by module path.
    """
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    return Fingerprint(
        config=json.loads(json.dumps(_essential(to_dict()), default=str)),
        sites={path: _site(weight) for path, weight in weights.items()},
    )


def misfits(saved: Fingerprint, present: Fingerprint) -> list[str]:
    """Tell which target layers are missing, additional, or of another shape.

    Args:
        saved: The base that an adapter was trained on.
        present: The base at hand.
    """
    old, new = saved.sites, present.sites
    told = [f"{path} is missing" for path in old if path not in new]
    told += [f"{path} had no adapter" for path in new if path not in old]
    told += [
        f"{path} has the shape {new[path].shape} instead of {old[path].shape}"
        for path in old
        if path in new and new[path].shape != old[path].shape
    ]
    return told


def differences(saved: Fingerprint, present: Fingerprint) -> list[str]:
    """Tell where the config or the weights of equal layers differ.

    Config fields that only one side has are let be: other versions of transformers
    have other fields.

    Args:
        saved: The base that an adapter was trained on.
        present: The base at hand.
    """
    told = _config_differences(saved.config, present.config, "config.")
    old, new = saved.sites, present.sites
    other = [
        path
        for path in old
        if old[path].bfloat16 != new[path].bfloat16
        and old[path].float16 != new[path].float16
    ]
    if other:
        told.append(
            f"{len(other)} of {len(old)} target layers have other weights: "
            f"{shortened(other)}"
        )
    return told


def shortened(names: Sequence[str]) -> str:
    """First few of many names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _site(weight: Tensor) -> SitePrint:
    sample = _sample(weight)
    return SitePrint(
        shape=list(weight.shape),
        bfloat16=_checksum(sample.to(torch.bfloat16)),
        float16=_checksum(sample.to(torch.float16)),
    )


def _sample(weight: Tensor) -> Tensor:
    """Evenly spread values, at most SAMPLES of them."""
    flat = weight.detach().reshape(-1)
    # odd, so that a sample of rows of even length is no single column
    step = -(-flat.numel() // SAMPLES) | 1
    return flat[::step].cpu()


def _checksum(values: Tensor) -> str:
    data = values.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _essential(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields without the incidental ones, also in nested configs."""
    return {
        str(key): _essential(value) if isinstance(value, Mapping) else value
        for key, value in fields.items()
        if not _INCIDENTAL.fullmatch(str(key))
    }


def _config_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str
) -> list[str]:
    told = []
    for key in sorted(old.keys() & new.keys()):
        before, now = old[key], new[key]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            told += _config_differences(before, now, f"{where}{key}.")
        elif before != now:
            told.append(f"{where}{key} is {now!r} instead of {before!r}")
    return told
