"""Names to classes. Registration demands the paper; a duplicate name is an error."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from molora.errors import ConfigError
from molora.schema import nearest

T = TypeVar("T")

_LIMITATIONS = "Limitations:"
"""How the paragraph on them begins in the docstring of a registered class."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered class and where its mathematics comes from."""

    cls: type[T]
    paper: str
    summary: str

    @property
    def limitations(self) -> str:
        """What the class says of its limits, in one line; empty where it has none."""
        paragraphs = inspect.cleandoc(self.cls.__doc__ or "").split("\n\n")
        found = [text for text in paragraphs if text.startswith(_LIMITATIONS)]
        return " ".join(found[0][len(_LIMITATIONS) :].split()) if found else ""


class Registry(Generic[T]):
    """A table of the classes of one kind (expert families, routers, ...).

    Args:
        kind: What the entries are, in the singular, for messages.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, paper: str) -> Callable[[type[T]], type[T]]:
        """Return a decorator that files a class under name.

        Args:
            name: The value of ``kind:`` in YAML.
            paper: Where the formula comes from, for example ``arXiv:2106.09685``.

        Raises:
            ValueError: The name is taken, or no paper is given.
        """
        if not paper:
            raise ValueError(f"{self.kind} {name!r}: registration needs a paper")

        def file(cls: type[T]) -> type[T]:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            summary = (cls.__doc__ or "").strip().split("\n")[0]
            self._entries[name] = Entry(cls, paper, summary)
            return cls

        return file

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._entries:
            raise ConfigError(
                f"unknown {self.kind} {name!r}.{nearest(name, self._entries)} "
                f"Registered: {', '.join(self.names())}"
            )
        return self._entries[name].cls

    def names(self) -> list[str]:
        """Registered names in alphabetical order."""
        return sorted(self._entries)

    def entries(self) -> dict[str, Entry[T]]:
        """Name to entry, alphabetical."""
        return {name: self._entries[name] for name in self.names()}
