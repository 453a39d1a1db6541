"""The section `baselines`: the names and options of the recommenders that a run is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, TypeAdapter

from peso.config.registry import Options, Registry, typed

BASELINES = Registry(
    "baseline",
    "peso.baselines",
    "peso.baselines",
    "peso.baselines.baseline:Part",
    beside=["baseline", "fitting", "networks", "tuning"],
    hyphens=True,
)
DEFAULT: list[dict[str, Any]] = [
    {"name": "popularity", "last": 1},
    {"name": "item-knn"},
    {"name": "ease"},
    {"name": "item-graph"},
]


class BaselineOptions(Options):
    """The options of a baseline. A baseline declares its own as a nested class ``Options``."""

    @property
    def fused(self) -> Sequence[BaselineOptions]:
        """The baselines that are fused with the run's own model. Empty if that model is not needed."""
        return ()

    def memory(self, items: int, users: int, window: int) -> int:
        """The least memory that the baseline needs, in bytes.

        Args:
            items: the number of items in the catalog, or 0 if the log was not read yet.
            users: the number of users of a stage, or 0 if the log was not read yet.
            window: the number of items of a history that are used.
        """
        return 0


BaselineConfig = Annotated[SerializeAsAny[BaselineOptions], typed(BASELINES)]


def default_baselines() -> list[BaselineOptions]:
    """The baselines of a configuration that does not list any. Each takes seconds."""
    return [BASELINES.read(options) for options in DEFAULT]


def _listed(value: Any) -> Any:
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str | Mapping) else value


Baselines = Annotated[list[BaselineConfig], BeforeValidator(_listed)]


def read_baseline(options: Mapping[str, Any]) -> BaselineOptions:
    """The options of a baseline from dumped options, which include the name."""
    return TypeAdapter[BaselineOptions](BaselineConfig).validate_python(options)


def is_random(options: BaselineOptions) -> bool:
    """Whether a baseline depends on a seed. Networks do; those that count or solve do not."""
    return bool(BASELINES.find(options.name).random)


def baseline_label(options: BaselineOptions) -> str:
    """A unique label of a baseline: its name and the options that are not defaults, as in
    ``popularity last=1``."""
    own = options.model_dump(mode="json", exclude_defaults=True)

    def words(some: Mapping[str, Any], prefix: str = "") -> list[str]:
        return [
            text
            for key, value in some.items()
            if key != "name"
            for text in (
                words(value, f"{prefix}{key}.")
                if isinstance(value, Mapping)
                else [f"{prefix}{key}={word(value)}"]
            )
        ]

    def word(value: Any) -> str:
        if isinstance(value, list):  # of weights, or of baselines
            return "+".join(map(word, value))
        if isinstance(value, Mapping):
            return " ".join([value["name"], *words(value)])
        return f"{value:g}" if isinstance(value, float) else str(value)

    return " ".join([options.name, *words(own)])
