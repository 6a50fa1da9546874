"""PEFT LoRAs as experts: each against PEFT's forward, training, round trip, errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import molora
from molora.context import ForwardContext
from molora.errors import CheckpointError, ConfigError, WrapError
from molora.model import adapter_parameters, is_wrapped, sites
from molora.routers import Routing
from molora.routers.base import AbstractRouter, RouterConfig

Factory = Any
IDS = torch.arange(1, 25).view(2, 12)
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
# ranks, alphas, rsLoRA and patterns that all differ
ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 12},
    {"r": 3, "lora_alpha": 5, "use_rslora": True, "lora_dropout": 0.1},
    {"r": 2, "lora_alpha": 2, "rank_pattern": {"PATH": 6}, "alpha_pattern": {"0": 9}},
]


@pytest.fixture
def make(tiny_llama: Factory, tiny_gpt2: Factory) -> Any:
    return lambda kind="llama": {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]()


def write(model: PreTrainedModel, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A LoRA with random factors, saved by PEFT."""
    theirs: Any = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    theirs.save_pretrained(folder)
    return folder


def adapters(make: Any, root: Path, kind: str = "llama") -> list[Path]:
    path = {"llama": r"layers\.1\.mlp\.down_proj", "gpt2": r"h\.1\.mlp\.c_proj"}[kind]
    alpha = {"llama": r"layers\.0\.self_attn\.q_proj", "gpt2": r"h\.0\.attn\.c_attn"}
    folders = []
    for number, settings in enumerate(ADAPTERS):
        settings = dict(settings)
        if "rank_pattern" in settings:
            settings["rank_pattern"] = {path: 6}
            settings["alpha_pattern"] = {alpha[kind]: 9}
        folder = root / f"lora_{number}"
        settings |= {"target_modules": TARGETS[kind]}
        settings["fan_in_fan_out"] = kind == "gpt2"
        folders.append(write(make(kind), folder, number, **settings))
    return folders


def logits(model: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.to(dtype)(IDS).logits
    return out


class Only(AbstractRouter):
    """A router that gives every token to one expert."""

    def __init__(self, expert: int, experts: int):
        super().__init__(
            RouterConfig(kind="soft"),
            in_features=1,
            num_experts=experts,
            site="",
            generator=torch.Generator(),
        )
        self.expert, self.experts = expert, experts

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        gates = x.new_zeros(len(x), self.experts)
        gates[:, self.expert] = 1
        return Routing(gates, gates, gates, None)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_expert_is_what_peft_computes(
    kind: str, make: Any, tmp_path: Path
) -> None:
    folders = adapters(make, tmp_path, kind)
    ours: Any = molora.import_peft(make(kind), folders, router={"kind": "soft"})
    for site in sites(ours).values():
        assert site.experts.num_experts == 3
    plain = logits(make(kind))
    for number, folder in enumerate(folders):
        for site in sites(ours).values():
            site.router = Only(number, 3)  # type: ignore
        theirs = PeftModel.from_pretrained(make(kind), folder).eval()
        want = logits(theirs)
        assert (logits(ours) - want).abs().max() < 1e-9
        assert (want - plain).abs().max() > 1e-2


def test_a_mixture_is_the_gated_sum_of_peft_layers(make: Any, tmp_path: Path) -> None:
    folders = adapters(make, tmp_path)
    ours: Any = molora.import_peft(make(), folders, router={"kind": "soft"}).double()
    path = "model.layers.1.mlp.down_proj"
    site: Any = sites(ours)[path]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).double()
    gates = site.router(x, ForwardContext()).gates.double()
    want = site.base(x)
    for number, folder in enumerate(folders):
        theirs: Any = PeftModel.from_pretrained(make(), folder).double().eval()
        layer = theirs.base_model.model.get_submodule(path)
        want = want + gates[:, number, None] * (layer(x) - layer.base_layer(x))
    assert (site(x) - want).abs().max() < 1e-9
    assert site.experts.ranks == [4, 3, 6]


def test_one_folder_is_an_ordinary_adapter(make: Any, tmp_path: Path) -> None:
    folder = adapters(make, tmp_path)[1]
    ours = molora.import_peft(make(), [folder])
    theirs = PeftModel.from_pretrained(make(), folder).eval()
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-9


