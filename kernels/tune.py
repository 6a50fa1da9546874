"""Measure the configurations of the Triton kernels on a GPU: ``molora kernels tune``.

For every bucket of sizes (``configs.Bucket``) the candidates are compiled by several
processes, then timed one after another as replays of a CUDA graph, so that no time of
the host counts. The fastest goes into a JSON file that ``configs.pick`` reads before
its own table. The file is written after every bucket, and a later run goes on from it.

Limitations: one width, token count and rank stand for their bucket, and inputs of small
buckets stay in the second-level cache while they are timed.
"""

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from rich.progress import track
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench_cudagraph

from molora.errors import ConfigError
from molora.kernels import triton_dense_backward as dense_backward
from molora.kernels import triton_dense_forward as dense_forward
from molora.kernels import triton_gather, triton_grouped
from molora.kernels.configs import (
    KERNELS,
    RANKS,
    Bucket,
    Config,
    casts,
    experts_of,
    forced,
    pick,
    read_table,
)
from molora.kernels.triton_tiles import arch_of, interpreted

STAND_INS = ((16, 128, 2048, 8192), (1024, 4096, 8192))
"""Tokens and wide dimension that stand for each of their buckets."""

_BETTER = 0.98
"""Share of the present time that a candidate must beat to replace what there is."""


def tune(
    path: Path,
    kernels: Sequence[str] = KERNELS,
    ranks: Sequence[int] = RANKS,
    tokens: Sequence[int] = (0, 1, 2, 3),
    widths: Sequence[int] = (0, 1, 2),
    jobs: int = 4,
) -> dict[Bucket, tuple[Config, float, float]]:
    """Time the candidates of the chosen buckets and write the fastest to a file.

    Args:
        path: JSON file to write, and to go on from.
        kernels: Names in ``configs.KERNELS``.
        ranks: Values in ``configs.RANKS``.
        tokens: Places in ``configs.TOKENS``.
        widths: Places in ``configs.WIDTHS``.
        jobs: Processes that compile.

    Returns:
        For each bucket measured now: its fastest configuration, the microseconds of
        what the table had, and those of the fastest.

    Raises:
        ConfigError: There is no GPU, or the file is of another architecture.
    """
    if interpreted() or not torch.cuda.is_available():
        raise ConfigError(
            "the kernels can be timed on a GPU only, without TRITON_INTERPRET"
        )
    arch = arch_of(torch.device("cuda", torch.cuda.current_device()))
    rows = read_table(path, arch) if path.is_file() else {}
    # it may be the file that MOLORA_KERNEL_TABLE names, which must be there
    _write(path, arch, rows)
    buckets = [
        bucket
        for bucket in itertools.starmap(
            Bucket, itertools.product(kernels, ranks, tokens, widths, (2,))
        )
        if bucket not in rows and not _senseless(bucket)
    ]
    found = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        for bucket in track(buckets, "buckets"):
            here = _present(bucket, arch)
            tried = list(dict.fromkeys([here, *candidates(bucket)]))
            good = list(pool.map(_compiles, [(bucket, config) for config in tried]))
            times = {
                config: _time(bucket, config)
                for config, compiled in zip(tried, good, strict=True)
                if compiled
            }
            if not times:
                raise ConfigError(f"no configuration of {bucket} runs on this GPU")
            best = min(times, key=lambda config: times[config])
            before = times.get(here, float("inf"))
            if times[best] > _BETTER * before:
                best = here
            found[bucket] = best, before, times[best]
            rows[bucket] = best
            _write(path, arch, rows)
    return found


def _senseless(bucket: Bucket) -> bool:
    """Whether nothing ever takes this bucket: decoding kernels see few tokens."""
    return bucket.kernel.startswith("gather") and bucket.tokens > 1


def _present(bucket: Bucket, arch: str) -> Config:
    tokens, wide = STAND_INS[0][bucket.tokens], STAND_INS[1][bucket.wide]
    return pick(bucket.kernel, arch, bucket.rank, tokens, wide, bucket.itemsize)


def candidates(bucket: Bucket) -> Iterator[Config]:
    """Configurations worth timing for a bucket."""
    kernel, rank, tokens, _, _ = bucket
    if kernel.startswith("gather"):
        splits = (1, 2, 4, 8, 16, 32) if kernel == "gather_shrink" else (1,)
        for BN, warps, split in itertools.product((64, 128, 256), (1, 2, 4, 8), splits):
            if BN * rank <= 16384:
                yield Config(1, BN, warps, 2, split)
        return
    rows = (16, 32) if tokens == 0 else (32, 64, 128)
    if kernel in ("wgrad", "grouped_wgrad"):
        rows = (32, 64, 128)
    shape = itertools.product(rows, (32, 64, 128, 256), (4, 8), (2, 3, 4))
    for BM, BN, warps, stages in shape:
        # the tiles of all stages in shared memory, accumulators in registers
        tile = 2 * (BM * BN + max(BM, BN) * rank)
        held = {"expand_add": BM * BN, "grouped_expand": BM * BN}.get(kernel, BM * rank)
        if kernel.endswith("wgrad"):
            held = BN * rank
        if tile * stages > 220_000 or not 256 <= held <= 128 * 32 * warps:
            continue
        for split, columns in itertools.product(
            _SPLITS.get(kernel, {}).get(tokens, (1,)),
            (1, 2, 4, 8) if kernel == "expand_add" else (1,),
        ):
            yield Config(BM, BN, warps, stages, split, columns)


