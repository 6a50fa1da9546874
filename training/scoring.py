"""Likelihoods and greedy answers of a causal language model, batched.

Legend: B rows of a batch, S tokens of the longest row, C candidates of a row,
A tokens of the longest candidate, N rows after expansion (B * C), M learned tokens of
a batch, V vocabulary; 1 a dimension of size one.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

import molora
from molora.model import is_wrapped
from molora.prompt import PromptLayer, prompt_from_labels
from molora.training.encoding import IGNORE

RowsContext = Callable[[int], AbstractContextManager[Any]]


class Scorer:
    """Runs a model over padded batches.

    Args:
        model: Any causal language model, in eval mode.
        filler: Id for padding; padding is masked, so any id of the vocabulary.
        context: Called with the number of rows of each forward, which then runs inside
            what it returns.
    """

    def __init__(self, model: PreTrainedModel, filler: int, context: RowsContext):
        # generate is no part of PreTrainedModel's type
        self.model: Any = model
        self.filler = filler
        self.context = context
        # PEFT's outer classes hide the signature of the model inside
        inner: Any = getattr(model, "get_base_model", lambda: model)()
        names = inspect.signature(inner.forward).parameters
        self._takes_position_ids = "position_ids" in names
        self._takes_logits_to_keep = "logits_to_keep" in names

    def learned_nll(self, batch: Mapping[str, Tensor]) -> tuple[float, int]:
        """Sum of the negative log-likelihood over the learned tokens of a batch.

        Logits are computed only in columns where some row learns, and brought to fp32
        only where the row itself does.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, all [B, S], padded
                on the right.

        Returns:
            The sum in nats, and the number of tokens.
        """
        target_BS = batch["labels"][:, 1:].to(self.model.device)
        columns = (target_BS != IGNORE).any(0).nonzero().squeeze(1)
        with self._prompts(prompt_from_labels(batch["labels"])):
            logits_BSV = self._logits(
                batch["input_ids"], batch["attention_mask"], columns, use_cache=False
            )
        target_BS = target_BS[:, columns]
        is_learned_BS = target_BS != IGNORE
        logits_MV = logits_BSV[is_learned_BS].float()
        nll_M = F.cross_entropy(logits_MV, target_BS[is_learned_BS], reduction="none")
        return float(nll_M.double().sum()), nll_M.numel()

    def candidate_scores(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[Sequence[int]]],
    ) -> Tensor:
        """Log-likelihood of each candidate after its prompt.

        The prompts run once. Their cache is then repeated for the candidates, of which
        all tokens but the last follow in one short forward. Where the cache cannot be
        repeated (recurrent layers), prompt and candidate run together.

        Args:
            prompts: B prompts, token ids.
            candidates: The ids of C candidates for each prompt; none empty.

        Returns:
            Sums over the candidates' tokens, fp32 [B, C].
        """
        num_candidates = len(candidates[0])
        flat = [ids for row in candidates for ids in row]
        prompt_BS, mask_BS = self._pad_left(prompts)
        output = self._forward(
            prompt_BS,
            mask_BS,
            position_ids=(mask_BS.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=1,
            use_cache=True,
        )
        cache: Any = getattr(output, "past_key_values", None)
        if not _is_repeatable(cache):
            repeated = [ids for ids in prompts for _ in range(num_candidates)]
            return self._full_scores(repeated, flat).view(-1, num_candidates)
        target_NA, is_real_NA = self._pad_right(flat)
        first_BV = _log_probs(output.logits[:, -1])
        first_NV = first_BV.repeat_interleave(num_candidates, 0)
        score_NA = first_NV.gather(1, target_NA[:, :1])
        if target_NA.shape[1] > 1:
            cache.batch_repeat_interleave(num_candidates)
            past_NS = mask_BS.repeat_interleave(num_candidates, 0)
            steps_A = torch.arange(target_NA.shape[1] - 1, device=past_NS.device)
            logits_NAV = self._forward(
                target_NA[:, :-1],
                torch.cat([past_NS, is_real_NA[:, :-1]], 1),
                position_ids=past_NS.sum(1, keepdim=True) + steps_A,
                past_key_values=cache,
                use_cache=True,
            ).logits
            later_NA1 = _log_probs(logits_NAV).gather(2, target_NA[:, 1:, None])
            score_NA = torch.cat([score_NA, later_NA1.squeeze(2)], 1)
        score_N = score_NA.where(is_real_NA == 1, 0.0).sum(1)
        return score_N.view(-1, num_candidates)

    def greedy_answers(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int],
    ) -> list[list[int]]:
        """Continue each prompt with the likeliest tokens, up to an end token.

        The model's own generation settings (sampling, penalties, forced tokens) are
        set aside: with them the answer would not be the model's likeliest.

        Args:
            prompts: B prompts, token ids.
            max_new_tokens: Longest answer.
            end_ids: Tokens that end an answer.

        Returns:
            Ids of the B answers, without the end token and what follows it.
        """
        prompt_BS, mask_BS = self._pad_left(prompts)
        kept_config = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(end_ids),
            pad_token_id=self.filler,
        )
        try:
            with self.context(len(prompts)):
                output_BS = self.model.generate(
                    input_ids=prompt_BS, attention_mask=mask_BS
                )
        finally:
            self.model.generation_config = kept_config
        answers = output_BS[:, prompt_BS.shape[1] :].tolist()
        return [_until(ids, end_ids) for ids in answers]

    def _prompts(self, prompt_BS: Tensor) -> AbstractContextManager[None]:
        """Tell routers that read the prompt where it ends."""
        if is_wrapped(self.model):
            return molora.prompts(self.model, prompt_BS)
        return nullcontext()

    def _forward(self, ids: Tensor, mask: Tensor, **inputs: Any) -> Any:
        """Run the model, leaving out what its forward does not take."""
        if not self._takes_position_ids:
            inputs.pop("position_ids", None)
        if not self._takes_logits_to_keep:
            inputs.pop("logits_to_keep", None)
        device = self.model.device
        with self.context(len(ids)):
            return self.model(
                input_ids=ids.to(device), attention_mask=mask.to(device), **inputs
            )

    def _logits(
        self, ids_BS: Tensor, mask_BS: Tensor, columns: Tensor, use_cache: bool
    ) -> Tensor:
        """Logits in some columns only."""
        output = self._forward(
            ids_BS, mask_BS, logits_to_keep=columns, use_cache=use_cache
        )
        logits: Tensor = output.logits
        return logits if self._takes_logits_to_keep else logits[:, columns]

    def _full_scores(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> Tensor:
        """Scores [N] of N prompts with one candidate each, by one padded forward."""
        rows = [[*p, *c] for p, c in zip(prompts, candidates, strict=True)]
        ids_NS, mask_NS = self._pad_right(rows)
        lengths = [[len(prompt)] for prompt in prompts]
        length_N1 = torch.tensor(lengths, device=ids_NS.device)
        position_S = torch.arange(ids_NS.shape[1], device=ids_NS.device)
        with self._prompts(position_S < length_N1):
            logits_NSV = self._forward(ids_NS, mask_NS, use_cache=False).logits
        score_NS1 = _log_probs(logits_NSV[:, :-1]).gather(2, ids_NS[:, 1:, None])
        is_scored_NS = (position_S[1:] >= length_N1) & (mask_NS[:, 1:] == 1)
        return score_NS1.squeeze(2).where(is_scored_NS, 0.0).sum(1)

    def _pad_left(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Stack rows that end in the same column: ids and mask, [B, S]."""
        width = max(len(row) for row in rows)
        ids = [[self.filler] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _pad_right(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Stack rows that begin in the same column: ids and mask, [B, S]."""
        ids, mask = self._pad_left([list(row)[::-1] for row in rows])
        return ids.flip(1), mask.flip(1)


def _log_probs(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), dim=-1)


def _is_repeatable(cache: object) -> bool:
    # exact types: subclasses may hold states that batch_repeat_interleave leaves alone
    return isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, PromptLayer)
        for layer in cache.layers
    )


def _until(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(ids) if token in end_ids]
    return ids[: ends[0]] if ends else ids
