"""What all routers share.

Shape legend (this folder)
    T tokens   B rows   I in features   E experts   K experts chosen per token
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from molora.context import ForwardContext
from molora.kernels import router_logits
from molora.registry import Registry
from molora.routers.gates import require_finite
from molora.routers.routing import Routing as Routing
from molora.routers.settings import GateConfig as GateConfig
from molora.routers.settings import RouterConfig as RouterConfig


class AbstractRouter(nn.Module, abc.ABC):
    """Chooses experts for each token.

    Args:
        config: Settings.
        in_features: I, or the number of tasks with input: task.
        num_experts: E.
        site: Module path of the target layer, for messages.
        generator: Source of the initial weights.

    Attributes:
        capacity: Multiple of the mean load that an expert serves in training, or None.
        bias_E: Added to what experts are ranked by, once ``add_bias`` was called.
        load_E: Tokens assigned to each expert since the bias was moved; None: none. Not
            a buffer: DistributedDataParallel would copy that of the first process.
    """

    Config: ClassVar[type[RouterConfig]]
    selects: ClassVar[bool] = True
    """Whether some gates are zero."""
    has_probs: ClassVar[bool] = True
    """Whether each token has a distribution over the experts, to balance."""
    ranks: ClassVar[bool] = False
    """Whether it takes a fixed number of experts by rank, and reads ``bias_E``."""
    has_sparsity: ClassVar[bool] = False
    """Whether it sets ``Routing.sparsity``."""
    needs_trained: ClassVar[bool] = False
    """Whether it can choose only among experts that were trained before."""
    own_site: ClassVar[bool] = False
    """Whether it belongs to one target layer and its tokens, for any other use."""
    reads_prompt: ClassVar[bool] = False
    """Whether it asks the context for the prompt, whatever its input."""
    reads_base_pass: ClassVar[bool] = False
    """Whether it routes all its sites at once, by the hidden state that a first pass of
    the base model gives (molora/base_pass.py): it has ``routings``."""
    capacity: float | None = None
    bias_E: Tensor | None
    load_E: Tensor | None = None

    def __init__(
        self,
        config: RouterConfig,
        *,
        in_features: int,
        num_experts: int,
        site: str,
        generator: torch.Generator,
    ):
        super().__init__()
        self.config = config
        self.in_features = in_features
        self.site = site
        self.register_buffer("bias_E", None)

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """Say why this config means nothing with num_experts, or return None."""
        for field in ("scope", "input"):
            value = getattr(config, field)
            if cls.own_site and value not in ("site", "token"):
                return (
                    f"router.{field}={value!r}: router.kind {config.kind!r} reads the "
                    "experts of its own layer and that layer's tokens; drop it, or set "
                    "router.kind to topk or soft"
                )
        return None

    @classmethod
    def check_balance(cls, config: RouterConfig) -> str | None:
        """Say why balance objectives mean nothing with this config, or return None."""
        return None

    @classmethod
    def can_grow(cls, config: RouterConfig) -> bool:
        """Whether gates do not depend on experts that were not chosen, to the bit."""
        return False

    @classmethod
    def known_tasks(cls, config: RouterConfig) -> tuple[str, ...]:
        """Tasks of the rows that it routes by; none where it does not read them."""
        return tuple(config.tasks)

    def bind(self, experts: Any) -> None:  # noqa: B027
        """Meet the bank of the same site, for routers that read the experts.

        Args:
            experts: The expert family's module.

        Raises:
            ConfigError: The router cannot read this family.
        """

    @property
    def needs_context(self) -> bool:
        """Whether a routing depends on more of the forward than the tokens given."""
        config = self.config
        elsewhere = config.scope != "site" or config.input != "token"
        return elsewhere or self.reads_prompt

    def sums_to_one(self) -> bool:
        """Whether the gates of every token sum to 1; False where that is not known."""
        return False

    def place(self, depth: float | None) -> None:  # noqa: B027
        """Learn where the target layer stands, for routers whose start depends on it.

        Args:
            depth: 0 in the first layer of the model, 1 in the last, 0.5 in the only
                one; None where the layer has no number.

        Raises:
            WrapError: The router needs the depth, and there is none.
        """

    def add_bias(self, num_experts: int) -> None:
        """Make the bias, which is saved with the router."""
        self.register_buffer("bias_E", torch.zeros(num_experts))

    @abc.abstractmethod
    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """Route a flat batch of tokens.

        Args:
            x: [T, I] inputs of the target layer.
            context: The running forward.

        Returns:
            The routing of every token.

        Raises:
            RoutingError: A logit is NaN or infinite.
        """


class LinearGateRouter(AbstractRouter):
    """Base of routers whose logits are a linear map of the token; see base class."""

    def __init__(
        self,
        config: GateConfig,
        *,
        in_features: int,
        num_experts: int,
        site: str,
        generator: torch.Generator,
    ):
        super().__init__(
            config,
            in_features=in_features,
            num_experts=num_experts,
            site=site,
            generator=generator,
        )
        self.capacity = config.capacity
        self.gate = nn.utils.skip_init(nn.Linear, in_features, num_experts, bias=False)
        with torch.no_grad():
            self.gate.weight.normal_(0.0, config.init_range, generator=generator)

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, GateConfig)
        if config.capacity is not None and not cls.selects:
            return (
                f"router.capacity={config.capacity}: router.kind {config.kind!r} gives "
                "every token to every expert, so nothing can overflow; drop it, or set "
                "router.kind to topk"
            )
        return super().check(config, num_experts)

    def available(self, logits: Tensor) -> Tensor:
        """Logits with -inf at the experts that expert dropout hides.

        Args:
            logits: [T, E].

        Returns:
            [T, E]; the same tensor where nothing is dropped.
        """
        config = self.config
        assert isinstance(config, GateConfig)
        if not (self.training and config.expert_dropout):
            return logits
        drawn_TE = torch.rand_like(logits)
        luckiest_T1 = drawn_TE.amax(-1, keepdim=True)
        hidden_TE = (drawn_TE < config.expert_dropout) & (drawn_TE < luckiest_T1)
        return logits.masked_fill(hidden_TE, -torch.inf)

    def probs(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Softmax of the available experts, and ``Routing.full``.

        Args:
            logits: [T, E].

        Returns:
            [T, E] to choose from, and the same where nothing was dropped, else None.
        """
        seen_TE = self.available(logits)
        probs_TE = torch.softmax(seen_TE, -1)
        return probs_TE, probs_TE if seen_TE is logits else None

    def biased(self, logits: Tensor) -> Tensor:
        """Probabilities plus ``bias_E``, to rank experts by; -inf stays last.

        Args:
            logits: [T, E].

        Returns:
            [T, E] without a gradient.
        """
        assert self.bias_E is not None
        logits = logits.detach()
        scores_TE = torch.softmax(logits, -1) + self.bias_E
        return scores_TE.masked_fill(logits == -torch.inf, -torch.inf)

    def chooser(self) -> Callable[[list[float]], list[tuple[int, float]] | None] | None:
        """How one token's experts follow from its scores, on the host, in eval mode.

        Returns:
            A function of the scores that gives experts with their gates, or None where
            only ``forward`` can tell (a tie, a score that is not finite); None where
            it is not this simple.
        """
        return None

    def in_one(self, x: Tensor) -> Routing | None:
        """``forward`` as one launch on a GPU.

        Args:
            x: [T, I].

        Returns:
            The routing; None where it takes more than that.
        """
        return None

    def scores(self, x: Tensor) -> Tensor:
        """Logits before noise and temperature, [T, E] in at least float32."""
        return router_logits(x, self.gate.weight)

    def logits(self, x: Tensor) -> Tensor:
        """Gate logits after noise and temperature.

        Args:
            x: [T, I].

        Returns:
            [T, E], float32 at least, finite.

        Raises:
            RoutingError: A logit is NaN or infinite; names the site.
        """
        config = self.config
        assert isinstance(config, GateConfig)
        logits_TE = self.scores(x)
        logits_TE = require_finite(logits_TE, self.site)
        if self.training and config.noise:
            logits_TE = logits_TE + config.noise * torch.randn_like(logits_TE)
        if config.temperature != 1.0:
            logits_TE = logits_TE / config.temperature
        return logits_TE


ROUTERS: Registry[AbstractRouter] = Registry("router")
