"""Routing numbers against values worked out by hand; tables, picture and strip."""

import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import molora
from molora.context import ForwardContext
from molora.errors import ConfigError, RoutingError
from molora.records import RoutingTrace
from molora.report import RoutingReport, pieces, save_heatmap, token_strip
from molora.routers import Routing
from molora.token_strip import PALETTE, token_gates

A, B, C = "h.0.up", "h.0.down", "h.1.up"


def routing(gates: list[list[float]], sparse: bool = True) -> Routing:
    gates_TE = torch.tensor(gates)
    return Routing(gates_TE, gates_TE, gates_TE.log(), 2 if sparse else None)


@pytest.fixture
def trace() -> RoutingTrace:
    """Two rows of three positions; the first, of task one, ends in padding.

    Layer 0 has two sites with four experts, layer 1 a site with two.
    """
    trace = RoutingTrace()
    context = ForwardContext(tasks=("one", "two"))
    shape = (2, 3, 8)
    mask_T = torch.tensor([True, True, False, True, True, True])
    up = [
        [0.75, 0.25, 0, 0],
        [0.5, 0.5, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 1, 0],
        [0, 0, 1, 0],
        [0, 0, 0.5, 0.5],
    ]
    trace.add(A, routing(up), context, shape, mask_T)
    trace.add(B, routing([[0.25] * 4] * 6, sparse=False), context, shape, mask_T)
    trace.add(C, routing([[1, 0]] * 6), context, shape, mask_T)
    return trace


def test_numbers_of_a_site(trace: RoutingTrace) -> None:
    one = RoutingReport(trace).tasks["one"]
    assert one.tokens == 2
    # (0.75 + 0.5) / 2 and (0.25 + 0.5) / 2; padding would show in the last expert
    assert one.sites[A].gate == [0.625, 0.375, 0, 0]
    assert one.sites[A].share == [0.5, 0.5, 0, 0]
    assert one.sites[A].live == 2
    # (0.625 ln 1.6 + 0.375 ln 2.6667) / ln 4 = 0.661563 / 1.386294
    assert one.sites[A].entropy == pytest.approx(0.477217, abs=1e-6)
    # uniform: each token counts for the first of the likeliest
    assert one.sites[B].gate == [0.25] * 4
    assert one.sites[B].share == [1, 0, 0, 0]
    assert (one.sites[B].entropy, one.sites[B].live) == (pytest.approx(1), 4)
    assert (one.sites[C].gate, one.sites[C].entropy) == ([1, 0], 0)


def test_numbers_of_a_layer_a_task_and_all_tokens(trace: RoutingTrace) -> None:
    report = RoutingReport(trace)
    layers = report.tasks["one"].layers()
    assert list(layers) == ["0", "1"]
    assert layers["0"].gate == [0.4375, 0.3125, 0.125, 0.125]
    assert layers["0"].live == 3
    assert layers["0"].entropy == pytest.approx((0.477217 + 1) / 2, abs=1e-6)
    mean = report.tasks["one"].mean()
    # experts 2 and 3 are at two of the three sites
    assert mean.gate == pytest.approx([1.875 / 3, 0.625 / 3, 0.25 / 2, 0.25 / 2])
    overall = report.overall
    assert overall.tokens == 5
    assert overall.sites[A].gate == pytest.approx([0.25, 0.15, 0.5, 0.1])
    # 4 assignments of task one, 1 + 1 + 2 of task two
    assert overall.sites[A].share == [0.25, 0.25, 0.375, 0.125]


def test_an_expert_is_live_above_a_tenth_of_its_even_part() -> None:
    trace = RoutingTrace()
    # 1 / (10 E) = 0.025
    gates = [[0.924, 0.024, 0.026, 0.026]]
    trace.add(A, routing(gates, sparse=False), ForwardContext(), (1, 1, 8), None)
    assert RoutingReport(trace).overall.sites[A].live == 3


def test_gates_that_do_not_sum_to_one_are_normalised_for_the_entropy() -> None:
    trace = RoutingTrace()
    trace.add(A, routing([[0.2, 0.2, 0, 0]]), ForwardContext(), (1, 1, 8), None)
    use = RoutingReport(trace).overall.sites[A]
    assert use.gate == pytest.approx([0.2, 0.2, 0, 0])
    assert use.entropy == pytest.approx(0.5)


