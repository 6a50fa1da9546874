"""Laws that hold for every bank, router and objective, on drawn shapes and values."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import molora
from molora.context import ForwardContext, Runtime, forward_context, mask_from_positions
from molora.model import adapter_parameters, sites
from molora.routers import OBJECTIVES, ROUTERS
from tests.registered import GATED, objective, router_settings, value

WIDE, OUT = 10, 7
quick = settings(max_examples=25, deadline=None, derandomize=True)

draws = {
    "kind": st.sampled_from(GATED),
    "E": st.integers(3, 7),
    "T": st.integers(1, 24),
    "seed": st.integers(0, 50),
}


def bank(kind: str, E: int, seed: int, **experts: Any) -> Any:
    """A wrapped layer in float64 with random values."""
    raw = {
        "target_modules": ["0"],
        "experts": {"kind": "lora", "num_experts": E, "r": 2, **experts},
        "router": router_settings(kind),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(WIDE, OUT))
        molora.wrap(model, molora.AdapterConfig.from_dict(raw)).double()
        for p in adapter_parameters(model).values():
            nn.init.normal_(p)
    return sites(model)["0"]


def tokens(T: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(T, WIDE, generator=g, dtype=torch.float64)


@quick
@given(**draws)
def test_tokens_are_routed_each_for_itself(
    kind: str, E: int, T: int, seed: int
) -> None:
    layer, x = bank(kind, E, seed), tokens(T, seed)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(layer(x)[order], layer(x[order]), atol=1e-12)
    half = T // 2
    parts = torch.cat([layer(x[:half]), layer(x[half:])])
    assert torch.allclose(layer(x), parts, atol=1e-12)
    gates = layer.router(x, ForwardContext()).gates
    assert (gates >= 0).all()
    assert torch.allclose(gates.sum(-1), torch.ones(T).double())


@quick
@given(**draws)
def test_the_names_of_the_experts_do_not_matter(
    kind: str, E: int, T: int, seed: int
) -> None:
    layer, x = bank(kind, E, seed, r=list(range(1, E + 1))), tokens(T, seed)
    y = layer(x)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        experts = layer.experts
        scales = torch.tensor(experts.scales(), dtype=torch.float64)
        for p in (experts.A, experts.Bt, layer.router.gate.weight):
            p.copy_(p[order].clone())
        # scales belong to the configuration: move them into B
        experts.Bt.mul_((scales[order] / scales)[:, None, None])
    assert torch.allclose(layer(x), y, atol=1e-9)


@quick
@given(**draws)
def test_equal_experts_are_one_expert(kind: str, E: int, T: int, seed: int) -> None:
    """Gates that sum to one do not matter where all experts agree."""
    layer, x = bank(kind, E, seed), tokens(T, seed)
    with torch.no_grad():
        layer.experts.A.copy_(layer.experts.A[:1].clone().expand_as(layer.experts.A))
        layer.experts.Bt.copy_(layer.experts.Bt[:1].clone().expand_as(layer.experts.Bt))
    factor_A, factor_B = layer.experts.expert_factors(0)
    want = layer.base(x) + x @ factor_A.double().t() @ factor_B.double()
    assert torch.allclose(layer(x), want, atol=1e-4)


@quick
@given(**draws)
def test_an_unchosen_expert_may_hold_anything(
    kind: str, E: int, T: int, seed: int
) -> None:
    layer, x = bank(kind, E, seed), tokens(T, seed)
    unused = (layer.router(x, ForwardContext()).gates == 0).all(0)
    y = layer(x)
    with torch.no_grad():
        layer.experts.A[unused] = 7.0
        layer.experts.Bt[unused] = -5.0
    assert torch.equal(layer(x), y)


@quick
@given(mask=st.lists(st.booleans(), min_size=1, max_size=24), **draws)
def test_objectives_are_blind_to_padding(
    kind: str, E: int, T: int, seed: int, mask: list[bool]
) -> None:
    layer = bank(kind, E, seed)
    x, real = tokens(len(mask), seed), torch.tensor(mask)
    garbage = torch.where(real[:, None], x, 100 * x.flip(0) + 3)
    for name in OBJECTIVES.names():
        made = objective(name)
        if made.check(made.config, ROUTERS[kind], E):
            continue
        values = [
            value(made, layer.router(rows, ForwardContext()), m)
            for rows, m in ((x, real), (garbage, real), (x[real], None))
        ]
        for other in values[1:]:
            assert torch.allclose(other, values[0], atol=1e-12), name
        if not real.any():
            assert values[0] == 0


@quick
@given(**draws)
def test_switch_is_at_most_e_and_one_where_probabilities_are_uniform(
    kind: str, E: int, T: int, seed: int
) -> None:
    layer, x = bank(kind, E, seed), tokens(T, seed)
    switch = objective("switch")
    assert 0 < switch(layer.router(x, ForwardContext()), None) <= E + 1e-9
    nn.init.zeros_(layer.router.gate.weight)
    # whatever ties do to f, P is uniform
    uniform = switch(layer.router(x, ForwardContext()), None)
    assert abs(uniform.item() - 1) < 1e-12


@quick
@given(
    lengths=st.lists(st.tuples(st.integers(2, 9), st.integers(0, 4)), min_size=1),
)
def test_packed_rows_keep_exactly_their_tokens(lengths: list[tuple[int, int]]) -> None:
    positions: list[int] = []
    real: list[bool] = []
    for tokens_, gap in lengths:
        positions += [*range(tokens_), *[0] * gap]
        real += [True] * tokens_ + [False] * gap
    mask = mask_from_positions(torch.tensor([positions]))
    assert mask[0].tolist() == real


@quick
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 3),
)
def test_two_and_four_dimensional_masks_agree(
    lengths: list[int], side: str, extra: int
) -> None:
    S = max(lengths) + extra
    flat = torch.zeros(len(lengths), S, dtype=torch.long)
    for i, n in enumerate(lengths):
        flat[i, :n] = 1
    flat = flat if side == "right" else flat.flip(1)
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    full = (causal & flat.bool()[:, None] & flat.bool()[:, :, None])[:, None]
    additive = torch.zeros(full.shape).masked_fill(~full, float("-inf"))
    want = forward_context({"attention_mask": flat}, Runtime(), False).mask_BS
    assert want is not None
    for mask in (full, additive):
        got = forward_context({"attention_mask": mask}, Runtime(), False).mask_BS
        assert got is not None and torch.equal(got, want)
