"""wrap, unwrap, merge, disable: what they refuse, change, leave and restore."""

import copy
import io
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import molora
from molora.errors import WrapError
from molora.model import adapter_parameters, is_wrapped, sites

Factory = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(0))


def config(targets: Any = ("q_proj", "down_proj"), **kw: Any) -> molora.AdapterConfig:
    raw = {
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "topk"},
    }
    return molora.AdapterConfig.from_dict(raw | kw)


ONE: dict[str, Any] = {"experts": {"kind": "lora", "r": 2}, "router": {"kind": "none"}}


def randomise(model: Any) -> Any:
    g = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 1.0 if "router" in name else 0.2, generator=g)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that wrapping could change on a model."""
    return {
        "class": type(model),
        "keys": sorted(model.__dict__),
        "modules": {n: (id(m), type(m), m.training) for n, m in model.named_modules()},
        "hooks": {
            n: tuple(len(t) for k, t in vars(m).items() if "_hooks" in k and t)
            for n, m in model.named_modules()
        },
        "parameters": {
            n: (id(p), p.requires_grad, p.detach().clone())
            for n, p in model.named_parameters(remove_duplicate=False)
        },
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    values = a["parameters"].keys() == b["parameters"].keys() and all(
        p[:2] == b["parameters"][n][:2] and torch.equal(p[2], b["parameters"][n][2])
        for n, p in a["parameters"].items()
    )
    return values and all(a[k] == b[k] for k in ("class", "keys", "modules", "hooks"))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"targets": ["q_porj"]}, r"target_modules: 'q_porj' matches no .*mean 'q_proj'"),
    ({"targets": ["q_proj", "zzz"]}, "'zzz' matches no module. Layers that can host"),
    ({"targets": ["proj"]}, "'proj' matches no module"),
    ({"targets": r"model\.layer\..*"}, "matches no module path; it must match a whole"),
    ({"targets": "q_proj"}, "the expression 'q_proj' matches no module path"),
    ({"targets": ["mlp"]}, r"'model\.layers\.0\.mlp', a LlamaMLP; .*Linear, Conv1D"),
    ({"targets": ["norm"]}, "a LlamaRMSNorm"),
    ({"targets": ["rotary_emb"]}, "a LlamaRotaryEmbedding; experts can sit on"),
    (
        {"targets": r".*\.layers\.0\..*"},
        "experts can sit on Linear, Conv1D, Embedding, .*only",
    ),
    ({"exclude_modules": ["v_porj"]}, "exclude_modules: 'v_porj' matches no module"),
    ({"exclude_modules": "nothing"}, "exclude_modules: the expression 'nothing'"),
    (
        {"targets": ["q_proj"], "exclude_modules": ["q_proj"]},
        "exclude_modules leaves no target layer",
    ),
    (
        {"overrides": [{"match": r"layers\.7\.", "experts": {"r": 4}}]},
        r"overrides\[0\]\.match: 'layers.*' matches none of the 4 target layers",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_targets_that_do_not_fit_leave_the_model_untouched(
    settings: dict[str, Any], message: str, tiny_llama: Factory
) -> None:
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(WrapError, match=message):
        molora.wrap(model, config(**settings))
    assert same(snapshot(model), before)
    assert not is_wrapped(model)


def test_wrapping_twice(tiny_llama: Factory) -> None:
    model = molora.wrap(tiny_llama(), config())
    before = snapshot(model)
    with pytest.raises(WrapError, match="wrapped already; call molora.unwrap first"):
        molora.wrap(model, config())
    assert same(snapshot(model), before)
    outer = tiny_llama()
    molora.wrap(outer.model, config())
    for targets in (("k_proj",), "all-linear"):
        with pytest.raises(WrapError, match=r"'model\.layers\.0\.self_attn\.q_proj' c"):
            molora.wrap(outer, config(targets))


def test_wrapping_what_peft_has_touched(tiny_llama: Factory) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    whole = peft.get_peft_model(tiny_llama(), lora)
    with pytest.raises(WrapError, match="carries a PEFT adapter .*merge or unload it"):
        molora.wrap(whole, config())
    injected = peft.inject_adapter_in_model(lora, tiny_llama())
    with pytest.raises(WrapError, match=r"PEFT adapter \(model\.layers\.0\.self_attn"):
        molora.wrap(injected, config(("k_proj",)))
    added = tiny_llama()
    added.add_adapter(lora)
    with pytest.raises(WrapError, match="PEFT adapter"):
        molora.wrap(added, config(("k_proj",)))
    clean = whole.unload()
    assert is_wrapped(molora.wrap(clean, config()))


def test_quantised_bases_are_refused(tiny_llama: Factory) -> None:
    class Quantizer:
        is_trainable = False

    model: Any = tiny_llama()
    model.hf_quantizer = Quantizer()
    with pytest.raises(WrapError, match="quantised by Quantizer, which cannot be"):
        molora.wrap(model, config())
    layer = nn.Sequential(nn.Linear(4, 4))
    layer[0].weight = nn.Parameter(torch.zeros(4, 4).to(torch.uint8), False)
    with pytest.raises(WrapError, match=r"'0' holds quantised weights \(torch.uint8"):
        molora.wrap(layer, config(("0",)))


def test_one_layer_under_two_paths() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.append(model[0])
        return model

    model = make()
    before = snapshot(model)
    with pytest.raises(WrapError, match="targets '0' and '2' are one shared module"):
        molora.wrap(model, config(("0", "1", "2")))
    assert same(snapshot(model), before)


def test_a_wrapped_model_looks_like_its_own_class(tiny_llama: Factory) -> None:
    model: Any = tiny_llama()
    same_object = molora.wrap(model, config())
    assert same_object is model
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__module__ == LlamaForCausalLM.__module__
    assert model.forward.__func__ is LlamaForCausalLM.forward
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model))
    assert len(trainable) == 4 * 3
    assert "model.layers.0.self_attn.q_proj.experts.Bt" in trainable
    assert "model.layers.1.mlp.down_proj.router.gate.weight" in trainable
    assert model._hf_peft_config_loaded is True
    for p in adapter_parameters(model).values():
        p.requires_grad_(False)
    assert model._hf_peft_config_loaded is False
    with pytest.raises(
        WrapError, match=r"model\.load_adapter belongs to .*molora\.load"
    ):
        model.load_adapter("x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_do_not_change_at_first(
    dtype: torch.dtype, tiny_llama: Factory
) -> None:
    model = tiny_llama().to(dtype)
    before = logits(model)
    molora.wrap(model, config("all-linear"))
    assert torch.equal(logits(model), before)
    for p in adapter_parameters(model).values():
        assert p.dtype == torch.float32


def test_train_and_eval_mode_are_kept(tiny_llama: Factory) -> None:
    for mode in (True, False):
        model = molora.wrap(tiny_llama().train(mode), config())
        assert {m.training for m in model.modules()} == {mode}


def test_deepcopy_is_a_model_of_its_own(tiny_llama: Factory) -> None:
    model: Any = randomise(molora.wrap(tiny_llama(), config()))
    model.activation_checkpointing_enable()
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    want = logits(model)
    assert torch.equal(logits(twin), want)
    with molora.disabled(twin):
        assert torch.equal(logits(model), want)
        assert not torch.equal(logits(twin), want)
    twin.train().molora_runtime.stats = {}
    twin(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.sum().backward()
    assert len(twin.molora_runtime.stats) == 4
    assert model.molora_runtime.stats is None
    assert all(p.grad is None for p in adapter_parameters(model).values())
    for p in adapter_parameters(twin).values():
        p.data.zero_()
    assert torch.equal(logits(model), want)
    molora.unwrap(twin)
    assert is_wrapped(model)


def test_pickling_is_refused(tiny_llama: Factory) -> None:
    model = molora.wrap(tiny_llama(), config())
    with pytest.raises(WrapError, match=r"not pickled: .*save_pretrained\(folder\)"):
        torch.save(model, io.BytesIO())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_unwrap_restores_everything(checkpointing: bool, tiny_llama: Factory) -> None:
    model: Any = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    if checkpointing:
        model.activation_checkpointing_enable()
    before, want = snapshot(model), logits(model)
    func = model.model.layers[0].__dict__.get("_gradient_checkpointing_func")
    randomise(molora.wrap(model, config("all-linear")))
    assert not torch.equal(logits(model), want)
    assert molora.unwrap(model) is model
    assert same(snapshot(model), before)
    assert torch.equal(logits(model), want)
    after = model.model.layers[0].__dict__.get("_gradient_checkpointing_func")
    assert after is func
    with pytest.raises(WrapError, match="no molora adapter; call molora.wrap first"):
        molora.unwrap(model)
    molora.wrap(model, config())
    assert len(sites(model)) == 4


def test_unwrap_ends_checkpointing_of_ours_and_keeps_new_parameters(
    tiny_llama: Factory,
) -> None:
    model: Any = molora.wrap(tiny_llama(), config())
    model.activation_checkpointing_enable()
    model.head = nn.Linear(3, 3)
    model.head.bias.requires_grad_(False)
    molora.unwrap(model)
    funcs = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    assert not any(type(f).__module__.startswith("molora") for f in funcs)
    assert (model.head.weight.requires_grad, model.head.bias.requires_grad) == (
        True,
        False,
    )
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_is_bit_for_bit_the_base(
    dtype: torch.dtype, tiny_llama: Factory, tiny_gpt2: Factory
) -> None:
    for make in (tiny_llama, tiny_gpt2):
        base = make().to(dtype)
        want = logits(base)
        tokens = base.generate(IDS, max_new_tokens=6, do_sample=False)
        model: Any = randomise(molora.wrap(make().to(dtype), config("all-linear")))
        adapted = logits(model)
        assert not torch.equal(adapted, want)
        with molora.disabled(model):
            assert torch.equal(logits(model), want)
            with molora.disabled(model):
                assert torch.equal(logits(model), want)
            assert torch.equal(logits(model), want)
            out = model.generate(IDS, max_new_tokens=6, do_sample=False)
            assert torch.equal(out, tokens)
            for site in sites(model).values():
                site.train()
            assert torch.equal(logits(model), want)
            model.eval()
        assert torch.equal(logits(model), adapted)
        with pytest.raises(ValueError, match="planted"), molora.disabled(model):
            raise ValueError("planted")
        assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merge_then_unwrap_is_a_plain_model(
    kind: str, dtype: torch.dtype, tiny_llama: Factory, tiny_gpt2: Factory
) -> None:
    make = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]
    model: Any = randomise(molora.wrap(make().to(dtype), config("all-linear", **ONE)))
    want, before = logits(model), snapshot(model)
    assert molora.merge(model) is model
    merged = logits(model)
    error = (merged - want).float().norm() / want.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.08)
    with pytest.raises(WrapError, match="merged already; call molora.unmerge first"):
        molora.merge(model)
    with (
        pytest.raises(WrapError, match="merged into the weights; unmerge it first"),
        molora.disabled(model),
    ):
        raise AssertionError
    molora.unmerge(model)
    assert same(snapshot(model), before)
    assert torch.equal(logits(model), want)
    with pytest.raises(WrapError, match="not merged; there is nothing to restore"):
        molora.unmerge(model)
    molora.unwrap(molora.merge(model))
    assert type(model) is type(make())
    assert model.state_dict().keys() == make().state_dict().keys()
    assert torch.equal(logits(model), merged)


def test_merge_of_several_experts_or_tied_weights_changes_nothing(
    tiny_llama: Factory,
) -> None:
    path = r"model\.layers\.1\.mlp\.down_proj"
    override = {
        "match": path,
        "experts": {"num_experts": 2},
        "router": {"kind": "soft"},
    }
    mixed = randomise(molora.wrap(tiny_llama(), config(overrides=[override], **ONE)))
    before, want = snapshot(mixed), logits(mixed)
    with pytest.raises(WrapError, match=rf"{path}' routes among 2 experts per token"):
        molora.merge(mixed)
    assert same(snapshot(mixed), before)
    assert torch.equal(logits(mixed), want)
    tied = tiny_llama(tie_word_embeddings=True)
    randomise(molora.wrap(tied, config(("q_proj", "lm_head"), **ONE)))
    before = snapshot(tied)
    with pytest.raises(WrapError, match=r"'lm_head': its weight is tied to .*embed_to"):
        molora.merge(tied)
    assert same(snapshot(tied), before)


def test_forward_and_generate_leave_the_state_as_found(tiny_llama: Factory) -> None:
    settings = {"router": {"kind": "topk", "noise": 0.5}}
    model: Any = randomise(molora.wrap(tiny_llama(), config(**settings)))
    for mode in (False, True):
        model.train(mode)
        before, state = snapshot(model), torch.get_rng_state()
        logits(model.eval())
        model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(torch.get_rng_state(), state)
        model.train(mode)
        assert same(snapshot(model), before)
        fresh = type(model.molora_runtime)(identity=model.molora_runtime.identity)
        assert vars(model.molora_runtime) == vars(fresh)


def test_a_plain_module_can_be_wrapped_too() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    want = model(x)
    molora.wrap(model, config("all-linear"))
    assert type(model).__name__ == "Sequential"
    assert torch.equal(model(x), want)
    randomise(model)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model).values())
    assert torch.equal(molora.unwrap(model)(x), want)
    assert all(p.requires_grad for p in model.parameters())
