"""X-LoRA folders as PEFT writes them: PEFT's logits and gradients, and what is refused.

Shape legend: E adapters.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import molora
from molora.errors import CheckpointError, ConfigError, WrapError
from molora.model import is_wrapped, sites

Factory = Any
IDS = torch.arange(1, 25).view(2, 12)
E = 4
FORMS: dict[str, dict[str, Any]] = {
    "one layer": {},
    # its layers are numbers 0, 3 and 6, two of which are names of adapters too
    "mlp": {"xlora_depth": 3, "xlora_size": 12, "softmax_temperature": 1.7},
    "no dropout": {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0},
    "layerwise": {"layerwise_scalings": True, "top_k_lora": 2},
    "softmax again": {"top_k_lora": 2, "enable_softmax_topk": True},
    "softmax of all again": {
        "enable_softmax_topk": True,
        "global_scaling_weight": 1.5,
        "softmax_temperature": 0.5,
    },
    # the temperature is read with enable_softmax only
    "softmax of the kept": {
        "enable_softmax": False,
        "enable_softmax_topk": True,
        "top_k_lora": 3,
        "softmax_temperature": 3.0,
    },
    "softmax of all": {
        "enable_softmax": False,
        "enable_softmax_topk": True,
        "softmax_temperature": 3.0,
    },
}


def loras(make: Factory, root: Path, targets: Any = None) -> list[Path]:
    found = []
    for e in range(E):
        own = targets[e] if targets else ["q_proj", "down_proj"]
        config = LoraConfig(r=e + 1, lora_alpha=4, target_modules=own)
        model: Any = get_peft_model(make(), config)
        g = torch.Generator().manual_seed(e)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data.normal_(0, 0.4, generator=g)
        model.save_pretrained(root / f"lora_{e}")
        found.append(root / f"lora_{e}")
    return found


def xlora(make: Factory, folders: list[Path], out: Path, **settings: Any) -> Any:
    """PEFT's model in eval mode, saved by PEFT."""
    named = {str(e): str(folder) for e, folder in enumerate(folders)}
    settings = {"task_type": "CAUSAL_LM", "hidden_size": 32, **settings}
    model: Any = get_peft_model(
        make(use_cache=False), XLoraConfig(adapters=named, **settings)
    )
    g = torch.Generator().manual_seed(9)
    for p in model.base_model.internal_xlora_classifier.parameters():
        p.data.normal_(0, 0.7, generator=g)
    model.save_pretrained(out)
    return model


def linears(model: Any) -> list[Any]:
    layers = model.base_model.internal_xlora_classifier.layers
    return [m for m in layers if isinstance(m, nn.Linear)]


def classifier(model: Any) -> Any:
    (router,) = [s.router for s in sites(model).values() if s.router is not None]
    return router


