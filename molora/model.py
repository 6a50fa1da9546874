"""Give a model its banks, and take them away: wrap, unwrap, merge, disable, record.

Wrapping replaces the target layers in place and swaps the model's class for a subclass
of the same name, so that Trainer, generate and pipelines see the model they know.
"""

import copy
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from molora.config import AdapterConfig
from molora.context import (
    ContextCheckpoint,
    RoutingTrace,
    Runtime,
    forward_context,
)
from molora.errors import WrapError
from molora.layer import MoloraLinear
from molora.routers import OBJECTIVES
from molora.targets import find_targets

M = TypeVar("M", bound=nn.Module)


class MoloraModel:
    """What a wrapped model can do beyond its own class; never instantiated itself."""

    molora_config: AdapterConfig
    molora_runtime: Runtime

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Tell transformers that trainable adapters are attached, while they are."""
        return any(p.requires_grad for p in adapter_parameters(self).values())

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the adapter alone; see ``molora.save``.

        Args:
            save_directory: Folder to write, atomically.
            **kwargs: What transformers' trainers pass; see ``molora.save``.
        """
        from molora.checkpoint import save_pretrained

        save_pretrained(self, save_directory, **kwargs)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = torch.utils.checkpoint.checkpoint,
        **kwargs: Any,
    ) -> None:
        """Carry each forward's context into its recomputation."""
        if not isinstance(gradient_checkpointing_func, ContextCheckpoint):
            gradient_checkpointing_func = ContextCheckpoint(
                gradient_checkpointing_func, self.molora_runtime
            )
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable=enable,
            gradient_checkpointing_func=gradient_checkpointing_func,
            **kwargs,
        )

    def __reduce__(self) -> Any:
        raise WrapError(
            "a wrapped model is not pickled: save the adapter with "
            "model.save_pretrained(folder) and load it with molora.load"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _refuse(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise WrapError(
            f"model.{name} belongs to transformers' PEFT adapters; this model carries "
            "a molora adapter. Use molora.load, molora.disabled or molora.unwrap."
        )

    return method


for _name in (
    "load_adapter",
    "add_adapter",
    "set_adapter",
    "delete_adapter",
    "disable_adapters",
    "enable_adapters",
    "active_adapters",
    "get_adapter_state_dict",
):
    setattr(MoloraModel, _name, _refuse(_name))


def is_wrapped(model: nn.Module) -> bool:
    """Whether the model carries a molora adapter."""
    return isinstance(model, MoloraModel)


def sites(model: nn.Module) -> dict[str, MoloraLinear]:
    """Target layers by module path, in model order.

    Raises:
        WrapError: The model is not wrapped.
    """
    if not is_wrapped(model):
        raise WrapError("the model carries no molora adapter; call molora.wrap first")
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, MoloraLinear)
    }


def adapter_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Parameters of experts and routers by their name in the model."""
    return {
        name: parameter
        for path, site in sites(model).items()
        for part in ("experts", "router")
        if getattr(site, part) is not None
        for name, parameter in getattr(site, part).named_parameters(f"{path}.{part}")
    }


def wrap(model: M, config: AdapterConfig, seed: int = 0) -> M:
    """Give every target layer its bank of experts, in place.

    Base parameters are frozen. The update is zero at the start, so outputs do not
    change. Each site draws its initial values from (seed, module path): the global RNG
    is untouched, and another target list leaves a site's values as they are.

    Args:
        model: A base model, on any device, in any floating dtype.
        config: Targets, experts, router, balance.
        seed: Seed of the initial values.

    Returns:
        The same object.

    Raises:
        WrapError: The model is wrapped already, is a PEFT model, has a quantiser that
            cannot be trained, or the targets do not fit. The model is left untouched.
    """
    _check_wrappable(model)
    targets = find_targets(model, config)
    runtime = Runtime()
    routed = sum(config.site(path).experts.num_experts > 1 for path in targets)
    if config.balance and not routed:
        raise WrapError(
            "balance: every target layer has one expert after the overrides, so there "
            "is nothing to balance; drop the balance block"
        )
    objectives = [
        (OBJECTIVES[o.kind](o), o.weight / max(routed, 1)) for o in config.balance
    ]
    banks = {
        path: MoloraLinear(
            base,
            config.site(path),
            path=path,
            runtime=runtime,
            objectives=objectives,
            generator=_generator(seed, path),
        )
        for path, base in targets.items()
    }
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, bank in banks.items():
        _replace(model, path, bank)
        bank.train(bank.base.training)
    _attach(model, config, runtime, frozen)
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
    for path, site in sites(model).items():
        _replace(model, path, site.base)
    state: Any = model.__dict__.pop("_molora_state")
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(h, _ContextHook)]:
                _remove_hook(module, key)
        func = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(func, ContextCheckpoint):
            module._gradient_checkpointing_func = func.checkpoint  # type: ignore
    del model.__dict__["molora_config"], model.__dict__["molora_runtime"]
    model.__class__ = state["cls"]
    for name, parameter in model.named_parameters():
        # a parameter that was added after wrapping stays as it is
        before = state["requires_grad"].get(name, parameter.requires_grad)
        parameter.requires_grad_(before)
    return model


def merge(model: M) -> M:
    """Fold each bank's update into its base weight; original bytes are kept.

    Args:
        model: A wrapped model whose banks all have one expert (see ``collapse``).

    Returns:
        The same object.

    Raises:
        WrapError: A bank routes among several experts, the model is merged already, a
            target's weight is tied to another module, or a merged weight is not
            finite. The weights are left as they were.
    """
    found = sites(model)
    if any(site.merged for site in found.values()):
        raise WrapError("the model is merged already; call molora.unmerge first")
    _check_untied(model, found)
    done: list[MoloraLinear] = []
    try:
        for site in found.values():
            site.merge()
            done.append(site)
    except WrapError:
        for site in done:
            site.unmerge()
        raise
    return model


def unmerge(model: M) -> M:
    """Restore the exact bytes of the base weights.

    Raises:
        WrapError: The model is not merged.
    """
    merged = [site for site in sites(model).values() if site.merged]
    if not merged:
        raise WrapError("the model is not merged; there is nothing to restore")
    for site in merged:
        site.unmerge()
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Make the model exactly the base model inside the block; nests.

    Raises:
        WrapError: The model is not wrapped, or it is merged.
    """
    if any(site.merged for site in sites(model).values()):
        raise WrapError("the adapter is merged into the weights; unmerge it first")
    runtime = _runtime(model)
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
    runtime = _runtime(model)
    before, runtime.tasks = runtime.tasks, tuple(names)
    try:
        yield
    finally:
        runtime.tasks = before


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
    if all(site.router is None for site in sites(model).values()):
        raise WrapError("no site of this model has a router, so nothing is routed")
    runtime = _runtime(model)
    before, runtime.trace = runtime.trace, RoutingTrace(keep_tokens=keep_tokens)
    try:
        yield runtime.trace
    finally:
        runtime.trace = before


