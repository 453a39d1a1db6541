"""`peso diagnose`: how the stream drifts, whether the codes still fit, whether the anchor holds."""

from __future__ import annotations

import typer

from peso.cli.display import table
from peso.cli.options import Directory, Json


def register(app: typer.Typer) -> None:
    app.command()(diagnose)


def diagnose(workspace: Directory, as_json: Json = False) -> None:
    """Show how the stream drifts, whether the codes still fit new items, and whether the anchor holds.

    Whatever is there is shown: after `peso ingest` the drift, after `peso tokenize` the codes, after each
    learnt stage the anchor. Warnings come last.

    Example: peso diagnose -w runs/shop
    """
    import json

    from peso import diagnosis
    from peso.workspace import Workspace

    found = diagnosis.diagnose(Workspace.open(workspace))
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    for title, columns, rows in diagnosis.diagnosis_tables(found):
        table(title, columns, rows)
    for warning in found["warnings"]:
        print(f"warning: {warning}")
