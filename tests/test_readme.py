"""The README's example runs as it stands, and its commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_python_example_runs_and_leaves_a_peft_adapter(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 30
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "runs/readme/peft").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= written


def test_two_commands_come_first() -> None:
    first = [line for line in README.splitlines() if line.startswith("    ")][:2]
    assert [line.split()[:2] for line in first] == [["make", "demo"], ["make", "test"]]


def test_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"^    molora (\w+)", README, re.MULTILINE))
    help_text = subprocess.run(
        [Path(sys.executable).parent / "molora", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert named and all(name in help_text for name in named)
