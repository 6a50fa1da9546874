"""configs/batched_adapters.yaml on a tiny base: train, then each adapter to PEFT."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

import molora
from molora.cli import main
from molora.config import AdapterConfig
from molora.model import sites

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "batched_adapters.yaml"


@pytest.fixture
def base(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A Llama for the bytes that the tokenizer knows."""
    folder = tmp_path / "base"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_file_trains_four_adapters_that_peft_loads(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = [f"model.name={base}", f"training.output_dir={out}"]
    for task in range(4):
        settings += [f"data.tasks.{task}.{n}=8" for n in ("limit", "eval_limit")]
    settings += [f"data.tasks.{task}.max_new_tokens=2" for task in (2, 3)]
    settings += ["data.max_length=900", "training.max_steps=3"]
    settings += ["training.warmup_steps=0", "training.report_to=none"]
    with pytest.raises(SystemExit) as stop:
        main(["train", str(CONFIG), *settings])
    assert stop.value.code == 0
    model = molora.load(
        AutoModelForCausalLM.from_pretrained(base), out / "adapter"
    ).eval()
    for site in sites(model).values():
        trained = site.experts.Bt.detach().abs().amax((1, 2))  # type: ignore
        assert (trained > 0).all() and len(set(trained.tolist())) == 4
    names = AdapterConfig.from_yaml(CONFIG).router.adapters  # type: ignore
    folders = molora.export_peft_experts(model, tmp_path / "peft")
    ids = torch.arange(2, 50).view(4, 12)
    with torch.no_grad(), molora.tasks(model.double(), names):
        logits = model(ids).logits
    for e, folder in enumerate(folders):
        plain = AutoModelForCausalLM.from_pretrained(base)
        theirs = PeftModel.from_pretrained(plain, folder).double().eval()
        with torch.no_grad():
            want = theirs(ids[e : e + 1]).logits[0]
        assert (logits[e] - want).abs().max() < 1e-10
        with torch.no_grad(), molora.disabled(model):
            assert (model(ids[e : e + 1]).logits[0] - want).abs().max() > 1e-4
