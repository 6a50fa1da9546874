"""Banks on layers of bitsandbytes, on a GPU where there is one: train, then merge.

    .venv/bin/python tests/benchmarks/check_quantised.py

Each family is trained on a 4-bit and on an 8-bit layer, where its loss must fall, and
merged onto the dequantised weight, whose output must be that of the adapted layer. An
8-bit layer rounds its input as well, so there the two agree roughly. Exits with 1 if
anything is wrong.
"""

import sys
from typing import Any

import bitsandbytes as bnb
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import molora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {"nf4": 1e-5, "int8": 5e-2}
"""Largest difference over the largest value."""
FAMILIES: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 8},
    "dora": {"kind": "dora", "inner": {"kind": "lora", "r": 8}},
    "oft": {"kind": "oft", "oft_block_size": 16},
    "lokr": {"kind": "lokr", "r": 8},
    "top-2 of 4": {"kind": "lora", "num_experts": 4, "r": 8},
}
WIDE = (128, 192)


def build(scheme: str) -> nn.Sequential:
    """A layer norm, whose dtype is the model's, and a quantised layer."""
    torch.manual_seed(0)
    weight = nn.Linear(*WIDE, bias=False).weight.data
    if scheme == "nf4":
        layer: Any = bnb.nn.Linear4bit(*WIDE, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", module=layer
        )
    else:
        layer = bnb.nn.Linear8bitLt(*WIDE, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False)
    return nn.Sequential(nn.LayerNorm(WIDE[0]), layer).to(DEVICE).requires_grad_(False)


def check(scheme: str, experts: dict[str, Any]) -> tuple[float, float, float | None]:
    """Loss before and after training, and the difference that merging makes."""
    router = {"kind": "topk", "top_k": 2} if "num_experts" in experts else None
    raw = {"target_modules": ["1"], "experts": experts}
    config = molora.AdapterConfig.from_dict(
        {**raw, **({"router": router} if router else {})}
    )
    model = molora.wrap(build(scheme), config).train()
    x, wanted = (torch.randn(40, wide, device=DEVICE) for wide in WIDE)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(60):
        loss = F.mse_loss(model(x), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if router:
        return losses[0], losses[-1], None
    with torch.no_grad():
        adapted = model.eval()(x)
        molora.merge(model, base="dequantised")
        off = (model(x) - adapted).abs().max() / adapted.abs().max()
    return losses[0], losses[-1], off.item()


def main() -> None:
    """Check every family on both kinds of layers, print one table."""
    table, wrong = Table(title=f"Quantised layers on {DEVICE}"), 0
    for column in ("layer", "experts", "loss", "trained", "merged off by"):
        table.add_column(column)
    for scheme, limit in LIMITS.items():
        for name, experts in FAMILIES.items():
            first, last, off = check(scheme, experts)
            bad = not last < 0.95 * first or (off is not None and not off <= limit)
            wrong += bad
            said = "" if off is None else f"{off:.1e}"
            cells = (scheme, name, f"{first:.3f}", f"{last:.3f}", said)
            table.add_row(*cells, style="red" if bad else "")
    Console().print(table)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
