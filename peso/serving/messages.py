"""The schemas of requests and responses.

The limits of requests are part of the OpenAPI schema; a request that exceeds them is refused with status 422.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

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

MOST_REQUESTS = 64  # requests for recommendations in one HTTP request
MOST_EVENTS = 1_000
MOST_ITEMS = 1_000  # in a history
MOST_LISTED = 10_000  # in allow and deny
MOST_K = 100
AHEAD = 86_400.0  # seconds that a time may be in the future
ISO = {"type": "string", "format": "date-time"}
ID_LENGTH = 256  # maximum characters of a user id, an item id and an event key

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
            raise ValueError("is not a time such as 2026-03-01T12:00:00Z") from None
    if not 0 <= time <= now() / 1e6 + AHEAD:  # also refuses NaN
        raise ValueError("is before 1970 or more than a day in the future; send seconds or ISO 8601")
    return round(time * 1e6)


def now() -> int:
    """Microseconds since 1970."""
    return round(datetime.now(UTC).timestamp() * 1e6)


Id = Annotated[str, Field(min_length=1, max_length=ID_LENGTH), AfterValidator(_storable)]


class Message(BaseModel):
    """Base of all schemas: unknown keys are refused, and numbers are not accepted as ids."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _describe_request(schema: dict[str, Any]) -> None:
    _describe_one_of(schema)
    schema["examples"] = [EXAMPLE]


def _describe_one_of(schema: dict[str, Any]) -> None:
    """Declare in the JSON schema that exactly one of two keys is required, and not null."""
    schema["oneOf"] = [{"required": ["user"]}, {"required": ["history"]}]
    for name in ("user", "history"):
        described = schema["properties"][name]
        described.pop("default")
        described.update(next(kind for kind in described.pop("anyOf") if kind != {"type": "null"}))


