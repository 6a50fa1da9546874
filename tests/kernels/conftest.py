"""Shared by tests of Triton kernels: a correct interpreter, and poisoned memory."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

_spec = importlib.util.spec_from_file_location(
    "triton_shim", Path(__file__).with_name("triton_shim.py")
)
assert _spec and _spec.loader
triton_shim = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(triton_shim)


@pytest.fixture
def exact_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, corrected for bfloat16."""
    triton_shim.install(monkeypatch)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is not a number, as it may be on a device."""

    def fill(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(torch, "empty", fill(torch.empty))
