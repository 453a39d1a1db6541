"""Find the files of a backbone, without importing Transformers."""

from __future__ import annotations

from pathlib import Path

from peso.config.model import AUTO, BUILT_IN, is_on_hub
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
    if not is_on_hub(name):
        known = ", ".join([AUTO, *BUILT_IN, *assets.names("backbone")])
        raise BackboneError(
            f"backbone {name!r} is neither a directory nor a known name ({known}), and names on the hub have "
            "the form owner/model. If the directory was moved, change backbone.name (in a workspace, in its "
            "config.yaml)"
        )
    return name


def source_of_pretrained(path: str) -> str:
    """The directory of the weights that ``backbone.pretrained`` names: those that stage 0 of a workspace
    trained, or a directory that ``save_pretrained`` wrote.

    Raises:
        BackboneError: there is neither.
    """
    folder = Path(path).expanduser()
    of_stage = folder / "stages" / "0" / "backbone"
    for directory in (of_stage, folder):
        if (directory / "config.json").is_file():
            return str(directory)
    why = "does not exist"
    if folder.is_dir():
        why = "is neither a workspace whose stage 0 trained a backbone nor the directory of a model"
    raise BackboneError(
        f"backbone.pretrained: {path} {why}; train one first, with backbone.name=scratch in a workspace "
        "of its own"
    )
