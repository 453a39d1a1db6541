"""`backbone: auto`: the sizes that a workspace chose for its log, when the stream was made.

The choice is kept in sizes.json and the resulting values in config.yaml, so that neither a longer log nor
another version of the rule changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peso.config import BackboneConfig, Config, HeadConfig, TrainingConfig, load_config
from peso.config.model import AUTO, OF_ITEMS
from peso.config.parsing import Section
from peso.config.reading import SIZED, given, leaves, place, values
from peso.config.recipe import FEWEST, from_scratch, given_head_of, with_given
from peso.errors import DataError, WorkspaceError
from peso.runs.place import SIZES
from peso.runtime.records import read_record, write_record

FORMAT = 1  # of sizes.json; newer versions may write higher numbers
SECTIONS: dict[str, type[Section]] = {
    "backbone": BackboneConfig,
    "head": HeadConfig,
    "training": TrainingConfig,
}


@dataclass(frozen=True)
class Sizes:
    """The chosen sizes of a model, and the reason.

    Attributes:
        events, items: training targets of stage 0 and items, by which the sizes were chosen.
        sections: the chosen sections, see :func:`peso.config.recipe.from_scratch`.
        kept: the keys of these sections that the configuration gave.
        reason: why these sizes.
    """

    events: int
    items: int
    sections: Mapping[str, Any]
    kept: Mapping[str, Any]
    reason: str

    @classmethod
    def of(cls, stream: Mapping[str, Any], config: Config) -> Sizes:
        """Choose for the stream with this manifest, as it was before anything was appended."""
        items = stream["items"] - sum(added["new_items"] for added in stream.get("appended", []))
        return cls.by(_targets(stream, config), items, config)

    @classmethod
    def by(cls, events: int, items: int, config: Config) -> Sizes:
        """Choose for these numbers of training targets of stage 0 and items."""
        kept = given(config)
        sections, reason = from_scratch(events, items, given_head_of(kept))
        return cls(events, items, sections, kept, reason)

    def settle(self, config: Config) -> Config:
        """The configuration with these sizes in place of ``auto``."""
        resolved = with_given(self.sections, given(config))
        sections = {name: section.model_validate(resolved[name]) for name, section in SECTIONS.items()}
        return config.model_copy(update=sections)

    def unsettle(self, config: Config) -> Config:
        """The configuration before the choice, to choose again for other data: ``auto``, and what was given
        then or changed since."""
        tree: dict[str, Any] = {name: dict(self.kept.get(name, {})) for name in SIZED}
        before = dict(leaves(_sized(self.settle(_with(config, tree)))))  # as it was written
        for key, value in leaves(_sized(config)):
            if before.get(key) != value:
                place(tree, key, value)
        return _with(config, tree)

    def leaves_out_contents(self, config: Config) -> bool:
        """Whether the settled configuration has an item head without contents, and none was asked for."""
        head = config.head
        return head.name == "items" and not head.contents and "contents" not in self.kept.get("head", {})

    def __str__(self) -> str:
        ruled = (
            {f"head.{key}": True for key in OF_ITEMS} | dict(leaves(self.sections)) | {"backbone.name": AUTO}
        )
        kept = [f"{key} {value}" for key, value in leaves(self.kept) if ruled.get(key) != value]
        instead = f"; instead, the configuration gives {', '.join(kept)}" if kept else ""
        return f"backbone: auto: {self.reason}{instead}"


def settled(root: Path, config: Config) -> Config:
    """The configuration with the sizes of the workspace at ``root``, which are chosen from its stream if they
    were not chosen yet. Without ``backbone: auto``, and as long as there is no stream or it is too short, the
    configuration is returned unchanged."""
    sizes = sizes_for(root, config)
    return config if sizes is None else sizes.settle(config)


def sizes_for(root: Path, config: Config) -> Sizes | None:
    """The sizes that :func:`settled` uses, or None."""
    if not config.backbone.is_auto or not (root / "stream").is_dir():
        return None
    if (chosen := chosen_sizes(root)) is not None:
        return replace(chosen, kept=given(config))
    from peso.events.stream import Stream

    sizes = Sizes.of(Stream.open(root / "stream").manifest, config)
    return sizes if sizes.events >= FEWEST else None


def require_sizes(stream: Mapping[str, Any], config: Config) -> None:
    """Raise DataError if stage 0 of the stream with this manifest is too short for ``backbone: auto``."""
    if config.backbone.is_auto and (events := _targets(stream, config)) < FEWEST:
        raise DataError(
            f"stage 0 has {events:,} training targets, too few to learn more than popularity; "
            f"backbone: auto needs at least {FEWEST}. Use a longer log or a longer stage 0 (data.stages), or "
            "choose the sizes yourself, for example with backbone: scratch"
        )


def _targets(stream: Mapping[str, Any], config: Config) -> int:
    """The training targets of stage 0."""
    from peso.events.histories import trained_counts

    return trained_counts(stream["stages"][0], config.training.users)["training_targets"]


def provisional(config: Config) -> Config:
    """For checks before the stream is known: the configuration with the smallest sizes in place of ``auto``,
    beside those that are given."""
    return Sizes.by(0, 0, config).settle(config) if config.backbone.is_auto else config


def chosen_sizes(root: Path) -> Sizes | None:
    """The recorded choice of a workspace, if any.

    Raises:
        WorkspaceError: the record is damaged.
    """
    path = root / SIZES
    if not path.is_file():
        return None
    try:
        return Sizes(**read_record(path, FORMAT))
    except (DataError, TypeError, ValueError) as error:
        raise WorkspaceError(
            f"{path} is damaged ({str(error).splitlines()[0]}); restore it from a copy, or remove it and run "
            "config.yaml of the workspace, which has the chosen values, instead of `backbone: auto`"
        ) from None


def record(root: Path, sizes: Sizes) -> None:
    """Keep a choice in sizes.json."""
    write_record(root / SIZES, FORMAT, asdict(sizes))


def _sized(config: Config) -> dict[str, Any]:
    return {name: values(getattr(config, name)) for name in SIZED}


def _with(config: Config, kept: Mapping[str, Any]) -> Config:
    """The configuration with ``backbone: auto`` and, of the sections that it chooses, only the kept keys."""
    others = {name: each for name, each in config.model_dump(mode="json").items() if name not in SIZED}
    backbone = {**kept.get("backbone", {}), "name": AUTO}
    return load_config({**others, **{k: v for k, v in kept.items() if v}, "backbone": backbone})
