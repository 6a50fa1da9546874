"""How often the rank-space kernels launch, and the bytes their launches move."""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from molora.kernels import (
    triton_dense,
    triton_dense_backward,
    triton_dense_forward,
    triton_tiles,
)
from molora.kernels.configs import Config
from molora.kernels.gradients import Needs
from molora.kernels.triton_traffic import CACHED, Traffic, traffic

MIB = 2**20
SMALL = {
    "shrink_gate": Config(BM=16, BN=16, warps=4, stages=2, split=2),
    "expand_add": Config(BM=16, BN=16, warps=4, stages=2, columns=2),
    "bwd_rank": Config(BM=16, BN=32, warps=4, stages=2),
    "wgrad": Config(BM=16, BN=16, warps=4, stages=2, split=2),
}


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    tensors: Mapping[str, Tensor | None]
    settings: Mapping[str, Any]

    def traffic(self) -> Traffic:
        return traffic(*self)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch that is asked for, none of which is made."""
    made: list[Launch] = []

    def record(
        kernel: Any,
        grid: tuple[int, ...],
        tensors: dict[str, Tensor | None],
        config: Config,
        **settings: Any,
    ) -> None:
        made.append(Launch(kernel.fn.__name__, grid, tensors, settings))

    for module in (triton_dense_forward, triton_dense_backward):
        monkeypatch.setattr(module, "launch", record)
    return made


def on_meta(
    T: int, wide: int, out: int, E: int, r: int, *, shared: str = "", base: bool = True
) -> dict[str, Any]:
    """Arguments that have shapes and no memory."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    return {
        "x": make(T, wide, dtype=torch.bfloat16),
        "base": make(T, out, dtype=torch.bfloat16) if base else None,
        "A": make(1 if "A" in shared else E, r, wide),
        "Bt": make(1 if "B" in shared else E, r, out),
        "gates": make(T, E),
        "scale": 0.5,
    }


def backward(args: dict[str, Any], z: Tensor, dy: Tensor, **options: Any) -> None:
    rest = (args[n] for n in ("A", "Bt", "gates", "scale"))
    triton_dense.backward(dy, args["x"], z, *rest, **options)


SHAPES = [(T, E, shared)
          for T in (1, 100, 8192)
          for E in (1, 8, 300)
          for shared in ("", "A", "B", "AB")]  # fmt: skip


@pytest.mark.parametrize(("T", "E", "shared"), SHAPES)
def test_two_launches_forward_and_five_backward(
    T: int, E: int, shared: str, launches: list[Launch]
) -> None:
    args = on_meta(T, 1000, 4096, E, 8, shared=shared)
    y, z = triton_dense.forward(**args)
    assert [launch.kernel for launch in launches] == ["shrink_gate", "expand_add"]
    launches.clear()
    backward(args, z, y)
    names = [launch.kernel for launch in launches]
    summed = ["sum_parts"] if "sum_parts" in names else []
    assert names == ["bwd_rank", "wgrad", "wgrad", *summed, "expand_add"]
    # programs share a sum over many tokens only
    assert bool(summed) == (T == 8192)


def test_launches_made_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: collections.Counter[str] = collections.Counter()
    call = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        made[self.fn.__name__] += 1
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    x, dy = torch.ones(3, 16), torch.ones(3, 16)
    args = (torch.ones(2, 8, 16), torch.ones(2, 8, 16), torch.ones(3, 2), 1.0)
    _, z = triton_dense.forward(x, None, *args)
    assert made == {"shrink_gate": 1, "expand_add": 1}
    made.clear()
    triton_dense.backward(dy, x, z, *args)
    assert made == {"bwd_rank": 1, "wgrad": 2, "expand_add": 1}


def test_what_is_not_needed_is_not_launched(launches: list[Launch]) -> None:
    args = on_meta(64, 96, 80, 4, 8)
    y, z = triton_dense.forward(**args)
    wanted = {
        (False, False, False, False): [],
        (False, False, False, True): ["bwd_rank"],
        (True, False, False, False): ["bwd_rank", "expand_add"],
        (False, True, True, True): ["bwd_rank", "wgrad", "wgrad"],
    }
    for needs, names in wanted.items():
        launches.clear()
        backward(args, z, y, needs=Needs(*needs))
        assert [launch.kernel for launch in launches] == names


def test_no_token_launches_nothing(launches: list[Launch]) -> None:
    args = on_meta(0, 96, 80, 4, 8)
    y, z = triton_dense.forward(**args)
    backward(args, z, y)
    assert launches == []


