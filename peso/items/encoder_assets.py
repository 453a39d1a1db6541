"""Find text encoders in the cache of assets, without importing a model library."""

from __future__ import annotations

from pathlib import Path

from peso.errors import ConfigError
from peso.runtime import assets


def find_encoder(name: str) -> Path:
    """The directory of an asset that ``items.encoder`` names.

    Raises:
        ConfigError: the asset is not in the cache.
        AssetError: it is damaged.
    """
    found = assets.find(name)
    if found is None:
        raise ConfigError(
            f"items.encoder {name!r} is not in the cache; download it with `peso pull {name}`, or use "
            "`hashing`, which needs no model"
        )
    return found
