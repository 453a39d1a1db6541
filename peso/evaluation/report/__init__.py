"""A report: what lies in its directory."""

from __future__ import annotations

from pathlib import Path

from peso.errors import WorkspaceError

PAGE, TABLES, PLOTS = "index.html", "tables", "plots"


def refuse_foreign(directory: Path) -> None:
    """A report replaces a whole directory, so the directory must not hold anything else.

    Raises:
        WorkspaceError: it does.
    """
    if not directory.exists():
        return
    own = (PAGE, TABLES, PLOTS, ".DS_Store")
    found = directory.iterdir() if directory.is_dir() else [directory]
    foreign = sorted(path.name for path in found if path.name not in own)
    if foreign:
        raise WorkspaceError(
            f"{directory} holds files that are not part of a report ({', '.join(foreign[:3])}"
            f"{' …' if len(foreign) > 3 else ''}); they would be removed. Choose another directory"
        )
