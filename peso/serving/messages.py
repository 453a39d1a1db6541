"""What requests and answers consist of, with the limits of every request.

The limits are part of the OpenAPI description; a request beyond them is refused with status 422.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

MOST_REQUESTS = 64  # recommendations that one request may ask for
MOST_EVENTS = 1_000
MOST_ITEMS = 1_000  # of a history
MOST_LISTED = 10_000  # of allow and deny
MOST_K = 100
AHEAD = 86_400.0  # seconds that the clock of a caller may be ahead
ISO = {"type": "string", "format": "date-time"}
ID_LENGTH = 256  # characters of an id of a user or an item, and of an event key

EXAMPLE: dict[str, Any] = {"history": ["25", "311"], "k": 3, "titles": True}


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("has a null character")
    return text


def _moment(time: float | str) -> int:
    """Microseconds since 1970."""
    if isinstance(time, str):
        try:
            when = datetime.fromisoformat(time)
            time = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            raise ValueError("is not a moment such as 2026-03-01T12:00:00Z") from None
    if not 0 <= time <= now() / 1e6 + AHEAD:  # a NaN is not
        raise ValueError("lies before 1970 or more than a day in the future; send seconds or ISO 8601")
    return round(time * 1e6)


def now() -> int:
    """Microseconds since 1970."""
    return round(datetime.now(UTC).timestamp() * 1e6)


Id = Annotated[str, Field(min_length=1, max_length=ID_LENGTH), AfterValidator(_storable)]


class Message(BaseModel):
    """An unknown key is a slip of the pen, and is refused; a number is not taken for an id."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _describe_request(schema: dict[str, Any]) -> None:
    _describe_one_of(schema)
    schema["examples"] = [EXAMPLE]


def _describe_one_of(schema: dict[str, Any]) -> None:
    """Exactly one of two keys is there, and it is not null."""
    schema["oneOf"] = [{"required": ["user"]}, {"required": ["history"]}]
    for name in ("user", "history"):
        described = schema["properties"][name]
        described.pop("default")
        described.update(next(kind for kind in described.pop("anyOf") if kind != {"type": "null"}))


