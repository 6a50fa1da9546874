"""Which rows an epoch sees, and how rows become a batch.

Legend: B rows of a batch, S tokens of the longest row.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from molora.errors import ConfigError
from molora.training.encoding import IGNORE, Encoded
from molora.training.mixture import TaskMixture


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Round shares of a total to whole numbers (Hamilton's method).

    Args:
        shares: Non-negative, in any unit.
        total: What the counts add up to.

    Returns:
        One count per share: the quota rounded down, plus one for the largest
        remainders, the earlier share first among equals.
    """
    quotas = [share * total / sum(shares) for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


class MixtureSampler(Sampler[int]):
    """Draws the rows of an epoch from (seed, epoch) alone.

    Each task's count is its share of the epoch, rounded by the largest remainder. Its
    rows are drawn without replacement; where the count exceeds the task's rows, further
    passes follow, each shuffled anew. Then all drawn rows are shuffled. A task drawn
    below its size sees a fresh random part of its rows every epoch.

    Args:
        mixture: The rows, with the tasks' shares and the size of an epoch.
        seed: Of the run.

    Raises:
        ConfigError: A task with rows and a share would never be drawn.
    """

    def __init__(self, mixture: TaskMixture, seed: int = 0):
        self.seed = seed
        self.epoch = 0
        self.sizes = mixture.sizes
        self.counts = largest_remainder(mixture.shares, mixture.epoch_size)
        for name, share, count in zip(
            mixture.task_names, mixture.shares, self.counts, strict=True
        ):
            if share > 0 and count == 0:
                raise ConfigError(
                    f"epoch_size: task {name!r} would get no row of the "
                    f"{mixture.epoch_size} of an epoch; raise epoch_size, or the "
                    "task's weight or the temperature"
                )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw(self.epoch))

    def __len__(self) -> int:
        return sum(self.counts)

    def draw(self, epoch: int) -> list[int]:
        """Indices into the mixture that an epoch visits, in order."""
        drawn: list[int] = []
        offset = 0
        for task, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            passes = -(-count // size) if size else 0
            rows = [
                offset + row
                for index in range(passes)
                for row in self._shuffled(size, "rows", epoch, task, index)
            ]
            drawn += rows[:count]
            offset += size
        return [drawn[i] for i in self._shuffled(len(drawn), "order", epoch)]

    def _shuffled(self, size: int, *key: object) -> list[int]:
        text = repr((self.seed, *key)).encode()
        # 63 bits: manual_seed takes a signed 64-bit number
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = torch.randperm(size, generator=generator).tolist()
        return order


class Collator:
    """Pads rows on the right and stacks them.

    Args:
        pad_token_id: Filler of ``input_ids``. It may be a token that also occurs in
            rows (often eos): masks come from lengths.
        pad_to_multiple_of: Pad to a multiple of this many tokens.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None):
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Build one batch.

        Args:
            rows: B encoded rows.

        Returns:
            ``input_ids``, ``attention_mask`` (1 on real tokens) and ``labels``, all
            [B, S], and ``task_ids`` [B], all int64.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        step = self.pad_to_multiple_of
        width = -(-longest // step) * step

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (width - len(values))

        return {
            "input_ids": torch.tensor(
                [padded(row["input_ids"], self.pad_token_id) for row in rows]
            ),
            "attention_mask": torch.tensor(
                [padded([1] * len(row["input_ids"]), 0) for row in rows]
            ),
            "labels": torch.tensor([padded(row["labels"], IGNORE) for row in rows]),
            "task_ids": torch.tensor([row["task_id"] for row in rows]),
        }
