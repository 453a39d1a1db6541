"""What the command line does with mistakes, failures and odd text, whatever the command."""

from __future__ import annotations

import json
import subprocess
import sys

SLOW = ("torch", "transformers", "peft", "accelerate", "scipy", "sklearn", "matplotlib", "faiss")


REFUSED = [
    ["frob"],
    ["run", "--nope"],
    ["run", "absent.yaml"],
    ["compare", "absent.yaml"],
    ["ingest", "absent.csv", "-w", "w"],
    ["pull", "gpt-9"],
    *(
        [*command.split(), "-w", "nowhere"]
        for command in ("tokenize", "train", "update", "evaluate", "report", "diagnose", "baseline ease")
    ),
    ["recommend", "-w", "nowhere", "--user", "u"],
    ["export", "-w", "nowhere", "-o", "x"],
]


def test_a_refused_call_loads_no_slow_library(tmp_path):
    """Loading PyTorch and its kin costs seconds; modules are counted, since seconds depend on the machine."""
    program = f"""
import json, sys
from peso.cli import app
loaded = {{}}
for arguments in {[["--help"], *REFUSED]!r}:
    sys.argv = ["peso", *arguments]
    try:
        app.main()
    except SystemExit as stop:
        loaded[" ".join(arguments)] = [stop.code, [name for name in {SLOW!r} if name in sys.modules]]
print(json.dumps(loaded), file=sys.__stderr__)
"""
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    calls = json.loads(found.stderr.splitlines()[-1])
    assert len(calls) == len(REFUSED) + 1
    for call, (status, loaded) in calls.items():
        assert (status == 0) == (call == "--help"), call
        assert loaded == [], call
