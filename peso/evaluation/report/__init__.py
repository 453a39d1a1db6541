"""The files in the directory of a report."""

from __future__ import annotations

from pathlib import Path

from peso.errors import WorkspaceError
from peso.runtime.failures import listed

PAGE, TABLES, PLOTS = "index.html", "tables", "plots"


def refuse_foreign(directory: Path) -> None:
    """Check that a directory has no files that are not part of a report, because a report replaces all of it.

    Raises:
        WorkspaceError: the directory has other files.
    """
    if not directory.exists():
        return
    own = (PAGE, TABLES, PLOTS, ".DS_Store")
    found = directory.iterdir() if directory.is_dir() else [directory]
    foreign = sorted(path.name for path in found if path.name not in own)
    if foreign:
        raise WorkspaceError(
            f"{directory} has files that are not part of a report ({listed(foreign, 3)}) and would "
            "be removed. Choose another directory"
        )
