"""Many PEFT LoRAs in one batch: each row against PEFT with that adapter alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import molora
from molora.errors import CheckpointError
from molora.model import adapter_parameters, sites

Factory = Any
NAMES = ["poet", "coder", "judge"]
ROUTER = {"kind": "adapter", "adapters": NAMES}
ROWS = ["coder", "base", "judge", "poet", "coder"]
# ranks, alphas, rsLoRA, patterns and target layers that all differ
ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]},
    {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
    },
    {
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {r"layers\.1\.mlp\.down_proj": 6},
        "target_modules": ["down_proj"],
        "layers_to_transform": [1],
    },
]


@pytest.fixture
def folders(tiny_llama: Factory, tmp_path: Path) -> list[Path]:
    written = []
    for number, settings in enumerate(ADAPTERS):
        theirs: Any = get_peft_model(tiny_llama(), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(number)
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.3, generator=generator)
        written.append(tmp_path / f"lora_{number}")
        theirs.save_pretrained(written[-1])
    return written


def alone(make: Factory, folders: list[Path]) -> dict[str, Any]:
    models = {"base": make().double()}
    for name, folder in zip(NAMES, folders, strict=True):
        models[name] = PeftModel.from_pretrained(make(), folder).double().eval()
    return models


def prompts() -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 128, (n,), generator=generator) for n in (7, 3, 5, 6, 4)]
    ids = torch.stack([torch.nn.functional.pad(r, (7 - len(r), 0)) for r in rows])
    return rows, {"input_ids": ids, "attention_mask": (ids > 0).long()}


@torch.no_grad()
def test_a_mixed_batch_is_each_adapter_alone(
    tiny_llama: Factory, folders: list[Path]
) -> None:
    ours: Any = molora.import_peft(
        tiny_llama(), folders, router=ROUTER, train="router"
    ).double()
    assert not any(p.requires_grad for p in ours.parameters())
    theirs = alone(tiny_llama, folders)
    rows, batch = prompts()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with molora.tasks(ours, ROWS):
        logits = ours(**batch, position_ids=positions).logits
    outputs = []
    for i, (row, name) in enumerate(zip(rows, ROWS, strict=True)):
        want = theirs[name](input_ids=row[None]).logits[0]
        assert (logits[i, 7 - len(row) :] - want).abs().max() < 1e-10, name
        outputs.append(want[-1])
        plain = theirs["base"](input_ids=row[None]).logits[0]
        assert torch.equal(want, plain) == (name == "base")


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_mixed_generation_is_each_adapter_alone(
    beams: int, tiny_llama: Factory, folders: list[Path]
) -> None:
    ours: Any = molora.import_peft(tiny_llama(), folders, router=ROUTER).double()
    theirs = alone(tiny_llama, folders)
    rows, batch = prompts()
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "num_beams": beams,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with molora.tasks(ours, ROWS):
        found = ours.generate(**batch, **settings)
    for i, (row, name) in enumerate(zip(rows, ROWS, strict=True)):
        want = theirs[name].generate(input_ids=row[None], **settings)
        assert torch.equal(found.sequences[i, 7:], want.sequences[0, len(row) :]), name
        for ours_V, theirs_V in zip(found.logits, want.logits, strict=True):
            mine_V = ours_V[i * beams : (i + 1) * beams]
            assert (mine_V - theirs_V).abs().max() < 1e-10, name
    assert len({tuple(row.tolist()) for row in found.sequences[:, 7:]}) > 1


def test_adapters_that_lack_a_layer_lack_it_after_training_and_export(
    tiny_llama: Factory, folders: list[Path], tmp_path: Path
) -> None:
    model: Any = molora.import_peft(tiny_llama(), folders, router=ROUTER).train()
    ids = torch.arange(3, 33).view(3, 10)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    with molora.tasks(model, NAMES):
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in adapter_parameters(model).items():
        assert not torch.equal(parameter, before[name])
    back = molora.export_peft_experts(model.eval(), tmp_path / "back")
    for old, new in zip(folders, back, strict=True):
        was, now = (load_file(f / "adapter_model.safetensors") for f in (old, new))
        assert {k: v.shape for k, v in was.items()} == {
            k: v.shape for k, v in now.items()
        }
    theirs = alone(tiny_llama, back)
    again: Any = molora.import_peft(tiny_llama(), back, router=tmp_path / "back")
    model.save_pretrained(tmp_path / "ours")
    loaded: Any = molora.load(tiny_llama(), tmp_path / "ours")
    with torch.no_grad():
        for same in (model, again, loaded):
            with molora.tasks(same, NAMES):
                logits = same.double()(ids).logits
            for i, name in enumerate(NAMES):
                want = theirs[name](ids[i : i + 1]).logits[0]
                assert (logits[i] - want).abs().max() < 1e-10, name


def test_other_routers_want_the_same_layers(
    tiny_llama: Factory, folders: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="different target layers.*kind adapter"):
        molora.import_peft(tiny_llama(), folders, router={"kind": "soft"})
    with pytest.raises(CheckpointError, match="general adapters and experts need the"):
        molora.import_peft(tiny_llama(), folders, router=ROUTER, general=folders[:1])
    model: Any = molora.import_peft(tiny_llama(), folders, router=ROUTER)
    with torch.no_grad():
        for site in sites(model).values():
            site.experts.A[2] = 0
            site.experts.Bt[2] = 0
    with pytest.raises(molora.errors.WrapError, match="expert 2 is zero"):
        molora.export_peft_experts(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
