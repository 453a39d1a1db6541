"""`peso recommend`: what one user, one history or everybody should see next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import Directory, Json, Stage, Terminal, Trust, say, say_json, table


def register(app: typer.Typer) -> None:
    app.command()(recommend)


def recommend(
    workspace: Directory,
    user: Annotated[str | None, typer.Option(help="A user of the log.")] = None,
    history: Annotated[str | None, typer.Option(help="Item ids, oldest first: ITEM,ITEM,…")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Every user of the log, into --output.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="For --all: FILE.parquet, FILE.csv or FILE.jsonl."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of -o.")] = False,
    k: Annotated[int, typer.Option("-k", help="How many items.", min=1)] = 10,
    exclude_seen: Annotated[bool, typer.Option(help="Leave out the items of the history.")] = False,
    stage: Stage = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Recommend k items, best first, with their scores (log-probabilities) and semantic IDs.

    With --exclude-seen a user who has had almost everything gets fewer.

    Example: peso recommend -w runs/games --history 25,311 -k 5

    Example: peso recommend -w runs/games --all -o recommendations.csv
    """
    from peso.errors import UsageError
    from peso.runs.recommender import Recommender, require_output
    from peso.runs.workspace import Workspace

    if [user is not None, history is not None, everyone].count(True) != 1:
        raise UsageError("say for whom: exactly one of --user U, --history ITEM,ITEM,… or --all")
    if everyone != (output is not None):
        raise UsageError("--all goes with -o FILE (.parquet, .csv or .jsonl), and -o with --all")
    if output is not None:
        require_output(output, force)
    recommender = Recommender(Workspace.open(workspace, trust or ()), stage)
    if output is not None:
        users = recommender.recommend_all(
            output, k=k, exclude_seen=exclude_seen, force=force, observer=Terminal()
        )
        if as_json:
            say_json({"users": users, "file": str(output)})
        else:
            say(f"{users:,} users: {output}")
        return
    items = history.split(",") if history else recommender.history(user) if user is not None else []
    ranked = recommender.recommend(history=items, k=k, exclude_seen=exclude_seen)
    if len(ranked) < k:
        who = "the history" if user is None else f"user {user!r}"
        Terminal().note(f"{len(ranked)} of {k} items: {who} holds all others of the catalogue")
    if as_json:
        rows = [
            {
                "item": item,
                "title": recommender.title(item),
                "score": score,
                "semantic_id": recommender.semantic_id(item),
            }
            for item, score in ranked
        ]
        say_json({"history": items, "recommendations": rows})
        return
    table(
        f"after {', '.join(recommender.title(item) or item for item in items[-5:]) or 'nothing'}",
        ["", "item", "title", "score", "semantic ID"],
        [
            [place, item, recommender.title(item) or "", score, "".join(recommender.semantic_id(item))]
            for place, (item, score) in enumerate(ranked, 1)
        ],
    )
