"""Every family that PEFT has: PEFT's folder to our bank and back, equal logits.

PEFT takes tensors that it does not know in silence, so that the keys it loaded are
compared as well.
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import molora
from molora.errors import CheckpointError, ConfigError, WrapError
from molora.experts import EXPERTS, LoRAExperts
from molora.model import adapter_parameters, is_wrapped, sites

Factory = Any
IDS = torch.arange(1, 25).view(2, 12)
TARGETS = ["k_proj", "up_proj", "down_proj"]
"""Layers of 32 to 16, 32 to 64 and 64 to 32 features."""

BY_LAYER = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"up_proj": 7}}
THEIRS: dict[str, list[peft.PeftConfig]] = {
    "adalora": [
        peft.AdaLoraConfig(
            target_modules=TARGETS, init_r=5, target_r=2, lora_alpha=9, total_step=9
        )
    ],
    "bitfit": [peft.BeftConfig(target_modules=TARGETS)],
    "boft": [
        peft.BOFTConfig(target_modules=TARGETS, boft_block_size=8),
        peft.BOFTConfig(target_modules=TARGETS, boft_block_num=4, boft_block_size=0),
    ],
    "dora": [
        peft.LoraConfig(target_modules=TARGETS, use_dora=True, r=4, lora_alpha=6),
        peft.LoraConfig(
            target_modules=TARGETS, use_dora=True, use_rslora=True, **BY_LAYER
        ),
    ],
    "ia3": [
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=r".*\.0\..*_proj"),
    ],
    "loha": [
        peft.LoHaConfig(target_modules=TARGETS, r=4, alpha=6),
        peft.LoHaConfig(target_modules=TARGETS, **BY_LAYER),
    ],
    "lokr": [
        peft.LoKrConfig(target_modules=TARGETS, r=2, alpha=3, decompose_factor=4),
        peft.LoKrConfig(target_modules=TARGETS, **BY_LAYER),
        peft.LoKrConfig(target_modules=TARGETS, r=2, decompose_both=True),
    ],
    "oft": [
        peft.OFTConfig(target_modules=TARGETS, oft_block_size=8),
        peft.OFTConfig(target_modules=TARGETS, r=4, oft_block_size=0),
        peft.OFTConfig(
            target_modules=TARGETS, oft_block_size=4, use_cayley_neumann=False
        ),
        peft.OFTConfig(
            target_modules=TARGETS,
            oft_block_size=4,
            block_share=True,
            coft=True,
            eps=0.5,
        ),
    ],
    "sparse": [peft.ShiraConfig(target_modules=TARGETS, r=2, random_seed=3)],
    "vera": [
        peft.VeraConfig(target_modules=TARGETS, r=6),
        peft.VeraConfig(
            target_modules=TARGETS, r=6, save_projection=False, projection_prng_key=7
        ),
    ],
}
"""By family: what PEFT writes."""

LORA_BY_LAYER = [{"match": "up_proj", "experts": {"inner": {"kind": "lora", "r": 3}}}]
OURS: dict[str, dict[str, Any]] = {
    "adalora": {"experts": {"kind": "adalora", "init_r": 4}},
    "bitfit": {},
    "boft": {"experts": {"kind": "boft", "boft_block_size": 8}},
    "dora": {"overrides": LORA_BY_LAYER},
    "ia3": {"overrides": [{"match": "down", "experts": {"position": "input"}}]},
    "loha": {"overrides": [{"match": "down", "experts": {"r": 3, "alpha": 2.0}}]},
    "lokr": {"overrides": [{"match": "down", "experts": {"r": 2, "alpha": 2.0}}]},
    "oft": {"experts": {"kind": "oft", "oft_block_size": 8}},
    "sparse": {"experts": {"kind": "sparse", "r": 2}},
    "vera": {"experts": {"kind": "vera", "r": 6}},
}
"""By family: settings of a bank that PEFT has to read."""

CASES = [(kind, n) for kind, configs in THEIRS.items() for n in range(len(configs))]


def values(model: Any, seed: int = 0) -> None:
    """Change everything that an adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter.dtype))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.double().eval()(IDS).logits
    return out


def written(make: Factory, config: peft.PeftConfig, folder: Path, seed: int = 0) -> Any:
    """An adapter that PEFT made, with other values than those of its start."""
    theirs: Any = get_peft_model(make(), config)
    values(theirs, seed)
    theirs.save_pretrained(folder)
    return theirs


