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
from peft import get_peft_model
from safetensors.torch import load_file

import molora
from molora.commands import deploy, session
from molora.experts import EXPERTS, LoRAExperts
from molora.model import adapter_parameters, sites
from tests.peft_families import (
    OURS,
    TARGETS,
    THEIRS,
    Factory,
    in_peft,
    logits,
    values,
    wrapped,
    written,
)

CASES = [(kind, n) for kind, configs in THEIRS.items() for n in range(len(configs))]


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


def test_several_boft_factors_say_what_peft_needs(
    tiny_llama: Factory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def export(m: int) -> str:
        experts = {"kind": "boft", "boft_n_butterfly_factor": m}
        ours = wrapped(tiny_llama(), "boft", experts=experts)
        monkeypatch.setattr(session, "trained", lambda *_: (ours, None))
        deploy.export(None, tmp_path / "own", tmp_path / str(m))  # type: ignore
        notes = molora.export_peft(ours, tmp_path / str(m)).notes
        told = capsys.readouterr().err
        assert all(note in told for note in notes) and len(notes) == m - 1
        return told

    assert "CUDA" not in export(1)
    assert "boft_n_butterfly_factor=2 only where its CUDA" in export(2)
    # where it is not built
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*boft_R"):
        in_peft(tiny_llama, tmp_path / "2")