def test_numbers_equal_a_loop_over_the_gates_of_a_model(
    tiny_llama: Callable[..., PreTrainedModel],
) -> None:
    settings = {
        "target_modules": ["up_proj", "down_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "topk", "top_k": 2, "init_range": 3.0},
    }
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(settings))
    ids = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    seen: dict[str, Any] = {}
    for path, site in molora.model.sites(model).items():
        assert site.router is not None
        site.router.register_forward_hook(
            lambda module, args, out, path=path: seen.update({path: out.gates})
        )
    with molora.record_routing(model) as trace, molora.tasks(model, ["p", "q"]):
        model(input_ids=ids, attention_mask=mask)
    report = RoutingReport(trace)
    real = mask.flatten().tolist()
    for path, gates_TE in seen.items():
        rows = [g for g, keep in zip(gates_TE.tolist(), real, strict=True) if keep]
        assert report.overall.sites[path].gate == pytest.approx(
            [math.fsum(row[e] for row in rows) / 11 for e in range(4)]
        )
        counts = [sum(row[e] > 0 for row in rows) for e in range(4)]
        assert report.overall.sites[path].share == [c / 22 for c in counts]
    assert [report.tasks[t].tokens for t in ("p", "q")] == [4, 7]


def test_without_tasks_there_is_only_the_whole(trace: RoutingTrace) -> None:
    plain = RoutingTrace()
    plain.add(C, routing([[0.5, 0.5]]), ForwardContext(), (1, 1, 8), None)
    report = RoutingReport(plain)
    assert report.tasks == {}
    assert json.loads(json.dumps(report.to_dict()))["overall"]["tokens"] == 1


def test_json_holds_the_numbers(trace: RoutingTrace) -> None:
    text = json.dumps(RoutingReport(trace).to_dict(), allow_nan=False)
    values = json.loads(text)
    assert values["tasks"]["one"]["sites"][A]["gate"] == [0.625, 0.375, 0, 0]
    assert values["tasks"]["one"]["layers"]["1"]["gate"] == [1, 0]
    assert values["overall"]["mean"]["live"] == pytest.approx((4 + 4 + 1) / 3)


def test_nothing_recorded_is_an_error() -> None:
    with pytest.raises(RoutingError, match=r"inside molora\.record_routing"):
        RoutingReport(RoutingTrace())
    padding = RoutingTrace()
    none = torch.tensor([False])
    padding.add(C, routing([[0.5, 0.5]]), ForwardContext(), (1, 1, 8), none)
    with pytest.raises(RoutingError, match="one real token"):
        RoutingReport(padding)


def printed(value: Any, **settings: Any) -> str:
    file = io.StringIO()
    Console(file=file, **{"width": 80, **settings}).print(value)
    return file.getvalue()


def test_tables_show_the_numbers(trace: RoutingTrace) -> None:
    report = RoutingReport(trace)
    lines = [line.split() for line in printed(report.task_table()).splitlines()]
    assert ["one", "2", "0.49", "2.3", "0.62", "0.21", "0.12", "0.12"] in lines
    lines = [line.split() for line in printed(report.layer_table("one")).splitlines()]
    assert ["0", "2", "0.74", "3.0", "0.44", "0.31", "0.12", "0.12"] in lines
    # the narrower layer has no third and fourth expert
    assert ["1", "1", "0.00", "1.0", "1.00", "0.00"] in lines


def test_many_experts_are_summed_up_in_one_column() -> None:
    wide = RoutingTrace()
    gates = [0.0] * 64
    gates[17], gates[3] = 0.75, 0.25
    wide.add(A, routing([gates]), ForwardContext(), (1, 1, 8), None)
    assert "e17 (0.75)" in printed(RoutingReport(wide).layer_table())


