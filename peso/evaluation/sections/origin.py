"""Sections: the configurations, and the manifests that lead back to the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from peso.evaluation.comparison import Comparison
from peso.evaluation.sections.section import Listing, Section
from peso.evaluation.tables import Table


def configuration(comparison: Comparison) -> Section:
    """Configurations as resolved, and where they differ."""
    systems = [system for system in comparison.systems if system.first.configuration]
    if not systems:
        return Section("configuration", "Configuration", ["These runs came without a configuration."])
    flat = {s.name: dict(_flat(yaml.safe_load(s.first.configuration))) for s in systems}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = []
    for key in keys:
        values = [flat[system.name].get(key) for system in systems]
        if len(set(values)) > 1:
            rows.append([key, *values])
    table = Table(
        "configuration-differences",
        "Where the configurations differ",
        ["Key", *(system.label for system in systems)],
        rows,
    )
    return Section(
        "configuration",
        "Configuration",
        [] if rows or len(systems) == 1 else ["The configurations are the same."],
        tables=[table] if rows else [],
        listings=[Listing(system.label, system.first.configuration) for system in systems],
    )


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{path}.{key}".lstrip("."))]
    return [
        (
            path,
            yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip(),
        )
    ]


def provenance(comparison: Comparison) -> Section:
    """The chain of manifests of every run."""
    listings = [
        Listing(
            f"{system.label}{f', seed {run.seed}' * (len(system.runs) > 1)}",
            yaml.safe_dump_all(map(dict, run.manifests), sort_keys=False, allow_unicode=True),
        )
        for system in comparison.systems
        for run in system.runs
        if run.manifests
    ]
    if not listings:
        return Section("provenance", "Provenance", ["These runs came without manifests."])
    return Section(
        "provenance",
        "Provenance",
        [
            "Every step left a manifest with the sha256 of what it read and wrote; each names the one before "
            "it, so the chain leads from the data to the figures above. Oldest first."
        ],
        listings=listings,
    )
