"""Started by `tests/runs/test_sharding.py` in several processes, which make all runs of a file together.

torchrun --nproc-per-node N tests/sharded_runs.py FILE      # JSON: workspace → configuration
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peso
from peso.errors import PesoError

if __name__ == "__main__":
    for workspace, tree in json.loads(Path(sys.argv[1]).read_text()).items():
        try:
            peso.run(tree, workspace)
        except PesoError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
