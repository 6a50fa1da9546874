"""The wrapped model: a subclass of the model's own class, and the hooks it needs.

The class keeps its name, so that Trainer, generate and pipelines see the model they
know; the hooks give each forward its context (context.py).
"""

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from molora.base_pass import is_running, keep_base, refuse_reentry, runs_twice
from molora.config import AdapterConfig
from molora.context import ContextCheckpoint, Runtime, forward_context
from molora.errors import WrapError
from molora.layer import MoloraLinear
from molora.prompt import keep_means


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


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate as the model does; routers that read the prompt are told where it ends.

    Arguments and result are those of the model's own ``generate``.
    """
    runtime, cls = self.molora_runtime, self.__dict__["_molora_state"]["cls"]
    if not runtime.reads_prompt or runtime.prompts is not None:
        return cls.generate(self, *args, **kwargs)
    names = ("inputs", "input_ids", "inputs_embeds")
    given = [*args[:1], *(kwargs.get(name) for name in names)]
    inputs = next((part for part in given if isinstance(part, Tensor)), None)
    # without an input, generation begins with one token
    size = (1, 1) if inputs is None else inputs.shape[:2]
    runtime.prompts = torch.ones(*size, dtype=torch.bool)
    try:
        return cls.generate(self, *args, **kwargs)
    finally:
        runtime.prompts = None


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


def runtime_of(model: nn.Module) -> Runtime:
    """What all sites of a wrapped model share."""
    runtime = model.molora_runtime
    assert isinstance(runtime, Runtime)
    return runtime


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


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """What an adapter is saved as: its parameters, and buffers such as a bias."""
    return {
        name: tensor
        for path, site in sites(model).items()
        for part in ("experts", "router")
        if getattr(site, part) is not None
        for name, tensor in getattr(site, part)
        .state_dict(prefix=f"{path}.{part}.", keep_vars=True)
        .items()
    }


def attach(
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
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    generate = {"generate": _generate} if hasattr(cls, "generate") else {}
    model.__class__ = type(cls.__name__, (MoloraModel, cls), own | generate)
    for module in model.modules():
        func = module.__dict__.get("_gradient_checkpointing_func")
        if func is not None:
            module._gradient_checkpointing_func = ContextCheckpoint(func, runtime)  # type: ignore


def detach(model: nn.Module) -> None:
    """Undo ``attach``: class, hooks, checkpointing, what was frozen, what was noted."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(h, _ContextHook)]:
                _remove_hook(module, key)
        func = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(func, ContextCheckpoint):
            module._gradient_checkpointing_func = func.checkpoint  # type: ignore
    kept: Any = model.__dict__
    state = kept.pop("_molora_state")
    del kept["molora_config"], kept["molora_runtime"]
    kept.pop("molora_report", None)
    model.__class__ = state["cls"]
    for name, parameter in model.named_parameters():
        # a parameter that was added after wrapping stays as it is
        before = state["requires_grad"].get(name, parameter.requires_grad)
        parameter.requires_grad_(before)


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
        refuse_reentry(runtime, module)
        # an interrupt skips the leaving hook, so what is found here may be stale
        if runtime.current is None or runtime.owner == id(module) or _is_over(runtime):
            arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
            runtime.current = forward_context(arguments, runtime, module.training)
            runtime.owner = id(module)
            if runtime.base_pass is not None and not runtime.disabled:
                runtime.base_pass.run(module, arguments, runtime)


def _is_over(runtime: Runtime) -> bool:
    """Whether the forward that made the current context runs no more."""
    return not torch.compiler.is_compiling() and not is_running(runtime.owner)


class _LeaveForward(_ContextHook):
    """Drop the context when the forward that made it ends, also by an exception."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        runtime = self.runtime
        # output is None after an exception, which may be that of a refused re-entry
        if runtime.owner == id(module) and not (
            output is None and runtime.shares and runs_twice(module)
        ):
            context, runtime.current = runtime.current, None
            runtime.owner = None
            cache = _cache_of(output)
            if context is None or cache is None:
                return
            if context.means:
                keep_means(cache, context.means, runtime.identity)
            if context.base.get("cache") is not None:
                keep_base(cache, context.base["cache"])


def _cache_of(output: Any) -> Any:
    """The key-value cache among what a forward returned, if any."""
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Cache)), None)
    return getattr(output, "past_key_values", None)


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
