"""Which model a quantised one was made from: rounded ones pass, siblings do not."""

from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.errors import WrapError
from molora.model import sites
from molora.originals import originals
from tests.bits import Single, layer_of, single

ADAPTER = {
    "target_modules": ["lin"],
    "experts": {"kind": "lora", "r": 4, "init_lora_weights": "loftq_iter_3"},
    "router": {"kind": "none"},
}


def drawn(seed: int = 0) -> Tensor:
    """[96, 128], as wide as trained weights are."""
    return 0.05 * torch.randn(96, 128, generator=torch.Generator().manual_seed(seed))


def moved(weight: Tensor, relative: float) -> Tensor:
    """A sibling: weights that training has moved by so much of their norm."""
    return weight + relative * drawn(1) * weight.norm() / drawn(1).norm()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("was", [torch.float32, torch.bfloat16])
def test_the_original_in_either_dtype_is_taken(kind: str, was: torch.dtype) -> None:
    held = layer_of(kind, drawn().to(was))
    for given in (torch.float32, torch.bfloat16):
        weight = drawn().to(given)
        found = originals(single(weight), {"lin": held}, "here")
        assert torch.equal(found["lin"], weight)


@pytest.mark.parametrize(("kind", "least"), [("nf4", 2), ("fp4", 1.5), ("int8", 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sibling_is_refused(kind: str, least: float, dtype: torch.dtype) -> None:
    held = layer_of(kind, drawn())
    sibling = single(moved(drawn(), 1e-2).to(dtype))
    told = r"here: original is another model: its layer 'lin' gives [\d,]+ of 12,288 "
    with pytest.raises(WrapError, match=told) as raised:
        originals(sibling, {"lin": held}, "here")
    message = str(raised.value)
    assert "original=load_base(name)[0]" in message and "trained or merged" in message
    share = float(message.split("holds (")[1].split("%")[0])
    assert least < share < 50
    count = int(message.split("gives ")[1].split(" of")[0].replace(",", ""))
    assert count == pytest.approx(share / 100 * 12288, abs=0.0005 * 12288 + 1)


def test_the_codes_are_those_of_nf4() -> None:
    """Moving one value to the next level changes one code of the block."""
    levels = torch.tensor([-1.0, 0.0, 0.4407098, 0.5626170]).repeat(16)
    weight = levels.repeat(4, 1)
    held = layer_of("nf4", weight)
    near = weight.clone()
    near[0, 2] = levels[3]
    # 1 of 256 codes, then 3
    assert originals(single(near), {"lin": held}, "here")["lin"].shape == (4, 64)
    near[1, 2] = near[2, 2] = levels[3]
    with pytest.raises(WrapError, match=r"gives 3 of 256 4-bit codes.*\(1\.2%"):
        originals(single(near), {"lin": held}, "here")


def test_another_shape_is_told() -> None:
    held = layer_of("nf4", drawn())
    with pytest.raises(WrapError, match=r"'lin' is \[95, 128\].* base \[96, 128\]"):
        originals(single(drawn()[:95]), {"lin": held}, "here")


def test_layers_of_loftq_are_compared_as_they_came(tmp_path: Any) -> None:
    """The site computes with the codes of W - C, which W does not give."""
    config = molora.AdapterConfig.from_dict(ADAPTER)
    sibling = single(moved(drawn(), 1e-2))
    model: Any = Single(layer_of("nf4", drawn()))
    given = model.lin
    with pytest.raises(WrapError, match="loftq: original is another model"):
        molora.wrap(model, config, original=sibling)
    assert model.lin is given and type(model) is Single
    molora.wrap(model, config, original=single(drawn().bfloat16().float()))
    site = sites(model)["lin"]
    with pytest.raises(WrapError, match=r"'lin' gives .* 4-bit codes"):
        originals(single(drawn()), {"lin": site.base}, "here")
    model.save_pretrained(tmp_path)
    again = Single(layer_of("nf4", drawn()))
    with pytest.raises(WrapError, match="loftq: original is another model"):
        molora.load(again, tmp_path, original=sibling)
    molora.load(again, tmp_path, original=single(drawn()))
    for wrapped in (model, again):
        with pytest.raises(WrapError, match="merge: original is another model"):
            molora.merge(wrapped, "original", sibling)
        assert sites(molora.merge(wrapped, "original", single(drawn())))["lin"].merged
