"""Rows to token ids and labels: loss on what the assistant says, and on its end.

The parts of a row (prompt, completion, the spans of a conversation) are tokenised one
by one and their ids joined. Tokenised as one text, the end of a prompt and the start of
a completion could merge into one token: then the prompt that generation starts from
would not be a prefix of what was trained on, and prompt text would bear loss.
"""

from dataclasses import dataclass, replace
from typing import TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from molora.errors import ConfigError, DataError
from molora.training.formats import Row, Turn
from molora.training.tasks import OnLong, Template

IGNORE = -100


class Encoded(TypedDict):
    """One row as the model sees it; ids and labels are equally long."""

    input_ids: list[int]
    labels: list[int]
    task_id: int


@dataclass(frozen=True)
class Piece:
    """A stretch of token ids that bears loss, or does not."""

    ids: list[int]
    is_learned: bool


def encode(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "plain",
    task_id: int = 0,
) -> Encoded:
    """Turn a row into token ids, with labels on the assistant's part only.

    ``plain``: prompt, one space, completion, eos; no bos, which the models at hand do
    not need and SmolLM2 uses to open a chat turn. A dialogue, or ``chat``: the
    tokenizer's chat template, which writes its own bos if it wants one; each assistant
    turn is learned up to its end-of-turn mark, the white space after it is not, and
    nothing after the last assistant turn is kept.

    Args:
        row: The row.
        tokenizer: Writes and cuts the text.
        template: How a prompt and a completion become text.
        task_id: Carried along.

    Returns:
        Ids, labels (``IGNORE`` where nothing is learned) and the task's id.

    Raises:
        ConfigError: The tokenizer lacks the eos token or chat template it needs.
        DataError: The chat template cannot write this row, or does not allow to tell
            the assistant's part, or no token would be learned.
    """
    if row.is_dialogue or template == "chat":
        pieces = _chat_pieces(row, tokenizer)
    else:
        pieces = _plain_pieces(row, tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        ids += piece.ids
        labels += piece.ids if piece.is_learned else [IGNORE] * len(piece.ids)
    if num_learned(labels) == 0:
        raise DataError(f"{row.where}: no token of this row would be learned")
    return {"input_ids": ids, "labels": labels, "task_id": task_id}


def num_learned(labels: list[int]) -> int:
    """Count the labels that bear loss; the first token is predicted by nothing."""
    return sum(label != IGNORE for label in labels[1:])


def fit(encoded: Encoded, max_length: int, on_long: OnLong, where: str) -> Encoded:
    """Bring a row to at most max_length tokens.

    Args:
        encoded: The row.
        max_length: In tokens.
        on_long: ``error``, or ``truncate``: cut the end off.
        where: The row's place, for messages.

    Returns:
        The row itself if it fits, else its first max_length tokens.

    Raises:
        DataError: The row is too long and may not be cut, or nothing learned is left.
    """
    length = len(encoded["input_ids"])
    if length <= max_length:
        return encoded
    if on_long != "truncate":
        raise DataError(
            f"{where}: {length} tokens, max_length is {max_length}; raise max_length "
            "or set on_long to truncate or drop"
        )
    labels = encoded["labels"][:max_length]
    if num_learned(labels) == 0:
        raise DataError(
            f"{where}: {length} tokens, and cut to max_length {max_length} no token "
            "would be learned; raise max_length or set on_long to drop"
        )
    ids = encoded["input_ids"][:max_length]
    return {"input_ids": ids, "labels": labels, "task_id": encoded["task_id"]}


def split_answer(encoded: Encoded) -> tuple[list[int], list[int]]:
    """Split a row before its last learned stretch.

    Args:
        encoded: A row that has not been cut.

    Returns:
        Ids of the prompt and of the last answer, end-of-turn mark included.
    """
    labels = encoded["labels"]
    start = len(labels)
    while labels[start - 1] != IGNORE:
        start -= 1
    return encoded["input_ids"][:start], encoded["input_ids"][start:]


def with_answer(row: Row, answer: str) -> Row:
    """Return the row with another text as its last turn, which is the assistant's."""
    return replace(row, turns=(*row.turns[:-1], Turn("assistant", answer)))


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose: max_length is ours to check
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    return list(encoding["input_ids"])


def _plain_pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "template: plain ends every row with the eos token, and this tokenizer "
            "has none; set tokenizer.eos_token or use template: chat"
        )
    prompt, completion = (turn.content for turn in row.turns)
    answer_ids = _ids(" " + completion, tokenizer) + [tokenizer.eos_token_id]
    return [Piece(_ids(prompt, tokenizer), False), Piece(answer_ids, True)]


def _chat_pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Find the assistant's spans by rendering every prefix of the conversation."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{row.where}: conversations and template: chat need a tokenizer with a "
            "chat template, and this one has none; set tokenizer.chat_template"
            + ("" if row.is_dialogue else " or use template: plain")
        )
    spoken = [i for i, turn in enumerate(row.turns) if turn.role == "assistant"]
    turns = row.turns[: spoken[-1] + 1]
    whole = _render(row, turns, tokenizer)
    pieces: list[Piece] = []
    done = 0
    for index in spoken:
        before = _render(row, turns[:index], tokenizer, opens_answer=True)
        through = _render(row, turns[: index + 1], tokenizer)
        if not (whole.startswith(through) and through.startswith(before)):
            raise DataError(
                f"{row.where}: cannot tell what turn {index} says: the chat template "
                "writes the start of this conversation differently once more turns "
                "follow; use another chat template, or one row per assistant turn"
            )
        end = len(before) + _learned_length(
            through[len(before) :], row.turns[index].content, row.where
        )
        pieces.append(Piece(_ids(whole[done : len(before)], tokenizer), False))
        pieces.append(Piece(_ids(whole[len(before) : end], tokenizer), True))
        done = end
    return pieces


def _render(
    row: Row,
    turns: tuple[Turn, ...],
    tokenizer: PreTrainedTokenizerBase,
    opens_answer: bool = False,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [turn._asdict() for turn in turns],
            tokenize=False,
            add_generation_prompt=opens_answer,
        )
    except TemplateError as error:
        raise DataError(
            f"{row.where}: the chat template refuses this conversation: {error}"
        ) from None
    return str(text)


def _learned_length(span: str, content: str, where: str) -> int:
    """Length of an assistant span without the white space after its end-of-turn mark.

    A template may end a turn with white space alone; then that is the mark.
    """
    stripped = span.rstrip()
    if not stripped.endswith(content.rstrip()):
        return len(stripped)
    if len(stripped) == len(span):
        raise DataError(
            f"{where}: the chat template writes no end-of-turn mark after an assistant "
            "turn, so the model could not learn to stop; use another chat template"
        )
    return len(span)
