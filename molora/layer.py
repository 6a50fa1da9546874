"""MoloraLinear: a frozen base layer, a bank of experts, and its router.

    y = base(x) + sum_e g_e(x) * delta_e(x)

Shape legend
    T tokens   E experts   I in features   O out features
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from molora import shared_shrink
from molora.config import SiteConfig
from molora.context import ForwardContext, Runtime, in_backward
from molora.decode import Plan, short_way
from molora.errors import RoutingError
from molora.experts import EXPERTS, AbstractExperts, Place
from molora.ffn import enter, leave, slots_of
from molora.mergeable import MergeableLinear
from molora.quantized import is_nf4
from molora.records import SiteStats
from molora.route import decide, follow
from molora.routers import ROUTERS, Routing
from molora.routers.balance import Objective, Steering, attach
from molora.routers.base import AbstractRouter
from molora.routers.capacity import limited


class MoloraLinear(MergeableLinear):
    """One target layer with its bank.

    Args:
        base: The frozen layer, of a type that has a host, see ``molora.hosts``.
        site: Settings of the experts and the router.
        path: Module path of the layer in the model, for messages and records.
        runtime: State shared by all sites of the model.
        objectives: Balance objectives with their coefficients, divided by the number
            of routers.
        generator: CPU generator that draws the initial values.
        leader: Layer whose routing this one follows; None where it routes for itself.
        places: Of the experts' tensors that are not this layer's own.

    Attributes:
        followers: Layers that follow this one's routing.
        reads_same: Paths of those that read this one's tensor, as far as noted.
    """

    router: AbstractRouter | None
    plan: Plan | None = None
    """How it decodes, see ``molora.decode``."""
    ends_ffn: bool = False
    """Whether it is the last layer of an FFN whose experts run side by side."""

    def __init__(
        self,
        base: nn.Module,
        site: SiteConfig,
        *,
        path: str,
        runtime: Runtime,
        objectives: Sequence[tuple[Objective, float]],
        generator: torch.Generator,
        leader: "MoloraLinear | None" = None,
        places: Mapping[str, Place] | None = None,
    ):
        super().__init__(base)
        self.in_features, self.out_features = self.host.sizes(base)
        for name in self.host.SHOWN:
            setattr(self, name, getattr(base, name))
        self.path = path
        self.runtime = runtime
        self.objectives = list(objectives)
        experts = EXPERTS[site.experts.kind]
        self.host.check(base, experts)
        self.host.check_settings(site.experts)
        self.experts: AbstractExperts = experts(
            site.experts,
            in_features=self.in_features,
            out_features=self.out_features,
            generator=generator,
            **({"places": places} if places else {}),
            **({"kernel": self.host.kernel(base)} if experts.reads_kernel else {}),
        )
        self.host.begin(self.experts, generator)
        self.experts.frozen_weight = self._weight_OI
        self.experts.frozen_bias = self._bias_O
        self.experts.frozen_sources = self.frozen_sources
        self.experts.in_nf4 = is_nf4(base)
        # in a tuple: the leader is no part of this module
        self._leader = () if leader is None else (leader,)
        self.followers: list[MoloraLinear] = []
        self.reads_same: set[str] = set()
        self.router = None
        if site.experts.num_experts > 1 and leader is None:
            kind = ROUTERS[site.router.kind]
            by_task = site.router.input == "task"
            wide = {"in_features": self.host.width(base)}
            if by_task:
                wide = {"in_features": len(site.router.tasks)}
            elif kind.reads_base_pass:
                assert runtime.base_pass is not None
                wide = runtime.base_pass.sizes
            self.router = kind(
                site.router,
                **wide,
                num_experts=site.experts.num_experts,
                site=path,
                generator=generator,
            )
            self.router.bind(self.experts)
            if any(isinstance(o, Steering) for o, _ in self.objectives):
                self.router.add_bias(site.experts.num_experts)
        assert isinstance(base.weight, Tensor)
        for module in (self.experts, self.router):
            if module is not None:
                module.to(device=base.weight.device)
        self.experts.start(self._weight_OI())

    @property
    def leader(self) -> "MoloraLinear | None":
        """Layer whose routing this one follows; None where it routes for itself."""
        return self._leader[0] if self._leader else None

    @property
    def decider(self) -> AbstractRouter | None:
        """Router that decides here, the own or the leader's; None: one expert."""
        if self.experts.num_experts == 1:
            return None
        router = self.router if self.leader is None else self.leader.router
        assert router is not None
        return router

    def _apply(self, *args: Any, **settings: Any) -> Self:
        """Move or cast, once nothing is kept that refers to the tensors."""
        self.experts.forget()
        super()._apply(*args, **settings)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus the routed update.

        Args:
            x: What the layer takes, for a linear one [..., I] of any strides.

        Returns:
            What the layer gives, in its dtype.

        Raises:
            RoutingError: Router logits that are not finite, a mask that does not fit,
                or a balance objective that no gradient reaches.
        """
        if not torch.is_grad_enabled():
            decoded = short_way(self, x)
            if decoded is not None:
                return decoded
            if not self.runtime.continues:
                self.experts.forget()
        runtime = self.runtime
        if runtime.disabled or self.merged:
            layer = self.base if self.merged else self.given_layer
            plain: Tensor = layer(x)
            return plain
        host, decider = self.host, self.decider
        if decider is None:
            single_TO = host.run(self, x, None, None, None)
            return host.shaped(self.base, single_TO, x)
        watched = bool(self.objectives) and self.training
        watched = watched or runtime.trace is not None or runtime.stats is not None
        capacity = decider.capacity if self.training else None
        needed = watched or capacity is not None or decider.needs_context
        context = runtime.context_for(self.path, needed=needed)
        read = host.seen(self.base, x)
        seen = self._positions(read, context, watched or capacity is not None)
        wanted = self.routing(read, context)
        routing = wanted
        if capacity is not None:
            weight_T = context.token_weights(seen, self.path)
            routing = wanted._replace(gates=limited(wanted.gates, capacity, weight_T))
        if decider.config.mix == "block":
            y = self._in_ffn(x, routing, context)
        else:
            y = self._updated(x, read, routing, context)
        if watched:
            # sums of tokens are not for half precision, which autocast would use
            with torch.autocast(y.device.type, enabled=False):
                # objectives see what tokens asked for, overflow included
                y = self._watched(y, wanted, routing, context, seen)
        return y if decider.config.mix == "block" else host.shaped(self.base, y, x)

    def _positions(
        self, read: Tensor, context: ForwardContext, masked: bool
    ) -> Sequence[int]:
        """Shape of the tokens without the slots of an FFN, and as the mask has them."""
        if masked:
            self.host.line_up(read, context, self.path)
        shape = read.shape
        return shape if not self.ends_ffn else (*shape[:-2], shape[-1])

    def _watched(
        self,
        y: Tensor,
        wanted: Routing,
        routing: Routing,
        context: ForwardContext,
        shape: Sequence[int],
    ) -> Tensor:
        """The output with the balance objectives on it, for who trains or records."""
        values: dict[str, Tensor] = {}
        if self.training and self.router is not None:
            y = self._balance(y, wanted, context, shape, values)
        if self.runtime.trace is not None or self.runtime.stats is not None:
            self._record(routing, context, shape, values)
        return y

    def routing(self, x: Tensor, context: ForwardContext) -> Routing:
        """Where the tokens of an input go: as the own router says, or the leader's.

        Args:
            x: What the router reads, [..., features]; of a linear layer its input.
            context: The running forward.

        Raises:
            RoutingError: See ``molora.route``.
        """
        if self.router is None or self.router.reads_base_pass:
            decider = self.decider
            assert decider is not None
            slots = x.shape[-2] if self.ends_ffn else 1
            tokens = x.numel() // x.shape[-1] // slots
            return follow(decider, tokens, context, self.path)
        routing = decide(self.router, x, context)
        if self.router.config.scope != "site":
            context.routes[self.path] = routing
        return routing

    def _updated(
        self, x: Tensor, read: Tensor, routing: Routing, context: ForwardContext
    ) -> Tensor:
        """Base output plus update, [T, O]."""
        decider = self.decider
        assert decider is not None
        if decider.config.scope == "block":
            shared = shared_shrink.update(self, x, routing, context)
            if shared is not None:
                return shared
        return self.host.run(self, x, read, routing.gates, routing.top_k)

    def _in_ffn(self, x: Tensor, routing: Routing, context: ForwardContext) -> Tensor:
        """The layer's part in an FFN whose experts run side by side; see ffn.py."""
        decider = self.decider
        assert decider is not None
        if self.router is not None:
            with_base = not decider.sums_to_one() or decider.capacity is not None
            context.slots[self.path] = slots_of(routing, with_base)
        slots = context.slots[decider.site]
        return leave(self, x, slots) if self.ends_ffn else enter(self, x, slots)

    def _balance(
        self,
        y_TO: Tensor,
        routing: Routing,
        context: ForwardContext,
        shape: Sequence[int],
        values: dict[str, Tensor],
    ) -> Tensor:
        """Attach the balance objectives, and note their values."""
        weight_T = context.token_weights(shape, self.path)
        for objective, weight in self.objectives:
            rows = None
            if objective.needs_tasks:
                rows = context.token_rows(shape, self.path)
            value = values[objective.config.kind] = objective(routing, weight_T, rows)
            if isinstance(objective, Steering):
                self._count(routing, weight_T)
            elif torch.is_grad_enabled():
                self._require_path(objective.config.kind, value, y_TO)
                y_TO = attach(y_TO, value, weight, self.runtime)
        return y_TO

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _count(self, routing: Routing, weight_T: Tensor | None) -> None:
        """Add a forward to the load that moves the bias."""
        assert self.router is not None
        # a recomputation in backward repeats a forward that was counted
        if not in_backward():
            load_E, before_E = routing.load(weight_T), self.router.load_E
            self.router.load_E = load_E if before_E is None else before_E + load_E

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(
        self,
        routing: Routing,
        context: ForwardContext,
        shape: Sequence[int],
        values: dict[str, Tensor],
    ) -> None:
        """Add to the trace and to the running sums, where somebody reads them."""
        # a recomputation in backward repeats a forward that is on record
        if in_backward():
            return
        weight_T = context.token_weights(shape, self.path)
        runtime = self.runtime
        if runtime.trace is not None:
            runtime.trace.add(self.path, routing, context, shape, weight_T)
        if runtime.stats is not None and self.training and self.router is not None:
            stats = runtime.stats.get(self.path)
            if stats is None:
                gates = routing.gates
                stats = SiteStats.empty(gates.shape[-1], gates.device)
                runtime.stats[self.path] = stats
            stats.add(routing, weight_T, values)

    @torch.no_grad()
    def after_optimizer_step(self, taken: bool) -> None:
        """Let objectives that steer act on the router; see ``molora.model``."""
        if self.router is None:
            return
        for objective, _ in self.objectives:
            if isinstance(objective, Steering) and taken:
                objective.step(self.router)
        self.router.load_E = None

    def _require_path(self, kind: str, value: Tensor, y_TO: Tensor) -> None:
        # a frozen router still passes a gradient to x, which would train other layers
        assert self.router is not None
        trained = any(p.requires_grad for p in self.router.parameters())
        if not (trained and value.requires_grad and y_TO.requires_grad):
            raise RoutingError(
                f"site {self.path!r}: balance objective {kind!r} has a coefficient but "
                "no gradient path to the router. Unfreeze the router, or drop the "
                "objective from the config."
            )
