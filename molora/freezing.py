"""Which parameters of a wrapped model are trained.

    all      experts and routers
    router   routers alone, over experts that are kept as they are
    newest   the last expert of each site and its row of the router; all older values
             are parameters of their own, which no optimizer step or decay reaches

Legend: E experts
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from molora.errors import WrapError
from molora.experts import AbstractExperts
from molora.layer import MoloraLinear

Train = Literal["all", "router", "newest"]

_HALVES = ("original0", "original1")
"""Names of the parts of a split parameter, old rows and last row."""
_NEW = ".original1"
"""How the name of the part that stays trainable ends; see ``_NewestRow``."""


class _NewestRow(nn.Module):
    """Keeps a tensor of E rows as two parameters: the old rows, and the last one."""

    def forward(self, old: Tensor, newest: Tensor) -> Tensor:
        """Put them together."""
        return torch.cat([old, newest])

    def right_inverse(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Take them apart."""
        return whole[:-1].clone(), whole[-1:].clone()


def split_newest(site: MoloraLinear) -> None:
    """Keep the last expert and its row of the router apart from the others.

    Raises:
        WrapError: The site has one expert, or experts that cannot be kept apart.
    """
    count = site.experts.num_experts
    if count == 1:
        raise WrapError(
            f"train: newest leaves nothing before the only expert of {site.path!r}; "
            "set train: all"
        )
    for part in (site.experts, site.router):
        for module in list(part.modules()) if part is not None else ():
            for name, values in list(module.named_parameters(recurse=False)):
                if values.dim() and values.shape[0] == count:
                    if hasattr(nn.ModuleDict, name):
                        raise WrapError(
                            f"site {site.path!r}: train: newest cannot keep the "
                            f"{name} of {type(module).__name__} apart; set train: all"
                        )
                    parametrize.register_parametrization(module, name, _NewestRow())


def whole_parameters(part: nn.Module) -> dict[str, Tensor]:
    """Parameters of experts or a router by name, those kept in two parts as one."""
    found: dict[str, Tensor] = {}
    for prefix, module in part.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            names += list(module.parametrizations)
        for name in names:
            found[f"{prefix}.{name}" if prefix else name] = getattr(module, name)
    return found


def set_trainable(site: MoloraLinear, train: Train, trainable: bool = True) -> None:
    """Set requires_grad of the site's experts and router.

    Args:
        site: A target layer.
        train: What is trained.
        trainable: False freezes everything.
    """
    frozen = _frozen(site.experts)
    for name, values in site.experts.named_parameters():
        trained = train == "all" or (train == "newest" and name.endswith(_NEW))
        values.requires_grad_(trainable and trained and _plain(name) not in frozen)
    for name, values in site.router.named_parameters() if site.router else ():
        values.requires_grad_(trainable and (train != "newest" or name.endswith(_NEW)))


def _frozen(experts: AbstractExperts) -> set[str]:
    """Names of all parameters that are never trained, those of inner families too."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in experts.named_modules()
        if isinstance(part, AbstractExperts)
        for name in part.frozen
    }


def _plain(name: str) -> str:
    """A name without what ``train: newest`` puts into it."""
    kept = [p for p in name.split(".") if p not in ("parametrizations", *_HALVES)]
    return ".".join(kept)
