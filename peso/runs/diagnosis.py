"""Figures of a workspace beside its metrics: drift of its stream, fit of its codes, effect of its anchor."""

from __future__ import annotations

from typing import Any

from peso.errors import WorkspaceError
from peso.events.drift import drift
from peso.items import quality
from peso.items.semantic_ids import token_name
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace

Titled = tuple[str, list[str], list[list[Any]]]  # a table: title, columns, rows


def diagnose(workspace: Workspace) -> dict[str, Any]:
    """All that there is to tell so far.

    Returns:
        ``stream`` (:func:`peso.events.drift.drift`, one dict a stage), ``semantic_ids`` (the manifest's
        ``quality`` and ``fitness``, and ``items_without_id``; None before they are made), ``anchor``
        (:func:`anchors`), ``warnings`` (sentences: what calls for action).

    Raises:
        WorkspaceError: there is no stream, or a file is damaged.
    """
    ids, anchor = _semantic_ids(workspace), anchors(workspace)
    warnings = list((ids or {}).get("fitness", {}).get("warnings", []))
    if ids and ids["items_without_id"]:
        warnings.append(
            f"{ids['items_without_id']:,} items of the stream have no semantic ID yet; "
            f"`peso tokenize --append -w {workspace.root}`"
        )
    warnings += [entry["finding"] for entry in anchor if entry["finding"]]
    return {"stream": stream_drift(workspace), "semantic_ids": ids, "anchor": anchor, "warnings": warnings}


def stream_drift(workspace: Workspace) -> list[dict[str, Any]]:
    """Drift of every stage of the stream; without that of the codes while an item has none."""
    stream = workspace.stream
    items, first_codes = int(stream.manifest["items"]), None
    if workspace.has_semantic_ids:
        codes = workspace.semantic_ids.codes
        first_codes = codes[:, 0] if len(codes) == items else None
    return drift((stream.stage(number) for number in range(stream.stages)), items, first_codes)


def anchors(workspace: Workspace) -> list[dict[str, Any]]:
    """Of every stage that was trained on from an adapter: how far that moved, and what the anchor pulled.

    ``distance`` and ``kl`` from the adapter as it was, ``strategy`` what the strategy says of itself (weight,
    strength, ρ̄ with its spread), and what :func:`peso.adapters.anchor_report.anchor_effect` found.
    """
    found = []
    for stage in workspace.stages:
        training = stage.training
        if (moved := training.get("moved")) is None:
            continue
        told = training.get("strategy", {})
        from peso.adapters.anchor_report import anchor_effect

        held = training.get("anchor") or anchor_effect(stage.number, stage.log, told.get("rho"))
        entry = {"stage": stage.number, "distance": moved["distance"], "kl": moved["kl"]}
        found.append({**entry, "strategy": told, **held})
    return found


def _semantic_ids(workspace: Workspace) -> dict[str, Any] | None:
    if not workspace.has_semantic_ids:
        return None
    manifest = workspace.semantic_ids_manifest
    told: dict[str, Any] = {key: manifest[key] for key in ("quality", "fitness") if key in manifest}
    return {**told, "items_without_id": max(0, workspace.items_without_id)}


# -- as tables ---------------------------------------------------------------------------------------

STATES = ("new", "continuing", "returning", "dormant")
USERS = ("stage", "events", "users", *(f"{state}_users" for state in STATES))  # keys of the drift
MOVED = ("item_divergence", "code_divergence", "new_item_targets")
ITEMS = ("stage", "items", *(f"{state}_items" for state in STATES), *MOVED)
ANCHOR = {
    "gradient_ratio": "penalty's gradient / loss's",
    "pull_ratio": "pull / step",
    "taken_back": "taken back",
    "distance": "distance moved",
    "kl": "KL",
}
FITNESS = ("how many", "error", "want an ID that is taken", "share an ID")


def diagnosis_tables(found: dict[str, Any]) -> list[Titled]:
    """What :func:`diagnose` found, as tables."""
    stages = found["stream"]
    users = [[*(s[key] for key in USERS), *s["history_lengths"].values()] for s in stages]
    lengths = [f"history, {name}" for name in stages[0]["history_lengths"]]
    tables: list[Titled] = [
        (
            "users, and how long the histories are that they bring",
            ["stage", "events", "users", *STATES, *lengths],
            users,
        ),
        (
            "items; Jensen-Shannon divergence from the stage before, in bits",
            ["stage", "items", *STATES, "JS items", "JS first codes", "new targets"],
            [[s[key] for key in ITEMS] for s in stages],
        ),
    ]
    told = (found["semantic_ids"] or {}).get("fitness", {})
    if fit := [list(row) for row in quality.fitness_rows(told)]:
        tables.append(("do the codes fit: items that came after they were made", ["items", *FITNESS], fit))
    if found["anchor"]:
        anchor = ["stage", *ANCHOR.values(), "weight", "strength", "ρ̄", "±"]
        told = ("weight", "strength", "rho", "rho_standard_error")
        rows = [
            [entry["stage"], *(entry[key] for key in ANCHOR), *(entry["strategy"].get(key) for key in told)]
            for entry in found["anchor"]
        ]
        tables.append(("does the anchor hold", anchor, rows))
    return tables


def quality_tables(manifest: dict[str, Any]) -> list[Titled]:
    """How good the IDs are, from the manifest of the semantic IDs: figures, levels, items under a prefix."""
    measured = manifest.get("quality", {})
    figures = [list(row) for row in quality.figures(manifest)]
    tables: list[Titled] = [("how good the IDs are", ["", "value"], figures)]
    if "levels" in measured:
        levels = [
            [token_name(place, 0)[1], level["codes"], level["used"], level["perplexity"]]
            for place, level in enumerate(measured["levels"])
        ]
        tables.append(("codes", ["level", "codes", "used", "perplexity"], levels))
    if sample := measured.get("sample", {}).get("items"):
        rows = [[entry["item"], entry["title"]] for entry in sample]
        tables.append((quality.sample_title(measured["sample"]), ["item", "title"], rows))
    return tables


def require_later_stage(workspace: Workspace, number: int | None) -> RunStage:
    """The stage asked for, or the newest. Raises WorkspaceError for one that has no anchor."""
    stage = workspace.trained(number)
    if stage.number == 0:
        raise WorkspaceError(
            "stage 0 starts from nothing that could be an anchor; name a later one (--stage)"
        )
    return stage
