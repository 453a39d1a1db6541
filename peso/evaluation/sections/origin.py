"""Section: the configurations, and the manifests that lead back to the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.tables import Table
from peso.evaluation.sections.section import Listing, Section


def origin(comparison: Comparison) -> Section | None:
    """Configurations as resolved, where they differ, and the chain of manifests of every run."""
    systems = [system for system in comparison.systems if system.first.configuration]
    flat = {s.name: dict(_flat(yaml.safe_load(s.first.configuration))) for s in systems}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    values = {key: [flat[system.name].get(key) for system in systems] for key in keys}
    manifests = [
        Listing(
            f"Manifests of {system.label}{f', seed {run.seed}' * (len(system.runs) > 1)}",
            yaml.safe_dump_all(map(dict, run.manifests), sort_keys=False, allow_unicode=True),
        )
        for system in comparison.systems
        for run in system.runs
        if run.manifests
    ]
    if not systems and not manifests:
        return None
    chain = (
        "Each step wrote a manifest with the sha256 of what it read and wrote, and names the step before it, "
        "so the chain leads from the data to the figures above. Oldest first."
    )
    return Section(
        "origin",
        "Configuration and provenance",
        [chain] if manifests else [],
        tables=[
            Table(
                "configuration-differences",
                "Where the configurations differ",
                ["Key", *(system.label for system in systems)],
                [[key, *found] for key, found in values.items() if len(set(found)) > 1],
            )
        ],
        listings=[
            *(Listing(f"Configuration of {system.label}", system.first.configuration) for system in systems),
            *manifests,
        ],
    )


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{path}.{key}".lstrip("."))]
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    return [(path, text.removesuffix("...\n").strip())]
