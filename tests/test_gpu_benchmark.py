"""The GPU benchmark runs, at toy size on the CPU: every figure is there and is a number."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_figures_are_told() -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--quick", "--device", "cpu", "--peak-tflops", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(output.stdout)["toy"]
    for part in ("training", "decoding"):
        for key in ("instruct_ratio", "stream_ratio", "instruct_expert_ratio", "stream_expert_ratio"):
            assert found[part][key] > 0
        assert {"ours, instruct", "ours, stream", "usual way", "expert's way"} <= set(
            found[part]["contestants"]
        )
    for figures in found["training"]["contestants"].values():
        for key in ("examples_per_second", "tokens_per_second", "model_flop_utilisation", "peak_gib"):
            assert 0 < figures[key] < math.inf
    for figures in found["decoding"]["contestants"].values():
        assert 0 < figures["p50_ms"] <= figures["p99_ms"]
        assert figures["users_per_second"] > 0
