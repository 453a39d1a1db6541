"""JSON files are JSON; what killed processes have left is removed."""

from __future__ import annotations

import doctest
import json
import platform
import shutil
from pathlib import Path

import numpy as np

from peso.cli.display import say_json
from peso.runtime import files


def test_what_is_not_finite_is_null(tmp_path: Path, capsys) -> None:
    value = {"a": [np.float64("nan"), 1.0, (float("-inf"), {"b": float("inf")})], "n": 2, "none": None}
    expected = {"a": [None, 1.0, [None, {"b": None}]], "n": 2, "none": None}
    files.write_json(tmp_path / "x.json", value)
    say_json(value)
    for text in ((tmp_path / "x.json").read_text(), capsys.readouterr().out):
        assert json.loads(text, parse_constant=lambda name: name) == expected
    assert not doctest.testmod(files).failed


def test_two_processes_may_clean_up_at_the_same_time(tmp_path: Path, monkeypatch) -> None:
    left = tmp_path / f".{'0' * 8}.{platform.node()}.{2**22 + 1}.0.writing"  # no process has this number
    left.mkdir()
    (left / "part").touch()
    rmtree = shutil.rmtree

    def second(path: Path, **options: bool) -> None:
        rmtree(path)  # by the other process
        rmtree(path, **options)

    monkeypatch.setattr(files.shutil, "rmtree", second)
    files.remove_left(tmp_path)
    assert not left.exists()
