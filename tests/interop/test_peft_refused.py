"""What PEFT's formats cannot say, and folders that are no experts."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file, save_file

import molora
from molora.errors import CheckpointError, ConfigError, WrapError
from molora.model import is_wrapped
from tests.peft_families import (
    TARGETS,
    THEIRS,
    Factory,
    wrapped,
    written,
)


def test_what_cannot_be_written(tiny_llama: Factory, tmp_path: Path) -> None:
    mixed = {
        "target_modules": TARGETS,
        "overrides": [{"match": "up_proj", "experts": {"kind": "lora"}}],
    }
    model = wrapped(tiny_llama(), "ia3", **mixed)
    with pytest.raises(WrapError, match=r"k_proj.*only one: IA3Experts.*a rank"):
        molora.export_peft(model, tmp_path / "out")
    with pytest.raises(WrapError, match="rank is 0"):
        molora.export_peft(model, tmp_path / "out", rank=0)
    assert not (tmp_path / "out").exists()
    assert molora.export_peft(model, tmp_path / "out", rank=4).worst > 0


ONCE: list[tuple[str, dict[str, Any], str]] = [
    ("oft", {"oft_block_size": 4}, r"differ in oft_block_size \(8, 4\).*a rank"),
    ("adalora", {"lora_alpha": 3.0}, "differ in lora_alpha .* PEFT's ADALORA"),
    ("vera", {"d_initial": 0.5}, "differ in d_initial"),
]


@pytest.mark.parametrize(("kind", "change", "message"), ONCE)
def test_what_peft_says_once_is_not_said_by_layer(
    kind: str, change: dict[str, Any], message: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    overrides = [{"match": "down", "experts": change}]
    model = wrapped(tiny_llama(), kind, overrides=overrides)
    with pytest.raises(WrapError, match=message):
        molora.export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert molora.export_peft(model, tmp_path / "out", rank=2).worst > 0


def test_a_form_that_peft_lacks_is_refused_with_its_layer(
    tiny_llama: Factory, tiny_gpt2: Factory, tmp_path: Path
) -> None:
    alone = {"kind": "vera", "r": 3, "shared": []}
    model = wrapped(tiny_llama(), "vera", experts=alone)
    with pytest.raises(WrapError, match=r"k_proj.*one pair of fixed proj.*a rank"):
        molora.export_peft(model, tmp_path / "out")
    conv = wrapped(tiny_gpt2(), "loha", target_modules=["c_fc"], overrides=[])
    with pytest.raises(WrapError, match=r"c_fc' is a Conv1D.*LOHA.*a rank"):
        molora.export_peft(conv, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert molora.export_peft(conv, tmp_path / "out", rank=32).worst < 1e-6


def test_adapters_from_other_starts_do_not_share(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        config = peft.VeraConfig(target_modules=TARGETS, r=6, projection_prng_key=seed)
        written(tiny_llama, config, folder)
    model = tiny_llama()
    with pytest.raises(CheckpointError, match="different A at .*k_proj, which"):
        molora.import_peft(model, folders, router={"kind": "soft"})
    assert not is_wrapped(model)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "POLY"}, r"peft_type is 'POLY'.*those that can: .*IA3.*LORA"),
    ({"peft_type": "MOLORA"}, "molora.load"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*trains whole modules"),
    ({"bias": "all"}, "bias='all': it trains biases of the base"),
    ({"layers_to_transform": [0]}, r"tensors of model.layers.1.*its config does not"),
    ({"target_modules": ["q_proj", *TARGETS]}, r"no tensors of .*0.*q_proj, which its"),
    ({"something": 3}, "something=3: IA3Experts do not know it"),
    ({"feedforward_modules": ["up_proj"]}, r"down_proj: ia3_l is \[1, 64\].*\[32, 1\]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_read(
    change: dict[str, Any], message: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    written(tiny_llama, THEIRS["ia3"][0], tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = tiny_llama()
    with pytest.raises(CheckpointError, match=message):
        molora.import_peft(model, [tmp_path])
    assert not is_wrapped(model)


@pytest.mark.parametrize("version", [None, "0.17.1"])
def test_rotations_of_an_older_peft(
    version: str | None, tiny_llama: Factory, tmp_path: Path
) -> None:
    written(tiny_llama, THEIRS["oft"][0], tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | {"peft_version": version}
    file.write_text(json.dumps(config))
    told = f": was written by PEFT {version}" if version else ": names no peft_version"
    with pytest.raises(CheckpointError, match=f"{told}.*0.18 than since"):
        molora.import_peft(tiny_llama(), [tmp_path])
    # without the series, every version says the same
    file.write_text(json.dumps(config | {"use_cayley_neumann": False}))
    assert is_wrapped(molora.import_peft(tiny_llama(), [tmp_path]))


def test_tensors_that_do_not_fit(tiny_llama: Factory, tmp_path: Path) -> None:
    written(tiny_llama, THEIRS["ia3"][0], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    right = load_file(file)
    first = next(key for key in right if "down_proj" in key)
    extra = {first + "_more": right[first].clone()}
    other = [right[first].clone() for _ in range(2)]
    for tensors, message in (
        (right | extra, "has the tensors.*ia3_l_more"),
        ({k: v for k, v in right.items() if k != first} | extra, "lacks 'ia3_l'"),
        (right | {first.replace("0", "7"): other[1]}, "no layer there that can"),
        (right | {"model.x": other[0]}, "no key of PEFT"),
    ):
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=message):
            molora.import_peft(tiny_llama(), [tmp_path])


def test_adapters_that_do_not_stack(tiny_llama: Factory, tmp_path: Path) -> None:
    vectors, other, less, lora = (tmp_path / name for name in "abcd")
    written(tiny_llama, THEIRS["ia3"][0], vectors)
    written(tiny_llama, THEIRS["ia3"][1], other)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    written(tiny_llama, config, less)
    written(tiny_llama, peft.LoraConfig(target_modules=TARGETS), lora)
    soft = {"kind": "soft"}
    for second, message in (
        (other, "differ at .* in position 'output' and 'input'"),
        (less, "different target layers"),
        (lora, "different methods.*a: ia3.*d: lora"),
    ):
        with pytest.raises(CheckpointError, match=message):
            molora.import_peft(tiny_llama(), [vectors, second], router=soft)
    with pytest.raises(ConfigError, match="general is for LoRAs"):
        molora.import_peft(tiny_llama(), [vectors], general=[vectors])
    with pytest.raises(ConfigError, match="lora_dropout"):
        molora.import_peft(tiny_llama(), [vectors], lora_dropout=0.1)
