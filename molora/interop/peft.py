"""Export to PEFT: a folder that ``PeftModel.from_pretrained`` loads.

One expert of a family that PEFT has goes into PEFT's own format (peft_forms.py). Any
linear one becomes a LoRA on request:

    y = base(x) + (lora_alpha / r) B A x (+ bias)

with lora_alpha = r and the scale of each layer folded into its B, so that readers which
know one rank and one lora_alpha for all layers (vLLM) compute the same. B A is the
update itself where its rank allows, else the nearest product of that rank in the
Frobenius norm (Eckart and Young 1936).

Shape legend
    I in features   O out features   r rank of one layer   R rank of the export
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from molora.atomic import atomic_folder
from molora.collapse.factors import LowRank, minus, norm, truncate
from molora.errors import WrapError
from molora.experts import AbstractExperts, BilinearExperts
from molora.interop.peft_forms import common_fields, has_own_form, write_forms
from molora.layer import MoloraLinear
from molora.manifest import CONFIG, TENSORS, write_json, write_manifest
from molora.model import sites


class PeftExport(NamedTuple):
    """What was written, and what it cost."""

    peft_type: str
    """Method as PEFT names it."""
    errors: dict[str, float]
    """By layer: ||written - update|| / ||update|| in the Frobenius norm, before
    rounding to float32. Zero where the layer is written as it is."""
    notes: tuple[str, ...] = ()
    """What PEFT needs to read the folder, beyond itself."""

    @property
    def worst(self) -> float:
        """Largest error of any layer."""
        return max(self.errors.values())


def export_peft(
    model: nn.Module, folder: str | Path, rank: int | None = None
) -> PeftExport:
    """Write the adapter as a PEFT folder, float32, without using PEFT.

    Without a rank, families that PEFT has are written in its own format of the method,
    and other products of two factors as a LoRA of their rank. With a rank, any linear
    family is written as a LoRA; where an update needs more rank, its largest singular
    values are kept and the error of each layer is returned. A family that changes the
    bias gives a LoRA with ``lora_bias``, which vLLM and ``import_peft`` do not read,
    and which PEFT merges only where the layer has a bias.

    All layers of a LoRA get the largest rank of any; smaller ones are padded with
    zeros, which changes no output.

    Args:
        model: A wrapped model with one expert per site, merged or not.
        folder: Folder to write, in one step.
        rank: Rank of a LoRA, for any linear family; None keeps the method.

    Returns:
        The method, the relative error of each layer, and notes on what PEFT needs,
        such as its CUDA extension for BOFT of several factors.

    Raises:
        CheckpointError: The folder cannot be written, or holds other things under the
            same names.
        WrapError: The model is not wrapped, a site has several experts, experts of
            different methods, that PEFT does not have, that are no change of a weight,
            or settings that differ where PEFT has one for all layers.
    """
    found = sites(model)
    for site in found.values():
        _check_single(site)
    refuse_restored(found)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise WrapError(f"export_peft: rank is {rank!r}; give a whole number above 0")
    if rank is None and all(has_own_form(site.experts) for site in found.values()):
        with atomic_folder(folder) as temp:
            kind, notes = write_forms(model, found, 0, temp)
            write_manifest(temp)
        return PeftExport(kind, dict.fromkeys(found, 0.0), notes)
    if rank is None:
        _check_factors(found)
    return _export_lora(model, found, folder, rank)


def _export_lora(
    model: nn.Module,
    found: dict[str, MoloraLinear],
    folder: str | Path,
    rank: int | None,
) -> PeftExport:
    made = {path: nearest_lora(site, rank) for path, site in found.items()}
    biases = {path: bias_change(site) for path, site in found.items()}
    with_bias = any(bias_O is not None for bias_O in biases.values())
    wide = rank or max(lora.rank for lora, _ in made.values())
    tensors = {}
    for path, (lora, _) in made.items():
        key = f"base_model.model.{path}"
        missing = (0, 0, 0, wide - lora.rank)
        a_RI, b_RO = pad(lora.A_rI, missing), pad(lora.Bt_rO, missing)
        site = found[path]
        for name, values in site.host.to_lora(site.base, a_RI, b_RO.t()).items():
            tensors[f"{key}.{name}"] = _stored(values)
        if with_bias:
            _check_takes_bias(site)
            bias_O = biases[path]
            bias_O = b_RO.new_zeros(b_RO.shape[1]) if bias_O is None else bias_O
            tensors[f"{key}.lora_B.bias"] = _stored(bias_O)
    with atomic_folder(folder) as temp:
        save_file(tensors, temp / TENSORS, metadata={"format": "pt"})
        config = peft_config(model, found, wide)
        write_json(temp / CONFIG, config | ({"lora_bias": True} if with_bias else {}))
        write_manifest(temp)
    return PeftExport("LORA", {path: error for path, (_, error) in made.items()})


def _check_takes_bias(site: MoloraLinear) -> None:
    """Refuse a LoRA with a bias where PEFT has none."""
    if isinstance(site.base, nn.Embedding):
        raise WrapError(
            f"site {site.path!r}: some layers change their bias (lora_bias), which "
            "PEFT does not have on an embedding; exclude this layer, or "
            "save_pretrained"
        )


def _stored(values: Tensor) -> Tensor:
    return values.float().cpu().contiguous()


@torch.no_grad()
def nearest_lora(site: MoloraLinear, rank: int | None) -> tuple[LowRank, float]:
    """The only update of a site as a product of two factors, and its relative error.

    Args:
        site: One linear expert.
        rank: Rank at most; None is for experts that are such a product.

    Raises:
        WrapError: The experts are not linear.
    """
    experts = site.experts
    if isinstance(experts, BilinearExperts):
        whole = LowRank(*experts.expert_factors(0))
        if rank is None or whole.rank <= rank:
            return whole, 0.0
        whole = LowRank(whole.A_rI.double(), whole.Bt_rO.double())
        kept = truncate(whole, rank)
        size = norm(whole)
        return kept, norm(minus(kept, whole)) / size if size else 0.0
    u_OM, s_M, vt_MI = torch.linalg.svd(
        site.delta_weight().double(), full_matrices=False
    )
    root_r1 = s_M[:rank].sqrt().unsqueeze(1)
    kept = LowRank(root_r1 * vt_MI[:rank], root_r1 * u_OM.t()[:rank])
    size = float(s_M.norm())
    return kept, float(s_M[rank:].norm()) / size if size else 0.0


@torch.no_grad()
def bias_change(site: MoloraLinear) -> Tensor | None:
    """What the only expert of a site adds to the bias, [O]; None: nothing."""
    bias_O = site.experts.frozen_bias()
    if bias_O is None:
        bias_O = site.base_weight().new_zeros(site.out_features)
    wide = bias_O.to(torch.promote_types(bias_O.dtype, torch.float32))
    delta_O = site.experts.delta_bias(0, wide)
    return delta_O if delta_O is not None and delta_O.any() else None


def _check_single(site: MoloraLinear) -> None:
    experts = site.experts
    if experts.num_experts == 1:
        return
    advice = "run molora.collapse first, or write"
    if not isinstance(experts, BilinearExperts):
        advice = "write"
    if isinstance(experts, BilinearExperts) or experts.peft_type is not None:
        advice += " one adapter per expert with molora.export_peft_experts"
    else:
        advice = "save the mixture itself with save_pretrained"
    raise WrapError(
        f"site {site.path!r} routes among {experts.num_experts} experts, which a PEFT "
        f"adapter cannot do; {advice}"
    )


def refuse_restored(found: dict[str, MoloraLinear]) -> None:
    """Refuse experts that are right on one quantised base only, which PEFT has not.

    Raises:
        WrapError: Some hold what quantising took from their layer.
    """
    for path, site in found.items():
        if site.experts.restored() is not None:
            raise WrapError(
                f"site {path!r}: the experts hold what LoftQ found missing in the "
                "4-bit weights, and PEFT would add it to any base; load the adapter "
                "onto the unquantised base (model.quantization=none) and export it "
                "from there, as the change that was learned"
            )


def _check_factors(found: dict[str, MoloraLinear]) -> None:
    """Refuse what no LoRA equals exactly, with what can be done instead."""
    for path, site in found.items():
        experts = site.experts
        if isinstance(experts, BilinearExperts):
            continue
        what = "PEFT has no format for"
        if has_own_form(experts):
            what = "some layers hold other methods, and a PEFT folder has only one:"
        raise WrapError(
            f"site {path!r}: {what} {type(experts).__name__}; {_instead(experts)}"
        )


def _instead(experts: AbstractExperts) -> str:
    if not experts.linear:
        return "they are no change of a weight, so no LoRA comes near; save_pretrained"
    return (
        "give export_peft a rank (--rank) for a LoRA that comes near them, or "
        "molora.merge "
        "folds one expert into the base exactly"
    )


def peft_config(
    model: nn.Module, found: dict[str, MoloraLinear], rank: int
) -> dict[str, Any]:
    """Fields of PEFT's LoraConfig; those left out have neutral defaults there."""
    return {
        **common_fields(model, found, "LORA"),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
