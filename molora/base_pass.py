"""The first pass of a forward, for routers that read what the base model makes of it.

When the outermost forward of the wrapped model begins, its body (the model without its
head) runs on the same arguments with the adapter disabled and without a gradient. The
last hidden state of every token goes to the one router of the model, and all its target
layers follow within the forward proper.

With a key-value cache both passes get the new tokens alone: the first pass has a cache
of its own, of the same kind, which stays in the other one as a layer and follows its
rows. With labels or ``logits_to_keep`` no logits are computed in the first pass.

Shape legend
    B rows   S positions   T = B * S tokens   D width of the hidden state
"""

import copy
import functools
import inspect
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DummyLayer

from molora.errors import RoutingError, WrapError

if TYPE_CHECKING:
    from molora.context import Runtime
    from molora.layer import MoloraLinear

UNREAD = {"labels", "logits_to_keep", "past_key_values", "return_dict"}
UNREAD |= {"output_hidden_states", "output_attentions"}
"""Arguments that the first pass leaves out, or that it gets its own."""


class BasePassLayer(DummyLayer):
    """What a key-value cache keeps of the first pass: the cache of that pass.

    Args:
        cache: Of as many tokens, and of the same rows.
    """

    def __init__(self, cache: Any):
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """As the cache of the first pass."""
        return bool(self.cache.is_compileable)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """As the cache of the first pass."""
        return bool(self.cache.is_croppable)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.cache.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.cache.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.cache.batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back."""
        self.cache.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Keep what taking tokens back needs."""
        self.cache.activate_past_recording()

    def reset(self) -> None:
        """Forget all tokens."""
        self.cache.reset()


