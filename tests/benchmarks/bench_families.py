"""Every expert family on one layer: trained values, time and memory of a step.

    .venv/bin/python tests/benchmarks/bench_families.py --json out.json

A step is forward and backward of one linear layer whose input asks for a gradient. All
families take it by turns in one process, so that what else the machine does meets them
alike; the ratio is the median over the rounds of each round's time by that of LoRA.
Decoding is the forward of one token in eval mode without gradients; its time is the
mean of a row of them, again by turns. Beside it one expert, and PEFT's layer of the
same method where PEFT has it, with PEFT's settings as near as they go: the trained
values show how near.

Kept bytes are those of the storages that autograd keeps from forward to backward,
without parameters and the input; the peak on a GPU is that of the allocator.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from turns import ran_on, settle

import molora
from molora.config import read_yaml
from molora.experts import EXPERTS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PEFT: dict[str, Callable[[int], Any]] = {
    "adalora": lambda r: peft.AdaLoraConfig(
        init_r=r, target_r=r - 1, total_step=10, target_modules=["lin"]
    ),
    "boft": lambda r: peft.BOFTConfig(boft_block_size=r, target_modules=["lin"]),
    "dora": lambda r: peft.LoraConfig(r=r, use_dora=True, target_modules=["lin"]),
    "ia3": lambda r: peft.IA3Config(target_modules=["lin"], feedforward_modules=[]),
    "loha": lambda r: peft.LoHaConfig(r=r, target_modules=["lin"]),
    "lokr": lambda r: peft.LoKrConfig(r=r, target_modules=["lin"]),
    "lora": lambda r: peft.LoraConfig(r=r, target_modules=["lin"]),
    "oft": lambda r: peft.OFTConfig(
        r=0, oft_block_size=32, target_modules=["lin"], use_cayley_neumann=False
    ),
    "vera": lambda r: peft.VeraConfig(r=r, target_modules=["lin"]),
}
"""PEFT's config of a method, by the name of ours."""


OWN_SIZE: dict[str, dict[str, Any]] = {
    "boft": {"boft_block_size": 8},
    "oft": {"oft_block_size": 32, "use_cayley_neumann": False},
}
"""Sizes of families that have no rank, those of PEFT's layers."""


def settings(kind: str, experts: int, rank: int) -> dict[str, Any]:
    """The experts block of a family; fields without default come from configs/."""
    raw: dict[str, Any] = {"kind": kind, "num_experts": experts}
    fields = EXPERTS[kind].Config.model_fields
    blocks = [read_yaml(file)["adapter"]["experts"] for file in CONFIGS.glob("*.yaml")]
    for name, field in fields.items():
        if field.is_required() and name not in raw:
            raw[name] = next(b[name] for b in blocks if b["kind"] == kind)
    if "inner" in fields:
        raw["inner"] = {"kind": "lora", "r": rank}
    if kind in OWN_SIZE:
        return raw | OWN_SIZE[kind]
    return raw | {name: rank for name in ("r", "init_r") if name in fields}


TOKENS = 20
"""Decoded in a row, as long as a step takes about."""


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self, features: int):
        super().__init__()
        self.lin = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        y: Tensor = self.lin(x)
        return y


def ours(kind: str, experts: int, options: argparse.Namespace) -> nn.Module:
    """A layer under a family, its trained values shaken."""
    router = {"kind": "topk", "top_k": options.top_k} if experts > 1 else None
    raw = {
        "target_modules": ["lin"],
        "experts": settings(kind, experts, options.rank),
        "router": router or {"kind": "none"},
    }
    torch.manual_seed(0)
    model = One(options.features).to(options.device)
    return shaken(molora.wrap(model, molora.AdapterConfig.from_dict(raw)))


def theirs(kind: str, options: argparse.Namespace) -> nn.Module | None:
    """PEFT's layer of the method."""
    if kind not in PEFT:
        return None
    torch.manual_seed(0)
    model: Any = One(options.features).to(options.device)
    return shaken(peft.get_peft_model(model, PEFT[kind](options.rank)))


def shaken(model: nn.Module) -> nn.Module:
    """Trained values that are not those of the start."""
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values), alpha=1e-3)
    return model.train()


def trained(model: nn.Module) -> int:
    """Number of trained values, without the router's."""
    return sum(
        values.numel()
        for name, values in model.named_parameters()
        if values.requires_grad and ".router." not in name
    )


