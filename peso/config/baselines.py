"""The recommenders that a run is compared with: the section `baselines`, names and their options."""

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
    """What a configuration says of a baseline. A baseline declares its own as a nested class ``Options``."""

    @property
    def fused(self) -> Sequence[BaselineOptions]:
        """The baselines with which the run's own model is fused; none: that model is not needed."""
        return ()

    def memory(self, items: int, users: int, window: int) -> int:
        """Bytes that it needs at least: of the catalog's size and of how many users a stage has, 0 where the
        log is not read yet, and the items of a history that are used."""
        return 0


BaselineConfig = Annotated[SerializeAsAny[BaselineOptions], typed(BASELINES)]


def default_baselines() -> list[BaselineOptions]:
    """Those of a run that names none; each takes seconds."""
    return [BASELINES.read(options) for options in DEFAULT]


def _listed(value: Any) -> Any:
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str | Mapping) else value


Baselines = Annotated[list[BaselineConfig], BeforeValidator(_listed)]


def read_baseline(options: Mapping[str, Any]) -> BaselineOptions:
    """A baseline from its options as they were dumped, the name among them."""
    return TypeAdapter[BaselineOptions](BaselineConfig).validate_python(options)


def is_random(options: BaselineOptions) -> bool:
    """Whether what it learns depends on a seed: the networks do, what is counted or solved does not."""
    return bool(BASELINES.find(options.name).random)


def baseline_label(options: BaselineOptions) -> str:
    """``popularity``, or with options that are not the defaults ``popularity last=1``; tells them apart."""
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
