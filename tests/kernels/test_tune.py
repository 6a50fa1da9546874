"""Measured tables of tiles: what is tried, what is kept, what is read."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from molora.cli import app
from molora.errors import ConfigError
from molora.kernels import configs, tune
from molora.kernels.configs import KERNELS, RANKS, Bucket, Config, pick


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    configs.measured.cache_clear()
    configs._pick.cache_clear()


def test_without_a_gpu_the_command_says_so() -> None:
    run = CliRunner().invoke(app, ["kernels", "tune"])
    assert isinstance(run.exception, ConfigError)
    assert "finds none here" in str(run.exception)
    with pytest.raises(ConfigError, match="on a GPU only"):
        tune.tune(Path("unused.json"))


def test_every_bucket_has_candidates_that_differ() -> None:
    for kernel, rank, tokens in itertools.product(KERNELS, RANKS, range(4)):
        bucket = Bucket(kernel, rank, tokens, 1, 2)
        if tune._senseless(bucket):
            continue
        found = list(tune.candidates(bucket))
        assert len(found) >= 4 and len(set(found)) == len(found), bucket


def test_a_measured_table_goes_before_the_built_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("expand_add", "sm_90", 128, 3000, 4096)
    before = pick(*call)
    path = tmp_path / "table.json"
    monkeypatch.setenv("MOLORA_KERNEL_TABLE", str(path))
    bucket, config = configs.bucket_of(*call[:1], *call[2:], 2), Config(32, 32, 4, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda: "a device")
        tune._write(path, "sm_90", {bucket: config})
    assert configs.read_table(path, "sm_90") == {bucket: config}
    forget()
    assert pick(*call) == config != before
    # another bucket keeps the built-in configuration
    assert pick("expand_add", "sm_90", 64, 3000, 4096) != config
    with pytest.raises(ConfigError, match="measured on sm_90"):
        pick("expand_add", "sm_80", 128, 3000, 4096)
    with pytest.raises(ConfigError, match="name another file"):
        configs.read_table(path, "sm_80")


@pytest.mark.parametrize("text", ["{", "{}", '{"arch": "sm_90", "rows": [{}]}', "[]"])
def test_a_broken_table_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    monkeypatch.setenv("MOLORA_KERNEL_TABLE", str(path))
    with pytest.raises(ConfigError, match=r"table\.json: no table"):
        pick("wgrad", "sm_90", 128, 3000, 4096)


def test_a_table_that_is_named_and_missing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLORA_KERNEL_TABLE", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="MOLORA_KERNEL_TABLE"):
        pick("wgrad", "sm_90", 128, 3000, 4096)


def test_the_table_written_is_json_of_plain_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    rows = {Bucket("wgrad", 16, 3, 1, 2): Config(64, 64, 4, 3, 2)}
    tune._write(tmp_path / "deep" / "t.json", "sm_80", rows)
    raw = json.loads((tmp_path / "deep" / "t.json").read_text())
    assert raw["arch"] == "sm_80" and raw["device"] == "a device"
    assert raw["rows"] == [
        {"bucket": ["wgrad", 16, 3, 1, 2], "config": [64, 64, 4, 3, 2, 1]}
    ]