def test_heatmap_draws_the_gates(
    trace: RoutingTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    saved = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        saved(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    save_heatmap(trace, tmp_path / "heat.png")
    pixels = matplotlib.image.imread(tmp_path / "heat.png")
    assert pixels.shape[0] > 200 and pixels.std() > 0.05
    one, two, bar = figures[0].axes
    assert one.get_title() == "one (2 tokens)"
    assert two.get_title() == "two (3 tokens)"
    grid = one.images[0].get_array().filled(numpy.nan)
    want = [[0.4375, 1], [0.3125, 0], [0.125, numpy.nan], [0.125, numpy.nan]]
    numpy.testing.assert_allclose(grid, want)
    assert one.images[0].get_clim() == two.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in one.get_xticklabels()] == ["0", "1"]
    assert (one.get_xlabel(), one.get_ylabel()) == ("layer", "expert")
    assert bar.get_ylabel() == "mean gate"


def test_panels_share_one_scale_that_starts_at_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    trace = RoutingTrace()
    gates = routing([[0.5, 0.5], [0.75, 0.25]])
    trace.add(A, gates, ForwardContext(tasks=("one", "two")), (2, 1, 8), None)
    save_heatmap(trace, tmp_path / "heat.png")
    one, two, _ = figures[0].axes
    assert one.images[0].get_clim() == two.images[0].get_clim() == (0, 0.75)


def test_heatmap_that_cannot_be_written(trace: RoutingTrace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no/heat\.png: cannot be written: No such"):
        save_heatmap(trace, tmp_path / "no" / "heat.png")


def test_token_gates_average_sites_and_leave_padding_out(trace: RoutingTrace) -> None:
    # site C has two experts: none of its weight is on the others
    want = [
        [2 / 3, 0.5 / 3, 0.25 / 3, 0.25 / 3],
        [1.75 / 3, 0.75 / 3, 0.25 / 3, 0.25 / 3],
    ]
    torch.testing.assert_close(token_gates(trace), torch.tensor(want))
    layer = token_gates(trace, row=1, layer="0")
    want = [[0.125, 0.125, 0.625, 0.125]] * 2 + [[0.125, 0.125, 0.375, 0.375]]
    torch.testing.assert_close(layer, torch.tensor(want))
    site = token_gates(trace, row=1, layer=A)
    torch.testing.assert_close(site[0], torch.tensor([0.0, 0, 1, 0]))


def test_strip_without_colours_prints_the_expert(trace: RoutingTrace) -> None:
    strip = token_strip(["an", " e[1]\n", " x\x1b[2J"], trace, row=1, layer=A)
    assert strip.experts == [2, 2, 2]
    text = printed(strip)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines == ["an[2] e[1]\\n[2]", " x\\x1b[2J[2]", "most used:   e2  100%"]


@pytest.mark.parametrize(
    "settings",
    [{"no_color": True}, {"color_system": "standard"}, {"color_system": None}],
)
def test_expert_numbers_replace_missing_colours(
    trace: RoutingTrace, settings: dict[str, Any]
) -> None:
    strip = token_strip(["p", "q"], trace)
    text = printed(strip, **{"force_terminal": True, "color_system": "256", **settings})
    assert "p[0]" in text and "\x1b[38" not in text


def test_no_color_in_the_environment_is_heeded(
    trace: RoutingTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert "p[0]" in printed(token_strip(["p", "q"], trace), force_terminal=True)


def test_strip_colours_each_token_by_its_expert(trace: RoutingTrace) -> None:
    strip = token_strip(["p", "q", "r"], trace, row=1, layer=A)
    settings = {"force_terminal": True, "color_system": "truecolor", "no_color": False}
    text = printed(strip, **settings)
    # expert 2 is #009E73
    assert "\x1b[38;2;0;0;0;48;2;0;158;115mp\x1b[0m" in text
    assert "[2]" not in text


def test_more_experts_than_colours_are_numbered_as_well() -> None:
    wide = RoutingTrace()
    gates = [0.0] * 10
    gates[9] = 1.0
    wide.add(A, routing([gates]), ForwardContext(), (1, 1, 8), None)
    settings = {"force_terminal": True, "color_system": "truecolor", "no_color": False}
    assert "p[9]" in printed(token_strip(["p"], wide), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": ["p"]}, r"1 tokens were given for a row of 2"),
        ({"layer": "7"}, r"layer '7' has no router.* Routed layers: 0, 1"),
        ({"layer": "h.0.upp"}, r"Did you mean 'h\.0\.up'"),
    ],
)
def test_strip_refuses_what_does_not_fit(
    trace: RoutingTrace, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RoutingError, match=message):
        token_strip(**{"tokens": ["p", "q"], "trace": trace, **settings})


def test_strip_needs_the_tokens(trace: RoutingTrace) -> None:
    trace.keep_tokens = False
    with pytest.raises(RoutingError, match="keep_tokens=True"):
        token_strip(["p", "q"], trace)
    with pytest.raises(RoutingError, match="no routing was recorded"):
        token_strip([], RoutingTrace())


def test_pieces_of_words_and_of_characters() -> None:
    vocabulary = {"a": 0, "\u0120b": 1, "\u00c3": 2, "<s>": 3}
    words = Tokenizer(models.BPE(vocabulary, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    # the third is the first byte of a character of two
    assert pieces([3, 0, 1, 2], tokenizer) == ["<s>", "a", " b", "\u00c3"]


# linear RGB as seen without one kind of cone: Machado et al. 2009, severity 1.0
VISION = {
    "all cones": numpy.eye(3),
    "protanopia": numpy.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": numpy.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": numpy.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
XYZ = numpy.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)


def linear(colour: str) -> Any:
    """Linear RGB of an sRGB colour."""
    c = numpy.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return numpy.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: Any) -> Any:
    """CIE L*a*b* of linear RGB."""
    v = XYZ @ rgb.clip(0, 1) / numpy.array([0.95047, 1, 1.08883])
    x, y, z = numpy.where(v > 0.008856, numpy.cbrt(v), 7.787 * v + 16 / 116)
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_palette_is_told_apart_by_all_kinds_of_colour_vision(vision: str) -> None:
    assert len(PALETTE) >= 8
    seen = [lab(VISION[vision] @ linear(background)) for background, _ in PALETTE]
    nearest = min(numpy.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    # a difference of 2.3 is just noticeable
    assert nearest > 15


def test_text_is_readable_on_every_colour() -> None:
    for background, text in PALETTE:
        dark, light = sorted((XYZ @ linear(c))[1] for c in (background, text))
        # contrast of WCAG 2, level AA
        assert (light + 0.05) / (dark + 0.05) > 4.5
