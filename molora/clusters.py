"""How many experts a corpus asks for: k-means over its embedded rows.

    inertia(k) = sum over rows of the squared distance to the nearest of k centres

``elbow`` takes the k whose inertia lies furthest below the straight line between those
of the smallest and the largest k, both axes scaled to 0..1; ``silhouette`` the k with
the largest mean of (b - a) / max(a, b), a and b being a row's mean distances to its own
cluster and to the nearest other one.

HydraLoRA (Tian et al. 2024, arXiv:2404.19245) chooses the number of its B matrices by
k-means; its code does not hold that step, so embedding and rule are ours. scikit-learn
computes k-means and silhouette: ``pip install molora[clusters]``.

Shape legend
    N rows   D features of an embedding   B rows of a batch   S positions
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from molora.errors import ConfigError, DataError

Rule = Literal["elbow", "silhouette"]


@dataclass(frozen=True)
class ClusterChoice:
    """What was measured and chosen.

    Attributes:
        num_experts: The chosen k.
        rule: How it was chosen.
        inertia: By k, from 1.
        silhouette: By k, from 2; between -1 and 1.
        sizes: Rows in each cluster of the chosen k.
    """

    num_experts: int
    rule: Rule
    inertia: dict[int, float]
    silhouette: dict[int, float]
    sizes: list[int]


def choose_num_experts(
    embeddings: Tensor,
    *,
    rule: Rule = "elbow",
    largest: int = 16,
    restarts: int = 10,
    seed: int = 0,
) -> ClusterChoice:
    """Choose the number of experts for a corpus.

    Args:
        embeddings: [N, D], one row per training row, see ``embed``.
        rule: ``elbow`` or ``silhouette``.
        largest: Largest number tried, at least 2; below N.
        restarts: Runs of k-means for each number, of which the best counts.
        seed: Seed of k-means.

    Returns:
        The number and every score. Rows that are all equal ask for one expert.

    Raises:
        ConfigError: scikit-learn is missing, or a setting is out of range.
        DataError: Too few rows for ``largest``, or values that are not finite.
    """
    if rule not in ("elbow", "silhouette"):
        raise ConfigError(f"rule: {rule!r} is none of elbow, silhouette")
    if largest < 2 or restarts < 1:
        raise ConfigError(
            f"largest={largest}, restarts={restarts}: need at least 2 and 1"
        )
    points = embeddings.detach().double().cpu().numpy()
    if points.ndim != 2 or not np.isfinite(points).all():
        raise DataError("embeddings: need finite values of shape [rows, features]")
    if len(points) <= largest:
        raise DataError(
            f"{len(points)} rows cannot show up to {largest} clusters; give more rows "
            "or lower largest"
        )
    if (points == points[0]).all():
        return ClusterChoice(1, rule, {1: 0.0}, {}, [len(points)])
    largest = min(largest, len(np.unique(points, axis=0)) - 1)
    return _measured(points, rule, max(largest, 1), restarts, seed)


def _measured(
    points: Any, rule: Rule, largest: int, restarts: int, seed: int
) -> ClusterChoice:
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise ConfigError(
            f"choosing the number of experts needs scikit-learn ({error}); install it "
            "with: pip install molora[clusters]"
        ) from None
    inertia, silhouette, labels = {}, {}, {}
    for k in range(1, largest + 1):
        fitted = KMeans(k, n_init=restarts, random_state=seed).fit(points)
        inertia[k], labels[k] = float(fitted.inertia_), fitted.labels_
        if k > 1:
            silhouette[k] = float(silhouette_score(points, fitted.labels_))
    if rule == "silhouette" and silhouette:
        chosen = max(silhouette, key=lambda k: silhouette[k])
    else:
        chosen = elbow(inertia)
    sizes = np.bincount(labels[chosen], minlength=chosen).tolist()
    return ClusterChoice(chosen, rule, inertia, silhouette, sizes)


def elbow(inertia: Mapping[int, float]) -> int:
    """The k furthest below the chord of the curve; the smallest where it is straight.

    Args:
        inertia: By k, falling.
    """
    first, last = min(inertia), max(inertia)
    drop = inertia[first] - inertia[last]
    if first == last or drop <= 0:
        return first
    below = {
        k: 1 - (k - first) / (last - first) - (value - inertia[last]) / drop
        for k, value in inertia.items()
    }
    return max(below, key=lambda k: (round(below[k], 12), -k))


@torch.no_grad()
def embed(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Embed rows by the mean of their last hidden states, scaled to length 1.

    Args:
        model: A transformers model, plain or wrapped, in eval mode.
        batches: With input_ids [B, S] and attention_mask [B, S]; other entries are not
            read.

    Returns:
        [N, D] float32, in the order of the rows.

    Raises:
        DataError: No rows, or one without a token.
    """
    body: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    rows = []
    for batch in batches:
        ids_BS = batch["input_ids"].to(device)
        mask_BS = batch["attention_mask"].to(device)
        if (mask_BS.sum(1) == 0).any():
            raise DataError("embed: a row has no token that is not padding")
        hidden = body(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
        weight_BS1 = mask_BS.unsqueeze(-1).float()
        mean_BD = (hidden.float() * weight_BS1).sum(1) / weight_BS1.sum(1)
        rows.append(nn.functional.normalize(mean_BD, dim=-1).cpu())
    if not rows:
        raise DataError("embed: there are no rows")
    return torch.cat(rows)
