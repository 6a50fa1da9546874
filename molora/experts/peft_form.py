"""How one layer of an adapter is written in PEFT's files."""

from typing import Any, NamedTuple

from torch import Tensor


class PeftForm(NamedTuple):
    """One expert of a layer in PEFT's format."""

    peft_type: str
    """PEFT's name of the method."""
    settings: dict[str, Any]
    """Fields of PEFT's config that the layer needs."""
    tensors: dict[str, Tensor]
    """By what follows the module path, such as ``lora_A.weight``."""
    model_tensors: dict[str, Tensor] = {}
    """Those outside the layers, such as ``vera_A``."""
    note: str | None = None
    """What PEFT needs to read the layer, beyond itself."""
