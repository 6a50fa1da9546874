"""Scores against row-by-row forwards and greedy generation of transformers itself."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import molora
from molora.errors import ConfigError
from molora.model import adapter_parameters
from molora.training.data import DataConfig, EvalRow, EvalSet, build_eval_sets
from molora.training.evaluation import TaskResult, evaluate
from molora.training.sampling import Collator
from molora.training.scoring import Scorer

Tokenizer = PreTrainedTokenizerFast
Factory = Callable[..., PreTrainedModel]

VOCABULARY = 259
# wide initial weights: likelihoods then differ clearly between rows and labels
SPREAD = 0.3
# labels that begin alike, of unequal length
LABELS = ["ab", "abcd", "cb", "yz"]


@pytest.fixture
def model(tiny_llama: Factory) -> PreTrainedModel:
    return tiny_llama(vocab_size=VOCABULARY, initializer_range=SPREAD)


def build(
    folder: Path, tokenizer: Tokenizer, rows: Sequence[Any], **settings: Any
) -> EvalSet:
    path = folder / "t.json"
    path.write_text(json.dumps(rows))
    task = {"name": "t", "eval": str(path), **settings}
    config = DataConfig.from_dict({"tasks": [task]})
    return build_eval_sets(config, tokenizer, show_progress=False)["t"]


def pairs(*rows: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": answer} for prompt, answer in rows]


def label_pairs(num_rows: int = 12) -> list[dict[str, str]]:
    """Prompts of random letters and length, with every label equally often."""
    draw = random.Random(3)
    prompts = [
        "".join(draw.choices("abcxyz ?", k=draw.randint(1, 9))) + ":"
        for _ in range(num_rows)
    ]
    return pairs(*zip(prompts, LABELS * (num_rows // len(LABELS)), strict=True))


def hf_nll(model: PreTrainedModel, row: EvalRow) -> tuple[float, int]:
    """Loss of one unpadded row by transformers, times its tokens."""
    ids = torch.tensor([row.encoded["input_ids"]])
    labels = torch.tensor([row.encoded["labels"]])
    count = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item() * count, count


def hf_score(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """Log-likelihood of an answer by one unpadded forward."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0]
    log_probs = logits.double().log_softmax(-1)
    return sum(
        log_probs[len(prompt) - 1 + index, token].item()
        for index, token in enumerate(answer)
    )


def no_context(num_rows: int) -> AbstractContextManager[None]:
    return nullcontext()


def mistral() -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        initializer_range=SPREAD,
    )
    return MistralForCausalLM(config)


def bloom() -> PreTrainedModel:
    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        initializer_range=1.0,
    )
    return BloomForCausalLM(config)


def mamba() -> PreTrainedModel:
    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        initializer_range=SPREAD,
    )
    return MambaForCausalLM(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "bloom", "mamba"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_loss_and_labels_equal_unpadded_forwards(
    kind: str,
    batch_size: int,
    tmp_path: Path,
    tokenizer: Tokenizer,
    tiny_llama: Factory,
    tiny_gpt2: Factory,
) -> None:
    # sliding window; no position ids; a cache that cannot be repeated
    others = {"mistral": mistral, "bloom": bloom, "mamba": mamba}
    settings = {"vocab_size": VOCABULARY, "initializer_range": SPREAD}
    if kind in others:
        torch.manual_seed(0)
        model = others[kind]().eval()
    else:
        factory = tiny_llama if kind == "llama" else tiny_gpt2
        model = factory(seed=1, **settings)
    eval_set = build(tmp_path, tokenizer, label_pairs(), labels=LABELS)

    expected = [
        [hf_score(model, row.prompt_ids, ids) for ids in row.candidates]
        for row in eval_set.rows
    ]
    best = [row.index(max(row)) for row in expected]
    right = sum(b == row.gold for b, row in zip(best, eval_set.rows, strict=True))
    # the test would show nothing if one label won everywhere
    assert len(set(best)) > 1
    nlls = [hf_nll(model, row) for row in eval_set.rows]

    result = evaluate(model, tokenizer, {"t": eval_set}, batch_size, False)["t"]
    assert result.n == len(eval_set.rows) == 12
    assert result.accuracy == right / 12
    tokens = sum(count for _, count in nlls)
    assert result.loss == pytest.approx(sum(nll for nll, _ in nlls) / tokens, abs=1e-5)
    with torch.no_grad():
        scores = Scorer(model, 0, no_context).candidate_scores(
            [row.prompt_ids for row in eval_set.rows],
            [row.candidates for row in eval_set.rows],
        )
    # float32 rounds scores of tens in the sixth digit, by processor; masks err far more
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=2e-5)


