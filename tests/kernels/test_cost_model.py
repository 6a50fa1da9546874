"""The choice of a backend: closed forms against enumeration and worked numbers."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.errors import ConfigError
from molora.kernels import choice, lowrank_mixture, machine
from molora.kernels.cost_model import (
    FORMS,
    Machine,
    Shape,
    by_slots,
    fastest,
    seconds,
)

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
H100 = machine.GPUS["sm_90"]
SLOW = Machine(gemm=6e10, grouped=1.5e10, bandwidth=1.2e10, launch=5e-6)


def shape(**changes: Any) -> Shape:
    default = {
        "tokens": 8192,
        "wide_in": 4096,
        "wide_out": 4096,
        "experts": 8,
        "rank": 16,
        "top_k": 2,
        "itemsize": 2,
        "training": False,
    }
    return Shape(**{**default, **changes})


def test_forward_at_the_reference_shape_is_three_passes() -> None:
    """Bytes worked by hand: x once, y twice, z and zg, both factors."""
    x = y = 8192 * 4096 * 2
    ranks = 8192 * 128 * 2
    factor = 128 * 4096 * 2
    work = list(FORMS["triton"](shape()))
    assert [w.bytes for w in work] == [
        x + factor + 2 * ranks,
        2 * y + factor + 2 * ranks,
    ]
    assert [w.flops for w in work] == [2 * 8192 * 4096 * 128] * 2
    # 72 MB and 139 MB at 3.35 TB/s, of which a copy reaches no more than 84 %
    free = H100._replace(launch=0.0, bandwidth=3.35e12, grouped=1e15)
    assert seconds("triton", shape(), free) * 1e6 == pytest.approx(64, rel=0.03)


def test_the_time_of_the_concatenated_form_does_not_follow_the_experts() -> None:
    """Below the machine's balance, about 100 ranks on this one, memory sets it."""
    one = seconds("triton", shape(experts=1), H100)
    four = seconds("triton", shape(experts=4), H100)
    assert four < 1.1 * one
    assert seconds("triton", shape(experts=64), H100) > 2 * one


def test_slots_read_and_write_once_per_expert_of_a_token() -> None:
    s = shape(tokens=100, experts=64, top_k=3, training=True)
    moved = sum(work.bytes for work in by_slots(s))
    tall = s.itemsize * s.tokens
    # by hand: x of 3 slots and dA 3 times; dx 1 + 2 + 2; ranks of dy and dBt 3 times;
    # y: a sum written, read and written, then read with base and written as y
    wide = tall * ((3 + 3 + 5) * s.wide_in + (3 + 3 + 1 + 2 + 3) * s.wide_out)
    factors = 3 * s.itemsize * s.experts * s.rank * (s.wide_in + s.wide_out)
    ranks = 6 * s.itemsize * 3 * s.tokens * s.rank
    routing = 2 * 8 * s.tokens * s.experts
    assert moved == wide + factors + ranks + routing


def test_slots_win_for_many_experts_and_not_for_few() -> None:
    names = ["triton", "triton_grouped"]
    assert fastest(names, shape(experts=8, training=True), H100) == "triton"
    for top_k in (1, 2):
        many = shape(experts=64, top_k=top_k, training=True)
        assert fastest(names, many, H100) == "triton_grouped"


def test_the_choice_is_the_fastest_that_was_measured_on_an_h100() -> None:
    results = json.loads((RESULTS / "gpu_h100.json").read_text())["results"]
    assert len(results) > 8
    for row in results:
        s = Shape(*row["size"].values(), itemsize=2, training=row["trains"])
        names = ["triton", "triton_grouped", "torch on a GPU"]
        names += [] if row["trains"] else ["triton_gather"]
        # the update alone, without the time of the host
        base = row["seconds"]["base, graph"]
        took = {
            name: row["seconds"][f"{name.split()[0]}, graph"] - base for name in names
        }
        best = fastest(names, s, H100)
        assert took[best] <= 1.1 * min(took.values()), (s, best)


