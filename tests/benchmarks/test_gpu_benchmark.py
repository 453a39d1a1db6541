"""The GPU benchmark runs, at toy size on the CPU: every figure is there and is a number."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_all_figures_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = ROOT / "benchmarks" / "gpu.py"
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", "--device", "cpu", "--peak-tflops", "1"])
    runpy.run_path(str(script), run_name="__main__")
    found = json.loads(capsys.readouterr().out)["toy"]
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


def test_the_account_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events as a profiler gives them on a GPU: operations of the host, and kernels of the device."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    def event(key: str, count: int, micros: float, *shapes: list[int], device: Any = DeviceType.CPU) -> Any:
        return SimpleNamespace(
            key=key, count=count, self_device_time_total=micros, input_shapes=shapes, device_type=device
        )

    events = [
        event("aten::mm", 2, 3e6, [90, 64], [64, 64]),
        event("aten::addmm_", 1, 1e6, [90, 64], [90, gpu.RANK], [gpu.RANK, 64]),
        event("aten::_scaled_dot_product_efficient_attention", 1, 5e5, [1, 2, 90, 32]),
        event("aten::add", 4, 2.5e5, [90, 64]),
        event("gemm", 3, 4e6, device=DeviceType.CUDA),
        event("add_kernel", 4, 7.5e5, device=DeviceType.CUDA),
    ]
    found = gpu.device_account(SimpleNamespace(key_averages=lambda **_: events))
    assert found == {
        "gpu_time": {"products": 3.0, "adapters' products": 1.0, "attention": 0.5, "else": 0.25},
        "kernels": 7,
        "gpu_kernels": [("gemm", 4.0), ("add_kernel", 0.75)],
    }
