"""`peso recommend`: recommend items for one user, one history or all users."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from peso.cli.display import Directory, Json, ServingStage, Terminal, Trust, next_steps, say, say_json, table
from peso.errors import UsageError


def recommend(
    workspace: Directory,
    user: Annotated[str | None, typer.Option(help="A user of the log.")] = None,
    history: Annotated[str | None, typer.Option(help="Item ids, oldest first: ITEM,ITEM,…")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="All users of the log; needs --output.")] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="For --all: FILE.parquet, FILE.csv or FILE.jsonl; a path or an address (s3://, gs://).",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="For --all: only the I-th of N parts of the users, where I starts at 1. Each part is "
            "written to its own file; the parts can run on different machines.",
        ),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="For --all: let N processes share the work, and write one file. Default with --executor: as "
            "many as there is room for.",
        ),
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="For --all: where these processes run: processes (on this machine, the default), ray, dask "
            "or slurm; with options as in `compare.executor`: '{name: ray, gpus: 1}'.",
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of items.", min=1)] = 10,
    exclude_seen: Annotated[
        bool | None,
        typer.Option(
            "--exclude-seen/--include-seen",
            help="Whether to leave out the items of the history. Default: as set in `decoding.repeats`, "
            "which by default leaves them out if no user of the log had an item twice.",
            show_default=False,
        ),
    ] = None,
    hybrid: Annotated[
        str | None,
        typer.Option(
            "--with",
            metavar="HYBRID",
            help="Use a hybrid of the model and baselines that `peso baseline` has run: its label, or "
            "`hybrid` if there is only one.",
        ),
    ] = None,
    stage: ServingStage = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Recommend k items, best first, with their scores (log-probabilities) and semantic IDs.

    A user's history contains the user's events in the stream and the events received since; with --stage, it
    is the history after that stage. If seen items are left out, a user who has had almost all items gets
    fewer than k.

    --all reads users from disk. If it is interrupted, run it again to continue, with the same result. If the
    model knows no item of a user's history, the user gets the most popular items of the newest stage, without
    scores. With --parts or --executor, several processes or machines share the work; the file is the same.

    With --with, the scores are weighted sums of log-probabilities.

    Example: peso recommend -w runs/games --history 25,311 -k 5

    Example: peso recommend -w runs/games --all -o recommendations.csv

    Example: peso recommend -w runs/games --all --parts 8 --executor ray -o recommendations.parquet

    Example: peso recommend -w runs/games --all --part 2/8 -o part_2.parquet
    """
    from peso.runs.recommend_all import require_output
    from peso.runs.recommender import Recommender
    from peso.runs.workspace import Workspace

    if [user is not None, history is not None, everyone].count(True) != 1:
        raise UsageError("give exactly one of --user U, --history ITEM,ITEM,… or --all")
    if everyone != (output is not None):
        raise UsageError("--all needs -o FILE (.parquet, .csv or .jsonl), and -o needs --all")
    if part is not None and not everyone:
        raise UsageError("--part I/N needs --all")
    if (parts is not None or executor is not None) and not everyone:
        raise UsageError("--parts and --executor need --all")
    only = _part(part) if part else None
    where = None if executor is None else _executor(executor)
    if output is not None:
        require_output(output, force)
    recommender = Recommender(Workspace.open(workspace, trust or ()), stage, hybrid=hybrid)
    left_out = recommender.leaves_out_seen if exclude_seen is None else exclude_seen
    seen = f"stage {recommender.stage}; items of the history are {'left out' if left_out else 'not left out'}"
    if exclude_seen is None:
        seen += f" (decoding.repeats: {recommender.workspace.config.decoding.repeats})"
    answering = {"with": recommender.hybrid.label} if recommender.hybrid is not None else {}
    if answering:
        seen = f"{answering['with']}, {seen}"
    if output is not None:
        users = recommender.recommend_all(
            output,
            k=k,
            exclude_seen=left_out,
            force=force,
            part=only,
            parts=parts,
            executor=where,
            observer=Terminal(),
        )
        if as_json:
            say_json(
                {
                    "stage": recommender.stage,
                    "users": users,
                    "file": output,
                    "exclude_seen": left_out,
                    **answering,
                }
            )
        else:
            say(f"recommendations for {users:,} users: {output}; {seen}")
            next_steps(["export", "-w", workspace, "-o", "exported"])
        return
    items = history.split(",") if history else recommender.history(user) if user is not None else []
    if user is not None and (now := recommender.histories.now(user)) != user:
        Terminal().note(f"note: user {user} is {now} now (`peso users merge`)")
        user = now
    renamed = recommender.semantic_ids.names.former(items)
    items = [renamed.get(item, item) for item in items]
    (ranked,) = recommender.search([items], k, exclude_seen=left_out, users=[user])
    if len(ranked) < k:
        whose = "the history" if user is None else f"the history of user {user!r}"
        Terminal().note(f"{len(ranked)} of {k} items: {whose} contains all other items that are not retired")
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
                **answering,
                **({"renamed_items": renamed} if renamed else {}),
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
    for former, now in renamed.items():
        Terminal().note(f"note: {former} is {now} now (`peso items rename`)")
    Terminal().note(seen)
    next_steps(["recommend", "-w", workspace, "--all", "-o", "recommendations.csv"])


def _part(text: str) -> tuple[int, int]:
    """``2/8`` as two numbers. Raises UsageError."""
    found = re.fullmatch(r"([1-9][0-9]*)/([1-9][0-9]*)", text, re.ASCII)
    if found is None or int(found[1]) > int(found[2]):
        raise UsageError(f"--part is I/N, such as 2/8 for the second of eight parts, not {text!r}")
    return int(found[1]), int(found[2])


def _executor(text: str) -> dict[str, Any]:
    """``ray`` or ``{name: ray, …}``. Raises ConfigError."""
    from peso.config.executors import read_executor
    from peso.config.parsing import parse

    return read_executor(parse(text, "--executor"), "--executor").model_dump()