class Request(Message):
    """Recommendations for a user or after a history."""

    model_config = ConfigDict(json_schema_extra=_describe_request)

    user: Id | None = Field(
        None, description="A user, whose history is that of the log and the events received since."
    )
    history: list[Id] | None = Field(None, max_length=MOST_ITEMS, description="Item ids, oldest first.")
    k: int = Field(10, ge=1, le=MOST_K, description="How many items.")
    exclude_seen: bool | None = Field(
        None,
        description="Leave out the items of the history. Default: as in the tests of the stage "
        "(`decoding.repeats`).",
    )
    allow: list[Id] | None = Field(
        None, min_length=1, max_length=MOST_LISTED, description="The only items that may come back."
    )
    deny: list[Id] | None = Field(None, max_length=MOST_LISTED, description="Items that may not come back.")
    titles: bool = Field(False, description="Add each item's title.")
    unknown: Literal["skip", "refuse"] = Field(
        "skip",
        description="What happens to items of `history`, `allow` and `deny` that the stage does not know. "
        "skip: they are left out and named in the answer.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Request:
        if (self.user is None) == (self.history is None):
            raise ValueError("give either user or history")
        return self


class Item(Message):
    item: str
    score: float = Field(
        description="Log-probability under the model; in a popularity list of the item's share of events."
    )
    title: str | None = Field(None, description="Where `titles` asks for it and the log has one.")


class Answer(Message):
    """Everything in it comes from one stage."""

    stage: int = Field(description="The stage that answered.")
    source: Literal["model", "popularity"] = Field(
        description="popularity: the items with the most events in the stage, for the reason given."
    )
    reason: Literal["loading", "unknown_user", "empty_history"] | None = Field(
        None, description="Why the model was not asked."
    )
    items: list[Item] = Field(description="Best first; fewer than k where the filters leave no more items.")
    unknown_items: list[str] = Field(
        default=[], description="Items of the request or the history that the stage does not know."
    )


class Event(Message):
    """A user had an item."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user": "7", "item": "311", "time": "2026-03-01T12:00:00Z"}]}
    )

    user: Id
    item: Id
    time: Annotated[float | Annotated[str, WithJsonSchema(ISO)], AfterValidator(_moment)] | None = Field(
        None,
        description="When: ISO 8601 (UTC where it names no zone) or seconds since 1970, at most a day from "
        "now. Default: now, and then two equal events are two events unless they have a key.",
    )
    key: Id | None = Field(
        None,
        description="Tells the event from others: an event whose key was received before changes nothing. "
        "Default: made from user, item and time.",
    )


class Received(Message):
    """The events are on disk."""

    new: int
    duplicates: int = Field(description="Events whose key was received before.")
    unknown_items: list[str] = Field(
        default=[], description="Items that the serving stage does not know; their events are kept."
    )


class ItemDetails(Message):
    stage: int
    item: str
    title: str | None
    semantic_id: list[str]


class Promotion(Message):
    """The last change of the stage that serves: by `peso promote`, `peso rollback` or a gate."""

    stage: int
    time: datetime
    by: str
    reason: str | None = None


class Status(Message):
    version: str
    stage: int = Field(description="The stage that answers.")
    stage_since: datetime = Field(description="Since when this server answers from it.")
    pinned: bool = Field(description="Whether --stage fixes the stage.")
    model: Literal["loading", "ready"]
    problem: str | None = Field(None, description="Why another stage could not be loaded.")
    newest_stage: int | None = Field(description="The newest trained stage; null where it cannot be read.")
    promotion: Promotion | None = Field(
        None, description="Why the workspace's stage serves; none where no stage was promoted yet."
    )
    read_only: bool
    items: int
    waiting: int = Field(description="Recommendations that wait for the model.")


class ShownItem(Message):
    """An item as the explorer shows it."""

    item: str
    title: str | None = None
    semantic_id: list[str] | None = Field(None, description="null: the stage does not know the item.")
    score: float | None = None


class ShownList(Message):
    stage: int
    source: Literal["model", "popularity"]
    reason: Literal["loading", "unknown_user", "empty_history"] | None
    items: list[ShownItem]


class Comparison(Message):
    """What the serving stage and the one before it recommend, from the same history."""

    history: list[ShownItem] = Field(description="The last items, newest last.")
    history_length: int
    serving: ShownList
    before: ShownList | None
    before_stage: int | None = Field(
        description="The stage that served before, or the parent of the serving one; null: there is none."
    )
    before_state: Literal["ready", "loading", "failed", "none"]


def _describe_explain(schema: dict[str, Any]) -> None:
    _describe_one_of(schema)
    schema["examples"] = [{"history": ["25", "311"], "item": "7"}]


class Explain(Message):
    """A question about one item after a history, or that of a user."""

    model_config = ConfigDict(json_schema_extra=_describe_explain)

    user: Id | None = Field(None, description="A user.")
    history: list[Id] | None = Field(None, max_length=MOST_ITEMS, description="Item ids, oldest first.")
    item: Id = Field(description="The item that is explained.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Explain:
        if (self.user is None) == (self.history is None):
            raise ValueError("give either user or history")
        return self


class NearItem(ShownItem):
    similarity: float = Field(description="1: the same vector, 0: nothing in common.")


class CodeChance(Message):
    code: str
    log_probability: float


class StageView(Message):
    """An item as one stage sees it."""

    stage: int
    score: float | None = Field(description="Log-probability; null: the model cannot tell.")
    codes: list[CodeChance] = Field(description="Of the semantic ID, each after the codes before it.")


class Explanation(Message):
    """Why an item is where it is."""

    item: str
    serving: StageView
    before: StageView | None = Field(description="null: there is no earlier stage, or its model is loading.")
    says: str = Field(description="Why the item moved, in sentences; empty without an earlier stage.")
    nearest_by: Literal["item head", "texts", "codes"] = Field(
        description="What `similarity` compares: vectors of the item head, TF-IDF vectors of the items' "
        "texts, or the first codes of the semantic IDs."
    )
    nearest: list[NearItem]
    events: dict[str, int] = Field(description="Events of the item in the stages of the stream, by stage.")


class KnownUser(Message):
    user: str
    items: int = Field(description="How many items the history has.")


class Users(Message):
    """Users of the log and of the received events, by name."""

    users: list[KnownUser]
    after: str | None = Field(description="For the next page; null: this is the last one.")


class StageDrift(Message):
    """How the data of a stage differ from those before it, as `peso diagnose` shows."""

    stage: int
    events: int
    users: int
    new_users: int
    items: int
    new_items: int
    item_divergence: float | None = Field(
        description="Jensen-Shannon divergence from the stage before, in bits; null in stage 0."
    )
    code_divergence: float | None = Field(description="The same of the first codes; null without codes.")


class Drift(Message):
    stages: list[StageDrift]
    high: float | None = Field(description="The value of `gate.drift`, above which a warning is given.")


class StageState(Message):
    """One stage of the lineage."""

    stage: int
    serves: bool
    parent: int | None
    strategy: str | None
    trained: str | None
    pruned: str | None = Field(description="When its weights were removed.")
    metrics: dict[str, float] | None = Field(description="On its own test cases; null: it was not tested.")
    gate: dict[str, Any] | None = Field(description="`decision`, `champion`, `says` and `time`; null: none.")


class Lineage(Message):
    gate: bool = Field(description="Whether an update must pass a gate.")
    previous: int | None = Field(description="Where a rollback leads.")
    since: str | None
    by: str | None
    reason: str | None
    stages: list[StageState] = Field(description="Oldest first.")
    refusal: str | None = Field(description="Why this caller may not change the stage; null: it may.")


def _one_line(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise ValueError("must be one line of visible text")
    return text.strip()


Reason = Annotated[
    str,
    Field(min_length=1, max_length=300, description="Recorded with the change."),
    AfterValidator(_one_line),
]


class Promote(Message):
    model_config = ConfigDict(json_schema_extra={"examples": [{"stage": 2, "reason": "better on new items"}]})

    stage: int = Field(ge=0)
    reason: Reason
    force: bool = Field(False, description="Also a stage that its gate did not pass; this is recorded.")


class Rollback(Message):
    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "complaints since noon"}]})

    reason: Reason
    stage: int | None = Field(None, ge=0, description="Refuse if the rollback leads to another stage.")


class Changed(Message):
    stage: int = Field(description="The stage that serves; this server answers from it once it is loaded.")
    changed: bool = Field(description="false: the stage served already, and nothing was recorded.")
    reason: str = Field(description="As recorded, with the token that made the change.")


class Problem(Message):
    detail: str = Field(description="What is wrong and what to do.")


def _shape(value: Any) -> str:
    return "list" if isinstance(value, list) else "one"


Requests = Annotated[
    Annotated[Request, Tag("one")]
    | Annotated[list[Request], Field(min_length=1, max_length=MOST_REQUESTS), Tag("list")],
    Discriminator(_shape),
]
Events = Annotated[
    Annotated[Event, Tag("one")]
    | Annotated[list[Event], Field(min_length=1, max_length=MOST_EVENTS), Tag("list")],
    Discriminator(_shape),
]
