"""PEFT adapters of one method, not plain LoRAs, as the experts of one bank.

Adapters with equal settings at a layer become the experts of one bank there; what its
experts share has to be equal in all of them. Nothing that PEFT's files say is lost:
the bank, written again, has the same tensors, and knows every field.

Shape legend
    E experts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from molora.errors import CheckpointError
from molora.experts import AbstractExperts
from molora.interop.peft_adapter import PeftAdapter, read_adapter
from molora.interop.peft_folder import NO_EFFECT
from molora.layer import MoloraLinear
from molora.manifest import CONFIG, read_json

_NO_EFFECT = NO_EFFECT | {
    "beta1",
    "beta2",
    "boft_dropout",
    "d_initial",
    "deltaT",
    "init_ia3_weights",
    "init_weights",
    "mask_type",
    "module_dropout",
    "orth_reg_weight",
    "projection_prng_key",
    "random_seed",
    "rank_dropout",
    "rank_dropout_scale",
    "runtime_config",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
    "use_effective_conv2d",
    "vera_dropout",
}
"""Fields that are read here, or that change nothing once a linear layer is trained."""


@dataclass(frozen=True)
class Adapters:
    """The adapters of one import.

    Attributes:
        adapters: One for each expert.
        dropout: Of the bank, in training.
    """

    adapters: list[PeftAdapter]
    dropout: float

    @classmethod
    def read(
        cls,
        folders: Sequence[str | Path],
        family: str,
        model: nn.Module,
        dropout: float,
    ) -> "Adapters":
        """Read the folders.

        Raises:
            CheckpointError: See ``read_adapter``.
        """
        return cls([read_adapter(f, family, model) for f in folders], dropout)

    @property
    def bases(self) -> dict[str, str | None]:
        """Base model that each folder names."""
        return {str(adapter.folder): adapter.base for adapter in self.adapters}

    @property
    def paths(self) -> list[str]:
        """Layers of the adapters."""
        return list(self.adapters[0].blocks)

    def blocks(self, model: nn.Module, named: bool) -> dict[str, dict[str, Any]]:
        """Settings of the bank of every layer; all adapters need the same layers.

        Raises:
            CheckpointError: Adapters with other layers or settings than the first.
        """
        return _stacked(self.adapters, self.dropout)

    def fill(self, site: MoloraLinear) -> None:
        """Give a bank the values at its layer.

        Raises:
            CheckpointError: What does not fit, or would be lost.
        """
        _fill(site.experts, self.adapters, site.path)
        for expert, adapter in enumerate(self.adapters):
            _check_fields(site, adapter, expert)


def _check_fields(site: MoloraLinear, adapter: PeftAdapter, expert: int) -> None:
    """Refuse what PEFT's files say and the bank does not."""
    folder, form = adapter.folder, site.experts.to_peft(expert)
    for name, value in read_json(folder / CONFIG).items():
        neutral = not value or (name, value) == ("bias", "none")
        if not (neutral or name in _NO_EFFECT or name in form.settings):
            raise CheckpointError(
                f"{folder}: {name}={value!r}: {type(site.experts).__name__} do not "
                "know it"
            )
    own, theirs = form.tensors | form.model_tensors, adapter.tensors[site.path]
    if own.keys() != theirs.keys():
        raise CheckpointError(
            f"{folder}: {site.path} has the tensors {sorted(theirs)}, where "
            f"{type(site.experts).__name__} with these settings have {sorted(own)}"
        )
    for name, values in theirs.items():
        # ranks that PEFT cut off are zeros here
        corner = own[name][tuple(slice(size) for size in values.shape)].cpu().float()
        if not torch.allclose(corner, values.float(), atol=1e-7):
            raise CheckpointError(
                f"{folder}: {name} of {site.path} is not that of the other adapters or "
                "layers, with which the bank shares it"
            )


def _stacked(adapters: Sequence[PeftAdapter], dropout: float) -> dict[str, Any]:
    first, *others = adapters
    for other in others:
        differing = sorted(first.blocks.keys() ^ other.blocks.keys())
        if differing:
            raise CheckpointError(
                f"import_peft: {first.folder} and {other.folder} have different target "
                f"layers, for example {differing[0]!r} is in one of them only"
            )
        for path, block in first.blocks.items():
            theirs = other.blocks[path]
            names = sorted(
                n for n in {*block, *theirs} if block.get(n) != theirs.get(n)
            )
            if names:
                told = ", ".join(
                    f"{n} {block.get(n)!r} and {theirs.get(n)!r}" for n in names
                )
                raise CheckpointError(
                    f"import_peft: {first.folder} and {other.folder} differ at {path} "
                    f"in {told}, but {block['kind']} experts of one layer have the "
                    "same; train them alike, or export each as a LoRA of one rank"
                )
    made: dict[str, Any] = {"num_experts": len(adapters)}
    if dropout:
        made |= {"lora_dropout": dropout}
    return {path: {**block, **made} for path, block in first.blocks.items()}


@torch.no_grad()
def _fill(experts: AbstractExperts, adapters: Sequence[PeftAdapter], path: str) -> None:
    states = [adapter.states[path] for adapter in adapters]
    own = experts.state_dict()
    for adapter, state in zip(adapters, states, strict=True):
        # what it lacks, another layer owns: _check_fields sees whether it has it
        if not own.keys() <= state.keys():
            raise CheckpointError(
                f"{adapter.folder}: {path} gives {sorted(state)}, the bank has "
                f"{sorted(own)}"
            )
    for name, values in own.items():
        given = [state[name].to(values.device) for state in states]
        shape, alone = tuple(values.shape), tuple(given[0].shape)
        if shape == (len(given) * alone[0], *alone[1:]):
            values.copy_(torch.cat(given))
        elif shape != alone:
            raise CheckpointError(
                f"{adapters[0].folder}: {path} gives {name} the shape {list(alone)}, "
                f"the bank has {list(shape)}"
            )
        elif any(not torch.equal(other, given[0]) for other in given[1:]):
            raise CheckpointError(
                f"import_peft: the adapters have different {name} at {path}, which "
                "the experts of one bank share; train them from the same start"
            )
        else:
            values.copy_(given[0])
