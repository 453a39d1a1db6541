"""The section `data`: where events come from, how they are cleaned and how they are split into stages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from peso.config.parsing import Section, new_key, shown
from peso.config.registry import Registry

MOST_STAGES = 10_000  # each stage is a directory and is trained


class SimulateConfig(Section):
    """The size of the simulated stream."""

    users: int = Field(600, ge=10, description="number of simulated users")
    items: int = Field(400, ge=20, description="number of simulated items")
    stages: int = Field(5, ge=1, le=MOST_STAGES, description="number of stages, including stage 0")


def _moment(value: Any) -> Any:
    # YAML reads 2013-06-01 as a date; the resolved configuration keeps it as ISO text
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a time must be ISO text such as 2013-06-01, or a number in the unit of the log")
    return value


def _column(value: Any) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(
        "a column must be a name or, if a CSV file has no header, a number that is counted from 1"
    )


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [] if value is None else [value]


def _types(value: Any) -> Any:
    # YAML reads 1 as a number and yes as a Boolean value; in the log they are text
    return [str(v).lower() if isinstance(v, bool) else str(v) for v in _listed(value) if v is not None]


def _quote(value: Any) -> Any:
    return "" if value in (None, "none") else value


Moment = Annotated[int | float | str, BeforeValidator(_moment)]
Column = Annotated[int | str, BeforeValidator(_column)]
Separator = Annotated[
    str, BeforeValidator(lambda v: "\t" if v == r"\t" else v), Field(min_length=1, max_length=4)
]
LogFormat = Literal["csv", "parquet", "jsonl"]  # of a user's own files
LOG_FORMATS: tuple[str, ...] = get_args(LogFormat)
STREAMS = ("peso-release", "simulate")  # formats that contain stages and semantic IDs
DATA_SETS = Registry(
    "data set",
    "peso.events.sources",
    "peso.data_sets",
    "peso.events.sources.tables:DataSet",
    beside=["files", "guess", "lines", "reading", "tables", "user_files"],
    hyphens=True,
)
FORMATS = [*LOG_FORMATS, *DATA_SETS.built_in(), *STREAMS]
TIME_FORMATS = ("auto", "seconds", "milliseconds", "microseconds", "iso")
DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
PERIOD = re.compile(r"([1-9]\d*) (hour|day|week|month|year)s?")


class StagesConfig(Section):
    """How the log is split into stages: by ``fractions``, by ``every`` and ``start`` (or ``from``), or by
    ``boundaries``.

    A time is ISO text (in UTC unless it has a time zone) or a number in the unit of the log. An event at
    exactly that time belongs to the later stage.
    """

    fractions: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, min_length=1, description="each stage's share of the events, in order of time"
    )
    every: str | None = Field(
        None, description="the length of each later stage, such as 1 week, 10 days or 1 month"
    )
    start: Moment | None = Field(None, description="with every: the time at which stage 1 begins")
    boundaries: list[Moment] | None = Field(
        None, min_length=1, description="the times at which stages 1, 2, … begin"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> StagesConfig:
        given = [name for name in ("fractions", "every", "boundaries") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of a number of stages, fractions, every with from, and boundaries "
                f"(given: {', '.join(given) or 'none'})"
            )
        if self.fractions is not None and abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions sum to {sum(self.fractions):g}; they must sum to 1")
        if self.boundaries is not None and not _ascend(self.boundaries):
            raise ValueError(
                f"boundaries must be in ascending order, not {', '.join(map(str, self.boundaries))}"
            )
        if self.every is not None and not PERIOD.fullmatch(self.every):
            raise ValueError(
                f"every must be a number of hours, days, weeks, months or years, such as '1 week', "
                f"not {self.every!r}"
            )
        if (self.every is None) != (self.start is None):
            raise ValueError("every and from (the time at which stage 1 begins) must be given together")
        return self


def _ascend(moments: list[Moment]) -> bool:
    """Whether times are in ascending order, as far as this can be known without the log."""
    numbers = [moment for moment in moments if not isinstance(moment, str)]
    days = [moment[:10] for moment in moments if isinstance(moment, str) and DAY.match(moment)]
    if len(numbers) == len(moments):
        return numbers == sorted(numbers)
    return len(days) < len(moments) or days == sorted(days)


def _stages(value: Any) -> Any:
    """Expand the short forms. A number is the number of stages: stage 0 has 0.6 of the events, and the other
    stages have equal parts of the rest. ``from`` is ``start``."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError("there must be at least one stage")
        if value > MOST_STAGES:
            raise ValueError(f"there can be at most {MOST_STAGES:,} stages")
        return {"fractions": [1.0] if value == 1 else [0.6, *[0.4 / (value - 1)] * (value - 1)]}
    if isinstance(value, Mapping) and "from" in value:
        if "start" in value:
            raise ValueError("give either from or start, which have the same meaning, not both")
        return {("start" if key == "from" else key): moment for key, moment in value.items()}
    return value


class ColumnsConfig(Section):
    """The columns of an event's fields. A column is given by its name or, in CSV files without a header, by
    its number, counted from 1."""

    user: Column = Field("user", description="the user's id")
    item: Column = Field("item", description="the item's id")
    time: Column = Field("time", description="the time of the event")
    rating: Column | None = Field(None, description="the rating; needed only for min_rating")
    # not written if it is the default, because earlier versions do not have this key
    history: Column | None = new_key(None, description="sequences only: the list of items before `item`")


