"""molora generate and molora routes."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import molora
from molora.atomic import file_to_write
from molora.commands import session
from molora.config import AdapterConfig
from molora.errors import ConfigError
from molora.page import Prompts, save_page
from molora.prompt import prompt_from_labels
from molora.records import RoutingTrace
from molora.report import RoutingReport, TokenStrip, pieces, save_heatmap, token_strip
from molora.routers import ROUTERS, AdapterRouter
from molora.run_config import RunConfig
from molora.schema import nearest
from molora.training.data import Collator, build_eval_sets
from molora.training.encoding import encode, split_answer
from molora.training.formats import parse_row
from molora.training.routing_log import LOG_NAME

LIMIT = 32
"""Rows per task that ``routes`` looks at when no prompt is given."""


def generate(
    config: RunConfig,
    adapter: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    num_beams: int,
    task: str | None,
    batch_size: int,
) -> None:
    """Continue prompts by greedy or beam search and print the answers.

    Args:
        config: The run.
        adapter: Folder of the adapter.
        prompts: Texts, written as the run's tasks write theirs.
        max_new_tokens: Longest answer in tokens.
        num_beams: Beams; 1 is greedy.
        task: Task of all prompts, for routers that read it.
        batch_size: Prompts per batch, padded on the left.

    Raises:
        MoloraError: No adapter, an unknown task, no task where routers read it, an
            empty or too long prompt.
    """
    _check_task(config, adapter, task)
    model, tokenizer = session.trained(config, adapter)
    rows = _encode(prompts, config, tokenizer)
    for ids, _ in rows:
        _check_length(len(ids) + max_new_tokens, model)
    answers: list[str] = []
    starts = range(0, len(rows), batch_size)
    for start in session.progress(starts, "Generating"):
        batch = rows[start : start + batch_size]
        ids_BS, mask_BS = _pad_left([ids for ids, _ in batch], tokenizer, model)
        names = [task] * len(batch) if task else []
        with molora.tasks(model, names) if names else nullcontext():
            output_BS = model.generate(  # type: ignore[operator]
                input_ids=ids_BS,
                attention_mask=mask_BS,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                eos_token_id=_ends(model, tokenizer, [end for _, end in batch]),
                pad_token_id=session.filler(tokenizer),
            )
        fresh = output_BS[:, ids_BS.shape[1] :]
        answers += tokenizer.batch_decode(fresh, skip_special_tokens=True)
    for number, answer in enumerate(answers, start=1):
        if len(answers) > 1:
            session.out.rule(f"prompt {number}", align="left")
        session.say(answer.strip())


def routes(
    config: RunConfig,
    adapter: Path,
    prompts: Sequence[str],
    *,
    limit: int | None,
    layer: str | None,
    task: str | None,
    png: Path | None,
    html: Path | None,
    json: Path | None,
) -> None:
    """Show which experts the tokens of prompts and of evaluation rows use.

    Args:
        config: The run.
        adapter: Folder of the adapter.
        prompts: Texts to show token by token.
        limit: Rows of each task's evaluation data for the tables; by default ``LIMIT``
            without prompts or with a page, else none.
        layer: Layer number or module path for the coloured tokens; all by default.
        task: Task of all prompts, for routers that read it.
        png: File for the heat map.
        html: File for the page, with the training log from beside the adapter.
        json: File for all numbers.

    Raises:
        MoloraError: No adapter, nothing to route, an unknown task or layer, no task
            where routers read it, a file that cannot be written.
    """
    session.require_writable(png, json)
    _check_page(html)
    if prompts or task is not None:
        _check_task(config, adapter, task)
    if limit is None:
        limit = 0 if prompts and html is None else LIMIT
    if not prompts and not limit:
        raise ConfigError("nothing to route: give --prompt, or --limit above 0")
    model, tokenizer = session.trained(config, adapter)
    results: dict[str, Any] = {}
    shown = None
    traces = []
    if limit:
        traces.append(_task_trace(config, model, tokenizer, limit))
    if prompts:
        trace, strips = _prompt_trace(config, model, tokenizer, prompts, task, layer)
        traces.append(trace)
        results["prompts"] = [
            {"tokens": strip.tokens, "experts": strip.experts} for strip in strips
        ]
        shown = Prompts(trace, [strip.tokens for strip in strips])
        for strip in strips:
            session.out.print(strip, soft_wrap=True)
            session.out.print()
    report = RoutingReport(traces[0])
    session.out.print(report.task_table())
    session.out.print(report.layer_table())
    if png is not None:
        save_heatmap(traces[0], png)
        session.note(f"Wrote {png}")
    if html is not None:
        log = adapter.resolve().parent / LOG_NAME
        title = f"Experts of {adapter}"
        save_page(html, model, traces[0], title=title, log=log, prompts=shown)
        session.note(f"Wrote {html}")
    if json is not None:
        session.write_json(json, {**report.to_dict(), **results})


def _task_trace(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
) -> RoutingTrace:
    """Route some evaluation rows of every task, answers included."""
    tasks = [
        t.model_copy(update={"eval_limit": min(limit, t.eval_limit or limit)})
        for t in config.data.tasks
    ]
    data = config.data.model_copy(update={"tasks": tasks})
    collate = Collator(session.filler(tokenizer))
    work = []
    for name, eval_set in build_eval_sets(data, tokenizer).items():
        rows = [row.encoded for row in eval_set.rows]
        work += [(name, rows[i : i + 8]) for i in range(0, len(rows), 8)]
    with molora.record_routing(model, keep_tokens=False) as trace, torch.no_grad():
        for name, rows in session.progress(work, "Routing"):
            batch = collate(rows)
            told = molora.prompts(model, prompt_from_labels(batch["labels"]))
            with molora.tasks(model, [name] * len(rows)), told:
                model(
                    input_ids=batch["input_ids"].to(model.device),
                    attention_mask=batch["attention_mask"].to(model.device),
                )
    return trace


def _prompt_trace(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    task: str | None,
    layer: str | None,
) -> tuple[RoutingTrace, list[TokenStrip]]:
    """Route prompts one by one; one strip each."""
    rows = [ids for ids, _ in _encode(prompts, config, tokenizer)]
    for ids in rows:
        _check_length(len(ids), model)
    with molora.record_routing(model) as trace, torch.no_grad():
        for ids in rows:
            with molora.tasks(model, [task]) if task else nullcontext():
                model(input_ids=torch.tensor([ids], device=model.device))
    strips = [
        token_strip(pieces(ids, tokenizer), trace, forward=i, layer=layer)
        for i, ids in enumerate(rows)
    ]
    return trace, strips


def _encode(
    prompts: Sequence[str], config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], int]]:
    """Ids of each prompt, written as in training, and the token that ends an answer."""
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        # the answer only completes the row; its end is what training taught
        raw = {"prompt": prompt, "completion": "-"}
        row = parse_row(raw, "prompt_completion", f"prompt {number}")
        ids, answer = split_answer(encode(row, tokenizer, config.data.template))
        rows.append((ids, answer[-1]))
    return rows


def _ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained: list[int]
) -> list[int]:
    """Tokens that end an answer: the model's own, and the one that training taught."""
    own = model.generation_config.eos_token_id
    special = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    ends = set(own if isinstance(own, list) else [own])
    # a template may end a turn with an ordinary token, which must not stop an answer
    ends |= {tokenizer.eos_token_id} | {token for token in trained if token in special}
    return sorted(token for token in ends if token is not None)


