"""A mixture as one PEFT adapter per expert, and one file of its routers.

Factors of LoRAs are written as they are: ranks and alphas that differ by layer become
PEFT's rank_pattern and alpha_pattern. Other families that PEFT has go into its own
format of them.

Shape legend
    E experts   I in features   O out features   r rank of one expert
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from molora.atomic import atomic_folder
from molora.config import AdapterConfig
from molora.errors import WrapError
from molora.experts import BilinearExperts, LoRAExperts
from molora.freezing import whole_parameters
from molora.interop.peft import peft_config, refuse_restored
from molora.interop.peft_forms import by_layer, has_own_form, write_forms
from molora.layer import MoloraLinear
from molora.manifest import CONFIG, TENSORS, write_json, write_manifest
from molora.model import sites

ROUTER = "router.safetensors"
"""File of the routers beside the folders of the experts."""


def export_peft_experts(model: nn.Module, folder: str | Path) -> list[Path]:
    """Write a mixture as one PEFT adapter per expert and one file of the routers.

    PEFT loads each ``expert_<n>`` by itself; ``import_peft`` with ``router=folder``
    puts the same mixture together again. Layers where both factors of a LoRA are
    zero, which the adapter it was imported from lacked, are left out.

    Args:
        model: A wrapped model with as many experts at every site, products of two
            factors or of a family that PEFT has.
        folder: Folder to write, in one step.

    Returns:
        Folder of each expert.

    Raises:
        CheckpointError: The folder cannot be written.
        WrapError: The model is not wrapped, sites have different numbers of experts,
            experts that PEFT cannot hold, or with nothing but zeros.
    """
    found = sites(model)
    counts = {site.experts.num_experts for site in found.values()}
    if len(counts) > 1:
        raise WrapError(
            f"layers have {sorted(counts)} experts, so there is no adapter for each "
            "expert that covers them all; run molora.collapse, or save_pretrained"
        )
    refuse_restored(found)
    own = all(has_own_form(site.experts) for site in found.values())
    names = [f"expert_{e}" for e in range(counts.pop())]
    config = model.molora_config
    assert isinstance(config, AdapterConfig)
    settings = {path: config.site(path).router.to_dict() for path in found}
    weights = {
        f"{path}.{name}": values.detach().cpu().contiguous()
        for path, site in found.items()
        if site.router is not None
        for name, values in router_values(site.router)
    }
    with atomic_folder(folder) as temp:
        for e, name in enumerate(names):
            (temp / name).mkdir()
            if own:
                write_forms(model, found, e, temp / name)
            else:
                _write_expert(model, found, e, temp / name)
        save_file(weights, temp / ROUTER, metadata={"routers": json.dumps(settings)})
        write_manifest(temp)
    return [Path(folder) / name for name in names]


def router_values(router: nn.Module) -> list[tuple[str, Tensor]]:
    """What a router learned, by name: its parameters, and a selection bias."""
    return [*whole_parameters(router).items(), *router.named_buffers()]


def _write_expert(
    model: nn.Module, found: dict[str, MoloraLinear], expert: int, folder: Path
) -> None:
    """One adapter with the factors as they are, ranks and alphas by layer."""
    tensors, ranks, alphas = {}, {}, {}
    for path, site in found.items():
        experts = site.experts
        if not isinstance(experts, BilinearExperts):
            raise WrapError(
                f"site {path!r}: PEFT cannot hold {type(experts).__name__} beside the "
                "other layers, as it is no product of two factors or of another "
                "method; save the mixture with save_pretrained"
            )
        A, Bt, _ = experts.factors()
        rank, scale = A.shape[1], experts.scales()[expert]
        if isinstance(experts, LoRAExperts):
            # without the padding, and not rounded to float32
            rank, scale = experts.ranks[expert], experts.config.scales()[expert]
        a_rI, b_rO = A[expert % len(A), :rank], Bt[expert % len(Bt), :rank]
        if not (a_rI.any() or b_rO.any()):
            continue
        key = f"base_model.model.{path}"
        named = site.host.to_lora(site.base, a_rI.detach(), b_rO.detach().t())
        for name, values in named.items():
            tensors[f"{key}.{name}"] = values.cpu().contiguous().clone()
        ranks[path], alphas[path] = rank, scale * rank
    if not ranks:
        raise WrapError(f"expert {expert} is zero at every layer, so it is no adapter")
    config = {
        **peft_config(model, {path: found[path] for path in ranks}, 1),
        **by_layer(ranks, "rank_pattern", "r"),
        **by_layer(alphas, "alpha_pattern", "lora_alpha"),
    }
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)
