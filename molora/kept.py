"""What depends on parameters alone, kept while they stay as they are.

A token is decoded in no time; norms, rotations and the like take as long for one token
as for a thousand. Without a gradient they are made once and kept until a tensor that
they were made of is another one, lies elsewhere, has another dtype, or was changed in
place, which its version counter tells.

Not kept: in forwards that take gradients, which also forget what is there; in compiled
graphs and while a CUDA graph is captured, which would hold on to old values; of tensors
of ``torch.inference_mode``, which have no version.

torch counts no change that is made through ``.data``, nor one by a kernel that is given
a bare pointer, as some 8-bit optimizers do. Therefore a target layer forgets what its
experts keep in every forward but those that go on from a key-value cache: within one
generation nothing but the counted changes is expected.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Kept:
    """One value and the state of the tensors that it was made of.

    A copy or a pickle of it holds nothing.
    """

    def __init__(self) -> None:
        self._known: tuple[list[_Seen], Any] | None = None

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()

    def forget(self) -> None:
        """Drop the value."""
        self._known = None

    def of(self, sources: Callable[[], Sequence[Tensor]], make: Callable[[], T]) -> T:
        """What ``make`` gives, or gave.

        Args:
            sources: Gives every tensor that the value depends on.
            make: Makes it, of these tensors and nothing else that can change.
        """
        if torch.compiler.is_compiling():
            return make()
        if torch.is_grad_enabled():
            self.forget()
            return make()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return make()
        tensors, known = sources(), self._known
        if any(tensor.is_inference() for tensor in tensors):
            return make()
        if known is not None and _same(known[0], tensors):
            value: T = known[1]
            return value
        # before, as some values bound the parameters that they are made of
        seen = [_seen(tensor) for tensor in tensors]
        value = make()
        self._known = seen, value
        return value


class Keeping(nn.Module):
    """A module that keeps one thing that its tensors give."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._kept = Kept()

    def sources(self) -> list[Tensor]:
        """Every tensor that the module is made of, those of others included."""
        return [*self.parameters(), *self.buffers()]

    def kept(self, make: Callable[[], T]) -> T:
        """What ``make`` gives of the sources, kept between forwards without gradient.

        It costs memory: let it be what takes longer to make than a token takes.
        """
        return self._kept.of(self.sources, make)

    def forget(self) -> None:
        """Drop what this module and those inside it keep."""
        if torch.compiler.is_compiling():
            # a graph keeps nothing
            return
        for module in self.modules():
            if isinstance(module, Keeping):
                module._kept.forget()

    def train(self, mode: bool = True) -> Self:
        """Switch mode, and forget what is kept."""
        self._kept.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **settings: Any) -> Self:
        """Move or cast, and forget what is kept."""
        self._kept.forget()
        super()._apply(*args, **settings)  # type: ignore[no-untyped-call]
        return self


class _Seen(NamedTuple):
    """A tensor as it was; nothing is kept alive by it."""

    tensor: "weakref.ref[Tensor]"
    storage: "weakref.ref[torch.UntypedStorage]"
    """x.data = y puts another one under the same tensor, and counts nothing."""
    facts: tuple[Any, ...]


def _seen(tensor: Tensor) -> _Seen:
    storage = tensor.untyped_storage()
    return _Seen(weakref.ref(tensor), weakref.ref(storage), _facts(tensor))


def _same(seen: Sequence[_Seen], tensors: Sequence[Tensor]) -> bool:
    """Whether these are the same tensors, unchanged."""
    return len(seen) == len(tensors) and all(
        old.tensor() is now
        and old.storage() is now.untyped_storage()
        and old.facts == _facts(now)
        for old, now in zip(seen, tensors, strict=True)
    )


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    """What differs where a tensor may hold other values, or is read otherwise."""
    return (
        tensor._version,
        tensor.data_ptr(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        _autocast(tensor.device.type),
    )


def _autocast(device: str) -> torch.dtype | None:
    # meta tensors have no autocast
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