def gap(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None and b is not None
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def folders(tiny_llama: Factory, tmp_path_factory: Any) -> list[Path]:
    return loras(tiny_llama, tmp_path_factory.mktemp("loras"))


def edited(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_gradients_of_peft(
    form: str, folders: list[Path], tiny_llama: Factory, tmp_path: Path
) -> None:
    theirs = xlora(tiny_llama, folders, tmp_path / "x", **FORMS[form])
    ours: Any = molora.import_peft(tiny_llama(), [tmp_path / "x"], train="router")
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        found = [m.to(dtype).eval() for m in (theirs, ours)]
        found[0].base_model.internal_xlora_classifier.dtype = dtype
        for model in found:
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            a, b = (model(input_ids=IDS).logits for model in found)
            with molora.disabled(ours):
                assert gap(ours(IDS).logits, a) > 1e-2
        assert gap(a, b) < tol
        for mine, layer in zip(classifier(ours).layers, linears(theirs), strict=True):
            assert float(layer.weight.grad.abs().max()) > 1e-4
            assert gap(mine.weight.grad, layer.weight.grad) < tol
            assert gap(mine.bias.grad, layer.bias.grad) < tol


def test_adapters_that_lack_layers(tiny_llama: Factory, tmp_path: Path) -> None:
    """PEFT gives them nothing to add there, and lets the gates be."""
    targets = [["q_proj"], ["q_proj", "up_proj"], ["up_proj"], ["v_proj"]]
    folders = loras(tiny_llama, tmp_path, targets)
    layerwise = {"layerwise_scalings": True}
    theirs = xlora(tiny_llama, folders, tmp_path / "x", **layerwise).double().eval()
    theirs.base_model.internal_xlora_classifier.dtype = torch.float64
    ours: Any = molora.import_peft(tiny_llama(), [tmp_path / "x"]).double().eval()
    with torch.no_grad():
        assert gap(ours(IDS).logits, theirs(input_ids=IDS).logits) < 1e-9


def test_folders_that_moved_and_the_way_back(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    folders = loras(tiny_llama, tmp_path)
    theirs = xlora(tiny_llama, folders, tmp_path / "x")
    with torch.no_grad():
        want = theirs(input_ids=IDS).logits
    moved = [f.rename(tmp_path / f"moved_{i}") for i, f in enumerate(folders)]
    base: Any = tiny_llama()
    with pytest.raises(CheckpointError, match=r"lora_0, which is no folder here"):
        molora.import_peft(base, [tmp_path / "x"])
    assert not is_wrapped(base)
    ours: Any = molora.import_peft(base, moved, router=tmp_path / "x").eval()
    ours.save_pretrained(tmp_path / "ours")
    again: Any = molora.load(tiny_llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        assert gap(ours(IDS).logits, want) < 1e-5
        assert torch.equal(again(IDS).logits, ours(IDS).logits)
    with pytest.raises(CheckpointError, match="among 4 LoRAs, and 3 were given"):
        molora.import_peft(tiny_llama(), moved[:3], router=tmp_path / "x")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "first pass": ({"scaling_pass_value": 0.5}, "scaling_pass_value=0.5: the first"),
    "logits": ({"enable_softmax": False}, "gates would be plain logits"),
    "trained on": ({"use_trainable_adapters": True}, "are from before"),
    "unknown": ({"use_magic": True}, "use_magic=True: molora does not know"),
    "base": ({"base_model_name_or_path": "other"}, "different bases"),
    "width": ({"hidden_size": 64}, "hidden_size is 64, .* has 32 features"),
    "names": ({"adapters": {"a": "x", "b": "y"}}, r"named \['a', 'b'\]"),
    "no names": ({"adapters": None}, "names no LoRA"),
    "top": ({"top_k_lora": 0}, "top_k: "),
    "depth": ({"xlora_depth": "deep"}, "depth: "),
    "layers": ({"layerwise_scalings": True}, r"shape \(4, 32\), not \(16, 32\)"),
    "deeper": ({"xlora_depth": 2}, "layer 0 of the classifier has the shape"),
}


@pytest.fixture(scope="module")
def saved(folders: list[Path], tiny_llama: Factory, tmp_path_factory: Any) -> Any:
    """Fields of a folder's config, and its classifier, whole."""
    root = tmp_path_factory.mktemp("saved")
    model = xlora(tiny_llama, folders, root / "x")
    tensors = {n: v for n, v in model.state_dict().items() if "xlora_classifier" in n}
    return json.loads((root / "x" / "adapter_config.json").read_text()), tensors


def folder_of(saved: Any, folder: Path) -> Path:
    folder.mkdir()
    config, tensors = saved
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read(
    case: str, saved: Any, tiny_llama: Factory, tmp_path: Path
) -> None:
    changes, told = REFUSED[case]
    folder = edited(folder_of(saved, tmp_path / "x"), **changes)
    base = tiny_llama(name_or_path="base")
    before = {n: p.clone() for n, p in base.named_parameters()}
    with pytest.raises((CheckpointError, ConfigError), match=told):
        molora.import_peft(base, [folder])
    assert not is_wrapped(base)
    for name, values in base.named_parameters():
        assert torch.equal(values, before[name])


def test_damaged_classifiers(saved: Any, tiny_llama: Factory, tmp_path: Path) -> None:
    x = folder_of(saved, tmp_path / "x")
    file = x / "adapter_model.safetensors"
    whole = load_file(file)
    name = "base_model.internal_xlora_classifier.layers.0.weight"
    for changed, told in (
        ({name: whole[name].double()}, "is torch.float64"),
        ({name: whole[name] * torch.nan}, "NaN or infinity"),
        ({}, "lacks weight of layer 0 .* peft_model.state_dict"),
    ):
        save_file({n: v for n, v in whole.items() if n != name} | changed, file)
        with pytest.raises(CheckpointError, match=told):
            molora.import_peft(tiny_llama(), [x])
    file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        molora.import_peft(tiny_llama(), [x])
    file.unlink()
    with pytest.raises(CheckpointError, match="a pickle"):
        molora.import_peft(tiny_llama(), [x])


def test_what_means_nothing(saved: Any, tiny_llama: Factory, tmp_path: Path) -> None:
    x = folder_of(saved, tmp_path / "x")
    lora = Path(saved[0]["adapters"]["0"])
    with pytest.raises(CheckpointError, match="an X-LoRA folder is a whole mixture"):
        molora.import_peft(tiny_llama(), [x, lora])
    with pytest.raises(ConfigError, match="whose router is its own classifier"):
        molora.import_peft(tiny_llama(), [x], router={"kind": "soft"})
    with pytest.raises(WrapError, match="wrapped already"):
        molora.import_peft(molora.import_peft(tiny_llama(), [x]), [x])
