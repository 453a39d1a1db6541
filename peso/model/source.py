"""Find the files of a backbone, without importing Transformers."""

from __future__ import annotations

from pathlib import Path

from peso.config.model import BUILT_IN
from peso.errors import BackboneError
from peso.runtime import assets


def source_of(name: str) -> str:
    """The directory or the hub name to pass to Transformers for a backbone's name.

    Raises:
        BackboneError: there is no such directory, the asset is not in the cache, or the name is not valid.
    """
    if name in assets.names("backbone"):
        found = assets.find(name)
        if found is None:
            raise BackboneError(f"backbone {name!r} is not in the cache; download it with `peso pull {name}`")
        return str(found)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise BackboneError(f"backbone {name!r} is a file; use the directory of a Transformers model")
    # names on the hub are owner/model; anything else is meant as a known name or a path
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        known = ", ".join([*BUILT_IN, *assets.names("backbone")])
        raise BackboneError(
            f"backbone {name!r} is neither a directory nor a known name ({known}), and names on the hub have "
            "the form owner/model. If the directory was moved, change backbone.name (in a workspace, in its "
            "config.yaml)"
        )
    return name
