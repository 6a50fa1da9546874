"""Token ids and labels worked by hand: what is learned, and what is not."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from molora.base_models import load_base
from molora.errors import ConfigError, DataError
from molora.training.data import DataConfig, build_mixture
from molora.training.encoding import IGNORE, Encoded, encode, fit, split_answer
from molora.training.formats import Row, Turn

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart"

Tokenizer = PreTrainedTokenizerFast


def row_of(*turns: tuple[str, str], is_dialogue: bool = True) -> Row:
    return Row("here:1", tuple(Turn(*turn) for turn in turns), is_dialogue)


def learned_texts(encoded: Encoded, tokenizer: Tokenizer) -> list[str]:
    """Each unbroken learned stretch, decoded."""
    stretches: list[list[int]] = []
    previous = IGNORE
    for label in encoded["labels"]:
        if label != IGNORE and previous == IGNORE:
            stretches.append([])
        if label != IGNORE:
            stretches[-1].append(label)
        previous = label
    return [tokenizer.decode(ids) for ids in stretches]


def test_plain_rows_join_parts_and_learn_the_end(tokenizer: Tokenizer) -> None:
    encoded = encode(
        row_of(("user", "a:"), ("assistant", "b"), is_dialogue=False), tokenizer
    )
    byte = {char: tokenizer.convert_tokens_to_ids(char) for char in "a:b\u0120"}
    assert encoded == {
        "input_ids": [byte["a"], byte[":"], byte["\u0120"], byte["b"], 0],
        "labels": [IGNORE, IGNORE, byte["\u0120"], byte["b"], 0],
        "task_id": 0,
    }
    # as one text, the colon and the space behind it would be one token
    assert len(tokenizer("a: b")["input_ids"]) == 3
    assert split_answer(encoded) == ([byte["a"], byte[":"]], encoded["input_ids"][2:])


def test_conversations_learn_every_assistant_turn_and_its_mark(
    tokenizer: Tokenizer,
) -> None:
    row = row_of(
        ("user", "hi"), ("assistant", "yo "), ("user", "so?"), ("assistant", "bye")
    )
    encoded = encode(row, tokenizer, task_id=3)
    assert encoded["task_id"] == 3
    assert tokenizer.decode(encoded["input_ids"]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyo <|im_end|>\n<|im_start|>user\nso?<|im_end|>\n"
        "<|im_start|>assistant\nbye<|im_end|>"
    )
    assert learned_texts(encoded, tokenizer) == ["yo <|im_end|>", "bye<|im_end|>"]
    assert tokenizer.decode(split_answer(encoded)[1]) == "bye<|im_end|>"
    later = row_of(*row.turns[:2], ("user", "never answered"))
    assert learned_texts(encode(later, tokenizer), tokenizer) == ["yo <|im_end|>"]


def test_chat_template_of_a_prompt_and_completion(tokenizer: Tokenizer) -> None:
    row = row_of(("user", "a"), ("assistant", "b"), is_dialogue=False)
    encoded = encode(row, tokenizer, "chat")
    prompt, answer = split_answer(encoded)
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(answer) == "b<|im_end|>"


TURN = "{{ message['role'] }}: {{ message['content'] }}"
OPEN = "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (
            "{% for message in messages %}{% if loop.last or message['role'] != "
            "'assistant' %}" + TURN + "<|im_end|>{% endif %}{% endfor %}" + OPEN,
            "here:1: cannot tell what turn 1 says: the chat template writes the start",
        ),
        (
            "{% for message in messages %}" + TURN + "{% endfor %}" + OPEN,
            "here:1: the chat template writes no end-of-turn mark",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            "here:1: the chat template refuses this conversation: roles must alternate",
        ),
        (None, "here:1: conversations and template: chat need a tokenizer with a chat"),
    ],
)
def test_templates_that_hide_the_answer_are_refused(
    tokenizer: Tokenizer, template: str | None, wanted: str
) -> None:
    tokenizer.chat_template = template
    row = row_of(
        ("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "bye")
    )
    with pytest.raises((DataError, ConfigError)) as caught:
        encode(row, tokenizer)
    assert wanted in str(caught.value)


def test_white_space_may_be_the_mark(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}" + TURN + "\n\n{% endfor %}" + OPEN
    )
    row = row_of(("user", "hi"), ("assistant", "yo"))
    assert learned_texts(encode(row, tokenizer), tokenizer) == ["yo\n\n"]


def test_plain_needs_an_eos_token(tokenizer: Tokenizer) -> None:
    tokenizer.eos_token = None
    row = row_of(("user", "hi"), ("assistant", "yo"), is_dialogue=False)
    with pytest.raises(ConfigError, match="set tokenizer.eos_token"):
        encode(row, tokenizer)


def test_a_row_that_learns_nothing_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "<|im_end|>{% endif %}{% endfor %}"
    )
    # the mark alone is left, and as the first token nothing predicts it
    with pytest.raises(
        DataError, match="here:1: no token of this row would be learned"
    ):
        encode(row_of(("user", "hi"), ("assistant", "yo")), tokenizer)


def test_cutting_leaves_fitting_rows_alone() -> None:
    row: Encoded = {"input_ids": [1, 2], "labels": [IGNORE, 2], "task_id": 0}
    assert fit(row, 2, "error", "here") is row


@pytest.mark.slow
def test_the_real_tokenizer_learns_answers_and_ends() -> None:
    tokenizer: Any = load_base("smollm2")[1]
    task = {"name": "t", "train": str(QUICKSTART / "sentiment.train.jsonl"), "limit": 2}
    for template, opening in (
        ("plain", "Is this movie review"),
        ("chat", "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"),
    ):
        config = DataConfig.from_dict({"tasks": [task], "template": template})
        mixture = build_mixture(config, tokenizer, show_progress=False)
        space = " " if template == "plain" else ""
        raw = (QUICKSTART / "sentiment.train.jsonl").read_text().splitlines()
        for encoded, line in zip(mixture, raw, strict=False):
            answer = json.loads(line)["completion"]
            text = tokenizer.decode(encoded["input_ids"])
            assert text.startswith(opening)
            assert learned_texts(encoded, tokenizer) == [f"{space}{answer}<|im_end|>"]
            # cutting at the seams must not change how the parts are tokenised
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert whole == encoded["input_ids"]