def in_peft(make: Factory, folder: Path) -> Any:
    """What PEFT loads, with every tensor of the file and no other."""
    theirs = PeftModel.from_pretrained(make(), folder)
    stored = load_file(folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(theirs)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key]) for key in stored)
    return theirs


def wrapped(model: Any, kind: str, seed: int = 1, **more: Any) -> Any:
    raw = {"target_modules": TARGETS, "experts": {"kind": kind}} | OURS[kind] | more
    molora.wrap(model, molora.AdapterConfig.from_dict(raw))
    values(model, seed)
    return model


def test_every_family_that_peft_has_is_here() -> None:
    families = {n for n in EXPERTS.names() if EXPERTS[n].peft_type is not None}
    assert families - {"lora"} == THEIRS.keys() == OURS.keys()


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_from_peft_and_back(
    kind: str, number: int, tiny_llama: Factory, tmp_path: Path
) -> None:
    config = THEIRS[kind][number]
    want = logits(written(tiny_llama, config, tmp_path / "theirs"))
    ours = molora.import_peft(tiny_llama(), [tmp_path / "theirs"])
    assert all(isinstance(s.experts, EXPERTS[kind]) for s in sites(ours).values())
    again = molora.export_peft(ours, tmp_path / "ours")
    assert again.peft_type == config.peft_type.value and again.worst == 0
    was, now = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("theirs", "ours")
    )
    assert was.keys() == now.keys()
    for key, tensor in was.items():
        torch.testing.assert_close(now[key], tensor, rtol=1e-6, atol=1e-7)
    back = logits(in_peft(tiny_llama, tmp_path / "ours"))
    got = logits(ours)
    bound = 1e-6 * want.abs().max()
    assert (got - want).abs().max() < bound and (back - want).abs().max() < bound
    assert (logits(tiny_llama()) - want).abs().max() > 100 * bound


@pytest.mark.parametrize("kind", list(OURS))
def test_ours_in_peft(kind: str, tiny_llama: Factory, tmp_path: Path) -> None:
    ours = wrapped(tiny_llama(), kind)
    molora.export_peft(ours, tmp_path / "out")
    got, want = logits(in_peft(tiny_llama, tmp_path / "out")), logits(ours)
    assert (got - want).abs().max() < 1e-6 * want.abs().max()
    assert (logits(tiny_llama()) - want).abs().max() > 1e-3


