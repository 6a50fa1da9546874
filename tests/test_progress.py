"""A bar appears for long work alone, on standard error, where a terminal is."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import molora
from molora import progress


def screen(monkeypatch: pytest.MonkeyPatch, terminal: bool = True) -> io.StringIO:
    """Catch what is drawn."""
    drawn = io.StringIO()

    def console(stderr: bool) -> Console:
        assert stderr is True
        return Console(file=drawn, force_terminal=terminal, width=80)

    monkeypatch.setattr(progress, "Console", console)
    return drawn


@pytest.mark.parametrize("terminal", [True, False])
def test_long_work_shows_how_far_it_is(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", -1.0)
    drawn = screen(monkeypatch, terminal)
    with progress.long_work("Sorting", 4) as step:
        assert drawn.getvalue() == ""
        step()
        assert ("Sorting" in drawn.getvalue() and "25%" in drawn.getvalue()) is terminal
        step()
    assert ("50%" in drawn.getvalue()) is terminal
    assert terminal or drawn.getvalue() == ""


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = screen(monkeypatch)
    with progress.long_work("Sorting", 2) as step:
        step()
        step()
    assert drawn.getvalue() == ""


def test_a_failure_takes_the_bar_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", -1.0)
    drawn = screen(monkeypatch)
    with pytest.raises(KeyError), progress.long_work("Sorting", 2) as step:
        step()
        raise KeyError
    # the cursor is shown again
    assert "\x1b[?25h" in drawn.getvalue()


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.lin(inputs_embeds)
        return y


def test_wrapping_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "r": 2, "init_lora_weights": "pissa"},
        "router": {"kind": "none"},
    }
    drawn = screen(monkeypatch)
    molora.wrap(Single(), molora.AdapterConfig.from_dict(raw))
    assert drawn.getvalue() == ""
    monkeypatch.setattr(progress, "SECONDS", -1.0)
    molora.wrap(Single(), molora.AdapterConfig.from_dict(raw))
    assert "Making experts" in drawn.getvalue() and "100%" in drawn.getvalue()
