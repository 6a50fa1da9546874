"""What routing needs from the running model: token mask, tasks of the rows.

A ``ForwardContext`` belongs to one forward of the whole model. A hook makes it from the
arguments of that forward; activation checkpointing carries it into the recomputation
(``ContextCheckpoint``), which may come after other forwards. The ``Runtime`` is what
all sites of one wrapped model share.

Shape legend
    B rows   S positions   T = B * S tokens
"""

import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from molora.base_pass import BasePass
from molora.errors import RoutingError
from molora.prompt import Means, Prompt, prompt_mean, read_prompt
from molora.token_mask import mask_from_attention
from molora.token_mask import mask_from_labels as mask_from_labels
from molora.token_mask import mask_from_positions as mask_from_positions

if TYPE_CHECKING:
    from molora.ffn import Slots
    from molora.records import RoutingTrace, SiteStats
    from molora.routers.base import Routing
    from molora.shared_shrink import Shrunk


class TokenRows(NamedTuple):
    """Rows that the flat tokens of a site belong to: equally many each, in order."""

    num_rows: int
    """B."""
    tasks: tuple[str, ...] | None
    """Task of each row; None when not given."""


@dataclass(frozen=True)
class ForwardContext:
    """One forward of the wrapped model.

    Attributes:
        mask_BS: True at real tokens; None when every token is real.
        tasks: Task of each row, as given to ``molora.tasks``; None when not given.
        mask_source: Which argument the mask came from, for messages.
        rows: B; None when the arguments do not tell.
        continues: Whether its tokens go on from a key-value cache that holds some.
        prompt: What the forward tells of the prompt, for routers that read it.
        positions: S; None when the arguments do not tell.
        means: Means of the prompt that sites have read in this forward.
        routes: Routings of this forward that sites share, by the site that made them;
            those of a first pass by the site they are for.
        slots: The same as slots of whole-FFN experts; see molora.ffn.
        shrunk: What layers that read one tensor share; see molora.shared_shrink.
        shrink_plans: Which layers took part in that when the forward ran.
        base: Of its first pass, the "cache", and whether the body has "entered" its
            forward proper.
    """

    mask_BS: Tensor | None = None
    tasks: tuple[str, ...] | None = None
    mask_source: str = "none"
    rows: int | None = None
    continues: bool = False
    prompt: Prompt | None = None
    positions: int | None = None
    means: Means = field(default_factory=dict, repr=False, compare=False)
    routes: "dict[str, Routing]" = field(
        default_factory=dict, repr=False, compare=False
    )
    slots: "dict[str, Slots]" = field(default_factory=dict, repr=False, compare=False)
    shrunk: "dict[str, Shrunk]" = field(default_factory=dict, repr=False, compare=False)
    shrink_plans: dict[str, frozenset[str]] = field(
        default_factory=dict, repr=False, compare=False
    )
    base: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _weights: dict[tuple[int, ...], Tensor | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def token_weights(self, shape: Sequence[int], site: str) -> Tensor | None:
        """The token mask as float32 [T], 1 at real tokens, made once for all sites.

        Arguments, None and errors are those of ``token_mask``.
        """
        key = tuple(shape[:-1])
        if torch.compiler.is_compiling():
            # a graph notes nothing outside itself, and finds what it repeats
            mask_T = self.token_mask(shape, site)
            return None if mask_T is None else mask_T.float()
        if key not in self._weights:
            mask_T = self.token_mask(shape, site)
            self._weights[key] = None if mask_T is None else mask_T.float()
        return self._weights[key]

    def token_mask(self, shape: Sequence[int], site: str) -> Tensor | None:
        """Flat mask of the tokens that a site sees.

        Args:
            shape: Shape of the site's input, (B, S, I) or (T, I). A site behind a slice
                of the last positions (``logits_to_keep``) sees fewer than S.
            site: Module path, for the message.

        Returns:
            Bool [T], or None when every token is real.

        Raises:
            RoutingError: The input cannot be lined up with the mask.
        """
        if self.mask_BS is None:
            return None
        return self._line_up(self.mask_BS, shape, site)

    def _line_up(self, mask_BS: Tensor, shape: Sequence[int], site: str) -> Tensor:
        """Flatten a mask to the tokens that a site sees; errors of ``token_mask``."""
        if len(shape) == 3 and mask_BS.shape[0] == 1:
            # position_ids and 4-D masks may have one row for the whole batch
            mask_BS = mask_BS.expand(shape[0], -1)
        rows, positions = mask_BS.shape
        if len(shape) == 3 and shape[0] == rows and shape[1] <= positions:
            return mask_BS[:, positions - shape[1] :].reshape(-1)
        # a flat input; [S, B, I] has as many tokens but in another order
        flat = len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)
        if flat and shape[-2] == mask_BS.numel():
            return mask_BS.reshape(-1)
        raise RoutingError(
            f"site {site!r}: its input {tuple(shape)} does not line up with the "
            f"{self.mask_source} of shape {tuple(mask_BS.shape)}, so padding cannot be "
            "told from real tokens there. Add the site to exclude_modules, or drop "
            "the balance objective."
        )

    def prompt_mean(self, x: Tensor, site: str) -> Tensor:
        """Mean input of a site over the prompt of each row; see molora.prompt.

        Args:
            x: Input of the site, [B, S, I] or flat [B * S, I].
            site: Module path; its mean is kept in the cache under this name.

        Returns:
            [B, I] in at least float32.

        Raises:
            RoutingError: It cannot be told which tokens are the prompt, or a row has
                none.
        """
        prompt = self.prompt
        if prompt is None:
            raise RoutingError(
                f"site {site!r}: router.input: sequence reads the prompt of a forward "
                "of the whole model; call the model itself"
            )
        if prompt.kept is not None:
            return prompt.kept[site]
        rows = self.token_rows(x.shape, site).num_rows
        x_BSI = x.reshape(rows, -1, x.shape[-1])
        prompt_BS = prompt.of_rows(self.mask_BS, x_BSI.shape[:2], x.device, site)
        mean_BI = self.means[site] = prompt_mean(x_BSI, prompt_BS)
        return mean_BI

    def token_rows(self, shape: Sequence[int], site: str) -> TokenRows:
        """Rows of the tokens that a site sees, with their tasks.

        Args:
            shape: Shape of the site's input, (B, S, I), or flat (B * S, I).
            site: Module path, for the message.

        Raises:
            RoutingError: The input cannot be cut into the rows of the batch, or their
                number is no multiple of the number of tasks.
        """
        stacked = len(shape) == 3 and shape[0] > 1
        rows = self.rows or (shape[0] if len(shape) == 3 else 0)
        tokens = math.prod(shape[:-1])
        # one row of positions for all rows of the batch has no task of its own
        once = rows > 1 and tokens == self.positions
        flat = not stacked and not once and rows > 0 and tokens % rows == 0
        if not (flat or (stacked and shape[0] == rows)):
            raise RoutingError(
                f"site {site!r}: its input {tuple(shape)} does not line up with the "
                f"{rows or 'unknown'} rows of the batch, so the task of a token cannot "
                "be told there. Add the site to exclude_modules, or drop the balance "
                "objective that reads tasks."
            )
        return TokenRows(rows, self.row_tasks(rows))

    def row_tasks(self, rows: int) -> tuple[str, ...] | None:
        """Tasks of the rows; beams repeat each row's task.

        Raises:
            RoutingError: The number of rows is no multiple of the number of tasks.
        """
        if self.tasks is None:
            return None
        if rows % len(self.tasks):
            raise RoutingError(
                f"molora.tasks got {len(self.tasks)} tasks for a batch of {rows} rows"
            )
        repeat = rows // len(self.tasks)
        return tuple(task for task in self.tasks for _ in range(repeat))