def test_loss_is_the_mean_over_tokens_not_rows(
    model: PreTrainedModel, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    turns = [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "d")]
    dialogue = [{"role": role, "content": text} for role, text in turns]
    rows = [{"messages": dialogue}, {"messages": dialogue[:2]}]
    eval_set = build(tmp_path, tokenizer, rows)
    (first, n), (second, m) = (hf_nll(model, row) for row in eval_set.rows)
    # two letters and the mark, one letter and the mark
    assert (n, m) == (5, 3)
    for batch_size in (1, 2):
        result = evaluate(model, tokenizer, {"t": eval_set}, batch_size, False)["t"]
        assert result.loss == pytest.approx((first + second) / 8, abs=1e-5)
        assert (result.accuracy, result.exact_match) == (None, None)


def test_labels_of_the_last_turn_leave_the_loss_of_all_turns(
    model: PreTrainedModel, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    turns = [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "ab")]
    rows = [{"messages": [{"role": r, "content": text} for r, text in turns]}]
    eval_set = build(tmp_path, tokenizer, rows, labels=LABELS)
    nll, tokens = hf_nll(model, eval_set.rows[0])
    assert tokens == 6
    result = evaluate(model, tokenizer, {"t": eval_set}, 4, False)["t"]
    assert result.loss == pytest.approx(nll / tokens, abs=1e-5)
    scores = [
        hf_score(model, eval_set.rows[0].prompt_ids, ids)
        for ids in eval_set.rows[0].candidates
    ]
    assert result.accuracy == float(scores.index(max(scores)) == 0)


def test_a_model_that_hides_its_signature_scores_alike(
    model: PreTrainedModel, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    eval_set = build(tmp_path, tokenizer, label_pairs(), labels=LABELS)
    alone = evaluate(model, tokenizer, {"t": eval_set}, 5, False)["t"]
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped: Any = peft.get_peft_model(model, config)
    result = evaluate(wrapped, tokenizer, {"t": eval_set}, 5, False)["t"]
    assert result.accuracy == alone.accuracy
    assert result.loss == pytest.approx(alone.loss, abs=1e-5)


@pytest.fixture(scope="module")
def riddles() -> list[dict[str, str]]:
    return pairs(
        ("q:", "a"),
        ("what is it?", "two words"),
        ("long question, short answer:", "no"),
        ("r:", "a long answer of many letters"),
        ("s:", "ends, with: marks"),
        ("t:", "nothing"),
    )


@pytest.fixture
def taught(
    model: PreTrainedModel,
    riddles: list[dict[str, str]],
    tmp_path: Path,
    tokenizer: Tokenizer,
) -> PreTrainedModel:
    """A model that knows the riddles' answers by heart."""
    eval_set = build(tmp_path, tokenizer, riddles)
    batch = Collator(0)([row.encoded for row in eval_set.rows])
    del batch["task_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    return model


def test_exact_match_equals_unpadded_greedy_generation(
    taught: PreTrainedModel,
    riddles: list[dict[str, str]],
    tmp_path: Path,
    tokenizer: Tokenizer,
) -> None:
    rows = [dict(row) for row in riddles]
    rows[1]["completion"] = "three words"
    rows[4]["completion"] = "ends, with:marks"
    # white space around an answer does not count
    rows[5]["completion"] = "nothing \n"
    eval_set = build(tmp_path, tokenizer, rows, exact_match=True)
    answers = []
    for row in eval_set.rows:
        prompt = torch.tensor([row.prompt_ids])
        ids = taught.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=0,
            pad_token_id=0,
        )[0, prompt.shape[1] :]
        answers.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert answers == [row["completion"] for row in riddles]
    for batch_size in (1, 4, 16):
        result = evaluate(taught, tokenizer, {"t": eval_set}, batch_size, False)["t"]
        assert result.exact_match == 4 / 6
    # the long answer is cut
    short = build(tmp_path, tokenizer, rows, exact_match=True, max_new_tokens=12)
    result = evaluate(taught, tokenizer, {"t": short}, 4, False)["t"]
    assert result.exact_match == 3 / 6


def test_generation_settings_of_the_model_are_set_aside_and_kept(
    taught: PreTrainedModel,
    riddles: list[dict[str, str]],
    tmp_path: Path,
    tokenizer: Tokenizer,
) -> None:
    eval_set = build(tmp_path, tokenizer, riddles, exact_match=True)
    kept = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=50.0, max_new_tokens=1
    )
    taught.generation_config = kept
    result = evaluate(taught, tokenizer, {"t": eval_set}, 4, False)["t"]
    assert result.exact_match == 1.0
    assert taught.generation_config is kept
    assert kept.max_new_tokens == 1


