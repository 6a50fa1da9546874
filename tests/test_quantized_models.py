"""Quantised bases from loading to merging: files, both trainers, generation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import molora
from molora import quantized
from molora.base_models import load_base
from molora.checkpoint import load_adapter_state
from molora.errors import CheckpointError, ConfigError, WrapError
from molora.fingerprint import differences, fingerprint
from molora.manifest import write_json, write_manifest
from molora.model import adapter_parameters, is_wrapped, sites
from molora.quantized import bits_of, dequantised
from molora.run_config import ModelSettings, load_run_config
from molora.saved import read_adapter
from molora.training import MoloraTrainer
from tests.bits import MIXTURE, SINGLE, quantise, wrapped

Factory = Callable[..., Any]
IDS = torch.arange(1, 25).view(2, 12)
KINDS = {"nf4": 4, "int8": 8}
QLORA = Path(__file__).parent.parent / "configs" / "qlora.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Factory) -> str:
    """A tiny model and its tokenizer as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("base")
    words = Tokenizer(WordLevel({"the": 0, "[unk]": 1}, unk_token="[unk]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[unk]")
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    tiny_llama(seed=3, **shape).save_pretrained(folder)
    return str(folder)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_quantised_while_it_loads(folder: str, kind: str, dtype: str) -> None:
    model, _ = load_base(folder, dtype, "cpu", kind)
    plain, _ = load_base(folder, dtype)
    want = {"auto": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    layers = {p: m for p, m in model.named_modules() if bits_of(m) is not None}
    assert len(layers) == 7 and type(model.lm_head) is nn.Linear
    assert (model.dtype, model.name_or_path, model.training) == (want, folder, False)
    twins = dict(plain.named_modules())
    for path, layer in layers.items():
        assert bits_of(layer) == KINDS[kind]
        far = quantized.relative(dequantised(layer), twins[path].weight)
        # 16 levels cost about 9 percent, 255 levels half a percent
        assert (0.08 < far < 0.1) if kind == "nf4" else (0.003 < far < 0.02)
        if kind == "nf4":
            state: Any = layer.weight.quant_state
            assert (state.quant_type, state.blocksize, state.nested) == (
                "nf4",
                64,
                True,
            )
            assert layer.compute_dtype == want
            assert not layer.support_avx512bf16_for_cpu
    assert logits(model).dtype == want


def test_wrong_quantisation_is_told(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"'nf44'.*Did you mean 'nf4'.*none, nf4, int8"
    ):
        load_base(folder, quantization="nf44")
    with pytest.raises(ConfigError, match="quantization: .*'none', 'nf4' or 'int8'"):
        ModelSettings.from_dict({"quantization": "nf44"})
    model, tokenizer = load_base(folder, quantization="nf4")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is quantised already; leave .* 'nf4' out"):
        load_base(str(tmp_path), quantization="nf4")
    again, _ = load_base(str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    assert not again.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*'molora\[quantized\]'"):
        load_base(folder, quantization="int8")
    monkeypatch.setattr("molora.run_config.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"training\.optim: 'paged_adamw_32bit' needs"
    ):
        load_run_config(QLORA)
    config = load_run_config(QLORA, ["training.optim=adamw_torch"])
    assert config.training["optim"] == "adamw_torch"


def test_an_adapter_goes_with_its_base_in_every_quantisation(
    folder: str, tmp_path: Path, tiny_llama: Factory
) -> None:
    for saved in ("nf4", "none"):
        model = wrapped(load_base(folder, quantization=saved)[0], MIXTURE)
        model.save_pretrained(tmp_path / saved)
        mine = adapter_parameters(model)
        for loaded in ("none", "nf4", "int8"):
            base, _ = load_base(folder, quantization=loaded)
            theirs = adapter_parameters(molora.load(base, tmp_path / saved))
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
            if loaded == saved:
                assert torch.equal(logits(base), logits(model))
    # files of before say nothing about the embedding
    told = fingerprint(model, {"x": torch.empty(2, 2, device="meta")})
    older = told.model_copy(update={"embedding": None})
    assert differences(told, told) == []
    assert "did not note the input embedding" in differences(older, told)[0]
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    other = quantise(tiny_llama(seed=4, **shape), "nf4")
    for saved in ("nf4", "none"):
        with pytest.raises(CheckpointError, match="the input embedding is another one"):
            molora.load(other, tmp_path / saved)
        assert not is_wrapped(other)
    assert molora.load(other, tmp_path / "nf4", allow_base_mismatch=True) is other


@pytest.mark.parametrize("kind", KINDS)
def test_merging_asks_onto_which_weights_and_tells_the_cost(
    folder: str, kind: str
) -> None:
    model = wrapped(load_base(folder, quantization=kind)[0])
    plain, _ = load_base(folder)
    held = {path: site.base for path, site in sites(model).items()}
    bytes_before = {path: layer.weight.clone() for path, layer in held.items()}
    before = logits(model)
    told = "base='dequantised'.*base='original'.*"
    with pytest.raises(WrapError, match=told + "say which"):
        molora.merge(model)
    with pytest.raises(WrapError, match=told + "'dequantized' is neither"):
        molora.merge(model, base="dequantized")
    with pytest.raises(WrapError, match=r"needs the weights before.*load_base\(name\)"):
        molora.merge(model, base="original")
    assert not any(site.merged for site in sites(model).values())
    deltas = {path: site.delta_weight() for path, site in sites(model).items()}
    for base in ("dequantised", "original"):
        molora.merge(model, base=base, original=plain)
        costs = molora.merge_costs(model)
        assert costs.keys() == held.keys()
        for path, site in sites(model).items():
            assert type(site.base) is nn.Linear and site.merged
            rounded, exact = dequantised(held[path]), plain.get_submodule(path).weight
            start = rounded if base == "dequantised" else exact
            want = start.double() + deltas[path].double()
            torch.testing.assert_close(
                site.base.weight.double(), want, rtol=0, atol=1e-6
            )
            apart = float((rounded - exact.detach()).norm())
            for name, cost in costs[path]._asdict().items():
                reference = {"dequantised": rounded, "original": exact}[name]
                near = (reference.detach() + deltas[path]).norm()
                expected = 0.0 if name == base else apart / float(near)
                assert cost == pytest.approx(expected, abs=1e-6, rel=1e-4)
        slack = {"dequantised": 0.02 if kind == "int8" else 1e-5, "original": 0.3}[base]
        assert quantized.relative(logits(model), before) < slack
        molora.unmerge(model)
        assert torch.equal(logits(model), before)
        for path, site in sites(model).items():
            assert site.base is held[path]
            assert torch.equal(site.base.weight, bytes_before[path])
        assert molora.merge_costs(model) == {}
    with pytest.raises(WrapError, match="base='original' is a choice for quantised"):
        molora.merge(wrapped(plain), base="original")


def test_merging_onto_the_original_is_loading_onto_it(
    folder: str, tmp_path: Path
) -> None:
    model = wrapped(load_base(folder, quantization="nf4")[0])
    model.save_pretrained(tmp_path)
    molora.merge(model, base="original", original=load_base(folder)[0])
    there = molora.load(load_base(folder)[0], tmp_path)
    for base in (None, "dequantised"):
        with pytest.raises(WrapError, match=r"trained on a quantised.*'original'"):
            molora.merge(there, base)
    with pytest.raises(WrapError, match="original is not read where the base is not"):
        molora.merge(there, "original", load_base(folder)[0])
    molora.merge(there, "original")
    # resuming notes it as well
    resumed = wrapped(load_base(folder)[0])
    load_adapter_state(resumed, tmp_path)
    with pytest.raises(WrapError, match=r"trained on a quantised.*'original'"):
        molora.merge(resumed)
    torch.testing.assert_close(logits(model), logits(there), rtol=1e-5, atol=1e-6)


def test_the_note_of_a_quantised_base_outlives_other_bases(
    folder: str, tmp_path: Path
) -> None:
    def file_of(name: str) -> Any:
        return json.loads((tmp_path / name / "adapter_config.json").read_text())

    model = wrapped(load_base(folder, quantization="nf4")[0])
    model.save_pretrained(tmp_path / "held")
    there: Any = molora.load(load_base(folder)[0], tmp_path / "held", trainable=True)
    there.save_pretrained(tmp_path / "plain")
    resumed = wrapped(load_base(folder)[0])
    load_adapter_state(resumed, tmp_path / "plain")
    resumed.save_pretrained(tmp_path / "resumed")
    again: Any = molora.load(load_base(folder)[0], tmp_path / "resumed")
    for name, noted in (("held", there), ("plain", resumed), ("resumed", again)):
        assert file_of(name)["rounded"] is True
        with pytest.raises(WrapError, match=r"trained on a quantised.*'original'"):
            molora.merge(noted)
    molora.merge(again, "original")
    # what never was on one is merged without a word
    own = wrapped(load_base(folder)[0])
    own.save_pretrained(tmp_path / "own")
    assert file_of("own")["rounded"] is False
    molora.merge(molora.load(load_base(folder)[0], tmp_path / "own"))
    # in folders without the field the base tells
    for name, told in (("held", True), ("own", False)):
        raw = file_of(name)
        del raw["rounded"]
        write_json(tmp_path / name / "adapter_config.json", raw)
        write_manifest(tmp_path / name)
        assert read_adapter(tmp_path / name).file.was_rounded is told


def test_an_original_that_is_none_is_refused(folder: str, tiny_llama: Factory) -> None:
    model = wrapped(load_base(folder, quantization="nf4")[0])
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    others = {
        "is another model": tiny_llama(seed=4, **shape),
        "no unquantised linear layer": load_base(folder, quantization="nf4")[0],
    }
    for told, other in others.items():
        with pytest.raises(WrapError, match=told):
            molora.merge(model, base="original", original=other)
        assert not any(site.merged for site in sites(model).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_and_unwrapped_model_is_ordinary(
    folder: str, tmp_path: Path, dtype: str
) -> None:
    base, _ = load_base(folder, dtype, quantization="nf4")
    # the other layers are dequantised as well
    model = wrapped(base, target_modules=["q_proj", "up_proj"])
    before = logits(model)
    molora.unmerge(molora.merge(model, base="dequantised"))
    assert sum(bits_of(module) == 4 for module in model.modules()) == 7
    assert torch.equal(logits(model), before)
    plain = molora.unwrap(molora.merge(model, base="dequantised"))
    assert all(bits_of(module) is None for module in plain.modules())
    assert {p.dtype for p in plain.parameters()} == {getattr(torch, dtype)}
    slack = 1e-5 if dtype == "float32" else 2e-2
    assert quantized.relative(logits(plain), before) < slack
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(plain))


def rows() -> Dataset:
    ids = IDS.repeat(2, 1).tolist()
    return Dataset.from_list([{"input_ids": r, "labels": r} for r in ids])


@pytest.mark.parametrize(
    ("kind", "trainer", "checkpointing"),
    [
        ("nf4", Trainer, False),
        ("nf4", MoloraTrainer, True),
        ("int8", Trainer, True),
        ("int8", MoloraTrainer, False),
    ],
)
def test_both_trainers_train_the_adapter_alone(
    folder: str, tmp_path: Path, kind: str, trainer: type[Any], checkpointing: bool
) -> None:
    model = wrapped(load_base(folder, quantization=kind)[0], MIXTURE)
    base = {p: site.base.weight.clone() for p, site in sites(model).items()}
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        label_names=["labels"],
    )
    trainer(model=model, args=arguments, train_dataset=rows()).train()
    for name, parameter in adapter_parameters(model).items():
        assert not torch.equal(parameter, before[name]), name
    assert all(torch.equal(s.base.weight, base[p]) for p, s in sites(model).items())
    files = {file.name for file in (tmp_path / "checkpoint-1").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    saved = molora.load(
        load_base(folder, quantization=kind)[0], tmp_path / "checkpoint-1"
    )
    assert torch.equal(logits(saved.eval()), logits(model.eval()))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_greedy_over_full_forwards(folder: str, kind: str) -> None:
    model = wrapped(load_base(folder, quantization=kind)[0], MIXTURE)
    ids = IDS[:1, :5]
    got = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=99,
    )
    for _ in range(4):
        with torch.no_grad():
            best = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    assert torch.equal(got, ids)


def test_paged_adamw_is_adamw(folder: str, tmp_path: Path) -> None:
    ends = []
    for optim in ("adamw_torch", "paged_adamw_32bit"):
        model = wrapped(load_base(folder, quantization="nf4")[0])
        arguments = TrainingArguments(
            output_dir=str(tmp_path / optim),
            max_steps=2,
            optim=optim,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = MoloraTrainer(model=model, args=arguments, train_dataset=rows())
        trainer.train()
        assert (type(trainer.optimizer.optimizer).__module__[:4] == "bits") == (
            optim != "adamw_torch"
        )
        ends.append([p.detach() for p in adapter_parameters(model).values()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_qlora_is_that_of_the_paper() -> None:
    config = load_run_config(QLORA)
    assert (config.model.quantization, config.model.dtype) == ("nf4", "bfloat16")
    experts: Any = config.adapter.experts
    assert (experts.r, experts.lora_alpha, experts.lora_dropout) == (64, 16, 0.1)
    assert config.adapter.target_modules == "all-linear"
    training = config.training
    assert training["optim"] == "paged_adamw_32bit"
    assert (training["learning_rate"], training["max_grad_norm"]) == (2e-4, 0.3)
    assert training["lr_scheduler_type"] == "constant"


@pytest.mark.slow
def test_the_embedded_base_in_four_bits() -> None:
    model, tokenizer = load_base(dtype="float32", quantization="nf4")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(input_ids=ids).logits
    wrapped(model, SINGLE | {"r": 8})
    assert len(sites(model)) == 210
    with torch.no_grad(), molora.disabled(model):
        assert torch.equal(model(input_ids=ids).logits, before)
        answer = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapter_parameters(model).values())
