"""Where events come from, how they are cleaned and cut into stages: the section `data`; how items get their
semantic IDs: the section `items`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from functools import partial
from operator import eq, not_
from string import Formatter
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from peso.config.model import WIDEST
from peso.config.parsing import Section, shown
from peso.config.registry import Registry

MOST_STAGES = 10_000  # each is a directory, and a training


class SimulateConfig(Section):
    """Size of the embedded stream. ``stages`` counts stage 0 too."""

    users: int = Field(600, ge=10, description="simulated users")
    items: int = Field(400, ge=20, description="simulated items")
    stages: int = Field(5, ge=1, le=MOST_STAGES, description="stages, stage 0 included")


def _moment(value: Any) -> Any:
    # YAML reads 2013-06-01 as a date; the resolved configuration keeps it as ISO text
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a moment is ISO text such as 2013-06-01 or a number in the unit of the log")
    return value


def _column(value: Any) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("a column is its name, or its number counted from 1 where a CSV file has no header")


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [] if value is None else [value]


def _types(value: Any) -> Any:
    # YAML reads 1 as a number and yes as a truth value; in the log they are text
    scalars = [str(v).lower() if isinstance(v, bool) else str(v) for v in _listed(value) if v is not None]
    return scalars


Moment = Annotated[int | float | str, BeforeValidator(_moment)]
Column = Annotated[int | str, BeforeValidator(_column)]
Separator = Annotated[
    str, BeforeValidator(lambda v: "\t" if v == r"\t" else v), Field(min_length=1, max_length=4)
]
LogFormat = Literal["csv", "parquet", "jsonl"]
STREAMS = ("peso-release", "simulate")  # come with stages and semantic IDs of their own
DATA_SETS = Registry(
    "data set",
    "peso.events.sources",
    "peso.data_sets",
    "peso.events.sources.tables:DataSet",
    beside=["files", "guess", "lines", "reading", "tables", "user_files"],
    hyphens=True,
)
FORMATS = [*get_args(LogFormat), *DATA_SETS.built_in(), *STREAMS]
TIME_FORMATS = ("auto", "seconds", "milliseconds", "microseconds", "iso")
DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
PERIOD = re.compile(r"([1-9]\d*) (hour|day|week|month|year)s?")


class StagesConfig(Section):
    """Where the log is cut: one of ``fractions``, ``every`` with ``start`` (or ``from``), ``boundaries``.

    A moment is ISO text (UTC where no zone is named) or a number in the log's own unit; an event at the very
    moment belongs to the later stage.
    """

    fractions: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, min_length=1, description="share of the events of each stage, in order of time"
    )
    every: str | None = Field(None, description="1 week, 10 days, 1 month: how long each later stage is")
    start: Moment | None = Field(None, description="with every: where stage 1 begins")
    boundaries: list[Moment] | None = Field(None, min_length=1, description="where stages 1, 2, … begin")

    @model_validator(mode="after")
    def _one_rule(self) -> StagesConfig:
        given = [name for name in ("fractions", "every", "boundaries") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "takes one of: a number of stages, fractions, every with from, boundaries "
                f"(given: {', '.join(given) or 'none'})"
            )
        if self.fractions is not None and abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions sum to {sum(self.fractions):g}; they have to sum to 1")
        if self.boundaries is not None and not _ascend(self.boundaries):
            raise ValueError(
                f"boundaries must be in ascending order, not {', '.join(map(str, self.boundaries))}"
            )
        if self.every is not None and not PERIOD.fullmatch(self.every):
            raise ValueError(
                f"every is a number and hours, days, weeks, months or years, such as '1 week', "
                f"not {self.every!r}"
            )
        if (self.every is None) != (self.start is None):
            raise ValueError("every and from (where stage 1 begins) go together")
        return self


def _ascend(moments: list[Moment]) -> bool:
    """Whether moments are in order, as far as that is known without a log."""
    numbers = [moment for moment in moments if not isinstance(moment, str)]
    days = [moment[:10] for moment in moments if isinstance(moment, str) and DAY.match(moment)]
    if len(numbers) == len(moments):
        return numbers == sorted(numbers)
    return len(days) < len(moments) or days == sorted(days)


def _stages(value: Any) -> Any:
    """A bare number is how many stages: 0.6 of the events, the rest in equal parts. ``from`` is ``start``."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError("there is at least one stage")
        if value > MOST_STAGES:
            raise ValueError(f"there are at most {MOST_STAGES:,} stages")
        return {"fractions": [1.0] if value == 1 else [0.6, *[0.4 / (value - 1)] * (value - 1)]}
    if isinstance(value, Mapping) and "from" in value:
        if "start" in value:
            raise ValueError("takes from or start, which mean the same, not both")
        return {("start" if key == "from" else key): moment for key, moment in value.items()}
    return value


