"""Diagnosis of a workspace: drift of the stream, quality of the semantic IDs, effect of the anchor."""

from __future__ import annotations

from typing import Any

from peso.errors import WorkspaceError
from peso.events.drift import drift
from peso.items import quality
from peso.items.ids_by_stage import REFRESH
from peso.items.semantic_ids import token_name
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace

Titled = tuple[str, list[str], list[list[Any]]]  # a table: title, columns, rows


def diagnose(workspace: Workspace) -> dict[str, Any]:
    """Collect all diagnostics that are available so far.

    Returns:
        ``stream`` (:func:`peso.events.drift.drift`, one dict per stage), ``semantic_ids`` (the manifest's
        ``quality``, ``fitness`` and ``refresh``, and ``items_without_id``; None if there are none),
        ``anchor`` (:func:`anchors`), and ``warnings`` (sentences).

    Raises:
        WorkspaceError: there is no stream, or a file is damaged.
    """
    ids, anchor = _semantic_ids(workspace), anchors(workspace)
    warnings = list((ids or {}).get("fitness", {}).get("warnings", []))
    if ids and ids["items_without_id"]:
        warnings.append(
            f"{ids['items_without_id']:,} items of the stream have no semantic ID yet; "
            f"run `peso tokenize --append -w {workspace.root}`"
        )
    warnings += [entry["finding"] for entry in anchor if entry["finding"]]
    return {"stream": stream_drift(workspace), "semantic_ids": ids, "anchor": anchor, "warnings": warnings}


def stream_drift(workspace: Workspace, engine: str | None = None) -> list[dict[str, Any]]:
    """Drift of every stage of the stream; that of the codes only if all items have semantic IDs.

    Args:
        engine: the engine that computes it, which does not change the figures; None: `data.engine`.
    """
    stream = workspace.stream
    items, first_codes = int(stream.manifest["items"]), None
    if workspace.has_semantic_ids:
        codes = workspace.semantic_ids.codes
        first_codes = codes[:, 0] if len(codes) == items else None
    return drift(stream, first_codes, engine or workspace.config.data.engine)


def anchors(workspace: Workspace) -> list[dict[str, Any]]:
    """How far each stage moved the adapter it started from, and the effect of the anchor.

    Returns:
        A dict per stage that inherited an adapter: ``distance`` and ``kl`` from its start, ``strategy``
        (weight, strength, ρ̄ with its standard error), and the keys of
        :func:`peso.adapters.anchor_report.anchor_effect`.
    """
    found = []
    for stage in workspace.stages:
        training = stage.training
        if (moved := training.get("moved")) is None:
            continue
        strategy = training.get("strategy", {})
        from peso.adapters.anchor_report import anchor_effect

        effect = training.get("anchor") or anchor_effect(stage.number, stage.log, strategy.get("rho"))
        entry = {"stage": stage.number, "distance": moved["distance"], "kl": moved["kl"]}
        found.append({**entry, "strategy": strategy, **effect})
    return found


def _semantic_ids(workspace: Workspace) -> dict[str, Any] | None:
    if not workspace.has_semantic_ids:
        return None
    manifest = workspace.semantic_ids_manifest
    kept = ("quality", "fitness", REFRESH)
    measured: dict[str, Any] = {key: manifest[key] for key in kept if key in manifest}
    return {**measured, "items_without_id": max(0, workspace.items_without_id)}


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
REFRESHED = {
    "stage": "stage",
    "tested": "enough events",
    "drifted": "drifted",
    "changed": "new codes",
    "median_drift": "median drift",
}
FITNESS = ("how many", "error", "want an ID that is taken", "share an ID")


def diagnosis_tables(found: dict[str, Any]) -> list[Titled]:
    """The result of :func:`diagnose` as tables."""
    stages = found["stream"]
    users = [[*(s[key] for key in USERS), *s["history_lengths"].values()] for s in stages]
    lengths = [f"history, {name}" for name in stages[0]["history_lengths"]]
    tables: list[Titled] = [
        ("users, and the lengths of their histories", ["stage", "events", "users", *STATES, *lengths], users),
        (
            "items; Jensen-Shannon divergence from the stage before, in bits",
            ["stage", "items", *STATES, "JS items", "JS first codes", "new targets"],
            [[s[key] for key in ITEMS] for s in stages],
        ),
    ]
    fitness = (found["semantic_ids"] or {}).get("fitness", {})
    if fit := [list(row) for row in quality.fitness_rows(fitness)]:
        tables.append(("fit of the codebooks to items that came later", ["items", *FITNESS], fit))
    refresh = (found["semantic_ids"] or {}).get(REFRESH, {}).get("stages", [])
    if refresh:
        rows = [[entry[key] for key in REFRESHED] for entry in refresh]
        tables.append(("items that get new codes", list(REFRESHED.values()), rows))
    if found["anchor"]:
        anchor = ["stage", *ANCHOR.values(), "weight", "strength", "ρ̄", "±"]
        keys = ("weight", "strength", "rho", "rho_standard_error")
        rows = [
            [entry["stage"], *(entry[key] for key in ANCHOR), *(entry["strategy"].get(key) for key in keys)]
            for entry in found["anchor"]
        ]
        tables.append(("effect of the anchor", anchor, rows))
    return tables


def quality_tables(manifest: dict[str, Any]) -> list[Titled]:
    """The quality of the semantic IDs, from their manifest: figures, levels, and the items of one prefix."""
    measured = manifest.get("quality", {})
    figures = [list(row) for row in quality.figures(manifest)]
    tables: list[Titled] = [("quality of the semantic IDs", ["", "value"], figures)]
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
    """A trained stage, by default the newest. Raises WorkspaceError for stage 0, which has no anchor."""
    stage = workspace.trained(number)
    if stage.number == 0:
        raise WorkspaceError(
            "stage 0 has no previous state that could be an anchor; choose a later stage (--stage)"
        )
    return stage
