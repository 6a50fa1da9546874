"""Which base an adapter belongs to: its shape, and a sample of its weights.

A base is often trained in one dtype and run in another, so each site carries two
checksums, of the sample rounded to bfloat16 and to float16; one that agrees is enough.
Rounding goes to the nearest, ties to even, as loading does: float32 weights rounded
here equal the same file loaded as bfloat16. A base stored in float32 and loaded as
bfloat16 on one side and as float16 on the other agrees in neither.

Of a quantised layer the shape alone is known: what its values round to depends on the
device and the dtype. There the input embedding tells, which quantisation leaves alone;
so an adapter goes with its base in every quantisation, and with none.

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
    bfloat16: str | None
    """Checksum of the sample in bfloat16; None for a quantised layer."""
    float16: str | None
    """Checksum of the sample in float16; None for a quantised layer."""


class Fingerprint(Schema):
    """A base, as far as an adapter depends on it."""

    config: dict[str, Any]
    """Config fields that say what the base computes."""
    sites: dict[str, SitePrint]
    """Target layers by module path."""
    embedding: SitePrint | None = None
    """The input embedding, where there is one; the only tensor that is compared where
    a layer is quantised."""

    @property
    def quantised(self) -> bool:
        """Whether some target layer is."""
        return any(site.bfloat16 is None for site in self.sites.values())


def fingerprint(model: nn.Module, weights: Mapping[str, Tensor]) -> Fingerprint:
    """Describe a base by its config and the weights that carry adapters.

    Args:
        model: The base, wrapped or not; its ``config`` is read if it has one.
        weights: Weight of each target layer before any merge, by module path; without
            values, on the meta device, where it is quantised.
    """
    embedding = _embedding(model)
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    return Fingerprint(
        config=json.loads(json.dumps(_essential(to_dict()), default=str)),
        sites={path: _site(weight) for path, weight in weights.items()},
        embedding=None if embedding is None else _site(embedding),
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
    shapes_only = [p for p in old if None in (old[p].bfloat16, new[p].bfloat16)]
    other = [p for p in old if p not in shapes_only and _differ(old[p], new[p])]
    if other:
        told.append(
            f"{len(other)} of {len(old)} target layers have other weights: "
            f"{shortened(other)}"
        )
    if shapes_only:
        told += _embedding_differences(saved.embedding, present.embedding)
    return told


def _embedding_differences(old: SitePrint | None, new: SitePrint | None) -> list[str]:
    if old is None and new is not None:
        return [
            "target layers are quantised, and the adapter was saved by a version that "
            "did not note the input embedding, which could be compared instead"
        ]
    same = old == new or (old and new and not _differ(old, new))
    return [] if same else ["the input embedding is another one"]


def _differ(one: SitePrint, other: SitePrint) -> bool:
    return one.bfloat16 != other.bfloat16 and one.float16 != other.float16


def shortened(names: Sequence[str]) -> str:
    """First few of many names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _embedding(model: nn.Module) -> Tensor | None:
    """Weight of the input embedding, as far as the model has one."""
    try:
        layer = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    # with experts on it, as it was before any merge
    known = getattr(layer, "known_weight", None)
    weight = getattr(layer, "weight", None) if known is None else known()
    return weight if isinstance(weight, Tensor) else None


def _site(weight: Tensor) -> SitePrint:
    if weight.is_meta:
        return SitePrint(shape=list(weight.shape), bfloat16=None, float16=None)
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
