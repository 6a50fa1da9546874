"""The GPU benchmark runs to its end without one, on tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"


def test_every_contender_runs_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH), "--tiny", "--json", str(out)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    trained, decoded = json.loads(out.read_text())["results"]
    shared = {"base", "peft r", "grouped_mm", "torch", "triton", "triton_grouped"}
    assert trained["seconds"].keys() == shared
    assert decoded["seconds"].keys() == shared | {"triton_gather"}
    assert all(value > 0 for value in decoded["seconds"].values())