def test_decoding_gathers_once_the_unused_factors_weigh_more() -> None:
    names = ["triton", "triton_grouped", "triton_gather"]
    few = shape(tokens=1, experts=8)
    many = shape(tokens=1, experts=256)
    assert seconds("triton", few, H100) == pytest.approx(
        seconds("triton_gather", few, H100), rel=0.15
    )
    assert fastest(names, many, H100) == "triton_gather"
    assert fastest(names, many._replace(tokens=4096), H100) == "triton_grouped"


def test_the_choice_is_the_least_of_all_for_every_shape() -> None:
    grid = itertools.product(
        [1, 16, 512, 8192],
        [576, 4096],
        [192, 4096],
        [2, 8, 64, 256],
        [4, 16, 64],
        [1, 2],
        [False, True],
        [H100, machine.GPUS["gfx942"], SLOW],
    )
    chosen = set()
    for tokens, wide, out, experts, rank, top_k, training, device in grid:
        s = Shape(tokens, wide, out, experts, rank, top_k, 2, training)
        names = ["torch", "sorted", "gather"][: 2 + (not training)]
        if device is not SLOW:
            names = ["torch on a GPU", "triton", "triton_grouped"]
            names += ["triton_gather"][training:]
        times = {name: seconds(name, s, device) for name in names}
        best = fastest(names, s, device)
        assert times[best] == min(times.values())
        assert all(time > 0 for time in times.values())
        chosen.add(best)
    # every form is the best one somewhere
    assert chosen == set(FORMS)


def test_more_work_never_takes_less_time() -> None:
    base = shape(training=True, top_k=1)
    for name in ("torch", "sorted", "triton_grouped"):
        for field in ("tokens", "wide_in", "wide_out", "experts", "rank", "top_k"):
            more = base._replace(**{field: 2 * getattr(base, field)})
            assert seconds(name, more, SLOW) >= seconds(name, base, SLOW), field


def test_the_cost_of_the_sorted_form_follows_the_experts_in_use() -> None:
    few = seconds("sorted", shape(tokens=2048, experts=8, training=True), SLOW)
    many = seconds("sorted", shape(tokens=2048, experts=256, training=True), SLOW)
    assert many < 1.5 * few
    dense = seconds("torch", shape(tokens=2048, experts=256, training=True), SLOW)
    assert dense > 10 * few


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing remembered in this process."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path))
    monkeypatch.delenv("MOLORA_CPU_MACHINE", raising=False)
    machine.cpu.cache_clear()
    choice._known_on_cpu.cache_clear()
    yield tmp_path
    machine.cpu.cache_clear()
    choice._known_on_cpu.cache_clear()