def test_adapters_of_some_layers_leave_the_others(make: Any, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    folders = [write(make(), tmp_path / str(n), n, **settings) for n in range(2)]
    ours = molora.import_peft(make(), folders, router={"kind": "soft"})
    assert list(sites(ours)) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_the_layer_decides_is_not_read_from_the_config(
    kind: str, make: Any, tmp_path: Path
) -> None:
    folder = adapters(make, tmp_path, kind)[1]
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"fan_in_fan_out": kind == "llama"}))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        theirs = PeftModel.from_pretrained(make(kind), folder).eval()
    assert (
        logits(molora.import_peft(make(kind), [folder])) - logits(theirs)
    ).abs().max() < 1e-9


@pytest.mark.parametrize("train", ["router", "all"])
def test_training_the_routers_alone_or_everything(
    train: Any, make: Any, tmp_path: Path
) -> None:
    folders = adapters(make, tmp_path)
    router = {"kind": "topk", "top_k": 2}
    model: Any = molora.import_peft(make(), folders, router=router, train=train).train()
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in adapter_parameters(model).items():
        same = torch.equal(parameter, before[name])
        assert same == (train == "router" and ".experts." in name), name
    model.save_pretrained(tmp_path / "out")
    again = molora.load(make(), tmp_path / "out", trainable=True)
    for name, parameter in adapter_parameters(again).items():
        expected = train == "all" or ".router." in name
        assert parameter.requires_grad == expected, name
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_round_trip(kind: str, make: Any, tmp_path: Path) -> None:
    folders = adapters(make, tmp_path, kind)
    router = {"kind": "topk", "top_k": 2, "temperature": 0.5}
    model = molora.import_peft(make(kind), folders, router=router, seed=3)
    back = molora.export_peft_experts(model, tmp_path / "back")
    for old, new in zip(folders, back, strict=True):
        was, now = (load_file(f / "adapter_model.safetensors") for f in (old, new))
        assert was.keys() == now.keys()
        assert all(torch.equal(was[key], now[key]) for key in was)
        theirs = [PeftModel.from_pretrained(make(kind), f).eval() for f in (old, new)]
        assert (logits(theirs[0]) - logits(theirs[1])).abs().max() < 1e-12
    again = molora.import_peft(make(kind), back, router=tmp_path / "back", seed=9)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, adapter_parameters(again)[name]), name
    assert (logits(again) - logits(model)).abs().max() < 1e-12