def test_every_forward_knows_the_tasks_of_its_rows(
    model: PreTrainedModel, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = label_pairs(4)
    sets = {
        name: build(
            tmp_path,
            tokenizer,
            rows,
            labels=LABELS,
            exact_match=True,
            max_new_tokens=3,
        )
        for name in ("one", "two")
    }
    current: list[list[str]] = []
    seen: list[tuple[str, int, int]] = []

    @contextmanager
    def tasks(names: Sequence[str]) -> Iterator[None]:
        current.append(list(names))
        yield
        current.pop()

    def note(module: Any, args: Any, kwargs: Any) -> None:
        (names,) = current
        assert len(set(names)) == 1
        seen.append((names[0], len(names), len(kwargs["input_ids"])))

    model.register_forward_pre_hook(note, with_kwargs=True)
    evaluate(model, tokenizer, sets, 3, False, task_context=tasks)
    assert current == []
    assert all(named == rows for _, named, rows in seen)
    assert [name for name, _, _ in seen] == sorted(name for name, _, _ in seen)
    # prompts by three and one, then with four labels each
    assert [rows for name, _, rows in seen if name == "two"][:4] == [3, 12, 1, 4]


def test_the_model_is_left_as_found(
    model: PreTrainedModel, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = label_pairs(4)
    eval_set = build(
        tmp_path, tokenizer, rows, labels=LABELS, exact_match=True, max_new_tokens=2
    )
    model.train()
    model.model.layers[0].eval()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()

    @contextmanager
    def breaks(names: Sequence[str]) -> Iterator[None]:
        torch.rand(1)
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise ArithmeticError("stop")
        yield

    evaluate(model, tokenizer, {"t": eval_set}, 3, False)
    with pytest.raises(ArithmeticError, match="stop"):
        evaluate(model, tokenizer, {"t": eval_set}, 3, False, task_context=breaks)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    trained = [p for p in model.parameters() if p is not frozen]
    assert all(p.requires_grad and p.grad is None for p in trained)
    assert not frozen.requires_grad


def test_results_are_plain_and_bad_batch_sizes_named(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    result = TaskResult(n=2, loss=0.5, accuracy=None, exact_match=1.0)
    assert result.to_dict() == {
        "n": 2,
        "loss": 0.5,
        "accuracy": None,
        "exact_match": 1.0,
    }
    with pytest.raises(ConfigError, match="batch_size: must be at least 1, got 0"):
        evaluate(model, tokenizer, {}, 0)


@pytest.mark.parametrize("make", ["tiny_llama", "bloom"])
def test_routers_that_read_the_prompt_do_not_see_the_answer(
    make: str, tmp_path: Path, tokenizer: Tokenizer, model: PreTrainedModel
) -> None:
    """Both losses, with and without a cache that can be repeated, by transformers."""
    base = bloom() if make == "bloom" else model
    raw = {
        "target_modules": ["dense" if make == "bloom" else "o_proj"],
        "experts": {"kind": "lora", "num_experts": 3, "r": 2},
        "router": {"kind": "topk", "input": "sequence"},
    }
    wrapped: Any = molora.wrap(base, molora.AdapterConfig.from_dict(raw))
    for name, p in adapter_parameters(wrapped).items():
        p.data.normal_(0, 3.0 if "router" in name else 0.5)
    wrapped.eval()
    labelled = build(tmp_path, tokenizer, label_pairs(4), labels=LABELS)
    result = evaluate(wrapped, tokenizer, {"t": labelled}, 3, False)["t"]
    # labels, not molora.prompts, tell transformers' forward where the prompt ends
    losses = [hf_nll(wrapped, row) for row in labelled.rows]
    want = sum(a for a, _ in losses) / sum(n for _, n in losses)
    assert result.loss == pytest.approx(want, rel=1e-4)
    plain = build(tmp_path, tokenizer, label_pairs(4))
    got = evaluate(wrapped, tokenizer, {"t": plain}, 3, False)["t"]
    assert got.loss == pytest.approx(want, rel=1e-4)
    whole = [row.encoded["input_ids"] for row in plain.rows]
    # with the answer as part of the prompt the loss is another one
    nll = []
    for row, ids in zip(plain.rows, whole, strict=True):
        everything = torch.ones(1, len(ids), dtype=torch.bool)
        with molora.prompts(wrapped, everything):
            nll.append(hf_nll(wrapped, row)[0])
    assert abs(sum(nll) / sum(n for _, n in losses) - want) > 1e-3 * want