def test_a_cpu_is_measured_once_and_remembered(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_rng_state()
    first = machine.cpu(torch.float32, 1)
    # it runs inside somebody's forward, between two draws of dropout seeds
    assert torch.equal(torch.get_rng_state(), before)
    assert all(value > 0 for value in first)
    assert first.launch < 1e-3 and 1e8 < first.gemm < 1e14
    (kept,) = (fresh / "cpu").iterdir()
    assert tuple(json.loads(kept.read_text()).values()) == tuple(first)
    machine.cpu.cache_clear()
    monkeypatch.setattr(machine, "measure", lambda dtype: pytest.fail("again"))
    assert machine.cpu(torch.float32, 1) == first


def test_of_two_processes_both_use_what_the_first_measured(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(dtype: torch.dtype) -> Machine:
        # another process is done while this one still measures
        monkeypatch.setattr(machine, "measure", lambda dtype: SLOW)
        machine.cpu.__wrapped__(dtype, 1)
        return H100

    monkeypatch.setattr(machine, "measure", measure)
    assert machine.cpu(torch.float32, 1) == SLOW
    assert [path.suffix for path in (fresh / "cpu").iterdir()] == [".json"]


@pytest.mark.parametrize("text", ["", '{"a":', "[]", "null", '{"gemm": 1}'])
def test_a_damaged_file_is_named(fresh: Path, text: str) -> None:
    machine.cpu(torch.float32, 1)
    (kept,) = (fresh / "cpu").iterdir()
    kept.write_text(text)
    machine.cpu.cache_clear()
    with pytest.raises(ConfigError, match=r"\.json \(delete it to measure again\)"):
        machine.cpu(torch.float32, 1)


def test_the_choice_does_not_follow_the_grad_mode(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reentrant checkpointing runs a forward without gradients and again with them."""
    rates = SLOW._replace(grouped=SLOW.gemm / 3)
    monkeypatch.setenv("MOLORA_CPU_MACHINE", json.dumps(rates._asdict()))
    x, gates = torch.randn(512, 576), torch.rand(512, 20)
    for rank in range(4, 41, 4):
        A = torch.nn.Parameter(torch.randn(20, rank, 576))
        Bt = torch.nn.Parameter(torch.randn(20, rank, 1536))
        call = ("auto", x, A, Bt, gates, 1.0, None, 2)
        with torch.no_grad():
            first = choice.choose(*call, False)
        assert first == choice.choose(*call, False)


def test_the_measurement_can_be_replaced(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLORA_CPU_MACHINE", json.dumps(SLOW._asdict()))
    assert machine.cpu(torch.float32, 1) == SLOW
    assert not (fresh / "cpu").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fast", "MOLORA_CPU_MACHINE: expected JSON with the numbers gemm, grouped"),
        ('{"gemm": 1}', "expected JSON with the numbers"),
        ("[1, 2, 3, 4]", "expected JSON with the numbers"),
        ('{"gemm": 0, "grouped": 1, "bandwidth": 1, "launch": 1}', "above zero"),
    ],
)
def test_a_wrong_replacement_is_named(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.setenv("MOLORA_CPU_MACHINE", text)
    with pytest.raises(ConfigError, match=said):
        machine.cpu(torch.float32, 1)


def test_a_cache_that_cannot_be_written_is_said(fresh: Path) -> None:
    (fresh / "file").write_text("")
    os.environ["MOLORA_CACHE"] = str(fresh / "file")
    with pytest.warns(UserWarning, match="cannot be kept .* Set MOLORA_CACHE"):
        machine.cpu(torch.float32, 1)


@pytest.mark.parametrize(("experts", "form"), [(4, "torch"), (256, "sorted")])
def test_many_experts_on_a_cpu_are_sorted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, experts: int, form: str
) -> None:
    monkeypatch.setenv("MOLORA_CPU_MACHINE", json.dumps(SLOW._asdict()))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=g)
    A = torch.randn(experts, 8, 128, generator=g)
    Bt = torch.randn(experts, 8, 64, generator=g)
    ids = torch.rand(256, experts, generator=g).topk(2).indices
    gates = torch.zeros(256, experts).scatter(1, ids, 0.5)
    args = (x, A, Bt, gates, 1.0, None)
    assert choice.choose("auto", *args, 2, False) == form
    # nothing is promised about the gates, or one call is too short to matter
    assert choice.choose("auto", *args, None, False) == "torch"
    tiny = (x[:4, :8], A[:, :, :8], Bt, gates[:4], 1.0, None)
    assert choice.choose("auto", *tiny, 2, False) == "torch"
    torch.testing.assert_close(
        lowrank_mixture(*args, top_k=2), lowrank_mixture(*args), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("major", "minor", "arch", "same_as"),
    [
        (8, 0, "", "sm_80"),
        (8, 6, "", "sm_80"),
        (9, 0, "", "sm_90"),
        (12, 0, "", "sm_100"),
        (7, 5, "", "sm_80"),
        (9, 4, "gfx942:sramecc+:xnack-", "gfx942"),
        (9, 0, "gfx90a", "gfx942"),
    ],
)
def test_rates_of_a_gpu_are_looked_up(
    major: int, minor: int, arch: str, same_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = type("P", (), {"major": major, "minor": minor, "gcnArchName": arch})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert machine.gpu(torch.device("cuda")) == machine.GPUS[same_as]
