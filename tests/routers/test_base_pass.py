"""The first pass of X-LoRA: its cost, its cache, and forwards inside forwards."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

import molora
from molora.errors import RoutingError
from molora.model import adapter_parameters

Factory = Callable[..., PreTrainedModel]


def build(make: Factory, layerwise: bool = False, targets: Any = "all-linear") -> Any:
    raw = {
        "target_modules": targets,
        "experts": {"kind": "lora", "num_experts": 3, "r": 2},
        "router": {"kind": "xlora", "layerwise": layerwise},
    }
    model: Any = molora.wrap(make(), molora.AdapterConfig.from_dict(raw)).double()
    g = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 1.0 if "router" in name else 0.3, generator=g)
    return model.eval()


def ids(rows: int = 3, width: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, 128, (rows, width), generator=g)


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-10 * (1 + b.abs().max()))


def counted(model: Any, module: nn.Module) -> list[int]:
    """Tokens that a module sees in each of its calls."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    return seen


def test_the_first_pass_gives_no_logits(tiny_llama: Factory) -> None:
    model = build(tiny_llama)
    head = counted(model, model.lm_head)
    layer = counted(model, model.model.layers[0].mlp)
    with torch.no_grad():
        model(ids(), labels=ids())
        model(ids(), logits_to_keep=1)
        model.model(ids())
    assert (head, layer) == ([6, 1], [6] * 6)


def test_both_passes_get_the_new_tokens_alone(tiny_llama: Factory) -> None:
    """15 tokens each for 8 new ones after 8; without a cache 92 each (PEFT: 184)."""
    model = build(tiny_llama)
    layer = counted(model, model.model.layers[0].mlp)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    got = model.generate(ids(1, 8), **settings)
    assert layer == [8, 8] + [1] * 14
    del layer[:]
    assert torch.equal(got, model.generate(ids(1, 8), **settings, use_cache=False))
    assert sum(layer) == 184


def test_embeddings_can_come_in(tiny_llama: Factory) -> None:
    model = build(tiny_llama, layerwise=True)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids())
        got = model(inputs_embeds=embedded).logits
        assert torch.equal(got, model(ids()).logits)


@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
def test_the_cache_follows_rows_and_steps_back(kind: str, tiny_llama: Factory) -> None:
    model, tokens = build(tiny_llama, layerwise=True), ids()
    make = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "lazy": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=8),
    }
    cache = make[kind]()
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        model(tokens[:, :4], past_key_values=cache)
        if kind != "static":
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 2, 4]))
            model(tokens[:, 4:5] * 0 + 9, past_key_values=cache)
            cache.crop(-1)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        step = model(tokens[[2, 0, 1], 4:], past_key_values=cache).logits
        assert same(step, want[[2, 0, 1], 4:])
        cache.reset()
        assert same(model(tokens, past_key_values=cache).logits, want)


def test_a_cache_that_missed_tokens_is_refused(tiny_llama: Factory) -> None:
    model = build(tiny_llama)
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
        with molora.disabled(model):
            model(ids()[:, :1], past_key_values=cache)
            other = model(ids(), use_cache=True).past_key_values
        for partial in (cache, other):
            with pytest.raises(RoutingError, match="filled in part without"):
                model(ids()[:, :1], past_key_values=partial)
        with pytest.raises(RoutingError, match="beside a tuple"):
            model(ids(), past_key_values=(1, 2))
        away = DynamicCache(config=model.config)
        away.offloading = True
        with pytest.raises(RoutingError, match="offloaded"):
            model(ids(), past_key_values=away)
        # nothing is left of a forward that was refused
        assert model.molora_runtime.current is None


def test_a_static_cache_generates_alike(tiny_llama: Factory) -> None:
    model = build(tiny_llama)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    mask = torch.ones_like(ids())
    mask[1, :2] = 0
    rows = [
        model.generate(
            ids(), attention_mask=mask, **settings, cache_implementation=kind
        )
        for kind in ("dynamic", "static", "static")
    ]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("inside", ["model", "body", "thread"])
def test_a_forward_inside_another_is_refused(inside: str, tiny_llama: Factory) -> None:
    model, caught = build(tiny_llama), []
    inner = model.model if inside == "body" else model

    def call() -> None:
        try:
            inner(ids(1))
        except RoutingError as error:
            caught.append(str(error))

    def hook(*_: Any) -> None:
        if inside == "thread":
            thread = Thread(target=call)
            thread.start()
            thread.join()
        elif not model.molora_runtime.disabled:
            call()

    with torch.no_grad():
        want = model(ids()).logits
        handle = model.lm_head.register_forward_pre_hook(hook)
        assert torch.equal(model(ids()).logits, want)
        assert len(caught) == 1 and "began inside another one" in caught[0]
        # what an interrupt left behind is no forward that runs
        handle.remove()
        handle = model.lm_head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids())
        handle.remove()
        assert torch.equal(model(ids()).logits, want)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_guessed_tokens_are_taken_back(tiny_gpt2: Factory) -> None:
    """Prompt lookup crops the cache; beams reorder it; on another kind of model."""
    model = build(tiny_gpt2, layerwise=True)
    tokens = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    want = model.generate(tokens, **settings, use_cache=False)
    got = model.generate(tokens, **settings, prompt_lookup_num_tokens=3)
    assert torch.equal(got, want)
    beams = [
        model.generate(tokens, **settings, num_beams=3, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)


def test_a_site_that_sees_other_tokens_is_refused(tiny_llama: Factory) -> None:
    model = build(tiny_llama, targets=["q_proj", "lm_head"])
    with torch.no_grad():
        assert model(ids()).logits.shape == (3, 6, 128)
        with pytest.raises(RoutingError, match="sees 3 .* add it to exclude_modules$"):
            model(ids(), logits_to_keep=1)