@dataclass
class BasePass:
    """The first pass of a wrapped model.

    Attributes:
        width: D.
        paths: Target layers that follow its router, in model order.
        leader: The first of them, which owns the router; set once it is there.
    """

    width: int
    paths: tuple[str, ...]
    leader: "MoloraLinear | None" = None

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the router that come from the model."""
        return {"in_features": self.width, "num_sites": len(self.paths)}

    def run(self, module: nn.Module, arguments: dict[str, Any], runtime: Any) -> None:
        """Run the first pass and leave every site's routing in the context.

        Args:
            module: Whose forward begins.
            arguments: Keyword arguments of that forward.
            runtime: Of the wrapped model; its context is that of the forward.

        Raises:
            RoutingError: The cache cannot be used, or no hidden state comes out.
        """
        assert self.leader is not None
        router, context = self.leader.router, runtime.current
        if router is None:
            # collapsed: nothing is routed any more
            return
        body = getattr(module, "base_model", module)
        classes: Any = type(module), type(body)
        given = {
            name: value for name, value in arguments.items() if _takes(*classes, name)
        }
        cache = _own_cache(arguments)
        if cache is not None:
            given["past_key_values"] = cache
        out = _without_adapter(body, given, runtime)
        hidden = getattr(out, "last_hidden_state", None)
        if not isinstance(hidden, Tensor) or hidden.shape[-1] != self.width:
            found = None if hidden is None else tuple(hidden.shape)
            raise RoutingError(
                f"router.kind {router.config.kind!r}: {type(body).__name__} gave a "
                f"last hidden state of shape {found} in the first pass, and the router "
                f"reads {self.width} features; this model cannot be routed so"
            )
        context.base["cache"] = getattr(out, "past_key_values", None)
        for path, routing in zip(
            self.paths,
            router.routings(hidden.reshape(-1, self.width)),  # type: ignore[operator]
            strict=True,
        ):
            context.routes[path] = routing


def _without_adapter(body: nn.Module, given: dict[str, Any], runtime: Any) -> Any:
    """Run the body as the base model, in no forward of its own."""
    owner, runtime.owner = runtime.owner, None
    try:
        with torch.no_grad(), runtime.use(runtime.current, runtime.disabled + 1):
            return body(**given)
    finally:
        runtime.owner = owner


@functools.lru_cache(maxsize=256)
def _takes(whole: Any, body: Any, name: str) -> bool:
    """Whether the body's class gets this argument of the whole model's forward."""
    if name in UNREAD:
        return False
    known = inspect.signature(body.forward).parameters
    if name in known or whole is body:
        return True
    is_open = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return is_open and name not in inspect.signature(whole.forward).parameters


def _own_cache(arguments: dict[str, Any]) -> Any:
    """Cache of the first pass beside the cache that a forward was given, if any."""
    given = arguments.get("past_key_values")
    layers = getattr(given, "layers", None)
    is_odd = given is not None and not isinstance(layers, list)
    if is_odd or arguments.get("cache_params") is not None:
        raise RoutingError(
            "the first pass cannot keep a cache beside a "
            f"{type(given or arguments['cache_params']).__name__}; use a cache of "
            "transformers that has layers, or use_cache=False"
        )
    if given is None:
        return None
    if given.offloading:
        raise RoutingError(
            "the first pass cannot keep a cache beside one that is offloaded; use "
            "another cache_implementation, or use_cache=False"
        )
    found = [layer for layer in layers or () if isinstance(layer, BasePassLayer)]
    length = given.get_seq_length()
    if bool(length != (found[0].cache.get_seq_length() if found else 0)):
        raise RoutingError(
            "the cache was filled in part without this adapter, so the first pass has "
            "not seen all of its tokens; run the prompt again with the adapter on"
        )
    return found[0].cache if found else copy.deepcopy(given)


def keep_base(cache: Any, base: Any) -> None:
    """Leave the cache of the first pass in the other one, which the forward filled."""
    if not any(isinstance(layer, BasePassLayer) for layer in cache.layers):
        cache.layers.append(BasePassLayer(base))


def hidden_width(model: nn.Module) -> int:
    """Width of the hidden state that the head reads, D.

    Raises:
        WrapError: It cannot be told.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise WrapError(
            f"a router that reads the first pass needs a decoder; "
            f"{type(model).__name__} has an encoder as well. Use router.kind soft"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Linear):
        return head.in_features
    text = getattr(config, "get_text_config", lambda: None)()
    width = getattr(text, "hidden_size", None)
    if not isinstance(width, int):
        raise WrapError(
            "a router that reads the first pass needs the width of the last hidden "
            f"state, and {type(model).__name__} has neither an output embedding nor "
            "config.hidden_size. Use router.kind soft"
        )
    return width


def _running(frame: Any, module_id: int | None) -> int:
    """How many forwards of a module stand on the stack that ends in a frame."""
    call, found = nn.Module._call_impl.__code__, 0
    while frame is not None:
        found += frame.f_code is call and id(frame.f_locals.get("self")) == module_id
        frame = frame.f_back
    return found


def is_running(module_id: int | None) -> bool:
    """Whether a forward of the module with this id runs on this thread."""
    return _running(sys._getframe(), module_id) > 0


def runs_twice(module: nn.Module) -> bool:
    """Whether two forwards of a module are running now, in any thread.

    An interrupt can leave notes of a forward that is over; what runs is on a stack.
    """
    frames = sys._current_frames().values()
    return sum(_running(frame, id(module)) for frame in frames) > 1


def refuse_reentry(runtime: "Runtime", module: nn.Module) -> None:
    """Refuse a forward inside another one, where sites share what a forward knows.

    Raises:
        RoutingError: See the message.
    """
    context = runtime.current
    if context is None or runtime.disabled or not runtime.shares:
        return
    is_outer = runtime.owner == id(module)
    again = runs_twice(module) if is_outer else context.base.get("entered", False)
    if again:
        raise RoutingError(
            f"a forward of {type(module).__name__} began inside another one of the "
            "same model, whose target layers share one routing; let the first forward "
            "end before the next one begins, or use a copy of the model"
        )
    context.base["entered"] = not is_outer and runtime.base_pass is not None