class Tails(nn.Module):
    """Layers whose path ends as that of another does; a dot is no other letter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.b2xfc = nn.Linear(8, 8), nn.Linear(8, 8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.b2 = nn.ModuleDict({"fc": nn.Linear(8, 8)})

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = self.block["fc"](self.fc(inputs_embeds))
        out: Tensor = self.b2xfc(self.b2["fc"](x))
        return out


@pytest.mark.parametrize("odd", ["fc", "b2.fc"])
def test_own_ranks_and_alphas_are_of_one_layer_alone(odd: str, tmp_path: Path) -> None:
    raw = {
        "target_modules": ["fc", "b2xfc"],
        "experts": {"kind": "lora", "num_experts": 2, "r": 2, "lora_alpha": 4},
        "router": {"kind": "adapter", "adapters": ["a", "b"]},
        "overrides": [
            {
                "match": f"^{re.escape(odd)}$",
                "experts": {"r": 3, "lora_alpha": 60},
            }
        ],
    }
    model = molora.wrap(Tails(), molora.AdapterConfig.from_dict(raw))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in sites(model).values():
            site.experts.Bt.normal_(0, 0.3, generator=generator)
    folders = molora.export_peft_experts(model, tmp_path / "out")
    again = molora.import_peft(Tails(), folders, router=tmp_path / "out")
    x = torch.randn(2, 5, 8, generator=generator)
    for e, name in enumerate("ab"):
        with molora.tasks(model, [name, name]):
            want = model(x)
        with molora.tasks(again, [name, name]):
            assert torch.equal(again(x), want)
        theirs: Any = PeftModel.from_pretrained(Tails(), folders[e])
        torch.testing.assert_close(theirs(x), want)
    assert sites(again)[odd].experts.ranks == [3, 3]


def test_exports_that_cannot_be(make: Any, tmp_path: Path) -> None:
    raw: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "experts": {"kind": "lora", "num_experts": 3, "r": 2},
        "router": {"kind": "soft"},
        "overrides": [{"match": "0", "experts": {"num_experts": 2}}],
    }
    uneven = molora.wrap(make(), molora.AdapterConfig.from_dict(raw))
    with pytest.raises(WrapError, match=r"\[2, 3\] experts.*save_pretrained"):
        molora.export_peft_experts(uneven, tmp_path / "out")
    raw["overrides"] = [{"match": "1", "experts": {"kind": "ia3"}}]
    mixed = molora.wrap(make(), molora.AdapterConfig.from_dict(raw))
    with pytest.raises(WrapError, match=r"layers\.1.*hold IA3Experts beside the other"):
        molora.export_peft_experts(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


VARIANTS: list[tuple[dict[str, Any], str]] = [
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "bias='all'"),
    ({"lora_bias": True}, "lora_bias"),
    ({"alora_invocation_tokens": [3]}, "from these tokens of a prompt on"),
    ({"target_parameters": ["experts"]}, "no linear layer"),
    ({"trainable_token_indices": [3]}, "rows of the embedding"),
    ({"layers_to_transform": [1]}, r"tensors of model.layers.0.*q_proj, which its con"),
    ({"exclude_modules": ["0.self_attn.q_proj"]}, r"tensors of model.layers.0"),
    ({"target_modules": ["q_proj", "v_proj"]}, r"no tensors of .*0.*v_proj, which"),
    ({"target_modules": ".*[qv]_proj"}, r"no tensors of .*0.*v_proj, which"),
    ({"target_modules": "("}, r"a/adapter_config.json: .*no regular expression"),
    ({"init_lora_weights": "pissa"}, "changed the base weight"),
    ({"use_something_new": True}, "use_something_new=True: this is no plain LoRA"),
    ({"peft_type": "POLY"}, "peft_type is 'POLY'"),
    ({"r": 5}, "has rank 4, but adapter_config.json says 5"),
    ({"lora_alpha": None}, r"a/adapter_config.json: lora_alpha is None"),
    ({"lora_alpha": 0}, r"a/adapter_config.json: lora_alpha is 0, .*above 0"),
    ({"lora_alpha": float("nan")}, r"a/adapter_config.json: lora_alpha is nan"),
    ({"alpha_pattern": {"q_proj": -1}}, r"a/.*: alpha_pattern\['q_proj'\] is -1"),
    ({"rank_pattern": {"(": 4}}, r"a/.*: rank_pattern has the key '\(', .*no regular"),
    ({"rank_pattern": ["q_proj"]}, r"a/.*: rank_pattern is \['q_proj'\]"),
]


@pytest.mark.parametrize(("change", "message"), VARIANTS)
def test_variants_are_refused(
    change: dict[str, Any], message: str, make: Any, tmp_path: Path
) -> None:
    folder = write(make(), tmp_path / "a", target_modules=["q_proj"], r=4)
    config = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = make()
    with pytest.raises(CheckpointError, match=message):
        molora.import_peft(model, [folder])
    assert not is_wrapped(model)


def test_a_dora_that_says_it_is_none_is_refused(make: Any, tmp_path: Path) -> None:
    folder = write(make(), tmp_path / "a", target_modules=["q_proj"], use_dora=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["use_dora"] = False
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="magnitude_vector"):
        molora.import_peft(make(), [folder])


def test_adapters_that_do_not_fit_each_other_or_the_model(
    make: Any, tmp_path: Path, tiny_llama: Factory
) -> None:
    one = write(make(), tmp_path / "one", target_modules=["q_proj"])
    two = write(make(), tmp_path / "two", target_modules=["k_proj"])
    soft = {"kind": "soft"}
    for folders, router, message in (
        ([], None, "at least one folder"),
        ([one, two], soft, r"different target layers.*[kq]_proj"),
        ([one, tmp_path / "no"], soft, "no such folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            molora.import_peft(make(), folders, router=router)
    with pytest.raises(ConfigError, match="cannot choose among num_experts=2"):
        molora.import_peft(make(), [one, one])
    with pytest.raises(ConfigError, match="nothing to train"):
        molora.import_peft(make(), [one], train="router")
    wider = tiny_llama(hidden_size=64)
    with pytest.raises(CheckpointError, match=r"maps 32 to 32.*in the model 64 to 64"):
        molora.import_peft(wider, [one])
    shallow = tiny_llama(num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"layers\.1.*the model lacks"):
        molora.import_peft(shallow, [one])
    tensors = load_file(one / "adapter_model.safetensors")
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, one / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lacks a factor"):
        molora.import_peft(make(), [one])
    for model in (wider, shallow):
        assert not is_wrapped(model)


def test_different_bases_are_refused_unless_forced(make: Any, tmp_path: Path) -> None:
    folders = []
    for name in ("org/first", "org/second"):
        base = make()
        base.config._name_or_path = base.name_or_path = name
        folder = tmp_path / name[4:]
        folders.append(write(base, folder, target_modules=["q_proj"]))
    soft = {"kind": "soft"}
    with pytest.raises(CheckpointError, match=r"different bases.*org/second"):
        molora.import_peft(make(), folders, router=soft)
    molora.import_peft(make(), folders, router=soft, allow_base_mismatch=True)
    model = make()
    model.config._name_or_path = "/models/second"
    with pytest.raises(CheckpointError, match="the model: /models/second"):
        molora.import_peft(model, folders[:1])
    assert is_wrapped(molora.import_peft(model, folders[1:]))


def test_a_router_file_of_others_is_refused(make: Any, tmp_path: Path) -> None:
    folders = adapters(make, tmp_path)
    model = molora.import_peft(make(), folders, router={"kind": "soft"})
    back = molora.export_peft_experts(model, tmp_path / "back")
    fresh = make()
    with pytest.raises(CheckpointError, match="another number of experts"):
        molora.import_peft(fresh, back[:2], router=tmp_path / "back")
    with pytest.raises(CheckpointError, match="no router file"):
        molora.import_peft(fresh, back, router=tmp_path)
    other = write(make(), tmp_path / "x", target_modules=["k_proj"])
    with pytest.raises(CheckpointError, match="other target layers"):
        molora.import_peft(fresh, [other] * 3, router=tmp_path / "back")
    assert not is_wrapped(fresh)


def test_newest_is_refused_because_nothing_is_newer(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train: all or router, then grow"):
        molora.import_peft(
            make(),
            adapters(make, tmp_path),
            router={"kind": "topk", "top_k": 2},
            train="newest",
        )


ROUTERS_BY_LAYER: list[dict[str, Any]] = [
    {
        "router": {"kind": "topp", "top_p": 0.5, "temperature": 2.0},
        "overrides": [
            {
                "match": "layers.1.mlp",
                "router": {"kind": "dynmole", "top_p": 0.5, "temperature": 2.0},
            }
        ],
    },
    {
        "router": {"kind": "topk", "top_k": 2},
        "balance": [{"kind": "bias", "weight": 0.1}],
    },
]


@pytest.mark.parametrize("settings", ROUTERS_BY_LAYER, ids=["two kinds", "bias"])
def test_round_trip_keeps_every_setting_and_the_bias(
    settings: dict[str, Any], make: Any, tmp_path: Path
) -> None:
    raw = {
        "target_modules": ["q_proj", "down_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        **settings,
    }
    model = molora.wrap(make(), molora.AdapterConfig.from_dict(raw))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(0, 0.4, generator=generator)
        for site in sites(model).values():
            if site.router.bias_E is not None:
                site.router.bias_E.copy_(torch.tensor([0.4, -0.4, 0.3, -0.3]))
        wanted = model.eval()(IDS).logits
    folders = molora.export_peft_experts(model, tmp_path / "mixture")
    again = molora.import_peft(
        make(),
        folders,
        router=tmp_path / "mixture",
        balance=raw.get("balance", []),
    )
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, wanted)
    before, after = sites(model), sites(again)
    for path, site in before.items():
        assert site.router.config.to_dict() == after[path].router.config.to_dict()
