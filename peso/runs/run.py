"""`peso run` as a function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peso.config import Config, load_config
from peso.errors import UsageError
from peso.runs.checks import check_configuration
from peso.runs.workspace import Workspace, trusted_classes
from peso.runtime.processes import join
from peso.runtime.progress import Observer


def run(
    config: Config | Mapping[str, Any] | str | Path,
    workspace: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    base: str | Path | None = None,
    observer: Observer | None = None,
    trust: Iterable[str] | None = None,
) -> Workspace:
    """Do everything that a configuration describes and that is not done yet, as `peso run` does.

    Ingest, tokenize, train and test the stages, run the baselines, write the report. The workspace is locked
    meanwhile: a second writer is refused. Interrupted at any time, the same call continues with the same
    result.

    Args:
        config: a YAML file, the same as a mapping, or a configuration that was loaded.
        workspace: a directory; by default ``runs/NAME`` for a file ``NAME.yaml``.
        overrides: ``a.b=value`` texts, as of ``--set``.
        base: a workspace to take stage 0 from; all that determines stage 0 must be equal.
        observer: is told of the progress; by default nothing is printed.
        trust: classes that may be imported, as ``module.Class``, beside those that a file of your own names
            (``config.yaml`` of a workspace is not one). None: what a mapping or a configuration names, too.

    Returns:
        The workspace, with all stages trained.

    Raises:
        ConfigError: an unknown key or an impossible value: names the nearest.
        UsageError: no workspace is given, and the configuration is not a file.
        PesoError: as the single steps. What was finished before stays.
    """
    if isinstance(config, Config):
        config = config.model_dump(mode="json") if overrides else config
    resolved = config if isinstance(config, Config) else load_config(config, overrides)
    file = Path(config) if isinstance(config, str | Path) else None
    if workspace is None:
        if file is None:
            raise UsageError("name a workspace: only a configuration file has a name to make one from")
        workspace = Path("runs") / file.stem
    trusted = list(trust or ())
    if file is not None:
        trusted += trusted_classes(resolved, overrides, file)
    elif trust is None:
        trusted += resolved.strategy.foreign
    check_configuration(resolved)
    join(resolved.training.device)

    from peso.runs import pipeline

    with Workspace.hold(workspace, resolved, trust=trusted) as opened:
        pipeline.run(opened, base=None if base is None else Path(base), observer=observer)
    return opened
