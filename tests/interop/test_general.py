"""GenKnowSub against PEFT's numbers, and its exact form against the definition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import molora
from molora.errors import CheckpointError, ConfigError
from molora.interop.general import subtract_general
from molora.interop.peft_folder import PeftLora
from molora.model import is_wrapped, sites
from tests.oracle import load, near


def lora(A: Tensor, B: Tensor, scale: float) -> PeftLora:
    return PeftLora(Path("x"), None, {"lin": (A, B)}, {"lin": scale})


def adapters(t: dict[str, Tensor], e: int) -> tuple[PeftLora, list[PeftLora]]:
    scale = float(t["scales"][e])
    general = zip(t["plain.general_A"], t["plain.general_B"], strict=True)
    expert = lora(t["plain.A"][e], t["plain.B"][e], scale)
    return expert, [lora(A, B, scale) for A, B in general]


def test_factors_are_those_of_peft() -> None:
    t = load("arrow_gks")
    for e in range(5):
        made = subtract_general(*adapters(t, e), "factors")
        assert near(made.factors["lin"][0], t["after_gks.A"][e], "A")
        assert near(made.factors["lin"][1], t["after_gks.B"][e], "B")


def test_delta_is_the_difference_of_the_updates() -> None:
    t = load("arrow_gks")
    for e in range(5):
        made = subtract_general(*adapters(t, e), "delta")
        A, B = made.factors["lin"]
        assert A.shape == (9, 24)
        assert near(
            made.scales["lin"] * B @ A, t["alt.gks_delta_weight_exact"][e], "delta"
        )


def test_each_general_adapter_has_its_own_scale() -> None:
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [5.0]])
    general = [lora(A, B, 2.0), lora(-A, B, 8.0)]
    made = subtract_general(lora(A, B, 4.0), general, "delta")
    a, b = made.factors["lin"]
    # 4 - (2 - 8) / 2 of the same product
    torch.testing.assert_close(4.0 * b @ a, 7.0 * B @ A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["delta", "factors"])
def test_half_precision_is_subtracted_in_float32(dtype: Any, form: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    A_Gri = torch.randn(4, 2, 9, generator=generator).to(dtype)
    B_Gor = torch.randn(4, 7, 2, generator=generator).to(dtype)
    made = [lora(A, B, 0.7) for A, B in zip(A_Gri, B_Gor, strict=True)]
    got_A, got_B = subtract_general(made[0], made[1:], form).factors["lin"]
    A, B = A_Gri.double(), B_Gor.double()
    if form == "delta":
        want = B[0] @ A[0] - (B[1:] @ A[1:]).mean(0)
    else:
        want = (B[0] - B[1:].mean(0)) @ (A[0] - A[1:].mean(0))
    assert got_A.dtype == got_B.dtype == torch.float32
    error = (got_B.double() @ got_A.double() - want).norm() / want.norm()
    assert error < 1e-6


def folder(base: Any, path: Path, seed: int, r: int = 2) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(
        base, LoraConfig(r=r, lora_alpha=4 + seed, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(path / str(seed))
    return path / str(seed)


def updates(model: Any) -> dict[str, Tensor]:
    """Dense update of each expert, [E, O, I], by site."""
    found = {}
    for path, site in sites(model).items():
        A, Bt = site.experts.A.detach(), site.experts.Bt.detach()
        scale = torch.tensor(site.experts.scales())
        found[path] = torch.einsum("e,ero,eri->eoi", scale, Bt, A)
    return found


def test_import_takes_the_general_mean(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    made = [folder(tiny_llama(), tmp_path, s, r=1 + s) for s in range(4)]
    arrow = {"kind": "arrow", "top_k": 2}
    plain = updates(molora.import_peft(tiny_llama(), made, router=arrow))
    model = molora.import_peft(tiny_llama(), made[:2], router=arrow, general=made[2:])
    for path, got in updates(model).items():
        want = plain[path][:2] - plain[path][2:].mean(0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert list(sites(model).values())[0].experts.ranks == [8, 9]


def test_bad_input(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    made = [folder(tiny_llama(), tmp_path, s, r=1 + s) for s in range(2)]
    base = tiny_llama()
    with pytest.raises(CheckpointError, match=r"ranks \[1, 2\] at .*'delta'"):
        molora.import_peft(base, made[:1], general=made[1:], general_form="factors")
    with pytest.raises(ConfigError, match="general_form is read with general"):
        molora.import_peft(base, made[:1], general_form="factors")
    with pytest.raises(ConfigError, match="none of delta, factors"):
        molora.import_peft(base, made[:1], general=made[1:], general_form="b")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"general is a list of folders; give \['"):
        molora.import_peft(base, made[:1], general=str(made[1]))
    with pytest.raises(ConfigError, match=r"folders is a list of folders; give \['"):
        molora.import_peft(base, str(made[0]))
    assert not is_wrapped(base)
