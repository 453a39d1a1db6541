"""`peso recommend`: recommend items for one user, one history or all users."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import (
    Directory,
    Json,
    ServingStage,
    Terminal,
    Trust,
    next_steps,
    say,
    say_json,
    table,
)


def recommend(
    workspace: Directory,
    user: Annotated[str | None, typer.Option(help="A user of the log.")] = None,
    history: Annotated[str | None, typer.Option(help="Item ids, oldest first: ITEM,ITEM,…")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="All users of the log; needs --output.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="For --all: FILE.parquet, FILE.csv or FILE.jsonl."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
    k: Annotated[int, typer.Option("-k", help="Number of items.", min=1)] = 10,
    exclude_seen: Annotated[
        bool | None,
        typer.Option(
            "--exclude-seen/--include-seen",
            help="Whether to leave out the items of the history. By default as `decoding.repeats` says: left "
            "out where no user of the log had an item twice.",
            show_default=False,
        ),
    ] = None,
    stage: ServingStage = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Recommend k items, best first, with their scores (log-probabilities) and semantic IDs.

    A user who has already had almost all items gets fewer than k where seen items are left out.

    Example: peso recommend -w runs/games --history 25,311 -k 5

    Example: peso recommend -w runs/games --all -o recommendations.csv
    """
    from peso.errors import UsageError
    from peso.runs.recommender import Recommender, require_output
    from peso.runs.workspace import Workspace

    if [user is not None, history is not None, everyone].count(True) != 1:
        raise UsageError("give exactly one of --user U, --history ITEM,ITEM,… or --all")
    if everyone != (output is not None):
        raise UsageError("--all needs -o FILE (.parquet, .csv or .jsonl), and -o needs --all")
    if output is not None:
        require_output(output, force)
    recommender = Recommender(Workspace.open(workspace, trust or ()), stage)
    left_out = recommender.leaves_out_seen if exclude_seen is None else exclude_seen
    seen = f"stage {recommender.stage}; items of the history are {'left out' if left_out else 'not left out'}"
    if exclude_seen is None:
        seen += f" (decoding.repeats: {recommender.workspace.config.decoding.repeats})"
    if output is not None:
        users = recommender.recommend_all(
            output, k=k, exclude_seen=left_out, force=force, observer=Terminal()
        )
        if as_json:
            say_json(
                {
                    "stage": recommender.stage,
                    "users": users,
                    "file": str(output),
                    "exclude_seen": left_out,
                }
            )
        else:
            say(f"recommendations for {users:,} users: {output}; {seen}")
            next_steps(["export", "-w", workspace, "-o", "exported"])
        return
    items = history.split(",") if history else recommender.history(user) if user is not None else []
    ranked = recommender.recommend(history=items, k=k, exclude_seen=left_out)
    if len(ranked) < k:
        whose = "the history" if user is None else f"the history of user {user!r}"
        Terminal().note(f"{len(ranked)} of {k} items: {whose} contains all other items of the catalogue")
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
        say_json(
            {
                "stage": recommender.stage,
                "history": items,
                "exclude_seen": left_out,
                "recommendations": rows,
            }
        )
        return
    table(
        f"after {', '.join(recommender.title(item) or item for item in items[-5:]) or 'an empty history'}",
        ["", "item", "title", "score", "semantic ID"],
        [
            [place, item, recommender.title(item) or "", score, "".join(recommender.semantic_id(item))]
            for place, (item, score) in enumerate(ranked, 1)
        ],
    )
    Terminal().note(seen)
    next_steps(["recommend", "-w", workspace, "--all", "-o", "recommendations.csv"])
