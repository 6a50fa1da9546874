"""Give a model its banks, and take them away: wrap, unwrap, merge, disable, record.

Wrapping replaces the target layers in place and swaps the model's class for a subclass
of the same name (wrapped.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from molora import loftq, quantized
from molora.banks import make_banks
from molora.config import AdapterConfig
from molora.errors import WrapError
from molora.freezing import set_trainable, split_newest
from molora.layer import MoloraLinear
from molora.records import RoutingTrace
from molora.targets import find_targets
from molora.wrapped import adapter_parameters as adapter_parameters
from molora.wrapped import attach, detach, runtime_of
from molora.wrapped import is_wrapped as is_wrapped
from molora.wrapped import sites as sites

M = TypeVar("M", bound=nn.Module)


def wrap(
    model: M,
    config: AdapterConfig,
    seed: int = 0,
    original: nn.Module | None = None,
) -> M:
    """Give every target layer its bank of experts, in place.

    Base parameters are frozen. The update is zero at the start, so outputs do not
    change. Each site draws its initial values from (seed, module path): the global RNG
    is untouched, and another target list leaves a site's values as they are.

    Args:
        model: A base model, on any device, in any floating dtype, or quantised by
            bitsandbytes.
        config: Targets, experts, router, balance.
        seed: Seed of the initial values.
        original: The model before quantisation, for ``init_lora_weights: loftq``, which
            replaces the 4-bit weights while the model is wrapped; see loftq.py.

    Returns:
        The same object.

    Raises:
        WrapError: The model is wrapped already, is a PEFT model, has a quantiser that
            cannot be trained, or 4-bit layers that cannot be read, or the targets or
            the layout do not fit; ``original`` is missing, another model, or not
            read. The model is left untouched.
    """
    return wrap_begun(model, config, seed, lambda banks: loftq.begin(banks, original))


def wrap_begun(
    model: M,
    config: AdapterConfig,
    seed: int,
    begin: Callable[[Mapping[str, MoloraLinear]], object],
) -> M:
    """Wrap a model with banks that begin otherwise, for example as they were saved.

    Args:
        model: See ``wrap``.
        config: See ``wrap``.
        seed: See ``wrap``.
        begin: Called with the new banks by path, before they enter the model.

    Returns:
        The same object.

    Raises:
        WrapError: See ``wrap``; also what ``begin`` raises leaves the model untouched.
    """
    check_wrappable(model)
    targets = find_targets(model, config)
    if config.layout is not None:
        names = [name for name, _ in model.named_modules()]
        layout = config.layout.placed(names, list(targets))
        config = config.model_copy(update={"layout": layout})
    banks, runtime = make_banks(model, targets, config, seed)
    for bank in banks.values():
        if config.train == "newest":
            split_newest(bank)
        set_trainable(bank, config.train)
    begin(banks)
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, bank in banks.items():
        _replace(model, path, bank)
        bank.train(bank.base.training)
    attach(model, config, runtime, frozen)
    quantized.keep_unpacked(model)
    return model


def unwrap(model: M) -> M:
    """Remove the banks and give the model its own class back, in place.

    A merged update stays in the weights: ``merge`` then ``unwrap`` leaves a plain model
    with the update folded in; ``unwrap`` alone restores the base exactly.

    Args:
        model: A wrapped model.

    Returns:
        The same object.

    Raises:
        WrapError: The model is not wrapped.
    """
    found = sites(model)
    plain = any(site.quantised is not None for site in found.values())
    for path, site in found.items():
        _replace(model, path, site.base if site.merged else site.given_layer)
    detach(model)
    if plain:
        quantized.drop_marks(model)
    return model


def after_optimizer_step(model: nn.Module, taken: bool = True) -> None:
    """Let balance objectives act that move routers between steps (``bias``).

    The trainer calls it. A training loop of one's own calls it once after each
    ``optimizer.step()``; without such an objective it does nothing.

    Args:
        model: A wrapped model.
        taken: False where the step was left out: what was counted for it is dropped.

    Raises:
        WrapError: The model is not wrapped.
    """
    for site in sites(model).values():
        site.after_optimizer_step(taken)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Make the model exactly the base model inside the block; nests.

    Raises:
        WrapError: The model is not wrapped, or it is merged.
    """
    if any(site.merged for site in sites(model).values()):
        raise WrapError("the adapter is merged into the weights; unmerge it first")
    runtime = runtime_of(model)
    runtime.disabled += 1
    try:
        yield
    finally:
        runtime.disabled -= 1


@contextmanager
def tasks(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Name the task of each row of the batches that run inside the block.

    Args:
        model: A wrapped model.
        names: One task per row; with beams, one per prompt.

    Raises:
        WrapError: The model is not wrapped, or names is empty or a bare string.
    """
    if isinstance(names, str) or not names:
        raise WrapError("molora.tasks: give a list with the task of each row")
    sites(model)
    runtime = runtime_of(model)
    before, runtime.tasks = runtime.tasks, tuple(names)
    try:
        yield
    finally:
        runtime.tasks = before


@contextmanager
def prompts(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Name the tokens of the prompt of the batches that run inside the block.

    Routers with ``input: sequence`` read them. Without it the prompt is what stands
    before the first supervised label, or all of an input without labels.

    Args:
        model: A wrapped model.
        mask: [B, S], True at the tokens of the prompt.

    Raises:
        WrapError: The model is not wrapped, or the mask is no matrix of booleans.
    """
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise WrapError("molora.prompts: give a bool tensor [rows, positions]")
    sites(model)
    runtime = runtime_of(model)
    before, runtime.prompts = runtime.prompts, mask
    try:
        yield
    finally:
        runtime.prompts = before


@contextmanager
def record_routing(
    model: nn.Module, keep_tokens: bool = True
) -> Iterator[RoutingTrace]:
    """Record which experts each site chose inside the block.

    Args:
        model: A wrapped model.
        keep_tokens: Keep the gates of every token; False keeps sums per task only.

    Raises:
        WrapError: The model is not wrapped, or no site has a router.
    """
    if all(site.decider is None for site in sites(model).values()):
        raise WrapError("no site of this model has a router, so nothing is routed")
    runtime = runtime_of(model)
    before, runtime.trace = runtime.trace, RoutingTrace(keep_tokens=keep_tokens)
    try:
        yield runtime.trace
    finally:
        runtime.trace = before


def check_wrappable(model: nn.Module) -> None:
    """Raise WrapError when the model cannot be wrapped, whatever the config."""
    if is_wrapped(model):
        raise WrapError("the model is wrapped already; call molora.unwrap first")
    for path, module in model.named_modules():
        if isinstance(module, MoloraLinear):
            raise WrapError(
                f"the submodule {path!r} carries a molora adapter already; unwrap the "
                "part of the model that was wrapped first"
            )
        if type(module).__module__.split(".")[0] == "peft":
            raise WrapError(
                f"the model carries a PEFT adapter ({path or type(module).__name__}); "
                "merge or unload it, and wrap the base model"
            )
    quantized.check(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise WrapError(
            f"the base is quantised by {type(quantizer).__name__}, which cannot be "
            "trained through; load the base another way"
        )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
