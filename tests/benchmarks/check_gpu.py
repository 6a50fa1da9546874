"""Every Triton backend on a real GPU against the definition in float64.

    .venv/bin/python tests/benchmarks/check_gpu.py

Result and all gradients, for shapes ragged in every dimension, three dtypes, shared
factors, dropout with its own mask, and tokens that all use one expert; then two runs
that must agree to the bit, and a replay from a CUDA graph that must agree with them;
and whole layers with their routers in training and in use.
Exits with 1 when anything is off. On a CPU it runs in Triton's interpreter.
"""

import copy
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import molora
from molora.kernels import lowrank_mixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest norm of a difference over the norm of what is right."""

TRITON = ("triton", "triton_grouped", "triton_gather")


ROUTERS: list[dict[str, object]] = [
    {"kind": "topk", "top_k": 2},
    {"kind": "topk", "top_k": 3, "renormalize": False, "temperature": 0.7},
    {"kind": "soft"},
]


class Case(NamedTuple):
    """Sizes of a call, and what is special about it."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    E: int
    r: int
    K: int
    shared: str = ""
    dropout: float = 0.0
    one_expert: bool = False
    has_base: bool = True


SMALL = [
    Case(1, 64, 48, 4, 8, 2),
    Case(37, 100, 60, 5, 12, 3),
    Case(20, 65, 33, 7, 5, 7),
    Case(40, 48, 64, 6, 8, 2, shared="A"),
    Case(40, 48, 64, 6, 8, 2, shared="B"),
    Case(33, 64, 40, 4, 8, 2, dropout=0.25),
    Case(50, 64, 40, 4, 8, 1, one_expert=True),
]
LARGE = [
    Case(1, 4096, 1000, 256, 16, 2),
    Case(16, 2048, 2048, 64, 16, 4),
    Case(129, 264, 1016, 3, 40, 2),
    Case(515, 576, 1536, 8, 8, 2),
    Case(700, 300, 212, 1, 256, 1),
    Case(2048, 1024, 1024, 64, 16, 2),
    Case(4099, 2048, 512, 8, 16, 2),
    Case(4099, 1024, 4096, 16, 16, 2, dropout=0.1),
    Case(3000, 640, 640, 12, 16, 3, shared="A"),
    Case(3000, 640, 640, 12, 16, 3, shared="B"),
    Case(5000, 512, 512, 31, 64, 2, one_expert=True),
    Case(2500, 768, 768, 128, 24, 8, has_base=False),
]


class Call:
    """Random arguments of one case."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.dtype = case, dtype
        g = torch.Generator().manual_seed(sum(case[:6]))
        T, I, O, E, r, K = case[:6]  # noqa: E741
        logits, index = torch.randn(T, E, generator=g).topk(K, 1)
        if case.one_expert:
            index = torch.full_like(index, E // 2)
        gates = torch.zeros(T, E).scatter(1, index, logits.softmax(1))
        EA, EB = 1 if case.shared == "A" else E, 1 if case.shared == "B" else E
        # rows longer than their data: the kernels take any stride
        x = torch.randn(T, I + 8, generator=g).to(dtype).to(DEVICE)[:, :I]
        self.x = x.requires_grad_()
        self.base = None
        if case.has_base:
            self.base = torch.randn(T, O, generator=g).to(dtype).to(DEVICE)
        self.dy = torch.randn(T, O, generator=g).to(dtype).to(DEVICE)
        self.A = (torch.randn(EA, r, I, generator=g) / I**0.5).to(DEVICE)
        self.Bt = (torch.randn(EB, r, O, generator=g) / r**0.5).to(DEVICE)
        self.gates = gates.to(DEVICE).requires_grad_()
        self.scale = (torch.rand(E, generator=g) + 0.5).to(DEVICE)

    def run(self, backend: str) -> list[Tensor]:
        """Result, and the gradients of x, A, Bt and the gates."""
        leaves = [self.x, self.A.requires_grad_(), self.Bt.requires_grad_(), self.gates]
        y = lowrank_mixture(
            self.x,
            self.A,
            self.Bt,
            self.gates,
            self.scale,
            self.base,
            backend,
            top_k=self.case.K,
            dropout=self.case.dropout,
            seed=2**40 + 7,
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def decode(self) -> Tensor:
        """Result of the kernels that have no gradient."""
        with torch.no_grad():
            return lowrank_mixture(
                self.x,
                self.A,
                self.Bt,
                self.gates,
                self.scale,
                self.base,
                "triton_gather",
                top_k=self.case.K,
                dropout=self.case.dropout,
                seed=2**40 + 7,
            )

    def wanted(self) -> list[Tensor]:
        """The definition in float64, with the mask that the device draws."""
        given = (self.x, self.A, self.Bt, self.gates)
        x, A, Bt, gates = (t.detach().double().requires_grad_() for t in given)
        read = x if not self.case.dropout else x * self.mask()
        y = torch.zeros_like(self.dy, dtype=torch.float64)
        if self.base is not None:
            y = y + self.base.double()
        for e in range(self.case.E):
            factors = A[e % len(A)].T, Bt[e % len(Bt)]
            y = y + self.scale[e] * gates[:, e : e + 1] * (
                read @ factors[0] @ factors[1]
            )
        grads = torch.autograd.grad(y, (x, A, Bt, gates), self.dy.double())
        # a token does not use an expert whose gate is zero
        return [y.detach(), *grads[:3], grads[3] * (gates != 0)]

    def mask(self) -> Tensor:
        """Dropout mask and scaling: what a hundred ones at a time become."""
        T, I = self.case.T, self.case.I  # noqa: E741
        ones = torch.ones(T, I, device=DEVICE)
        out = torch.empty(T, I, device=DEVICE)
        for start in range(0, I, 128):
            stop = min(start + 128, I)
            picked = torch.eye(I, device=DEVICE)[start:stop]
            shown = torch.eye(stop - start, device=DEVICE)
            y = lowrank_mixture(
                ones,
                picked[None],
                shown[None],
                None,
                1.0,
                backend="triton",
                dropout=self.case.dropout,
                seed=2**40 + 7,
            )
            out[:, start:stop] = y
        return out.double()


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    difference = (found.double() - wanted).norm()
    return float(difference / wanted.norm().clamp(min=1e-30))


def check(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Largest error by backend."""
    call, found = Call(case, dtype), {}
    wanted = call.wanted()
    for name in TRITON[:2]:
        made = call.run(name)
        used = made[:4] + [made[4] * (call.gates != 0)]
        found[name] = max(error(a, b) for a, b in zip(used, wanted, strict=True))
        again = call.run(name)
        if not all(torch.equal(a, b) for a, b in zip(made, again, strict=True)):
            found[name] = float("inf")
    found["triton_gather"] = error(call.decode(), wanted[0])
    return found


