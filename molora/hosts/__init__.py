"""Types of layers that can hold a bank, and what each makes of its input and weight."""

from torch import nn

from molora.errors import WrapError
from molora.hosts.base import Host as Host
from molora.hosts.convolution import ConvHost
from molora.hosts.embedding import EmbeddingHost
from molora.hosts.linear import Conv1DHost, LinearHost

HOSTS: tuple[Host, ...] = (LinearHost(), Conv1DHost(), EmbeddingHost(), ConvHost())
LINEAR: tuple[type[nn.Module], ...] = (*LinearHost.LAYERS, *Conv1DHost.LAYERS)
"""Layer types that ``target_modules: all-linear`` means."""


def find_host(layer: nn.Module | None) -> Host | None:
    """What holds a bank on a layer; None where no bank can sit on its type."""
    return next((host for host in HOSTS if isinstance(layer, host.LAYERS)), None)


def host_of(layer: nn.Module) -> Host:
    """What holds a bank on a layer.

    Raises:
        WrapError: No bank can sit on a layer of this type.
    """
    host = find_host(layer)
    if host is None:
        raise WrapError(f"experts cannot sit on {type(layer).__name__}")
    return host


def host_names() -> str:
    """Names of all layer types that can hold a bank, for messages."""
    names = [cls.__name__ for host in HOSTS for cls in host.LAYERS]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def sizes(layer: nn.Module) -> tuple[int, int]:
    """In and out features that the experts of a layer have.

    Raises:
        WrapError: See ``host_of``.
    """
    return host_of(layer).sizes(layer)