class EventsConfig(Section):
    """The types of events that are used. Other events are left out before any other step."""

    column: Column = Field(description="the column of an event's type")
    keep: Annotated[list[str], BeforeValidator(_types)] = Field(
        min_length=1, description="the types that are used, such as [purchase, cart]"
    )


class ItemColumnsConfig(Section):
    """The columns of an item's fields. If ``text`` has several columns, their texts are joined."""

    item: Column = Field("item", description="the item's id")
    title: Column | None = Field(None, description="the title")
    text: Annotated[list[Column], BeforeValidator(_listed)] = Field(
        [], description="one or more columns, such as a description and a brand"
    )
    category: Column | None = Field(
        None, description="the category; a list is a path from broad to narrow categories"
    )


class ItemTableConfig(Section):
    """The product table for the user's own log. Its other options are those of ``data``."""

    path: str = Field(min_length=1, description="the file of the product table, or its address")
    format: LogFormat | None = Field(
        None, description="none given: by the file's extension, else the format of the log"
    )
    columns: ItemColumnsConfig = ItemColumnsConfig()
    separator: Separator | None = Field(None, description="csv only; none given: by the file's extension")


def _known(name: str) -> str:
    if name not in FORMATS and name not in (offered := DATA_SETS.names()):
        known = ", ".join(map(repr, dict.fromkeys([*FORMATS, *offered])))
        raise ValueError(f"data.format: {shown(name)} is unknown; known formats are {known}")
    return name


class DataConfig(Section):
    """Where the events come from, how they are cleaned and how they are split into stages
    (docs/how-to/prepare-a-log.md)."""

    format: Annotated[str, AfterValidator(_known)] = Field(
        description=f"{', '.join(FORMATS)}, or a data set that an installed distribution adds"
    )
    path: str | None = Field(
        None,
        min_length=1,
        description="a file, a directory or a glob pattern, or its address (s3://, https://, hf://datasets/…)",
    )
    columns: ColumnsConfig = ColumnsConfig()
    separator: Separator | None = Field(
        None, description="csv only; none given: tab for .tsv, :: for .dat, else comma"
    )
    encoding: Literal["utf-8", "latin-1", "utf-16"] = Field("utf-8", description="csv only")
    # as above
    quote: Annotated[Literal['"', "'", ""], BeforeValidator(_quote)] = new_key(
        '"', description="csv only; none: quotes are part of the text"
    )
    time_format: str = Field(
        "auto", description="auto, seconds, milliseconds, microseconds, iso, or a pattern such as %d/%m/%Y"
    )
    items: ItemTableConfig | None = Field(
        None, description="the product table, instead of that of the data set"
    )
    events: EventsConfig | None = new_key(
        None, description="the types of events that are used; by default, all"
    )
    min_rating: float | None = Field(None, description="leave out events with a lower rating")
    repeats: Literal["keep", "drop"] = Field(
        "keep", description="drop: keep only a user's first event with an item"
    )
    min_user: int = Field(1, ge=1, description="smallest number of events of a user (k-core)")
    min_item: int = Field(1, ge=1, description="smallest number of events of an item (k-core)")
    stages: Annotated[StagesConfig, BeforeValidator(_stages)] = StagesConfig(
        fractions=[0.6, 0.1, 0.1, 0.1, 0.1]
    )
    split: Literal["natural", "user-disjoint"] = Field(
        "natural",
        description="user-disjoint: stages of the same sizes, but each with all events of its own users",
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="skip: unreadable rows are skipped and counted"
    )
    engine: Literal["duckdb", "spark"] = new_key(
        "duckdb", description="what cleans and cuts the log; spark for logs beyond one machine (extra: spark)"
    )
    simulate: SimulateConfig = SimulateConfig()

    @model_validator(mode="after")
    def _fits_its_format(self) -> DataConfig:
        if self.format != "simulate" and self.path is None:
            raise ValueError(f"data.path is required for data.format: {self.format}")
        own = self.format in LOG_FORMATS
        unused = set() if own else {"columns", "separator", "encoding", "quote", "time_format"}
        if own and self.format != "csv":
            unused |= {"separator", "encoding", "quote"}
        if self.format in STREAMS:
            unused |= {
                "items",
                "events",
                "min_rating",
                "repeats",
                "min_user",
                "min_item",
                "stages",
                "on_error",
            }
        if self.format == "peso-release":  # a simulated log is ingested like any other
            unused.add("engine")
        fields = type(self).model_fields
        given = {name for name in unused if getattr(self, name) != fields[name].default}
        if given and not own and self.format not in STREAMS:
            given -= DATA_SETS.find(self.format).takes
        for name in fields:
            if name in given:
                raise ValueError(f"data.{name} has no meaning for data.format: {self.format}; remove it")
        if own and self.columns.history is not None:
            raise ValueError("data.columns.history has a meaning only for data.format: sequences; remove it")
        if self.min_rating is not None and own and self.columns.rating is None:
            raise ValueError("data.min_rating needs data.columns.rating, the column of the ratings")
        if self.time_format not in TIME_FORMATS and "%" not in self.time_format:
            raise ValueError(
                f"data.time_format must be one of {', '.join(TIME_FORMATS)} or a pattern such as %d/%m/%Y; "
                f"got {self.time_format!r}"
            )
        return self


def expand_data(value: Any) -> Any:
    """Expand the short forms of the section."""
    # `simulate` is also a section (users, items, stages), which implies the format
    if value == "simulate":
        return {"format": "simulate"}
    if isinstance(value, Mapping) and "simulate" in value and "format" not in value:
        return {"format": "simulate", **value}
    return value
