"""Export to PEFT: a folder that ``PeftModel.from_pretrained`` loads as a LoRA.

PEFT computes y = base(x) + (lora_alpha / r) B A x. The export has lora_alpha = r and
the scale of each layer folded into its B, so that readers which know one rank and one
lora_alpha for all layers (vLLM) compute the same.

Shape legend
    I in features   O out features   r rank of one layer   R rank of the export
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from molora.atomic import atomic_folder
from molora.errors import WrapError
from molora.experts.base import BilinearExperts
from molora.layer import MoloraLinear
from molora.manifest import CONFIG, TENSORS, write_json, write_manifest
from molora.model import sites


def export_peft(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter as a PEFT LoRA, float32, without using PEFT.

    All layers get the largest rank of any; smaller ones are padded with zeros, which
    changes no output.

    Args:
        model: A wrapped model with one low-rank expert per site, merged or not.
        folder: Folder to write, in one step.

    Raises:
        CheckpointError: The folder cannot be written, or holds other things under the
            same names.
        WrapError: The model is not wrapped, a site has several experts, or experts that
            are no product of two factors.
    """
    found = sites(model)
    factors = {path: _factors(site) for path, site in found.items()}
    rank = max(a_rI.shape[0] for a_rI, _ in factors.values())
    tensors = {}
    for path, (a_rI, b_rO) in factors.items():
        missing = (0, 0, 0, rank - a_rI.shape[0])
        key = f"base_model.model.{path}"
        a_RI, b_RO = pad(a_rI, missing), pad(b_rO, missing)
        tensors[f"{key}.lora_A.weight"] = a_RI.cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = b_RO.t().cpu().contiguous()
    with atomic_folder(folder) as temp:
        save_file(tensors, temp / TENSORS, metadata={"format": "pt"})
        write_json(temp / CONFIG, peft_config(model, found, rank))
        write_manifest(temp)


def _factors(site: MoloraLinear) -> tuple[Tensor, Tensor]:
    """A [r, I] and B^T [r, O] of the only expert, its scale in B."""
    experts = site.experts
    if not isinstance(experts, BilinearExperts):
        raise WrapError(
            f"site {site.path!r} holds {type(experts).__name__}, which is no product "
            "of two factors, so no LoRA equals it; molora.merge folds one expert into "
            "the base"
        )
    if experts.num_experts > 1:
        raise WrapError(
            f"site {site.path!r} routes among {experts.num_experts} experts, which a "
            "PEFT LoRA cannot do; run molora.collapse first, or write one LoRA per "
            "expert with molora.export_peft_experts"
        )
    return experts.expert_factors(0)


def peft_config(
    model: nn.Module, found: dict[str, MoloraLinear], rank: int
) -> dict[str, Any]:
    """Fields of PEFT's LoraConfig; those left out have neutral defaults there."""
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", lambda: False)()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if can_generate else None,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(isinstance(s.base, Conv1D) for s in found.values()),
        "target_modules": list(found),
        "modules_to_save": None,
    }