def _pad_left(
    rows: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, S] of prompts that end in the same column."""
    width = max(map(len, rows))
    pad = session.filler(tokenizer)
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    device = model.device
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _check_task(config: RunConfig, adapter: Path, task: str | None) -> None:
    """Refuse a task that is unknown, or none where the adapter's routers need one."""
    known = _known_tasks(session.saved_settings(config, adapter))
    names = known or [t.name for t in config.data.tasks]
    if task is None and known:
        raise ConfigError(
            "the routers of this adapter read the task of a prompt; give it with "
            f"--task. Tasks: {', '.join(known)}"
        )
    if task is not None and task not in names:
        owner = "that the routers know" if known else "of this run"
        raise ConfigError(
            f"--task {task!r} is no task {owner}.{nearest(task, names)} "
            f"Tasks: {', '.join(names)}"
        )


def _known_tasks(adapter: AdapterConfig) -> list[str]:
    """Tasks that all routers which read the task know; none where no router does."""
    known: list[list[str]] = []
    for router in adapter.routers():
        tasks = list(ROUTERS[router.kind].known_tasks(router))
        if isinstance(router, AdapterRouter.Config):
            tasks.append(AdapterRouter.BASE)
        if tasks:
            known.append(tasks)
    return [name for name in known[0] if all(name in k for k in known)] if known else []


def _check_page(html: Path | None) -> None:
    try:
        if html is not None:
            file_to_write(html)
    except OSError as error:
        raise ConfigError(f"{html}: cannot be written: {error.strerror}") from error


def _check_length(tokens: int, model: PreTrainedModel) -> None:
    longest = getattr(model.config, "max_position_embeddings", None) or math.inf
    if tokens > longest:
        raise ConfigError(
            f"a prompt with its answer takes {tokens} tokens; the model reads at most "
            f"{longest}. Shorten the prompt or lower --max-new-tokens"
        )