class ColumnsConfig(Section):
    """Where an event's fields stand: a name, or a number counted from 1 in CSV files without a header."""

    user: Column = Field("user", description="the user's id")
    item: Column = Field("item", description="the item's id")
    time: Column = Field("time", description="when the event happened")
    rating: Column | None = Field(None, description="the rating; needed for min_rating only")


class EventsConfig(Section):
    """Which types of events count; the others are left out before anything else is done."""

    column: Column = Field(description="where an event's type stands")
    keep: Annotated[list[str], BeforeValidator(_types)] = Field(
        min_length=1, description="the types that count, such as [purchase, cart]"
    )


class ItemColumnsConfig(Section):
    """Where an item's fields stand. Several columns as ``text`` are joined to one."""

    item: Column = Field("item", description="the item's id")
    title: Column | None = Field(None, description="the title")
    text: Annotated[list[Column], BeforeValidator(_listed)] = Field(
        [], description="one column or several: a description, a brand"
    )
    category: Column | None = Field(None, description="the category; a list is a path, broad to narrow")


class ItemTableConfig(Section):
    """The product table beside a log of one's own; other options as in ``data``."""

    path: str = Field(min_length=1, description="the file of the product table")
    format: LogFormat | None = Field(None, description="none given: by its ending, else that of the log")
    columns: ItemColumnsConfig = ItemColumnsConfig()
    separator: Separator | None = Field(None, description="csv; none given: by the ending")


def _known(name: str) -> str:
    if name not in FORMATS and name not in (offered := DATA_SETS.names()):
        known = ", ".join(map(repr, dict.fromkeys([*FORMATS, *offered])))
        raise ValueError(f"data.format: {shown(name)} is unknown; known are {known}")
    return name


class DataConfig(Section):
    """Where the events come from, how they are cleaned and cut into stages (docs/how-to/prepare-a-log.md)."""

    format: Annotated[str, AfterValidator(_known)] = Field(
        description=f"{', '.join(FORMATS)}, or a data set that an installed distribution adds"
    )
    path: str | None = Field(None, min_length=1, description="a file, a folder or a glob")
    columns: ColumnsConfig = ColumnsConfig()
    separator: Separator | None = Field(
        None, description="csv; none given: tab in .tsv, :: in .dat, else comma"
    )
    encoding: Literal["utf-8", "latin-1", "utf-16"] = Field("utf-8", description="csv only")
    # not written at its default, as `events` is not: an earlier version's config.yaml does not hold them
    quote: Literal['"', "'", ""] = Field(
        '"', exclude_if=partial(eq, '"'), description="csv only; '' where quotes are part of the text"
    )
    time_format: str = Field(
        "auto", description="auto, seconds, milliseconds, microseconds, iso, or a pattern such as %d/%m/%Y"
    )
    items: ItemTableConfig | None = Field(None, description="csv, parquet and jsonl: the product table")
    events: EventsConfig | None = Field(
        None, exclude_if=not_, description="csv, parquet and jsonl: the types of events that count"
    )
    min_rating: float | None = Field(None, description="leave out events that are rated lower")
    repeats: Literal["keep", "drop"] = Field("keep", description="drop: a user's first event of an item only")
    min_user: int = Field(1, ge=1, description="events that every user is left with (k-core)")
    min_item: int = Field(1, ge=1, description="events that every item is left with (k-core)")
    stages: Annotated[StagesConfig, BeforeValidator(_stages)] = StagesConfig(
        fractions=[0.6, 0.1, 0.1, 0.1, 0.1]
    )
    split: Literal["natural", "user-disjoint"] = Field(
        "natural", description="user-disjoint: stages as large, but every user dealt to one of them, whole"
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="skip: unreadable rows are left out, counted"
    )
    simulate: SimulateConfig = SimulateConfig()

    @model_validator(mode="after")
    def _fits_its_format(self) -> DataConfig:
        if self.format != "simulate" and self.path is None:
            raise ValueError(f"data.path is required for data.format: {self.format}")
        own = self.format in get_args(LogFormat)
        unused = (
            {"columns", "separator", "encoding", "quote", "time_format", "items", "events"}
            if not own
            else set()
        )
        if own and self.format != "csv":
            unused |= {"separator", "encoding", "quote"}
        if self.format in STREAMS:
            unused |= {"min_rating", "repeats", "min_user", "min_item", "stages", "on_error"}
        fields = type(self).model_fields
        for name in fields:
            if name in unused and getattr(self, name) != fields[name].default:
                raise ValueError(f"data.{name} has no meaning for data.format: {self.format}; leave it out")
        if self.min_rating is not None and own and self.columns.rating is None:
            raise ValueError("data.min_rating needs data.columns.rating, the column that holds the ratings")
        if self.time_format not in TIME_FORMATS and "%" not in self.time_format:
            raise ValueError(
                f"data.time_format is one of {', '.join(TIME_FORMATS)} or a pattern such as %d/%m/%Y; "
                f"got {self.time_format!r}"
            )
        return self