_SPLITS: dict[str, dict[int, tuple[int, ...]]] = {
    "shrink_gate": {0: (1, 2, 4, 8), 1: (1, 2, 4), 2: (1, 2)},
    "bwd_rank": {0: (1, 2, 4, 8), 1: (1, 2, 4), 2: (1, 2)},
    "wgrad": {2: (1, 2, 4, 8), 3: (1, 2, 4, 8)},
}


def _compiles(job: tuple[Bucket, Config]) -> bool:
    """Compile into Triton's cache on disk; False where the device cannot hold it."""
    bucket, config = job
    try:
        with forced(bucket.kernel, config):
            problem(bucket)()
    except (OutOfResources, PTXASError, triton.CompilationError):
        return False
    torch.cuda.synchronize()
    return True


def _time(bucket: Bucket, config: Config) -> float:
    """Median microseconds of a configuration."""
    with forced(bucket.kernel, config):
        action = problem(bucket)
        action()
        seconds: float = do_bench_cudagraph(action, rep=10, return_mode="median")
    return 1e3 * seconds


def problem(bucket: Bucket) -> Callable[[], None]:
    """A call of the launcher of one kernel, on sizes that stand for its bucket."""
    tokens, wide = STAND_INS[0][bucket.tokens], STAND_INS[1][bucket.wide]
    dtype = torch.bfloat16 if bucket.itemsize == 2 else torch.float32
    experts, r = experts_of(bucket.kernel, bucket.rank)
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=dtype)

    # as a layer trains: parameters of 32 bits, cast where that pays
    factor = draw(experts, r, wide, dtype=torch.float32)
    if casts(tokens):
        factor = factor.to(dtype)
    logits = draw(tokens, experts, dtype=torch.float32).topk(min(2, experts))
    gates = torch.zeros(tokens, experts, device="cuda")
    gates = gates.scatter(1, logits.indices, logits.values.softmax(1))
    call = _Call(draw(tokens, wide), draw(tokens, wide), factor, gates)
    return _PROBLEMS[bucket.kernel](call)


class _Call(NamedTuple):
    x: Tensor
    out: Tensor
    factor: Tensor
    gates: Tensor

    @property
    def top_k(self) -> int:
        return min(2, self.gates.shape[1])

    def ranks(self) -> Tensor:
        """Numbers in rank space, of all experts."""
        return self.x[:1, :1].repeat(len(self.x), self.factor[:, :, 0].numel())

    def compact(self) -> tuple[triton_grouped.Call, Tensor]:
        """Arrangement of the tokens, and numbers in the rank space of their experts."""
        arranged = triton_grouped.Call.of(self.gates, 2.0, self.top_k)
        numbers = self.x[:1, :1].repeat(len(self.x), self.top_k * self.factor.shape[1])
        return arranged, numbers.view(len(self.x), self.top_k, -1)


def _shrink_gate(c: _Call) -> Callable[[], None]:
    z, zg, routed = c.ranks(), c.ranks(), (c.factor, c.factor, c.gates, 2.0)
    return lambda: dense_forward.shrink(c.x, *routed, 0.0, 0, z, zg)


def _expand_add(c: _Call) -> Callable[[], None]:
    zg = c.ranks()
    return lambda: dense_forward.expand(zg, c.factor, c.x, c.out)


def _bwd_rank(c: _Call) -> Callable[[], None]:
    z, dz, zg, dgates = c.ranks(), c.ranks(), c.ranks(), torch.empty_like(c.gates)
    routed = (c.factor, len(c.factor), c.gates, 2.0)
    return lambda: dense_backward.rank_gradients(c.x, *routed, z, dz, zg, dgates)


def _wgrad(c: _Call) -> Callable[[], None]:
    grad = torch.empty_like(c.factor, dtype=torch.float32)
    product = dense_backward.Product(c.x, c.ranks(), grad, 0.0)
    return lambda: dense_backward.weight_gradients([product], 0)


def _gather(c: _Call) -> Callable[[], None]:
    call = (c.x, c.out, c.factor, c.factor, c.gates, 2.0, c.top_k)

    def run() -> None:
        triton_gather.forward(*call)

    return run


def _grouped_shrink(c: _Call) -> Callable[[], None]:
    arranged, z = c.compact()
    return lambda: triton_grouped.shrink(arranged, c.x, c.factor, z)


def _grouped_expand(c: _Call) -> Callable[[], None]:
    arranged, z = c.compact()
    return lambda: triton_grouped.expand(arranged, z, c.factor, c.x, c.out, True)


def _grouped_wgrad(c: _Call) -> Callable[[], None]:
    arranged, z = c.compact()

    def run() -> None:
        triton_grouped.wgrad(arranged, z, c.x, c.factor, True)

    return run


_PROBLEMS = {
    "shrink_gate": _shrink_gate,
    "expand_add": _expand_add,
    "bwd_rank": _bwd_rank,
    "wgrad": _wgrad,
    "gather_shrink": _gather,
    "gather_expand": _gather,
    "grouped_shrink": _grouped_shrink,
    "grouped_expand": _grouped_expand,
    "grouped_wgrad": _grouped_wgrad,
}


def _write(path: Path, arch: str, rows: dict[Bucket, Config]) -> None:
    made = {
        "arch": arch,
        "device": torch.cuda.get_device_name(),
        "triton": triton.__version__,
        "rows": [{"bucket": b, "config": c} for b, c in sorted(rows.items())],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(made) + "\n", "utf-8")
    draft.replace(path)
