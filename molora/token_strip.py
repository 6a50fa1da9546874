"""A text in the terminal, each token in the colour of the expert that it used most.

Legend: B rows   S tokens   E experts
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.errors import RoutingError
from molora.records import RoutingTrace
from molora.schema import nearest
from molora.usage import layer_of

# Okabe and Ito's set for all kinds of colour vision, black replaced by dark grey; with
# each the text colour that can be read on it
PALETTE = (
    ("#E69F00", "#000000"),
    ("#56B4E9", "#000000"),
    ("#009E73", "#000000"),
    ("#F0E442", "#000000"),
    ("#0072B2", "#FFFFFF"),
    ("#D55E00", "#000000"),
    ("#CC79A7", "#000000"),
    ("#444444", "#FFFFFF"),
)


@dataclass(frozen=True)
class TokenStrip:
    """A text with the most used expert of each token, and a legend; printable.

    On a console without colours, or without enough of them, the number of the expert
    stands in brackets behind its token; likewise for more experts than colours.

    Attributes:
        tokens: S pieces of text.
        experts: The most used expert of each.
        num_experts: E.
    """

    tokens: list[str]
    experts: list[int]
    num_experts: int

    def text(self, colours: bool) -> Text:
        """The tokens one after the other; a new line after each line end."""
        numbered = not colours or self.num_experts > len(PALETTE)
        strip = Text()
        for token, expert in zip(self.tokens, self.experts, strict=True):
            label = "".join(c if c.isprintable() else _escaped(c) for c in token)
            label += f"[{expert}]" if numbered else ""
            strip.append(label, style=_style(expert, colours))
            if token.endswith("\n"):
                strip.append("\n")
        return strip

    def legend(self, colours: bool) -> Text:
        """Every expert that some token used most, with its part of the tokens."""
        text = Text("most used:")
        for expert in sorted(set(self.experts)):
            part = self.experts.count(expert) / len(self.experts)
            text.append("  ")
            text.append(f" e{expert} ", style=_style(expert, colours))
            text.append(f" {part:.0%}")
        return text

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        enough = console.color_system in ("256", "truecolor")
        colours = enough and not console.no_color
        yield self.text(colours)
        yield self.legend(colours)


def token_strip(
    tokens: Sequence[str],
    trace: RoutingTrace,
    forward: int = 0,
    row: int = 0,
    layer: str | None = None,
) -> TokenStrip:
    """Tell the most used expert of each token of one recorded row.

    Args:
        tokens: The S real tokens of the row as text, see ``pieces``.
        trace: A recording with ``keep_tokens``.
        forward: Which forward of the recording, from 0.
        row: Which row of its batch.
        layer: A layer number, or a module path; all sites by default.

    Raises:
        RoutingError: The recording kept no tokens, has no such layer, or its row has
            another number of tokens.
    """
    gates_SE = token_gates(trace, forward, row, layer)
    if len(gates_SE) != len(tokens):
        raise RoutingError(
            f"{len(tokens)} tokens were given for a row of {len(gates_SE)} in the "
            "recording; give the text of that row, without padding"
        )
    return TokenStrip(list(tokens), gates_SE.argmax(1).tolist(), gates_SE.shape[1])


def token_gates(
    trace: RoutingTrace, forward: int = 0, row: int = 0, layer: str | None = None
) -> Tensor:
    """Gates of the real tokens of one recorded row, averaged over sites.

    Sites that saw only the last tokens of the row are left out. A site with fewer
    experts than others counts as not using the ones that it lacks.

    Args:
        trace: A recording with ``keep_tokens``.
        forward: Which forward of the recording, from 0.
        row: Which row of its batch.
        layer: A layer number, or a module path; all sites by default.

    Returns:
        [S, E] float32.

    Raises:
        RoutingError: The recording kept no tokens, or has no such layer.
    """
    if not trace.keep_tokens:
        raise RoutingError("the recording kept no tokens; record with keep_tokens=True")
    records = [trace.sites[path] for path in _paths_at(trace, layer)]
    columns = max(record.gates[forward].shape[1] for record in records)
    whole = [r for r in records if r.gates[forward].shape[1] == columns]
    experts = max(record.gates[forward].shape[2] for record in whole)
    mean_SE = torch.zeros(columns, experts)
    for record in whole:
        gates_SE = record.gates[forward][row]
        mean_SE[:, : gates_SE.shape[1]] += gates_SE / len(whole)
    mask_BS = whole[0].masks[forward]
    return mean_SE if mask_BS is None else mean_SE[mask_BS[row]]


def pieces(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text of each token by itself.

    Args:
        token_ids: Of one text.
        tokenizer: That made them.
    """
    found = []
    for token_id in token_ids:
        text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        # part of a character, or a token that stands for no text
        is_broken = not text or "\ufffd" in text
        found.append(
            str(tokenizer.convert_ids_to_tokens(token_id)) if is_broken else str(text)
        )
    return found


def _paths_at(trace: RoutingTrace, layer: str | None) -> list[str]:
    if not trace.sites:
        raise RoutingError(
            "no routing was recorded: run the model inside molora.record_routing"
        )
    if layer is None:
        return list(trace.sites)
    paths = [path for path in trace.sites if layer in (path, layer_of(path))]
    if not paths:
        known = list(dict.fromkeys(layer_of(path) for path in trace.sites))
        raise RoutingError(
            f"layer {layer!r} has no router.{nearest(layer, trace.sites)} "
            f"Routed layers: {', '.join(known)}; or give the path of a site"
        )
    return paths


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _style(expert: int, colours: bool) -> str:
    background, text = PALETTE[expert % len(PALETTE)]
    return f"{text} on {background}" if colours else ""