def step(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Forward and backward."""
    x.grad = None
    for values in model.parameters():
        values.grad = None
    model(x).backward(dy)


@torch.no_grad()
def decode(model: nn.Module, token: Tensor) -> None:
    """One token after the other."""
    for _ in range(TOKENS):
        model(token)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward."""
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), x]}
    held: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            # held, so that no other tensor gets its address
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def peak_bytes(model: nn.Module, x: Tensor, dy: Tensor) -> int | None:
    """Most bytes that a step adds on a GPU; None on a CPU, which does not count."""
    if x.device.type != "cuda":
        return None
    step(model, x, dy)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, x, dy)
    return torch.cuda.max_memory_allocated() - before


def sizes(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Any]:
    """What a layer trains and holds."""
    return {
        "trained": trained(model),
        "kept_bytes": kept_bytes(model, x),
        "peak_bytes": peak_bytes(model, x, dy),
    }


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All numbers, by family."""
    size = (options.tokens, options.features)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(size, generator=generator) for _ in range(2))
    x, dy = x.to(options.device).requires_grad_(), dy.to(options.device)
    found: dict[str, dict[str, Any]] = {}
    models: dict[str, nn.Module] = {}
    for kind in options.families:
        models[kind] = mixture = ours(kind, options.experts, options)
        alone, other = ours(kind, 1, options), theirs(kind, options)
        found[kind] = {
            "mixture": sizes(mixture, x, dy),
            "one": sizes(alone, x, dy),
        }
        if other is not None:
            found[kind]["peft"] = sizes(other, x, dy)
    by_turns(found, models, lambda model: step(model, x, dy), "", options)
    for model in models.values():
        model.eval()
    token = x.detach()[:1]
    by_turns(found, models, lambda model: decode(model, token), "decode_", options)
    for values in found.values():
        values["mixture"]["decode_seconds"] /= TOKENS
    return found


def by_turns(
    found: dict[str, dict[str, Any]],
    models: dict[str, nn.Module],
    work: Callable[[nn.Module], object],
    name: str,
    options: argparse.Namespace,
) -> None:
    """Time a piece of work on every model, round after round; the first warms up."""
    times: dict[str, list[float]] = {kind: [] for kind in models}
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    for _ in range(1 + options.rounds):
        for kind, model in models.items():
            settle(options.device)
            start = clock()
            work(model)
            settle(options.device)
            times[kind].append(clock() - start)
    for kind, mine in times.items():
        pairs = zip(mine[1:], times["lora"][1:], strict=True)
        ratio = statistics.median(own / lora for own, lora in pairs)
        found[kind]["mixture"][f"{name}seconds"] = statistics.median(mine[1:])
        found[kind]["mixture"][f"{name}by_lora"] = ratio


def show(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print one table."""
    table = Table(
        title=f"{options.features} features, {options.tokens} tokens, rank "
        f"{options.rank}; {options.experts} experts, top-{options.top_k}"
    )
    for head in ("family", "step, ms", "by LoRA", "token, ms", "by LoRA"):
        table.add_column(head, justify="right")
    for head in ("trained", "kept, MiB", "peak, MiB"):
        table.add_column(head, justify="right")
    for head in ("one: trained", "kept, MiB", "peak, MiB"):
        table.add_column(head, justify="right")
    for head in ("PEFT: trained", "kept, MiB", "peak, MiB"):
        table.add_column(head, justify="right")
    for kind, values in found.items():
        mix, one, other = values["mixture"], values["one"], values.get("peft", {})
        table.add_row(
            kind,
            f"{mix['seconds'] * 1e3:.1f}",
            f"{mix['by_lora']:.2f}",
            f"{mix['decode_seconds'] * 1e3:.2f}",
            f"{mix['decode_by_lora']:.2f}",
            f"{mix['trained']:,}",
            _mib(mix["kept_bytes"]),
            _mib(mix["peak_bytes"]),
            f"{one['trained']:,}",
            _mib(one["kept_bytes"]),
            _mib(one["peak_bytes"]),
            f"{other['trained']:,}" if other else "-",
            _mib(other.get("kept_bytes")),
            _mib(other.get("peak_bytes")),
        )
    Console(width=150).print(table)


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f}"


def main() -> None:
    """Measure the families asked for, LoRA among them; print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: time that the process ran, on a machine that others use as well",
    )
    parser.add_argument("--families", nargs="*", choices=EXPERTS.names())
    options = parser.parse_args()
    options.families = sorted({"lora", *(options.families or EXPERTS.names())})
    torch.set_num_threads(options.threads)
    found = measure(options)
    show(found, options)
    if options.json:
        kept = {k: v for k, v in vars(options).items() if k != "json"}
        made = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": ran_on(options.device),
            "torch": torch.__version__,
            "options": kept,
            "families": found,
        }
        options.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
