"""`peso serve`: answer over HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import Directory, Trust, say

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    workspace: Directory,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Other machines reach 0.0.0.0, which needs tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: one that is free.")] = 8000,
    stage: Annotated[
        int | None, typer.Option(min=0, help="Always answer from this stage. Default: the promoted one.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File of bearer tokens, one a line, each as it is or as sha256:DIGEST. Default: those in "
            "the environment variable PESO_TOKENS, separated by commas.",
        ),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Accept no events.")] = False,
    rate: Annotated[
        float,
        typer.Option(min=0, help="Requests a second of one token, or without tokens of one address; 0: any."),
    ] = 1_000,
    queue: Annotated[
        int, typer.Option(min=1, help="Recommendations that may wait; more are refused with status 429.")
    ] = 256,
    prompt_memory: Annotated[
        int, typer.Option(min=0, help="MiB for the prompts of returning users; 0: none are kept.")
    ] = 256,
    trust: Trust = None,
) -> None:
    """Serve recommendations over HTTP, until SIGTERM or Ctrl-C.

    Listens at once; until the model is loaded it answers with popular items. When another stage is promoted,
    it is loaded and takes over without a failed request.

    Example: peso serve -w runs/games

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
        ),
        read_tokens(token_file),
        trust=trust or (),
        on_listening=lambda address: say(f"listening at {address}", error=True),
    )
