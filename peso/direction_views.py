"""The directions of a stage in words, as tables and as a plot: what was kept, what was overwritten.

Knows the figures of :func:`peso.directions.stage_directions`; knows nothing of models or workspaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peso.errors import WorkspaceError
from peso.evaluation.report.plots import Plot, Series

KEPT, OVERWRITTEN = 0.1, 0.9  # weight of the new optimum below and above which a direction is called so


def direction_sentences(found: Mapping[str, Any]) -> list[str]:
    """What was kept and what was overwritten, and how far the figures can be trusted."""
    rows, rest = found["directions"], found["rest"]
    said = list(found["differences"])
    if rest:
        said += [
            f"Where the new data support a movement most (directions 1 to {len(rows)}), the adapter is at "
            f"{_percent(rest['measured_in_directions'])} of what stage {found['stage']} reaches without an "
            f"anchor: {_verdict(rest['measured_in_directions'])}.",
            f"Where the sample shows no support, it is at {_percent(rest['measured_without_support'])}: "
            f"{_verdict(rest['measured_without_support'])}.",
            "Of the free movement (squared, in the metric of the anchor) "
            f"{_percent(rest['share_of_directions'])} is along these directions, "
            f"{_percent(rest['share_of_other_support'])} in the rest of the sample's span, "
            f"{_percent(rest['share_without_support'])} outside it.",
        ]
    elif found["weight"] is None:
        said.append("Nothing held these directions: the stage was trained without an anchor.")
    if rows and "predicted" in rows[0]:
        limit, stage = rows[-1]["predicted_in_the_limit"], rows[-1]["predicted"]
        said.append(
            f"Predicted for direction {len(rows)}: {_percent(limit)} of the new optimum if training went on "
            f"for ever, {_percent(stage)} of the free movement at the end of a stage this short."
        )
    first, last = rows[0], rows[-1]
    bias = [
        row["support_of_sample"] / row["support"] if row["support"] else float("inf") for row in (first, last)
    ]
    said.append(
        f"Supports are cross-validated on {found['examples']} single targets and, if anything, too small; "
        f"those of the sample itself are too large: by a factor of at most {bias[0]:.2g} for direction 1, "
        f"{bias[1]:.2g} for direction {last['direction']}."
    )
    return said


def _verdict(weight: float) -> str:
    if weight >= OVERWRITTEN:
        return "what was learned before is overwritten there"
    if weight <= KEPT:
        return "what was learned before is kept there"
    return "partly overwritten, partly kept"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


SHOWN = {
    "direction": "direction",
    "support": "support ρ",
    "support_standard_error": "±",
    "support_of_sample": "ρ, sample",
    "mean_share": "shared pull",
    "predicted_in_the_limit": "ρ/(ρ+λ)",
    "predicted": "predicted",
    "predicted_of_sample": "…, sample",
    "measured": "measured",
    "moved": "moved",
    "moved_freely": "moved freely",
}


def direction_tables(found: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """What :func:`stage_directions` found, as tables: title, columns, rows."""
    rows = found["directions"]
    shown = {name: title for name, title in SHOWN.items() if name in rows[0]}
    held = f"λ {found['weight']:.3g}, {found['coupling']}" if found["weight"] is not None else "no anchor"
    title = f"strongest directions of stage {found['stage']}: {found['term']}, {held}, ρ̄ {found['rho']:.3g}"
    carriers = [
        [row["direction"], *(_largest(row[kind]) for kind in ("modules", "layers", "targets", "factors"))]
        for row in rows
    ]
    return [
        (title, list(shown.values()), [[row[name] for name in shown] for row in rows]),
        ("which modules carry them", ["direction", "modules", "layers", "targets", "factors"], carriers),
    ]


def _largest(shares: Mapping[str, float], count: int = 3) -> str:
    return ", ".join(f"{name} {_percent(share)}" for name, share in list(shares.items())[:count])


def direction_plot(found: Mapping[str, Any]) -> Plot:
    """Predicted and measured weights, direction by direction.

    Raises:
        WorkspaceError: nothing was predicted or measured.
    """
    rows = found["directions"]
    x = np.array([row["direction"] for row in rows], dtype=np.float64)
    lines = {
        "predicted in the limit, ρ/(ρ+λ)": "predicted_in_the_limit",
        "predicted for a stage this long": "predicted",
        "measured": "measured",
    }
    drawn = [
        Series(label, number, x, np.array([row[name] for row in rows]), dashed=number == 0)
        for number, (label, name) in enumerate(lines.items())
        if name in rows[0]
    ]
    if not drawn:
        raise WorkspaceError("there is no weight to draw: the stage had no anchor; name another workspace")
    return Plot(
        "directions",
        f"Weight of the new optimum, stage {found['stage']}",
        "Predicted and measured weight of the new optimum along the strongest directions.",
        drawn,
        "direction, strongest support first",
        [(place, str(int(place))) for place in x],
    )
