"""One YAML of a run: reading, overrides, and every kind of mistake in it."""

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molora.base_models import DTYPES
from molora.errors import ConfigError
from molora.run_config import ModelSettings, RunConfig, load_run_config

YAML = """
seed: 5
model: {name: some/base, dtype: bfloat16}
adapter:
  target_modules: [up_proj]
  experts: {kind: lora, num_experts: 4, r: 2}
  router: {kind: topk, top_k: 2}
  balance:
    - {kind: switch, weight: 0.01}
  overrides:
    - {match: 'layers[.]0', experts: {r: 1}}
data:
  max_length: 64
  tasks:
    - {name: near, train: rows/near.jsonl, eval: near.parquet, labels: ['yes', 'no']}
    - {name: far, train: /data/far.jsonl, eval: 'some/dataset:config'}
training:
  output_dir: runs/${seed}
  max_steps: 3
  learning_rate: 1e-3
collapse: {method: svd, rank: 4, calibration_rows: 32}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def test_all_sections_are_read(file: Path) -> None:
    config = load_run_config(file)
    assert config.model.to_dict() == {
        "name": "some/base",
        "dtype": "bfloat16",
        "device": None,
        "quantization": "none",
    }
    assert config.adapter.site("layers.0.up_proj").experts.to_dict()["r"] == 1
    assert config.data.tasks[0].labels == ["yes", "no"]
    assert config.training == {
        "seed": 5,
        "output_dir": "runs/5",
        "max_steps": 3,
        "learning_rate": 0.001,
    }
    assert (config.collapse.method, config.collapse.options) == ("svd", {"rank": 4})
    assert config.collapse.calibration_rows == 32
    assert config.output_dir == Path("runs/5")


def test_data_files_are_relative_to_the_yaml(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent.parent)
    near, far = load_run_config(Path(file.parent.name) / "run.yaml").data.tasks
    assert near.train == str(file.parent / "rows" / "near.jsonl")
    assert near.eval == str(file.parent / "near.parquet")
    assert (far.train, far.eval) == ("/data/far.jsonl", "some/dataset:config")


def test_it_survives_the_way_to_json_and_back(file: Path) -> None:
    config = load_run_config(file)
    assert RunConfig.from_dict(config.to_dict()) == config


def test_defaults(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "adapter: {target_modules: [a], experts: {kind: lora}}\n"
        "data: {tasks: [{name: t, train: t.jsonl}]}\n"
        "training: {output_dir: out}\n"
    )
    config = load_run_config(path)
    assert (config.seed, config.training["seed"]) == (0, 0)
    assert (config.model.name, config.model.dtype) == ("smollm2", "auto")
    assert (config.collapse.method, config.collapse.options) == ("calibrated", {})


def test_dtypes_are_those_of_the_loader() -> None:
    field = ModelSettings.model_fields["dtype"]
    assert typing.get_args(field.annotation) == DTYPES


@pytest.mark.parametrize(
    ("override", "read", "want"),
    [
        ("data.tasks.0.weight=2", lambda c: c.data.tasks[0].weight, 2.0),
        ("data.tasks[1].limit=7", lambda c: c.data.tasks[1].limit, 7),
        ("training.learning_rate=1e-4", lambda c: c.training["learning_rate"], 1e-4),
        ("training.disable_tqdm=true", lambda c: c.training["disable_tqdm"], True),
        ("training.max_steps=9", lambda c: c.training["max_steps"], 9),
        ("adapter.experts.r=[1,2,3,4]", lambda c: c.adapter.experts.r, [1, 2, 3, 4]),
        ("adapter.overrides=[]", lambda c: c.adapter.overrides, []),
        ("adapter.target_modules=all-linear", lambda c: c.adapter.target_modules, ...),
        # a value replaces what was there: no top_k is left behind
        ("adapter.router={kind: soft}", lambda c: c.adapter.router.kind, "soft"),
        ("model.device=", lambda c: c.model.device, None),
        ("model.device=null", lambda c: c.model.device, None),
        ("model.name='a=b'", lambda c: c.model.name, "a=b"),
        ("model.name=x=y", lambda c: c.model.name, "x=y"),
        ("collapse.energy=0.9", None, None),
        ("seed=8", lambda c: (c.seed, c.training["seed"]), (8, 8)),
        ("seed=8", lambda c: str(c.output_dir), "runs/8"),
    ],
)
def test_overrides(
    file: Path, override: str, read: Callable[[RunConfig], Any], want: Any
) -> None:
    if override.startswith("data.tasks.0.weight"):
        config = load_run_config(file, [override, "data.tasks.1.weight=1"])
    elif read is None:
        config = load_run_config(file, ["collapse={method: svd}", override])
        read, want = lambda c: c.collapse.options, {"energy": 0.9}
    else:
        config = load_run_config(file, [override])
    assert read(config) == ("all-linear" if want is ... else want)


def test_later_overrides_win_and_sections_can_be_new(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(YAML[: YAML.index("collapse:")])
    config = load_run_config(path, ["collapse.rank=3", "collapse.rank=8"])
    assert config.collapse.options == {"rank": 8}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': expected key.path=value"),
        ("=3", "override '=3': expected key.path=value"),
        ("data..x=3", "expected key.path=value"),
        ("data.tasks.2.weight=1", "override 'data.tasks.2.weight=1': .*out of range"),
        ("data.tasks.near.weight=1", "'data.tasks.near.weight=1': .*not an int"),
        ("adapter.experts={r: ", "'adapter.experts={r: ': the value is not valid YAML"),
        ("training.output_dir=${nowhere}", "run.yaml: .*'nowhere' not found"),
        ("sede=3", "\nsede: unknown.* 'seed'"),
        ("training.max_step=3", r"\ntraining\.max_step: unknown field\. Did you mean"),
        ("training.max_steps=many", r"\ntraining\.max_steps: .*\(got 'many'\)"),
        ("adapter.experts.rr=3", r"\nadapter\.experts\.rr: unknown field\. Did you"),
        ("adapter.router=soft", r"\nadapter\.router: "),
        ("model=smollm2", r"\nmodel: expected a mapping"),
        ("data.tasks={}", r"\ndata\.tasks: .*list"),
    ],
)
def test_wrong_overrides(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(file, [override])


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("model:", "modl:", "modl: unknown.* 'model'"),
        ("dtype:", "dtpe:", "model.dtpe: unknown.* 'dtype'"),
        ("bfloat16", "bf16", "model.dtype: .*'bfloat16'"),
        (
            "target_modules",
            "target_module",
            "adapter.target_module: unknown.* 'target_modules'",
        ),
        (
            "num_experts",
            "num_expert",
            "adapter.experts.num_expert: unknown.* 'num_experts'",
        ),
        ("kind: lora", "kind: loraa", "adapter.experts.kind: .*Did you mean 'lora'"),
        ("top_k: 2", "topk: 2", "adapter.router.topk: unknown.* 'top_k'"),
        ("top_k: 2", "top_k: 5", "adapter.*router.top_k=5 exceeds num_experts=4"),
        ("kind: topk", "kind: topkk", "adapter.router.kind: .*Did you mean 'topk'"),
        ("weight: 0.01", "wight: 1", r"adapter.balance\[0\].wight: unknown.*'weight'"),
        ("match:", "mach:", "adapter.overrides.0.mach: unknown.* 'match'"),
        ("{r: 1}", "{q: 1}", r"adapter.*overrides\[0\].experts.q: unknown field"),
        ("max_length", "maxlength", "data.maxlength: unknown.* 'max_length'"),
        ("labels:", "label:", "data.tasks.0.label: unknown.* 'labels'"),
        ("name: far", "name: near", "data.tasks: names must be unique"),
        ("max_steps", "maxsteps", "training.maxsteps: unknown.* 'max_steps'"),
        ("output_dir:", "outputdir:", "training.output_dir: this field is required"),
        (
            "max_steps: 3",
            "seed: 3",
            "training.seed: 3 differs from the seed of the run",
        ),
        ("method: svd", "method: sdv", "collapse.method: .*Did you mean 'svd'"),
        ("method: svd", "method: concat", "collapse.*rank: concat keeps the rank R"),
        ("rank: 4", "rnk: 4", "collapse.rnk: unknown.* 'rank'"),
        ("rank: 4", "rank: 0", "collapse.rank: .*greater than or equal to 1"),
        ("rank: 4", "ridges: [1.0]", "collapse.ridges: unknown field"),
        (
            "calibration_rows",
            "calibration_row",
            "collapse.calibration_row: unknown.* 'calibration_rows'",
        ),
    ],
)
def test_mistakes_are_told_with_their_whole_path(
    file: Path, right: str, wrong: str, message: str
) -> None:
    text = YAML.replace(right, wrong, 1)
    assert text != YAML
    file.write_text(text)
    with pytest.raises(
        ConfigError, match=rf"(?s)run\.yaml: wrong settings\n.*{message}"
    ):
        load_run_config(file)


def test_all_problems_are_told_together(file: Path) -> None:
    text = YAML
    for right, wrong in [
        ("seed: 5", "seed: -1\nsedd: 4"),
        ("dtype:", "dtpe:"),
        ("num_experts: 4, r: 2", "num_expert: 4, r: 0"),
        ("max_length: 64", "max_length: 0"),
        ("labels: ['yes', 'no']", "labels: 3"),
        ("max_steps: 3", "max_step: 3\n  bf16: maybe"),
        ("rank: 4", "rank: 0"),
    ]:
        text = text.replace(right, wrong, 1)
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(file)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{file}: wrong settings"
    assert {line.split(":")[0] for line in lines} == {
        "seed",
        "sedd",
        "model.dtpe",
        "adapter.experts.num_expert",
        "adapter.experts.r",
        "data.max_length",
        "data.tasks.0.labels",
        "training.max_step",
        "training.bf16",
        "collapse.rank",
    }


@pytest.mark.parametrize("section", ["adapter", "data", "training"])
def test_a_missing_section_is_named(file: Path, section: str) -> None:
    with pytest.raises(ConfigError, match=rf"\n{section}"):
        load_run_config(file, [f"{section}=null"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "adapter: this field is required\ndata: this field is required"),
        ("- 1", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("seed: 1\nseed: 2", "not valid YAML: .*(?i:duplicate)"),
    ],
)
def test_files_that_are_no_run(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)run\.yaml.*{message}"):
        load_run_config(file)


def test_a_missing_file_offers_the_nearest(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"runn\.yaml: no such file.*'run\.yaml'"):
        load_run_config(file.with_name("runn.yaml"))
