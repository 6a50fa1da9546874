"""Making the banks of a model: one for every target layer, and what they share."""

from collections.abc import Mapping

from torch import nn

from molora.base_pass import BasePass, hidden_width
from molora.config import AdapterConfig, SiteConfig
from molora.context import Runtime
from molora.errors import WrapError
from molora.ffn import check_ffn, ffns
from molora.layer import MoloraLinear
from molora.layout import depths
from molora.progress import long_work
from molora.route import leaders
from molora.routers import OBJECTIVES, ROUTERS
from molora.sharing import Sharing, generator_of


def make_banks(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    config: AdapterConfig,
    seed: int,
) -> tuple[dict[str, MoloraLinear], Runtime]:
    """Make the bank of every target layer; the model is not changed.

    Args:
        model: The base model.
        targets: Its target layers by path, in model order.
        config: Settings, the layout placed.
        seed: Seed of the initial values.

    Returns:
        Banks by path, and the runtime that they share.

    Raises:
        WrapError: Layers that cannot share a routing or a tensor, or form an FFN of
            whole experts, a router that needs what the model has not, or nothing to
            balance.
    """
    settings = {path: config.site(path) for path in targets}
    leader_of = leaders(settings)
    if config.balance and not leader_of:
        raise WrapError(
            "balance: every target layer has one expert after the overrides, so there "
            "is nothing to balance; drop the balance block"
        )
    runtime = _runtime(model, {path: settings[path] for path in leader_of})
    share = 1 / max(len(set(leader_of.values())), 1)
    objectives = [(OBJECTIVES[o.kind](o), o.weight * share) for o in config.balance]
    depth = depths([name for name, _ in model.named_modules()])
    sharing = Sharing(targets, settings, seed)
    banks: dict[str, MoloraLinear] = {}
    with long_work("Making experts", len(targets)) as step:
        for path, base in targets.items():
            # leaders come first in model order
            leader = banks.get(leader_of.get(path, path))
            try:
                bank = banks[path] = MoloraLinear(
                    base,
                    settings[path],
                    path=path,
                    runtime=runtime,
                    objectives=objectives,
                    generator=generator_of(seed, path),
                    leader=leader,
                    places=sharing.places(path),
                )
            except WrapError as error:
                # families know their sizes, not where they are
                raise WrapError(f"layer {path!r}: {error}") from None
            sharing.made(path, bank.experts)
            if leader is not None:
                leader.followers.append(bank)
            if bank.router is not None:
                bank.router.place(depth[path])
            step()
    for group in ffns(banks).values():
        check_ffn(model, group)
        list(group.values())[-1].ends_ffn = True
    if runtime.base_pass is not None:
        runtime.base_pass.leader = banks[runtime.base_pass.paths[0]]
    return banks, runtime


def _runtime(model: nn.Module, routed: Mapping[str, SiteConfig]) -> Runtime:
    """What the routers of a model ask of its forwards."""
    kinds = {path: ROUTERS[site.router.kind] for path, site in routed.items()}
    configs = [site.router for site in routed.values()]
    runtime = Runtime(
        reads_prompt=any(config.input == "sequence" for config in configs)
        or any(kind.reads_prompt for kind in kinds.values()),
        shares=any(config.scope != "site" for config in configs),
    )
    two_streams = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if two_streams and (runtime.reads_prompt or runtime.shares):
        raise WrapError(
            f"{type(model).__name__} has an encoder beside its decoder: layers that "
            "share a routing may see the tokens of either, and which of them are the "
            "prompt is not defined. Set router.scope: site and router.input: token"
        )
    reading = tuple(path for path, kind in kinds.items() if kind.reads_base_pass)
    if reading:
        runtime.base_pass = BasePass(hidden_width(model), reading)
    return runtime
