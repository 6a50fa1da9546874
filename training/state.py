"""State of a training run on disk: tensors as safetensors, the rest as JSON, no pickle.

A state is a nest of dicts, lists and tuples with tensors and plain values as leaves. It
is written as ``<name>.json`` and, where it holds tensors, ``<name>.safetensors``; the
JSON says where each tensor belongs. What is read back is equal bit for bit.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from molora.errors import CheckpointError


def write_state(folder: Path, name: str, state: Any) -> None:
    """Write a state.

    Args:
        folder: Where to.
        name: Of the files, without suffix.
        state: Dicts, lists, tuples; tensors, numbers, strings, None.

    Raises:
        CheckpointError: A leaf is of another kind, which only pickle could store.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, tensors, name)
    text = json.dumps(tree, allow_nan=False)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> Any:
    """Read what ``write_state`` wrote; tensors come on the CPU.

    Raises:
        CheckpointError: The files are missing or not what ``write_state`` writes.
    """
    path = folder / f"{name}.json"
    tensors_path = folder / f"{name}.safetensors"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(tensors_path) if tensors_path.exists() else {}
        return _decode(tree, tensors)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a saved state: {error!r}") from None


def _encode(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """Plain values stand for themselves; everything else is [kind, content]."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else ["float", repr(value)]
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # two names for one storage are refused by safetensors
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return ["tensor", key]
    if isinstance(value, dict):
        pairs = [
            [_encode(k, tensors, place), _encode(v, tensors, f"{place}.{k}")]
            for k, v in value.items()
        ]
        return ["dict", pairs]
    if isinstance(value, list | tuple):
        items = [_encode(v, tensors, f"{place}[{i}]") for i, v in enumerate(value)]
        return ["list" if isinstance(value, list) else "tuple", items]
    raise CheckpointError(
        f"{place}: a {type(value).__name__} cannot be stored without pickle, so this "
        "run could not be resumed. Use another optimizer or scheduler, or set "
        "save_only_model to save the adapter alone."
    )


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, content = tree
    if kind == "float":
        return float(content)
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind not in ("list", "tuple"):
        raise ValueError(f"unknown kind {kind!r}")
    items = [_decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def rng_state() -> dict[str, Any]:
    """State of every generator that training draws from."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what ``rng_state`` returned.

    Raises:
        CheckpointError: It was saved on another number of GPUs.
    """
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    saved, here = len(state.get("cuda", [])), torch.cuda.device_count()
    if saved != here:
        raise CheckpointError(
            f"the checkpoint was saved with {saved} GPUs visible and there are {here} "
            "now, so their generators cannot be restored; make as many visible "
            "(CUDA_VISIBLE_DEVICES)"
        )
    if saved:
        torch.cuda.set_rng_state_all(state["cuda"])
