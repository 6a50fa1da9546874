"""nn.Embedding as the host of a bank: rows of the table, one for each id.

    y[t] = c (W[id_t] + sum_e g_e s_e B_e A_e[:, id_t])

W is [V, O], so I = V: a column of A for each id, which is gathered, never multiplied by
a one-hot row. c is 1, or the factor by which a subclass multiplies (Gemma's and BART's
``embed_scale``); merged, W + s (B A)^T is multiplied by it as well.

As in PEFT 0.21, A starts at zero and B at N(0, 1) (``init_lora_weights`` true or
gaussian, while no factor is frozen, masked, seeded or shared with other layers), the
column of ``padding_idx`` gets no gradient, and ``scale_grad_by_freq`` holds for A.

Shape legend: see base.py.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.errors import WrapError
from molora.experts import AbstractExperts, BilinearExperts, LoRAExperts
from molora.experts.base import ExpertsConfig
from molora.hosts.base import Host, add_parts
from molora.kernels.torch_path import cast, dtype_of

if TYPE_CHECKING:
    from molora.layer import MoloraLinear


class EmbeddingHost(Host):
    """nn.Embedding, and subclasses that multiply what they look up by ``embed_scale``.

    The router reads the output of the frozen layer, O features a token.

    Limitations: families that are a product of two factors only; no ``lora_dropout``,
    which PEFT leaves out silently; no ``max_norm``, which changes the frozen table in
    every forward. Where A does not start at zero (frozen or seeded, another start,
    another family) the row of ``padding_idx`` is changed as well, and A is as small as
    for V inputs, though one of them is read. The gradient of A is dense, [r, V] for
    each expert. Each table is a target of its own: T5 and BART never call ``shared``,
    name ``encoder.embed_tokens`` and ``decoder.embed_tokens`` there.
    """

    LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    READS = "ids"
    SHOWN = ("num_embeddings", "embedding_dim", "padding_idx")
    PEFT: ClassVar[frozenset[str] | None] = frozenset()
    LORA = ("lora_embedding_A", "lora_embedding_B")

    def sizes(self, layer: Any) -> tuple[int, int]:
        """See base class; I is the number of ids."""
        return layer.num_embeddings, layer.embedding_dim

    def width(self, layer: Any) -> int:
        """See base class."""
        wide: int = layer.embedding_dim
        return wide

    def check(self, layer: Any, family: type[AbstractExperts]) -> None:
        """See base class."""
        if not issubclass(family, BilinearExperts):
            raise WrapError(
                f"an nn.Embedding looks ids up, and {family.__name__} are no product "
                "of two factors whose columns could be looked up too; use "
                "experts.kind lora, or another bilinear one, in an override for this "
                "layer, or exclude it"
            )
        if layer.max_norm is not None:
            raise WrapError(
                "the embedding has max_norm, which changes its frozen rows in every "
                "forward; exclude the layer, or set max_norm to None"
            )
        if not _is_lookup(layer):
            raise WrapError(
                f"{type(layer).__name__} does more than look ids up and multiply by "
                "embed_scale, so no update of its rows is defined; exclude the layer"
            )

    def check_settings(self, settings: ExpertsConfig) -> None:
        """See base class."""
        if getattr(settings, "lora_dropout", 0.0):
            raise WrapError(
                "experts.lora_dropout: an embedding reads ids, of which nothing can "
                "be dropped; set it to 0 in an override for this layer"
            )

    def begin(self, experts: AbstractExperts, generator: torch.Generator) -> None:
        """See base class."""
        if isinstance(experts, LoRAExperts):
            experts.begin_at_zero_A(generator)

    def seen(self, layer: Any, x: Tensor) -> Tensor:
        """See base class; the frozen output."""
        y: Tensor = layer(x)
        return y

    def run(
        self,
        site: "MoloraLinear",
        x: Tensor,
        seen: Tensor | None,
        gates: Tensor | None,
        top_k: int | None,
    ) -> Tensor:
        """See base class."""
        layer: Any = site.base
        base_TO = self.rows(layer, site.base(x) if seen is None else seen)
        assert isinstance(site.experts, BilinearExperts)

        def shrink(A: Tensor, dropout: float) -> Tensor:
            z_TR = F.embedding(
                x.reshape(-1),
                A.flatten(0, 1).t(),
                padding_idx=layer.padding_idx,
                scale_grad_by_freq=layer.scale_grad_by_freq,
            )
            return cast(z_TR, dtype_of(base_TO, A))

        return add_parts(site.experts, base_TO, gates, shrink, scale_of(layer))

    def rows(self, layer: Any, y: Tensor) -> Tensor:
        """See base class."""
        return y.reshape(-1, y.shape[-1])

    def shaped(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """See base class."""
        return y.view(*x.shape, y.shape[-1])

    def weight_OI(self, weight: Tensor) -> Tensor:
        """See base class."""
        return weight.t()

    def stored(self, matrix_OI: Tensor, weight: Tensor) -> Tensor:
        """See base class."""
        return matrix_OI.t()


def scale_of(layer: Any) -> float | Tensor:
    """Factor on what a layer looks up, rounded as it is there; a tensor stays one."""
    scale: float | Tensor = getattr(layer, "embed_scale", 1.0)
    if isinstance(scale, Tensor):
        return scale.to(layer.weight.dtype).float()
    return float(scale)


@torch.no_grad()
def _is_lookup(layer: Any) -> bool:
    """Whether a layer gives its rows times ``embed_scale``, tried on a few ids."""
    if type(layer).forward is nn.Embedding.forward:
        return True
    if not hasattr(layer, "embed_scale"):
        return False
    if layer.weight.is_meta:
        return True
    count = min(layer.num_embeddings, 64)
    ids = torch.arange(count, device=layer.weight.device).unsqueeze(0)
    wanted = layer.weight[:count].double() * scale_of(layer)
    got = layer(ids)[0].double()
    slack = 4 * torch.finfo(layer.weight.dtype).eps
    return got.shape == wanted.shape and torch.allclose(got, wanted, slack, slack)
