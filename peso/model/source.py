"""Where the files of a backbone are, found without a library of models."""

from __future__ import annotations

from pathlib import Path

from peso.config.model import BUILT_IN
from peso.errors import BackboneError
from peso.runtime import assets


def source_of(name: str) -> str:
    """What Transformers is given for a name: a directory, or the name itself for the hub.

    Raises:
        BackboneError: there is no such directory, no such asset in the cache, or it cannot be a name.
    """
    if name in assets.names("backbone"):
        found = assets.find(name)
        if found is None:
            raise BackboneError(f"backbone {name!r} is not in the cache; fetch it with `peso pull {name}`")
        return str(found)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise BackboneError(f"backbone {name!r} is a file; name the directory of a Transformers model")
    # owner/model is how the hub names things; everything else was meant as one of ours or as a path
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        known = ", ".join([*BUILT_IN, *assets.names("backbone")])
        raise BackboneError(
            f"backbone {name!r} is not a directory and no known name ({known}); a hub name is written "
            "owner/model. If it was moved, change backbone.name (of a workspace: in its config.yaml)"
        )
    return name
