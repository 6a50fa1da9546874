"""What a trainer refuses before it starts."""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from molora.errors import TrainingError, WrapError
from molora.experts import BilinearExperts
from molora.layer import MoloraLinear
from molora.model import sites
from molora.routers import AdapterRouter
from molora.training.mixture import TaskMixture


def check_model(
    model: nn.Module, trainer: type[Trainer], args: TrainingArguments | None
) -> None:
    """Refuse a model that this kind of trainer could not train.

    Args:
        model: To be trained.
        trainer: Class of the trainer.
        args: Its arguments; None where the trainer makes its own.

    Raises:
        WrapError: The model is not wrapped, or carries an adapter that the trainer
            would bypass.
        TrainingError: It is merged, or has nothing to train.
    """
    found = sites(model)
    if any(site.merged for site in found.values()):
        raise TrainingError("the model is merged; call molora.unmerge first")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        routers = [site.decider for site in found.values() if site.decider is not None]
        named = routers and all(isinstance(r, AdapterRouter) for r in routers)
        if named and model.molora_config.train == "router":  # type: ignore[union-attr]
            raise TrainingError(
                "train: router freezes the experts, and router.kind adapter learns "
                "nothing itself, so nothing is left to train; set train: all"
            )
        raise TrainingError(
            "the model has no trainable parameter; load the adapter with "
            "molora.load(..., trainable=True)"
        )
    _check_experts(found)
    is_trl = any(cls.__module__.split(".")[0] == "trl" for cls in trainer.__mro__)
    is_fused = is_trl or (args is not None and args.use_liger_kernel)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if is_fused and isinstance(head, MoloraLinear):
        raise WrapError(
            f"{head.path!r} carries an adapter, and this trainer computes the loss "
            "from the weight of that layer directly: the adapter would never be "
            "trained. Add the layer to exclude_modules."
        )


def _check_experts(found: dict[str, MoloraLinear]) -> None:
    """Refuse what would train nothing: choices among experts that are all zero."""
    for path, site in found.items():
        router = site.decider
        if router is None or not isinstance(site.experts, BilinearExperts):
            continue
        empty = [not factors[1].any() for factors in _factors(site.experts)]
        frozen = not any(p.requires_grad for p in site.experts.parameters())
        if router.needs_trained and any(empty):
            raise TrainingError(
                f"site {path!r}: router.kind {router.config.kind!r} chooses among "
                "trained experts, and some of these are still zero: those would never "
                "be chosen. Bring trained ones in with molora.import_peft"
            )
        if frozen and all(empty):
            raise TrainingError(
                f"site {path!r}: the experts are frozen and still zero, so no gradient "
                "reaches the router; set train: all, or bring trained experts in with "
                "molora.import_peft"
            )


def _factors(experts: BilinearExperts) -> list[tuple[Tensor, Tensor]]:
    return [experts.expert_factors(e) for e in range(experts.num_experts)]


def check_setup(trainer: Trainer) -> None:
    """Refuse arguments and data that do not go together, once a trainer is built.

    Raises:
        TrainingError: See the message.
    """
    args = trainer.args
    if args.n_gpu > 1:
        raise TrainingError(
            "one process sees several GPUs: start it with torchrun or accelerate "
            "launch, or let CUDA_VISIBLE_DEVICES show one of them"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise TrainingError("DeepSpeed and FSDP are not supported")
    if args.enable_jit_checkpoint:
        raise TrainingError(
            "enable_jit_checkpoint saves in the middle of a step, from where a run "
            "cannot be resumed exactly; leave it out and lower save_steps"
        )
    strategy = args.train_sampling_strategy
    if isinstance(trainer.train_dataset, TaskMixture) and strategy != "random":
        raise TrainingError(
            f"train_sampling_strategy {strategy!r} has no effect on a TaskMixture, "
            "which says itself what an epoch holds; leave it out"
        )
    named = [d.task_names for d in datasets(trainer) if hasattr(d, "task_names")]
    if any(names != named[0] for names in named):
        raise TrainingError(f"the datasets number their tasks differently: {named}")


def datasets(trainer: Trainer) -> list[Any]:
    """The training set and the evaluation sets, as far as there are any."""
    evals = trainer.eval_dataset
    several = list(evals.values()) if isinstance(evals, dict) else [evals]
    return [d for d in [trainer.train_dataset, *several] if d is not None]