@pytest.mark.parametrize("kind", list(THEIRS))
def test_two_adapters_are_two_experts(
    kind: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    """Gates one and nothing give one of them; written again they are the same."""
    folders = [tmp_path / "a", tmp_path / "b"]
    want = [
        logits(written(tiny_llama, THEIRS[kind][0], folder, seed))
        for seed, folder in enumerate(folders)
    ]
    router = {"kind": "adapter", "adapters": ["a", "b"]}
    ours: Any = molora.import_peft(tiny_llama(), folders, router=router)
    for name, logit in zip("ab", want, strict=True):
        with molora.tasks(ours, [name, name]):
            assert (logits(ours) - logit).abs().max() < 1e-6 * logit.abs().max()
    ours = ours.float()
    back = molora.export_peft_experts(ours, tmp_path / "out")
    for folder, new in zip(folders, back, strict=True):
        was, now = (load_file(f / "adapter_model.safetensors") for f in (folder, new))
        assert was.keys() == now.keys()
        assert all(torch.allclose(now[key], was[key], atol=1e-7) for key in was)
    again = molora.import_peft(tiny_llama(), back, router=tmp_path / "out")
    for name, parameter in adapter_parameters(again).items():
        torch.testing.assert_close(parameter, adapter_parameters(ours)[name])


LINEAR = [n for n in OURS if EXPERTS[n].linear]


@pytest.mark.parametrize("kind", LINEAR)
def test_a_lora_of_a_chosen_rank_is_the_nearest(
    kind: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    """Its product is the truncated SVD of the merged update, its error that of it."""
    ours = wrapped(tiny_llama(), kind)
    report = molora.export_peft(ours, tmp_path / "out", rank=3)
    assert report.peft_type == "LORA" and report.errors.keys() == sites(ours).keys()
    assert report.worst == max(report.errors.values())
    theirs = in_peft(tiny_llama, tmp_path / "out")
    merged = molora.merge(ours)
    for path, site in sites(merged).items():
        base = site.base_weight().double()
        update = site.base.weight.detach().double() - base  # type: ignore
        u, s, vt = torch.linalg.svd(update)
        nearest = u[:, :3] * s[:3] @ vt[:3]
        layer: Any = theirs.base_model.model.get_submodule(path)
        got = layer.get_delta_weight("default").detach().double()
        assert (got - nearest).abs().max() < 1e-5
        error = float((got - update).norm() / update.norm().clamp(min=1e-30))
        assert report.errors[path] == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("kind", LINEAR)
def test_a_lora_of_enough_rank_is_exact(
    kind: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    ours = wrapped(tiny_llama(), kind)
    assert molora.export_peft(ours, tmp_path / "out", rank=40).worst < 1e-6
    got, want = logits(in_peft(tiny_llama, tmp_path / "out")), logits(ours)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_a_changed_bias_becomes_that_of_lora_b(
    tiny_gpt2: Factory, tmp_path: Path
) -> None:
    def make() -> Any:
        model = tiny_gpt2()
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.5, generator=generator)
        return model

    ours = wrapped(make(), "ia3", target_modules=["c_attn", "c_fc"], overrides=[])
    molora.export_peft(ours, tmp_path / "own")
    molora.export_peft(ours, tmp_path / "lora", rank=32)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_bias"] is True and config["fan_in_fan_out"] is True
    want = logits(ours)
    for name in ("own", "lora"):
        got = logits(in_peft(make, tmp_path / name))
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


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


def test_ranks_that_adalora_cut_off(tiny_llama: Factory, tmp_path: Path) -> None:
    """PEFT leaves them out of its file; here they are zeros, and the scale stays."""
    theirs: Any = get_peft_model(tiny_llama(), THEIRS["adalora"][0])
    values(theirs)
    kept, pattern = [True, False, True, True, False], {}
    for name, parameter in theirs.base_model.model.named_parameters():
        if "lora_E" in name:
            parameter.data[[1, 4]] = 0
            pattern[name.removesuffix(".default")] = kept
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {len(v) for k, v in stored.items() if "lora_A" in k} == {3}
    want = logits(theirs)
    ours = molora.import_peft(tiny_llama(), [tmp_path / "theirs"])
    molora.export_peft(ours, tmp_path / "ours")
    back = logits(in_peft(tiny_llama, tmp_path / "ours"))
    bound = 1e-6 * want.abs().max()
    assert (logits(ours) - want).abs().max() < bound
    assert (back - want).abs().max() < bound


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
        (right | {first.replace("0", "7"): other[1]}, "no linear layer"),
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


def test_plain_lora_keeps_its_own_way(tiny_llama: Factory, tmp_path: Path) -> None:
    """Without hooks: factors of one rank, and truncated on request."""
    raw = {"target_modules": TARGETS, "experts": {"kind": "lora", "r": 6}}
    ours: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    values(ours)
    assert all(isinstance(s.experts, LoRAExperts) for s in sites(ours).values())
    assert molora.export_peft(ours, tmp_path / "own").worst == 0
    assert molora.export_peft(ours, tmp_path / "wide", rank=8).worst == 0
    cut = molora.export_peft(ours, tmp_path / "cut", rank=2)
    for path, site in sites(ours).items():
        s = torch.linalg.svdvals(site.delta_weight().double())
        error = float((s[2:].square().sum() / s.square().sum()).sqrt())
        assert cut.errors[path] == pytest.approx(error, rel=1e-5) and error > 0.1
    want = logits(ours)
    for name in ("own", "wide"):
        got = logits(in_peft(tiny_llama, tmp_path / name))
        assert (got - want).abs().max() < 1e-5


def test_a_start_from_the_base_goes_with_the_export(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    """PiSSA's frozen term is in the factors, which PEFT puts on the same base."""
    experts = {"kind": "lora", "r": 4, "init_lora_weights": "pissa"}
    raw = {"target_modules": TARGETS, "experts": experts}
    ours: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    values(ours)
    molora.export_peft(ours, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 8 and "init_lora_weights" not in config
    got, want = logits(in_peft(tiny_llama, tmp_path / "out")), logits(ours)
    assert (got - want).abs().max() < 1e-5
    again = molora.import_peft(tiny_llama(), [tmp_path / "out"])
    assert (logits(again) - want).abs().max() < 1e-5
