"""Check that a comparison ran on the frozen streams of the benchmark.

    python examples/benchmark/streams.py runs/benchmark

It reads the streams in DIR/data and compares what they contain with `streams.json`: for every stage the users
with cases, training targets and a sha256 of their histories. It also says whether the semantic IDs are those
of the reference. The exit code is 1 if a stream differs or is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peso.events.histories import Stage
from peso.events.stream import Stream
from peso.items.semantic_ids import SemanticIds
from peso.runs.workspace import Workspace

FROZEN = Path(__file__).with_name("streams.json")


def digest_of_stage(stage: Stage, item_ids: list[str]) -> dict[str, Any]:
    """The numbers of users and targets, and the sha256 of one line per user with cases, sorted: the user, the
    items before the stage and those in it, all by their ids."""
    lines = []
    for row in stage.eligible():
        parts = (stage.previous[row], stage.current[row])
        items = (" ".join(item_ids[item] for item in part) for part in parts)
        lines.append("\t".join([stage.users[row], *items]) + "\n")
    targets = sum(sequence.targets for sequence in stage.training_sequences())
    text = "".join(sorted(lines)).encode()
    return {"users": len(lines), "targets": targets, "sha256": hashlib.sha256(text).hexdigest()}


def describe(stream: Stream, semantic_ids: SemanticIds) -> dict[str, Any]:
    """What `streams.json` holds of a stream."""
    ids = [f"{item}\t{''.join(semantic_ids.semantic_id(item))}\n" for item in semantic_ids.item_ids]
    return {
        "items": len(stream.item_ids),
        "stages": [digest_of_stage(stream.stage(n), stream.item_ids) for n in range(stream.stages)],
        "semantic_ids": hashlib.sha256("".join(sorted(ids)).encode()).hexdigest(),
    }


def differences(found: dict[str, Any], frozen: dict[str, Any]) -> Iterator[str]:
    """What of a stream is not as frozen, without semantic IDs, which depend on versions of libraries."""
    if found["items"] != frozen["items"]:
        yield f"{found['items']:,} items, not {frozen['items']:,}"
    if len(found["stages"]) != len(frozen["stages"]):
        yield f"{len(found['stages'])} stages, not {len(frozen['stages'])}"
        return
    for number, (one, other) in enumerate(zip(found["stages"], frozen["stages"], strict=True)):
        if one != other:
            keys = ", ".join(f"{key} {one[key]}, not {other[key]}" for key in one if one[key] != other[key])
            yield f"stage {number}: {keys}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory of the comparison (-w)")
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    missing, wrong = set(frozen), 0
    places = sorted(parser.parse_args().directory.glob("data/*/*/stream"))
    if not places:
        parser.error("there are no streams in DIR/data; name the directory of `peso compare`")
    for place in places:
        name, workspace = place.parts[-3], Workspace.open(place.parent)
        if name not in frozen:
            print(f"{name}: not a stream of the benchmark")
            continue
        missing.discard(name)
        found = describe(workspace.stream, workspace.semantic_ids)
        problems = list(differences(found, frozen[name]))
        wrong += bool(problems)
        ids = "as" if found["semantic_ids"] == frozen[name]["semantic_ids"] else "not as"
        print(f"{name}: {'; '.join(problems) or 'as frozen'} (semantic IDs {ids} in the reference)")
    for name in sorted(missing):
        print(f"{name}: missing")
    sys.exit(1 if wrong or missing else 0)


if __name__ == "__main__":
    main()