class UserOrHistory(Message):
    """Base of requests for either a user or a history."""

    user: Id | None = Field(
        None, description="A user id. The history is that of the log and the events received since."
    )
    history: list[Id] | None = Field(None, max_length=MOST_ITEMS, description="Item ids, oldest first.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.user is None) == (self.history is None):
            raise ValueError("give either user or history")
        return self


class Request(UserOrHistory):
    """A request for recommendations, for a user or a history."""

    model_config = ConfigDict(json_schema_extra=_describe_request)

    k: int = Field(10, ge=1, le=MOST_K, description="Number of items.")
    exclude_seen: bool | None = Field(
        None,
        description="Leave out the items of the history. Default: as in the tests of the stage "
        "(`decoding.repeats`).",
    )
    allow: list[Id] | None = Field(
        None, min_length=1, max_length=MOST_LISTED, description="The only items that may be recommended."
    )
    deny: list[Id] | None = Field(
        None, max_length=MOST_LISTED, description="Items that must not be recommended."
    )
    titles: bool = Field(False, description="Add the title of each item.")
    unknown: Literal["skip", "refuse"] = Field(
        "skip",
        description="How to treat items of `history`, `allow` and `deny` that the stage does not know. "
        "skip: ignore them and list them in the answer. refuse: status 422.",
    )


class Item(Message):
    item: str
    score: float = Field(
        description="Log-probability under the model; in a popularity list, log of the share of events."
    )
    title: str | None = Field(None, description="Only if requested with `titles` and present in the log.")


Source = Literal["model", "hybrid", "popularity"]


class Answer(Message):
    """Recommendations from one stage."""

    stage: int = Field(description="The stage that gave the recommendations.")
    source: Source = Field(
        description="hybrid: the model combined with baselines. popularity: the items with the most events "
        "in the newest stage, see `reason`."
    )
    reason: Literal["loading", "unknown_user", "empty_history"] | None = Field(
        None, description="Why the model was not used."
    )
    items: list[Item] = Field(description="Best first; fewer than k if the filters leave fewer.")
    unknown_items: list[str] = Field(
        default=[], description="Items of the request or the history that the stage does not know."
    )
    renamed_items: dict[str, str] | None = Field(
        None,
        description="Current names of items that the request has by a former name (`peso items rename`).",
    )


class Event(Message):
    """An interaction of a user with an item."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user": "7", "item": "311", "time": "2026-03-01T12:00:00Z"}]}
    )

    user: Id
    item: Id
    time: Annotated[float | Annotated[str, WithJsonSchema(ISO)], AfterValidator(_moment)] | None = Field(
        None,
        description="ISO 8601 (UTC if without a time zone) or seconds since 1970, at most one day in the "
        "future. Default: now; without a time and a key, repeated events are different events.",
    )
    key: Id | None = Field(
        None,
        description="Idempotency key: an event with a key that was received before is ignored. Default: made "
        "from user, item and time.",
    )


class Received(Message):
    """Confirms that the events are stored on disk."""

    new: int = Field(description="Number of new events.")
    duplicates: int = Field(description="Number of events whose key was received before.")
    unknown_items: list[str] = Field(
        default=[], description="Items that the serving stage does not know; their events are stored too."
    )


class ItemDetails(Message):
    stage: int
    item: str
    title: str | None
    semantic_id: list[str]


class Promotion(Message):
    """The last change of the serving stage: by `peso promote`, `peso rollback` or a gate."""

    stage: int
    time: datetime
    by: str
    reason: str | None = None
    pinned: bool = Field(False, description="Whether a gate may not replace the stage.")


class Status(Message):
    version: str
    stage: int = Field(description="The serving stage.")
    stage_since: datetime = Field(description="When this server started to use it.")
    pinned: bool = Field(description="Whether the stage is fixed with --stage.")
    hybrid: str | None = Field(
        None, description="The hybrid that answers (--with); null: the model alone answers."
    )
    model: Literal["loading", "ready"]
    problem: str | None = Field(None, description="Why another stage could not be loaded.")
    newest_stage: int | None = Field(description="The newest trained stage; null if it cannot be read.")
    promotion: Promotion | None = Field(
        None, description="The change that made the stage the serving one; null if none was promoted yet."
    )
    read_only: bool = Field(description="Whether the server accepts no events.")
    items: int = Field(description="Number of items in the catalog.")
    waiting: int = Field(description="Number of requests waiting for the model.")


class ShownItem(Message):
    """An item in the explorer."""

    item: str
    title: str | None = None
    semantic_id: list[str] | None = Field(None, description="null: the stage does not know the item.")
    score: float | None = None


class ShownList(Message):
    stage: int
    source: Source
    reason: Literal["loading", "unknown_user", "empty_history"] | None
    items: list[ShownItem]


class Comparison(Message):
    """Recommendations of the serving and the previous stage for the same history."""

    history: list[ShownItem] = Field(description="The newest items of the history, newest last.")
    history_length: int = Field(description="Length of the whole history.")
    serving: ShownList
    before: ShownList | None
    before_stage: int | None = Field(
        description="The stage that served before, or the parent of the serving one; null if there is none."
    )
    before_state: Literal["ready", "loading", "failed", "none"]


def _describe_explain(schema: dict[str, Any]) -> None:
    _describe_one_of(schema)
    schema["examples"] = [{"history": ["25", "311"], "item": "7"}]


class Explain(UserOrHistory):
    """A request to explain the score of an item, for a user or a history."""

    model_config = ConfigDict(json_schema_extra=_describe_explain)

    item: Id = Field(description="The item to explain.")


class NearItem(ShownItem):
    similarity: float = Field(description="1: identical, 0: nothing in common; see `nearest_by`.")


class CodeChance(Message):
    code: str
    log_probability: float


class StageView(Message):
    """The score of an item under one stage."""

    stage: int
    score: float | None = Field(
        description="Log-probability under the model (with a hybrid: under its language model); null if the "
        "stage has no model yet or does not know the item."
    )
    codes: list[CodeChance] = Field(
        description="The codes of the semantic ID, with conditional log-probabilities."
    )
    item_head: float | None = Field(
        None, description="What the item head adds: the score minus the sum of the codes; null without one."
    )


class Explanation(Message):
    """An explanation of the score of an item."""

    item: str
    serving: StageView
    before: StageView | None = Field(
        description="The previous stage; null if there is none, or its model is not loaded."
    )
    says: str = Field(description="Why the score changed, in sentences; empty without a previous stage.")
    nearest_by: Literal["item head", "texts", "codes"] = Field(
        description="What `similarity` compares: vectors of the item head, TF-IDF vectors of the items' "
        "texts, or the first codes of the semantic IDs."
    )
    nearest: list[NearItem]
    events: dict[str, int] = Field(description="Number of events of the item, by stage of the stream.")


class KnownUser(Message):
    user: str
    items: int = Field(description="Number of items in the history.")


class Users(Message):
    """Users of the log and of the received events, by name."""

    users: list[KnownUser]
    after: str | None = Field(description="Parameter for the next page; null on the last page.")


class StageDrift(Message):
    """Drift of the data of a stage, as in `peso diagnose`."""

    stage: int
    events: int
    users: int
    new_users: int
    items: int
    new_items: int
    item_divergence: float | None = Field(
        description="Jensen-Shannon divergence from the previous stage, in bits; null at stage 0, and if one "
        "of the two stages has no events."
    )
    code_divergence: float | None = Field(
        description="The same for the first codes; null without semantic IDs."
    )


class Drift(Message):
    stages: list[StageDrift]
    high: float | None = Field(description="The setting `gate.drift`, above which there is a warning.")


class StageState(Message):
    """A trained stage."""

    stage: int
    serves: bool
    parent: int | None
    strategy: str | None
    trained: str | None
    pruned: str | None = Field(description="When its weights were removed; null if they exist.")
    metrics: dict[str, float] | None = Field(description="On its own test cases; null if not tested.")
    gate: dict[str, Any] | None = Field(
        description="The verdict: `decision`, `champion`, `says` and `time`; null if there is none."
    )


class Lineage(Message):
    gate: bool = Field(description="Whether updates must pass a gate.")
    previous: int | None = Field(description="The target of a rollback; null if there is none.")
    since: str | None = Field(description="When the serving stage was promoted.")
    by: str | None
    reason: str | None
    stages: list[StageState] = Field(description="Oldest first.")
    refusal: str | None = Field(
        description="Why this caller may not change the serving stage; null if it may."
    )


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
    force: bool = Field(
        False, description="Promote the stage even if it did not pass its gate; this is recorded."
    )


class Rollback(Message):
    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "complaints since noon"}]})

    reason: Reason
    stage: int | None = Field(
        None, ge=0, description="The expected target; if the target is another stage, the request is refused."
    )


class Changed(Message):
    stage: int = Field(description="The serving stage; this server uses it when it is loaded.")
    changed: bool = Field(description="false if the stage was serving already; then nothing is recorded.")
    reason: str = Field(description="The recorded reason, with the token that made the change.")


class Problem(Message):
    detail: str = Field(description="The problem, and how to fix it.")


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
