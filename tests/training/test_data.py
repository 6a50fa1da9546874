"""Data settings, files and formats: every fault names its field, or file and line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from molora.errors import ConfigError, DataError
from molora.training.data import DataConfig, TaskConfig, load_task_rows
from molora.training.formats import Row, Turn

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def data_config(*tasks: dict[str, Any], **settings: Any) -> DataConfig:
    return DataConfig.from_dict({"tasks": list(tasks), **settings}, "data")


@pytest.mark.parametrize(
    ("tasks", "settings", "wanted"),
    [
        ([{"name": "a"}], {}, ["data.tasks.0: task 'a': give train, eval or both"]),
        ([], {}, ["data.tasks", "at least 1"]),
        (
            [{"name": "a", "trian": "x.jsonl"}],
            {},
            ["data.tasks.0.trian: unknown field. Did you mean 'train'?"],
        ),
        ([{"name": "a", "train": "x.jsonl", "weight": 0}], {}, ["weight", "than 0"]),
        (
            [{"name": "a", "train": "x.jsonl", "format": "alpacca"}],
            {},
            ["data.tasks.0.format", "'alpaca'"],
        ),
        (
            [{"name": "a", "train": "x.jsonl"}, {"name": "a", "train": "y.jsonl"}],
            {},
            ["names must be unique; used twice: ['a']"],
        ),
        (
            [{"name": "a", "train": "x.jsonl", "weight": 2}],
            {"temperature": 3},
            ["temperature: 3.0 has no effect beside the weights of ['a']"],
        ),
        (
            [
                {"name": "a", "train": "x.jsonl", "weight": 2},
                {"name": "b", "train": "y.jsonl"},
                {"name": "c", "eval": "z.jsonl"},
            ],
            {},
            ["weight is given for ['a'] but not for ['b']; give every task"],
        ),
        ([{"name": "a", "train": "x.jsonl"}], {"temperature": 0.5}, ["temperature"]),
        (
            [{"name": "a", "train": "x.jsonl", "train_split": "all"}],
            {},
            ["train_split is read only for hub data sets", "x.jsonl"],
        ),
        (
            [{"name": "a", "train": "x.jsonl", "labels": ["p", "n"]}],
            {},
            ["labels is read only with eval"],
        ),
        (
            [{"name": "a", "eval": "x.jsonl", "limit": 3, "weight": 1}],
            {},
            ["weight, limit is read only with train"],
        ),
        (
            [{"name": "a", "eval": "x.jsonl", "max_new_tokens": 9}],
            {},
            ["max_new_tokens is read only with exact_match: true"],
        ),
        (
            [{"name": "a", "eval": "x.jsonl", "labels": ["p", "p"]}],
            {},
            ["labels must differ"],
        ),
        (
            [{"name": "a", "eval": "x.jsonl", "labels": ["p", " n"]}],
            {},
            ["white space"],
        ),
    ],
)
def test_wrong_settings_name_the_field_and_the_fix(
    tasks: list[dict[str, Any]], settings: dict[str, Any], wanted: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        data_config(*tasks, **settings)
    for part in wanted:
        assert part in str(caught.value)


def test_settings_survive_a_round_trip() -> None:
    task = {
        "name": "a",
        "train": "x.jsonl",
        "eval": "org/set:cfg",
        "labels": ["p", "n"],
    }
    config = data_config(task, temperature=2, on_long="drop")
    assert DataConfig.from_dict(config.to_dict()) == config


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what datasets stores out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


GOOD = '{"prompt": "a:", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", "x.jsonl holds no rows"),
        ("\n  \n", "x.jsonl holds no rows"),
        (GOOD * 16 + '{"prompt": "a:",\n', "x.jsonl:17: invalid JSON, column 17"),
        (GOOD + "\n" + '{"prompt": "a"}\n', "x.jsonl:3: missing column 'completion'"),
        (GOOD + "[1]\n", "x.jsonl:2: expected an object with named columns, got list"),
        (GOOD + '{"prompt": "a", "completion": ""}', "x.jsonl:2: completion is empty"),
        (GOOD + '{"prompt": " ", "completion": "b"}', "x.jsonl:2: prompt is empty"),
        (
            GOOD + '{"prompt": "a", "completion": null}',
            "x.jsonl:2: completion must be text, got NoneType",
        ),
        (
            GOOD + '{"prompt": "ab\\ud83d", "completion": "b"}',
            "x.jsonl:2: prompt holds a lone surrogate (U+D83D at character 2)",
        ),
        ('{"text": "a"}', "x.jsonl:1: columns text fit no format. Wanted: prompt_comp"),
        (
            '{"prompt": "a", "completion": "b", "messages": []}',
            "x.jsonl:1: the columns fit several formats (prompt_completion, messages)",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "x.jsonl:1: no assistant turn, so nothing to learn",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "x.jsonl:1: the first turn must not be the assistant's",
        ),
        (
            '{"messages": [{"role": "users", "content": "a"}]}',
            "x.jsonl:1: messages[0]: unknown role 'users'. Did you mean 'user'?",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}',
            "x.jsonl:1: messages[1]: missing key 'content'",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "  "}]}',
            "x.jsonl:1: messages[1]: content is empty",
        ),
        (
            '{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}',
            "x.jsonl:1: messages[0]: key 'tool_calls' is not supported",
        ),
        ('{"messages": "hi"}', "x.jsonl:1: messages must be a list of turns, got str"),
        (
            '{"conversations": [{"from": "humna", "value": "a"}]}',
            "x.jsonl:1: conversations[0]: unknown role 'humna'. Did you mean 'human'?",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, wanted: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        load_task_rows(TaskConfig(name="t", train="x.jsonl"), "train", tmp_path)
    assert wanted in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode() + b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: not UTF-8 \(byte 13:"):
        load_task_rows(TaskConfig(name="t", train="x.jsonl"), "train", tmp_path)


def test_a_missing_file_offers_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "sentiment.train.jsonl", pair("a", "b"))
    task = TaskConfig(name="t", train="sentimnt.train.jsonl")
    with pytest.raises(DataError, match="task 't': no file .*'sentiment.train.jsonl'"):
        load_task_rows(task, "train", tmp_path)
    with pytest.raises(DataError, match="the folder .*nowhere does not exist"):
        load_task_rows(task, "train", tmp_path / "nowhere")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(DataError, match="d.jsonl is not a file"):
        load_task_rows(TaskConfig(name="t", train="d.jsonl"), "train", tmp_path)


def test_a_task_without_that_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="task 't': no eval data; set eval"):
        load_task_rows(TaskConfig(name="t", train="x.jsonl"), "eval")


def test_formats_become_turns(tmp_path: Path) -> None:
    said = (Turn("user", "hi"), Turn("assistant", "yo"))
    cases: list[tuple[dict[str, Any], tuple[Turn, ...], bool]] = [
        (pair("hi", "yo") | {"task": "other columns may stand"}, said, False),
        ({"instruction": "hi", "input": "", "output": "yo"}, said, False),
        (
            {"instruction": "do", "input": "x", "output": "yo"},
            (Turn("user", "do\n\nx"), said[1]),
            False,
        ),
        (
            {
                "messages": [turn._asdict() for turn in said]
                + [{"role": "tool", "content": "t"}]
            },
            (*said, Turn("tool", "t")),
            True,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s", "weight": None},
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "yo"},
                ]
            },
            (Turn("system", "s"), *said),
            True,
        ),
    ]
    for raw, turns, is_dialogue in cases:
        path = write(tmp_path / "x.jsonl", raw)
        rows = load_task_rows(TaskConfig(name="t", train=str(path)), "train")
        assert rows == [Row(f"{path}:1", turns, is_dialogue)]


def test_a_given_format_is_held_against_every_row(tmp_path: Path) -> None:
    task = TaskConfig(name="t", train="x.jsonl", format="alpaca")
    write(tmp_path / "x.jsonl", pair("a", "b"))
    with pytest.raises(
        DataError, match="missing column 'instruction' of format alpaca"
    ):
        load_task_rows(task, "train", tmp_path)
    both = pair("a", "b") | {"instruction": "i", "output": "o"}
    write(tmp_path / "x.jsonl", both)
    assert load_task_rows(task, "train", tmp_path)[0].turns[0].content == "i"


def test_json_arrays_blank_lines_marks_and_limits(tmp_path: Path) -> None:
    rows = [pair(f"p{index}", "c") for index in range(3)]
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps(rows, indent=1))
    (tmp_path / "y.json").write_text("\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "z.jsonl").write_text("\ufeff" + json.dumps(rows[0]) + "\r\n")
    for name, places in (("x.json", [" row 0", " row 1"]), ("y.json", [":1", ":3"])):
        task = TaskConfig(name="t", train=name, limit=2)
        loaded = load_task_rows(task, "train", tmp_path)
        assert [row.where for row in loaded] == [
            str(tmp_path / name) + place for place in places
        ]
        assert [row.turns[0].content for row in loaded] == ["p0", "p1"]
    task = TaskConfig(name="t", train="z.jsonl")
    assert load_task_rows(task, "train", tmp_path)[0].turns[0].content == "p0"
    (tmp_path / "x.json").write_text('[\n{"prompt": 1},\n}\n]')
    with pytest.raises(DataError, match=r"x\.json:3: invalid JSON, column 1"):
        load_task_rows(TaskConfig(name="t", train="x.json"), "train", tmp_path)


def test_parquet_rows_and_their_faults(tmp_path: Path, own_cache: None) -> None:
    table = datasets.Dataset.from_list([pair("a", "b"), pair("c", "")])
    table.to_parquet(str(tmp_path / "x.parquet"))
    task = TaskConfig(name="t", train="x.parquet", limit=1)
    assert load_task_rows(task, "train", tmp_path)[0].turns[1] == Turn("assistant", "b")
    task = TaskConfig(name="t", train="x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet row 1: completion is empty"):
        load_task_rows(task, "train", tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(
        DataError, match=r"'t': .*x\.parquet is not readable as Parquet"
    ):
        load_task_rows(task, "train", tmp_path)


def test_hub_data_sets_by_name_config_and_split(
    tmp_path: Path, own_cache: None
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "validation.jsonl", pair("a", "b"), pair("", "d"))
    task = TaskConfig(name="t", eval=f"{folder}:default", eval_limit=1)
    rows = load_task_rows(task, "eval")
    assert rows[0].turns == (Turn("user", "a"), Turn("assistant", "b"))
    task = TaskConfig(name="t", eval=str(folder))
    with pytest.raises(
        DataError, match="task 't', data set .*'validation', row 1: pro"
    ):
        load_task_rows(task, "eval")
    task = TaskConfig(name="t", eval=str(folder), eval_split="tets")
    with pytest.raises(DataError, match="cannot load data set .*split 'tets'"):
        load_task_rows(task, "eval")
    with pytest.raises(DataError, match=r"'no/such'.*local files end in \.jsonl"):
        load_task_rows(TaskConfig(name="t", train="no/such"), "train")


def test_quickstart_files_are_whole() -> None:
    starts = {
        "sentiment.train": "139b63ec7c7752e0",
        "sentiment.eval": "e3c451d55626744b",
        "intent_domain.train": "91070cc155af4d04",
        "intent_domain.eval": "d2c3d425025cf7d4",
        "text2sql.train": "bb855ffd61135986",
        "text2sql.eval": "af8a00974891ee67",
        "scan.train": "ca5714c010f78df2",
        "scan.eval": "69215f028313e2ef",
    }
    credits = (QUICKSTART / "LICENSES.md").read_text()
    for name, start in starts.items():
        path = QUICKSTART / f"{name}.jsonl"
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(start)
        task, split = name.split(".")
        rows = load_task_rows(TaskConfig(name=task, train=str(path)), "train")
        assert len(rows) == {"train": 1200, "eval": 200}[split]
        assert f"- {task}: " in credits