@dataclass
class Runtime:
    """State that all sites of one wrapped model share.

    Attributes:
        current: Context of the running forward; None between forwards.
        owner: Identity of the module whose forward made it.
        disabled: Sites return the base output while this is above 0.
        balance_scale: Factor on every balance gradient. A trainer sets it to
            1 / accumulation steps, times the loss scale under fp16.
        tasks: Tasks that ``molora.tasks`` set for the next forwards.
        prompts: Tokens that ``molora.prompts`` named as the prompt, [B, S].
        reads_prompt: Whether some router reads the prompt.
        identity: Tells caches that this adapter filled from others.
        shares: Whether some sites share a routing.
        base_pass: The first pass, where some router reads it.
        trace: Active ``record_routing``, if any.
        stats: Per-site training statistics; None when nobody reads them.
    """

    current: ForwardContext | None = None
    owner: int | None = None
    disabled: int = 0
    balance_scale: float = 1.0
    tasks: tuple[str, ...] | None = None
    prompts: Tensor | None = None
    reads_prompt: bool = False
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    shares: bool = False
    base_pass: BasePass | None = None
    trace: "RoutingTrace | None" = None
    stats: "dict[str, SiteStats] | None" = None

    def context_for(self, site: str, needed: bool) -> ForwardContext:
        """Context of the forward that a site is part of.

        Args:
            site: Module path, for the message.
            needed: Whether a missing context would change the result.

        Raises:
            RoutingError: A recomputation in backward does not know its forward.
        """
        if self.current is not None:
            return self.current
        if needed and in_backward():
            raise RoutingError(
                f"site {site!r}: recomputed in backward without the context of its "
                "forward (token mask, tasks). Enable activation checkpointing through "
                "model.gradient_checkpointing_enable(), not by hand."
            )
        return ForwardContext(tasks=self.tasks)

    @property
    def continues(self) -> bool:
        """Whether the running forward goes on from a cache; see ``ForwardContext``."""
        return self.current is not None and self.current.continues

    @contextmanager
    def use(self, context: ForwardContext | None, disabled: int) -> Iterator[None]:
        """Be inside the block as a forward was: its context, adapter on or off."""
        if self.current is context and self.disabled == disabled:
            # nothing to change, which a checkpoint inside a compiled graph could not
            yield
            return
        before = self.current, self.disabled
        self.current, self.disabled = context, disabled
        try:
            yield
        finally:
            self.current, self.disabled = before