def replayed(name: str) -> bool:
    """Whether a CUDA graph of a decoding step gives what the step itself gives."""
    call = Call(Case(3, 512, 768, 16, 8, 2), torch.bfloat16)

    def step() -> Tensor:
        with torch.no_grad():
            return lowrank_mixture(
                call.x, call.A, call.Bt, call.gates, 0.5, call.base, name, top_k=2
            )

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        call.x.copy_(torch.randn_like(call.x))
        call.gates.copy_(call.gates.roll(1, 1))
    graph.replay()
    torch.cuda.synchronize()
    return torch.equal(captured, step())


def layer_errors(router: dict[str, object], dtype: torch.dtype) -> dict[str, float]:
    """A routed layer in training and in use, against its copy in float64 on a CPU."""
    torch.manual_seed(0)
    raw = {
        "target_modules": ["0"],
        "experts": {"kind": "lora", "num_experts": 6, "r": 8, "lora_alpha": 16},
        "router": router,
        "balance": [{"kind": "switch", "weight": 0.1}],
    }
    plain = torch.nn.Sequential(torch.nn.Linear(200, 320)).to(dtype)
    ours = molora.wrap(plain, molora.AdapterConfig.from_dict(raw))
    for name, values in ours.named_parameters():
        if values.requires_grad:
            values.data.normal_(0, 0.3 if "gate" in name else 0.1)
    exact = copy.deepcopy(ours).double()
    ours.to(DEVICE)
    found: dict[str, float] = {}
    for tokens in (1, 300):
        x, dy = (torch.randn(tokens, wide).to(dtype) for wide in (200, 320))
        sides = []
        for model in (ours.train(), exact.train()):
            some = next(model.parameters())
            kind = {"device": some.device, "dtype": some.dtype}
            x_here = x.to(**kind).requires_grad_()
            y = model(x_here)
            leaves = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(y, [x_here, *leaves], dy.to(**kind))
            with torch.no_grad():
                sides.append([y, *gradients, model.eval()(x_here)])
        pairs = zip(*sides, strict=True)
        errors = [error(a.detach().cpu(), b.detach()) for a, b in pairs]
        found[f"{tokens} tokens"] = max(errors)
    return found


def row(job: tuple[Case, torch.dtype]) -> tuple[list[str], int]:
    """One row of the table, and how many of its results are wrong."""
    case, dtype = job
    errors = check(case, dtype)
    bad = [value for value in errors.values() if not value <= DTYPES[dtype]]
    special = {
        f"shared {case.shared}": case.shared,
        "dropout": case.dropout,
        "one expert": case.one_expert,
        "no base": not case.has_base,
    }
    name = ", ".join(str(v) for v in case[:6])
    name += "".join(f"; {text}" for text, holds in special.items() if holds)
    cells = [f"{v:.1e}{' wrong' if v in bad else ''}" for v in errors.values()]
    return [name, str(dtype).removeprefix("torch."), *cells], len(bad)


def main() -> None:
    """Check everything, print one table."""
    on_gpu = DEVICE == "cuda"
    # the interpreter rounds bfloat16 in its own way
    jobs = [
        (case, dtype)
        for case, dtype in product(SMALL + LARGE if on_gpu else SMALL, DTYPES)
        if on_gpu or dtype != torch.bfloat16
    ]
    table = Table(title=f"Largest error against float64 on {DEVICE}")
    for column in ("case", "dtype", *TRITON):
        table.add_column(column)
    wrong = 0
    # compiling takes nearly all of the time
    workers, spawn = min(16, os.cpu_count() or 1), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn) as pool:
        for cells, bad in track(pool.map(row, jobs), "cases", len(jobs)):
            table.add_row(*cells)
            wrong += bad
    Console(width=110).print(table)
    if on_gpu:
        for name in TRITON:
            good = replayed(name)
            wrong += not good
            print(f"CUDA graph of {name}: {'equal' if good else 'wrong'}")
    for router, (dtype, limit) in product(ROUTERS, DTYPES.items()):
        errors = layer_errors(router, dtype)
        wrong += sum(not value <= limit for value in errors.values())
        print(router, dtype, {k: f"{v:.1e}" for k, v in errors.items()})
    print(f"{wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