def _runtime(model: nn.Module) -> Runtime:
    runtime = model.molora_runtime
    assert isinstance(runtime, Runtime)
    return runtime


def _check_wrappable(model: nn.Module) -> None:
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
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise WrapError(
            f"the base is quantised by {type(quantizer).__name__}, which cannot be "
            "trained through; load the base another way"
        )


def _generator(seed: int, path: str) -> torch.Generator:
    """Generator seeded by the seed and the module path."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _attach(
    model: nn.Module,
    config: AdapterConfig,
    runtime: Runtime,
    requires_grad: dict[str, bool],
) -> None:
    """Swap the class, install the hooks, carry context through checkpointing."""
    cls = type(model)
    inner = getattr(model, "base_model", None)
    for module in dict.fromkeys([model, inner]):
        if isinstance(module, nn.Module):
            module.register_forward_pre_hook(
                _EnterForward(module, runtime), with_kwargs=True
            )
            module.register_forward_hook(_LeaveForward(runtime), always_call=True)
    state = {"cls": cls, "requires_grad": requires_grad}
    model.__dict__["_molora_state"] = state
    model.__dict__["molora_config"] = config
    model.__dict__["molora_runtime"] = runtime
    model.__class__ = type(
        cls.__name__,
        (MoloraModel, cls),
        {"__module__": cls.__module__, "__qualname__": cls.__qualname__},
    )
    for module in model.modules():
        func = module.__dict__.get("_gradient_checkpointing_func")
        if func is not None:
            module._gradient_checkpointing_func = ContextCheckpoint(func, runtime)  # type: ignore


class _ContextHook:
    """Hook on the model, or on its decoder when that is called by itself."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime


class _EnterForward(_ContextHook):
    """Make the context of the forward that begins, unless an outer one is running."""

    def __init__(self, module: nn.Module, runtime: Runtime):
        super().__init__(runtime)
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        runtime = self.runtime
        # an interrupt skips the leaving hook, so an own context found here is stale
        if runtime.current is None or runtime.owner == id(module):
            arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
            runtime.current = forward_context(arguments, runtime.tasks)
            runtime.owner = id(module)


class _LeaveForward(_ContextHook):
    """Drop the context when the forward that made it ends, also by an exception."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.runtime.owner == id(module):
            self.runtime.current = None
            self.runtime.owner = None


def _remove_hook(module: nn.Module, key: int) -> None:
    """Remove one of our hooks with its bookkeeping."""
    for table in (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ):
        table.pop(key, None)


def _check_untied(model: nn.Module, found: dict[str, MoloraLinear]) -> None:
    """Refuse to merge into a weight that another module uses as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path, site in found.items():
        names = owners[id(site.base.weight)]
        if len(names) > 1:
            raise WrapError(
                f"site {path!r}: its weight is tied to {names}, which a merge would "
                "change as well; leave this layer out of target_modules"
            )
