"""JSON files are JSON."""

from __future__ import annotations

import doctest
import json
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