def expand_data(value: Any) -> Any:
    """The short forms of the section written out."""
    # design: `simulate` is itself a section (users, items, stages), so naming it alone is enough
    if value == "simulate":
        return {"format": "simulate"}
    if isinstance(value, Mapping) and "simulate" in value and "format" not in value:
        return {"format": "simulate", **value}
    return value


HASHING, FILES = "hashing", "vectors"  # encoders that are not models


class RqVaeConfig(Section):
    """The network of ``items.quantizer: rq-vae`` and how it is trained; unused by the other quantisers."""

    hidden: list[Annotated[int, Field(ge=1, le=WIDEST)]] = Field(
        [256],
        min_length=1,
        description="widths between the vectors and the latent, mirrored in the decoder",
    )
    latent: int = Field(64, ge=2, le=WIDEST, description="width of the space that the codebooks quantise")
    steps: int = Field(1000, ge=1, le=100_000, description="optimiser steps")
    batch_size: int = Field(1024, ge=1, description="items in one optimiser step")
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW")
    commitment: float = Field(0.25, ge=0, description="weight that holds the encoder to its codes")


class ItemsConfig(Section):
    """How items get their semantic IDs (docs/reference/items.md); unused where the data bring an index.

    ``encoder``: ``hashing``, ``vectors`` (those of the files in ``vectors`` alone), or a text encoder:
    ``all-minilm-l6-v2``, any sentence-transformers or Transformers name or path, causal LMs included.
    """

    encoder: str = Field(
        HASHING,
        min_length=1,
        description="text to vectors: hashing, all-minilm-l6-v2, another model, or vectors (the files alone)",
    )
    dimensions: int = Field(128, ge=2, description="hashing only: width of the vectors")
    template: str = Field(
        "{title}\n{category}\n{text}", description="a line whose fields are all empty is dropped"
    )
    max_tokens: int = Field(256, ge=1, description="text encoders only: tokens of an item that are read")
    vectors: list[str] = Field([], description="files of vectors, fused with those of the encoder")
    index: str | None = Field(
        None, description="an index.json made elsewhere: its IDs are taken, nothing is fitted"
    )
    quantizer: Literal["rq-vae", "rq-kmeans", "balanced-rq-kmeans", "category-path"] = Field(
        "rq-vae",
        description="vectors to codes; simulated items take their category-path unless told otherwise",
    )
    levels: int = Field(4, ge=1, le=25, description="codes of a semantic ID")
    codes: int = Field(256, ge=2, le=65_536, description="codes a level; fewer where the catalogue is small")
    collisions: Literal["reassign", "extra-level", "allow"] = Field(
        "reassign", description="what happens to items that want the same ID"
    )
    fit: Literal["base", "all"] = Field(
        "base", description="fit to the items of stage 0, those of later stages get frozen codes; or to all"
    )
    rq_vae: RqVaeConfig = RqVaeConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> ItemsConfig:
        fields = {"title", "text", "category"}
        try:
            named = {name for _, name, _, _ in Formatter().parse(self.template) if name is not None}
        except ValueError as error:
            raise ValueError(f"items.template {self.template!r} is not a template ({error})") from None
        if not named or not named <= fields:
            raise ValueError(
                f"items.template takes the fields {{title}}, {{text}} and {{category}}; got {self.template!r}"
            )
        if self.encoder == FILES and not self.vectors:
            raise ValueError("items.encoder: vectors needs files in items.vectors")
        return self
