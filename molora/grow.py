"""Growing a trained mixture by one expert, with all that it knows kept.

The old experts and their rows of the router are frozen bit for bit; the new expert and
its row are trained (``train: newest``). Top-k gates that are divided by their sum do
not depend on experts that were not chosen, so

    y(x) is what it was for every token that does not choose the new expert,

at the start and after any training. The new row starts as the mean of the old ones: its
logit is the mean of theirs, seldom among the highest of a trained router, whatever
constant their logits share.

Shape legend
    E experts before
"""

from typing import Any, TypeVar

import torch
from torch import nn

from molora.config import AdapterConfig
from molora.errors import ConfigError, WrapError
from molora.experts import AbstractExperts, FactorExperts
from molora.experts.start import StartedExperts
from molora.freezing import set_trainable, split_newest, whole_parameters
from molora.layer import MoloraLinear
from molora.model import sites
from molora.routers import OBJECTIVES
from molora.sharing import generator_of

M = TypeVar("M", bound=nn.Module)


def grow(model: M, seed: int = 0, *, task: str | None = None) -> M:
    """Add an expert to every layer of a mixture and freeze the others, in place.

    The new expert's update is zero at first. Settings that list a value for each expert
    (r, lora_alpha) give it the last one. Parameters become new objects: make the
    optimizer or trainer afterwards. Factors that all experts share stay frozen.

    Args:
        model: A wrapped model with topk routers that renormalize.
        seed: Seed of the new expert's initial values.
        task: Task of the new expert, where a balance objective names one for each
            (``domain``); its row then learns from all tasks which tokens are its own.

    Returns:
        The same object. Its config says ``train: newest``; ``save_pretrained`` and
        ``molora.load`` know about it.

    Raises:
        ConfigError: A balance objective needs the task, none reads it, or one means
            nothing with an expert more.
        WrapError: The model is not wrapped, is merged, or has a layer without a router,
            or with one whose gates depend on experts that were not chosen or that
            reads the task. It is left as it was.
    """
    found = sites(model)
    for site in found.values():
        _check(site)
    config = _grown_config(model.molora_config, task)  # type: ignore[arg-type]
    grown = {path: _grown(site, config, seed) for path, site in found.items()}
    for path, site in found.items():
        site.experts, site.router = grown[path].experts, grown[path].router
        site.objectives = grown[path].objectives
        set_trainable(site, "newest")
    model.__dict__["molora_config"] = config
    model.__dict__.pop("molora_report", None)
    return model


def _check(site: MoloraLinear) -> None:
    if site.merged:
        raise WrapError("the model is merged; call molora.unmerge before growing it")
    router = site.decider
    if router is None:
        raise WrapError(
            f"site {site.path!r} has one expert and no router to extend; wrap the base "
            "with two experts, or bring several in with molora.import_peft"
        )
    _check_experts(site)
    if router.bias_E is not None:
        raise WrapError(
            f"site {site.path!r}: the selection bias moves with the load of all "
            "experts, and would send tokens elsewhere that do not choose the new one; "
            "grow a mixture without the balance objective bias"
        )
    if router.config.input == "task":
        raise WrapError(
            f"site {site.path!r}: router.input task routes by a fixed table of tasks, "
            "so rows of a new task could not reach the new expert; growing needs "
            "router.input token or sequence"
        )
    if not router.can_grow(router.config):
        raise WrapError(
            f"site {site.path!r}: the gates of {type(router).__name__} depend on every "
            "expert, so a new one would change what the old ones do for every token; "
            "growing needs router.kind topk with renormalize: true"
        )


def _check_experts(site: MoloraLinear) -> None:
    """Refuse experts, or parts of them, that are made for a fixed number of experts."""
    for part in site.experts.modules():
        if not isinstance(part, AbstractExperts):
            continue
        name = f"site {site.path!r}: {type(part).__name__}"
        if type(part).frozen:
            raise WrapError(
                f"{name} start from what depends on the number of experts, so none "
                "can be added; use lora experts"
            )
        places = getattr(part, "places", None)
        if places or any(True for _ in part.buffers(recurse=False)):
            raise WrapError(
                f"{name} have tensors that are shared among layers, seeded, masked or "
                "sparse, which fixes the number of experts; growing needs "
                "experts.shared within a layer and no trainability but frozen"
            )
        # on an embedding it is A that is zero at the start
        looked_up = isinstance(site.base, nn.Embedding)
        if isinstance(part, FactorExperts) and not _starts_at_zero(part, looked_up):
            raise WrapError(
                f"{name} share {', '.join(part.config.scopes())}, which has been "
                "trained, so a new expert would not start at zero; growing needs "
                "shared tensors that are not zero at the start"
            )


def _starts_at_zero(experts: FactorExperts, looked_up: bool) -> bool:
    """Whether a new expert has no update beside tensors that were trained."""
    shared = experts.config.scopes()
    if looked_up or (isinstance(experts, StartedExperts) and experts.correction):
        return not shared
    return not shared.keys() & set(experts.config.zero_tensors())


def _grown_config(config: AdapterConfig, task: str | None) -> AdapterConfig:
    """The same settings with one expert more in every layer."""
    raw = config.to_dict()
    if raw["layout"] is None:
        raw["experts"] = _one_more(raw["experts"])
    else:
        raw["layout"]["counts"] = [count + 1 for count in raw["layout"]["counts"]]
    for override in raw["overrides"]:
        override["experts"] = _one_more(override["experts"])
    before = raw["balance"]
    raw["balance"] = [OBJECTIVES[o["kind"]].grown(o, task) for o in before]
    if task is not None and raw["balance"] == before:
        raise ConfigError(
            f"grow: task={task!r} is read by the balance objective 'domain' alone, "
            "which this mixture has not; drop it"
        )
    return AdapterConfig.from_dict({**raw, "train": "newest"})


def _one_more(experts: dict[str, Any]) -> dict[str, Any]:
    """Settings of one expert more; lists with a value for each get their last again."""
    longer = dict(experts)
    for name in ("r", "lora_alpha"):
        if isinstance(longer.get(name), list):
            longer[name] = [*longer[name], longer[name][-1]]
    if "num_experts" in longer:
        longer["num_experts"] += 1
    return longer


@torch.no_grad()
def _grown(site: MoloraLinear, config: AdapterConfig, seed: int) -> MoloraLinear:
    """A site of one expert more with the values of the old ones."""
    twin = MoloraLinear(
        site.base,
        config.site(site.path),
        path=site.path,
        runtime=site.runtime,
        objectives=[
            (type(objective)(settings), weight)
            for (objective, weight), settings in zip(
                site.objectives, config.balance, strict=True
            )
        ],
        generator=generator_of(seed, site.path),
        leader=site.leader,
    )
    pairs: list[tuple[nn.Module, nn.Module]] = [(site.experts, twin.experts)]
    if site.router is not None and twin.router is not None:
        pairs.append((site.router, twin.router))
    for old, new in pairs:
        before = whole_parameters(old)
        new.to(next(iter(before.values())).dtype)
        for name, values in whole_parameters(new).items():
            # what all experts share has no row for each, and is copied whole
            values[: len(before[name])] = before[name]
        new.train(old.training)
        if old is site.router:
            for name, values in whole_parameters(new).items():
                values[-1] = before[name].mean(0)
    for part in twin.experts.modules():
        if isinstance(part, StartedExperts) and part.correction:
            # a randomised start is another one with another seed
            own = dict(part.named_parameters())
            for name in ("A", "Bt"):
                own[name][-1] = own[f"{name}_start"][0]
    split_newest(twin)
    return twin