class ContextCheckpoint:
    """Activation checkpointing that gives the recomputation its own forward's context.

    Args:
        checkpoint: The checkpoint function, in either mode, that does the work.
        runtime: Runtime of the wrapped model.
    """

    def __init__(self, checkpoint: Callable[..., Any], runtime: Runtime):
        self.checkpoint = checkpoint
        self.runtime = runtime

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint function(*args) under the context that is current now."""
        context, disabled = self.runtime.current, self.runtime.disabled

        def in_context(*inner: Any, **inner_kwargs: Any) -> Any:
            with self.runtime.use(context, disabled):
                return function(*inner, **inner_kwargs)

        return self.checkpoint(in_context, *args, **kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_backward() -> bool:
    """Whether autograd is running a backward on this thread; in a graph, at trace."""
    return bool(torch._C._current_graph_task_id() != -1)


def forward_context(
    arguments: dict[str, Any], runtime: Runtime, training: bool
) -> ForwardContext:
    """Make the context of a forward from the arguments it was called with.

    The mask comes from the first of these that is given: attention_mask (2-D, or the
    diagonal of a 4-D one), position_ids, labels. With a cache the attention mask is
    longer than the input; its last columns belong to the input.

    Args:
        arguments: Keyword arguments of the model's forward.
        runtime: Tasks and prompts of the rows, if set.
        training: Whether the model is in training mode.

    Raises:
        RoutingError: The attention mask has a form that cannot be read, or a router
            reads the prompt and this forward does not tell it.
    """
    mask = arguments.get("attention_mask")
    inputs = arguments.get("input_ids")
    if inputs is None:
        inputs = arguments.get("inputs_embeds")
    rows, positions = inputs.shape[:2] if isinstance(inputs, Tensor) else (None, None)
    position_ids, labels = arguments.get("position_ids"), arguments.get("labels")
    mask_BS, source = None, "none"
    if isinstance(mask, Tensor):
        source = "attention_mask"
        cache = arguments.get("past_key_values")
        mask_BS = mask_from_attention(mask, positions, cache)
    elif isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        source, mask_BS = "position_ids", mask_from_positions(position_ids)
    elif isinstance(labels, Tensor) and labels.dim() == 2:
        source, mask_BS = "labels", mask_from_labels(labels)
    prompt = None
    if runtime.reads_prompt and not runtime.disabled:
        prompt = read_prompt(
            arguments, mask_BS, runtime.prompts, training, runtime.identity
        )
    length = getattr(arguments.get("past_key_values"), "get_seq_length", int)()
    # a tensor is on the device, and nothing here waits for that
    continues = isinstance(length, int) and length > 0
    return ForwardContext(
        mask_BS, runtime.tasks, source, rows, continues, prompt, positions
    )
