"""`peso run` as a function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peso.config import Config, load_config
from peso.config.reading import as_tree
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
    """Do all steps of a configuration that are not done yet, as `peso run` does.

    Reads the data, makes semantic IDs, trains and tests the stages, runs the baselines and writes the report.
    The workspace is locked meanwhile. If interrupted, the same call continues with the same result.

    Args:
        config: a YAML file, its content as a mapping, or a loaded configuration.
        workspace: a directory; default: ``runs/NAME`` for a file ``NAME.yaml``.
        overrides: ``a.b=value`` texts, as for ``--set``.
        base: a workspace from which stage 0 is taken over; everything that determines stage 0 must be equal.
        observer: receives the progress; by default nothing is printed.
        trust: classes that may be imported, as ``module.Class``, in addition to those that your own
            configuration file names (config.yaml of a workspace does not count). None: also those that a
            mapping or a loaded configuration names.

    Returns:
        The workspace, with all stages trained.

    Raises:
        ConfigError: an unknown key or an invalid value; the message suggests the most similar one.
        UsageError: no workspace is given, and the configuration is not a file.
        PesoError: a step failed. Completed steps stay.
    """
    if isinstance(config, Config):
        config = as_tree(config) if overrides else config
    resolved = config if isinstance(config, Config) else load_config(config, overrides)
    file = Path(config) if isinstance(config, str | Path) else None
    if workspace is None:
        if file is None:
            raise UsageError(
                "give a workspace: a default name can only be derived from the name of a configuration file"
            )
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
        pipeline.run(opened, None if base is None else Path(base), observer, previous=True)
    return opened
