"""`peso serve`: serve recommendations over HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import Directory, Trust, say

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "cachetools")


def serve(
    workspace: Directory,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. With 0.0.0.0, other machines can connect; this requires tokens."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free port.")] = 8000,
    stage: Annotated[
        int | None, typer.Option(min=0, help="Always use this stage. Default: the promoted stage.")
    ] = None,
    hybrid: Annotated[
        str | None,
        typer.Option(
            "--with",
            metavar="HYBRID",
            help="Answer with a hybrid of the model and baselines, which `peso baseline` has run for every "
            "stage that is to serve: its label, or `hybrid` if there is only one.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File of bearer tokens, one per line, in plain text or as sha256:DIGEST. Default: the "
            "tokens in the environment variable PESO_TOKENS, separated by commas."
        ),
    ] = None,
    allow_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the items that may be recommended, such as those in stock, one id per line; no "
            "other item is recommended. The server reads the file again when it changes."
        ),
    ] = None,
    deny_file: Annotated[
        Path | None, typer.Option(help="File with items that may not be recommended, in the same format.")
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Accept no events and no changes of the stage.")
    ] = False,
    rate: Annotated[
        float,
        typer.Option(
            min=0,
            help="Maximum number of requests per second for a token (without tokens: for an address); 0: no "
            "limit.",
        ),
    ] = 1_000,
    queue: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of waiting requests; further ones are refused with status 429."
        ),
    ] = 256,
    prompt_memory: Annotated[
        int, typer.Option(min=0, help="MiB of memory for the prompts of returning users; 0: keep none.")
    ] = 256,
    answer_memory: Annotated[
        int,
        typer.Option(
            min=0, help="MiB of memory for answers, which repeated requests get again; 0: keep none."
        ),
    ] = 16,
    prepare: Annotated[
        bool,
        typer.Option(
            help="After an event of a user who has asked before, answer the user's last request again in "
            "idle time, so that the answer is ready. Needs --answer-memory."
        ),
    ] = True,
    trust: Trust = None,
) -> None:
    """Serve recommendations over HTTP until SIGTERM or Ctrl-C.

    The server listens at once and answers with popular items until the model is loaded. When another stage is
    promoted, the server loads it and switches to it without failing a request.

    Example: peso serve -w runs/games

    Example: peso serve -w runs/games --with hybrid

    Example: peso serve -w runs/games --host 0.0.0.0 --token-file tokens.txt
    """
    from peso.errors import UsageError

    if missing := [name.replace("_", "-") for name in NEEDED if find_spec(name) is None]:
        raise UsageError(f"peso serve needs {', '.join(missing)}; install them: pip install 'peso[serve]'")
    from peso.serving.server import Settings, serve
    from peso.serving.tokens import read_tokens

    serve(
        workspace,
        Settings(
            host=host,
            port=port,
            stage=stage,
            read_only=read_only,
            rate=rate,
            queue=queue,
            prompt_memory=prompt_memory * 2**20,
            answer_memory=answer_memory * 2**20,
            prepare=prepare,
            hybrid=hybrid,
            allow_file=allow_file,
            deny_file=deny_file,
        ),
        read_tokens(token_file),
        trust=trust or (),
        on_listening=lambda address: say(f"listening at {address}", error=True),
    )
