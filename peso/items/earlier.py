"""Semantic IDs as they were before items were added, for ``peso undo``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from safetensors.numpy import load_file

from peso.items import quality
from peso.items.contents import ENCODER_FILE, save_arrays
from peso.items.ids_by_stage import REFRESH, Changes
from peso.items.semantic_ids import EARLIER, FORMAT, read_semantic_ids, write_semantic_ids
from peso.items.tokenize import CATEGORIES_FILE, CODEBOOKS_FILE
from peso.items.vectors import ItemEncoder
from peso.runtime.files import link, write_json
from peso.runtime.manifest import intact, read_manifest, write_manifest


def remember(source: Path, directory: Path) -> None:
    """Store the manifest of ``source`` in that of ``directory``, which extends it, so that
    :func:`shorten_semantic_ids` can restore it."""
    before, now = read_manifest(source, FORMAT), read_manifest(directory, FORMAT)
    known = before.pop(EARLIER, [])
    if before["items"] < now["items"]:
        known = [*known, before]
    if known:
        write_manifest(directory, FORMAT, {**now, EARLIER: known})


def shorten_semantic_ids(items: pa.Table, stages: int, source: Path, directory: Path) -> None:
    """Write the IDs of ``source`` as they were before the last items were added.

    The earlier manifest is restored. If there is none, because the IDs of several appends were made together,
    the new manifest lacks the measures that need the items' vectors.

    Args:
        items: the earlier item table; its rows are the first ones of ``source``.
        stages: the earlier number of stages of the stream.
        source: a directory with semantic IDs.
        directory: the directory to write to, existing and empty.

    Raises:
        WorkspaceError: ``source`` is damaged, or a newer version wrote it.
    """
    now, manifest = read_semantic_ids(source), read_manifest(source, FORMAT)
    count = len(items)
    ids = now.first(count)
    for name in (CODEBOOKS_FILE, ENCODER_FILE):
        if name in manifest["files"]:
            link(intact(source, name, manifest), directory / name)
    _shorten_behavior(directory / ENCODER_FILE, count)
    if (changes := Changes.read(source, manifest)) is not None:
        changes.until(stages - 1).write(directory, ids.item_ids)
    if CATEGORIES_FILE in manifest["files"]:
        tree = json.loads(intact(source, CATEGORIES_FILE, manifest).read_text("utf-8"))
        used = (ids.codes.max(axis=0) + 1).tolist()
        write_json(directory / CATEGORIES_FILE, [level[:n] for level, n in zip(tree, used, strict=False)])
    earlier = [known for known in manifest.pop(EARLIER, []) if known["items"] <= count]
    if earlier and earlier[-1]["items"] == count:
        content = earlier.pop()
    else:
        content = dict(manifest)
        if count < len(now.item_ids):
            content["quality"] = quality.of_codes(ids, items["title"].to_pylist())
        if fit := manifest.get("fitness"):
            fit = {**fit, "stages": [stage for stage in fit["stages"] if stage["stage"] < stages]}
            content["fitness"] = {**fit, "warnings": quality.refit_warnings(fit)}
    if refreshed := content.get(REFRESH):
        kept = [found for found in refreshed["stages"] if found["stage"] < stages]
        content[REFRESH] = {"through": min(refreshed["through"], stages), "stages": kept}
    write_semantic_ids(ids, directory, {**content, **({EARLIER: earlier} if earlier else {})})


def _shorten_behavior(path: Path, items: int) -> None:
    """Remove the vectors of behavior of later items (there are some with ``fit: all``), because other items
    may get their rows."""
    if not path.exists():
        return
    encoder = ItemEncoder.from_arrays(load_file(path))
    if encoder.behavior is not None and (encoder.behavior.rows >= items).any():
        path.unlink()  # a link, whose target stays
        save_arrays(replace(encoder, behavior=encoder.behavior.first(items)).arrays(), path)