def test_the_grid_depends_on_shapes_only(launches: list[Launch]) -> None:
    # a value of a tensor on meta cannot be read: reading one would have raised
    args = on_meta(8192, 4096, 4096, 8, 16)
    triton_dense.forward(**args)
    triton_dense.forward(**{**args, "gates": args["gates"].clone()})
    grids = [launch.grid for launch in launches]
    assert grids[:2] == grids[2:]


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("shared", ["", "A", "B"])
def test_bytes_moved_are_within_the_floor(
    shared: str, base: bool, launches: list[Launch]
) -> None:
    args = on_meta(8192, 4096, 4096, 8, 16, shared=shared, base=base)
    y, z = triton_dense.forward(**args)
    backward(args, z, y)
    assert len(launches) == 7
    for launch in launches:
        moved, floor = launch.traffic()
        assert floor <= moved <= 1.15 * floor, launch.kernel


def test_bytes_of_the_reference_shape(launches: list[Launch]) -> None:
    args = on_meta(8192, 4096, 4096, 8, 16)
    y, z = triton_dense.forward(**args)
    backward(args, z, y)
    # by hand, in MiB: x, y, dy, dx 64 each; z, zg, dz 2; A, Bt cast to 16 bits 1; their
    # gradients and partial sums in float32 2 (times the programs that share a sum);
    # gates and their gradient 1/4
    made = [launch.traffic() for launch in launches]
    shrink, expand, rank, wgrad, _, parts, dx = made
    assert shrink == ((64 + 1 + 0.25 + 2 + 2) * MIB,) * 2
    assert expand == ((2 + 1 + 64 + 64) * MIB,) * 2
    assert rank == ((64 + 1 + 0.25 + 2 + 2 + 2 + 0.25) * MIB,) * 2
    split = launches[3].settings["SPLIT"]
    assert wgrad == ((64 + 2 + 2 * split) * MIB, (64 + 2 + 2) * MIB)
    assert parts == ((2 * split + 2) * 2 * MIB,) * 2
    assert dx == ((2 + 1 + 64) * MIB,) * 2
    # every wide matrix once for each product that needs it
    total = sum(moved for moved, _ in made)
    assert total <= 1.15 * (64 * (1 + 2 + 1 + 1 + 1 + 1)) * MIB


def test_reading_again_counts_beyond_the_cache(launches: list[Launch]) -> None:
    args = on_meta(8192, 4096, 4096, 128, 16)
    triton_dense.forward(**args)
    shrink, expand = launches
    # 128 experts of rank 16 are 8 tiles: x is read 8 times, and 16 MiB of A, cast to 16
    # bits, for every tile of tokens
    assert shrink.grid[0] == 8
    factor = shrink.tensors["a"]
    assert factor is not None and factor.nbytes == args["A"].nbytes // 2 > CACHED
    wide = 8 * args["x"].nbytes + shrink.grid[1] * factor.nbytes
    assert shrink.traffic().moved > wide > 2 * shrink.traffic().floor
    shared = on_meta(8192, 4096, 4096, 64, 16, shared="B")
    triton_dense.forward(**shared)
    # one program for all of them, that reads its rows of x for each
    assert launches[2].grid[0] == 1
    assert launches[2].settings["NC"] == 8
    assert launches[2].traffic().moved > 8 * args["x"].nbytes


@pytest.mark.parametrize("shared", ["", "A", "B", "AB"])
@pytest.mark.parametrize("E", [3, 37])
def test_traffic_is_what_the_programs_load_and_store(
    E: int, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = triton_tiles.launch
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(pointers: Any, mask: Any) -> None:
        bits = pointers.get_element_ty().primitive_bitwidth
        made[-1] += int(mask.data.sum()) * bits // 8

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def launched(
        kernel: Any, grid: Any, tensors: Any, config: Any, **rest: Any
    ) -> None:
        made.append(0)
        real(kernel, grid, tensors, config, **rest)
        name = kernel.fn.__name__
        want = traffic(name, grid, tensors, rest).moved
        assert made[-1] == want, (name, made[-1], want)

    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)
    monkeypatch.setattr("molora.kernels.triton_traffic.CACHED", -1)
    monkeypatch.setattr(triton_tiles, "pick", lambda kernel, *_: SMALL[kernel])
    for module in (triton_dense_forward, triton_dense_backward):
        monkeypatch.setattr(module, "launch", launched)
    T, wide, out, r = 20, 24, 40, 12
    x, dy, base = torch.ones(T, wide), torch.ones(T, out), torch.ones(T, out)
    A = torch.ones(1 if "A" in shared else E, r, wide)
    Bt = torch.ones(1 if "B" in shared else E, r, out)
    _, z = triton_dense.forward(x, base, A, Bt, torch.ones(T, E), 1.0)
    triton_dense.backward(dy, x, z, A, Bt, torch.ones(T, E), 1.0)
    assert len(made) == 7
