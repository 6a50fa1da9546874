"""A tokenizer small enough to read its ids, made on the spot."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# SmolLM2's form: turns between marks, a default system message before the first
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nS<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and one merge: a colon with the space behind it.

    Ids: 0 the eos and end-of-turn mark (also the pad token), 1 the start mark, from 2
    the bytes, then the merge. The vocabulary has 259 entries.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|im_end|>": 0, "<|im_start|>": 1}
    vocab |= {char: 2 + index for index, char in enumerate(alphabet)}
    vocab[":\u0120"] = len(vocab)
    core = Tokenizer(models.BPE(vocab, merges=[(":", "\u0120")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [
            AddedToken("<|im_end|>", special=True),
            AddedToken("<|im_start|>", special=True),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
