"""molora import and molora grow: experts from elsewhere, and one expert more."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

import molora
from molora.base_models import load_base
from molora.commands import session
from molora.errors import CheckpointError, ConfigError
from molora.interop.general import Subtract
from molora.model import sites
from molora.run_config import RunConfig


def import_peft(
    base: str,
    folders: Sequence[Path],
    output: Path,
    *,
    router: str | None,
    train: Literal["all", "router"],
    general: Sequence[Path],
    general_form: Subtract,
    lora_dropout: float,
    seed: int,
    allow_base_mismatch: bool,
) -> None:
    """Make one adapter of PEFT LoRAs, or of a PEFT X-LoRA.

    Args:
        base: Name or folder of the model that they were trained on.
        folders: One LoRA for each expert, or one X-LoRA.
        output: Folder of the result.
        router: A kind, settings as a YAML mapping, or a folder that holds routers.
        train: What ``molora train`` trains on; ``adapter.train`` can replace it.
        general: LoRAs whose mean is taken from every expert.
        general_form: How; see ``molora.import_peft``.
        lora_dropout: Dropout of the experts in training.
        seed: Seed of the routers' initial weights.
        allow_base_mismatch: Accept adapters that name another base.

    Raises:
        MoloraError: Folders or settings that do not fit.
    """
    for folder in (*folders, *general):
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; name that of a PEFT LoRA")
        session.require_other(folder, output)
    settings = _router(router)
    model, _ = load_base(base, "auto", None)
    molora.import_peft(
        model,
        folders,
        router=settings,
        train=train,
        general=general,
        general_form=general_form,
        lora_dropout=lora_dropout,
        seed=seed,
        allow_base_mismatch=allow_base_mismatch,
    )
    model.save_pretrained(output)
    count = next(iter(sites(model).values())).experts.num_experts
    session.note(f"{len(sites(model))} target layers, {_told(count)} each")
    session.note(f"Wrote {output}; train it with start_from={output}")


def grow(config: RunConfig, adapter: Path, output: Path, task: str | None) -> None:
    """Add an expert to every layer of a trained mixture.

    Args:
        config: The run.
        adapter: Folder of the mixture.
        output: Folder of the result.
        task: Task of the new expert, where a balance objective names one for each.

    Raises:
        MoloraError: No adapter, or a mixture that cannot grow.
    """
    session.require_other(adapter, output)
    session.require_adapter(adapter)
    model, _ = session.base(config)
    molora.grow(molora.load(model, adapter), seed=config.seed, task=task)
    model.save_pretrained(output)
    count = next(iter(sites(model).values())).experts.num_experts
    session.note(f"{len(sites(model))} target layers, {_told(count)} each")
    session.note(f"Wrote {output}; train the new one with start_from={output}")


def _told(count: int) -> str:
    return "1 expert" if count == 1 else f"{count} experts"


def _router(text: str | None) -> dict[str, Any] | Path | None:
    """What ``--router`` names."""
    if text is None or Path(text).is_dir():
        return None if text is None else Path(text)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--router {text!r}: is no valid YAML: {error}") from None
    if isinstance(value, dict):
        return {str(name): setting for name, setting in value.items()}
    if not isinstance(value, str) or "/" in value:
        raise ConfigError(
            f"--router {text!r}: there is no such folder, and it is no kind and no "
            "settings such as '{kind: topk, top_k: 2}'"
        )
    return {"kind": value}
