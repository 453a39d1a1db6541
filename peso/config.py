"""The one typed, validated configuration tree.

Knows every key, its type, its default and what is allowed; knows nothing of what the keys are used for.
A configuration is read from YAML, changed by ``--set a.b=value`` and written back as resolved.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from peso.errors import ConfigError

Layout = Literal["stream", "instruct"]
LossVocabulary = Literal["full", "semantic", "level"]
STREAM_LOSS_VOCABULARY: LossVocabulary = "semantic"
Precision = Literal["auto", "float32", "bfloat16"]


class Section(BaseModel):
    """A part of the tree: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SimulateConfig(Section):
    """Size of the embedded stream. ``stages`` counts stage 0 too."""

    users: int = Field(600, ge=10)
    items: int = Field(400, ge=20)
    stages: int = Field(5, ge=1)


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


Moment = Annotated[int | float | str, BeforeValidator(_moment)]
Column = Annotated[int | str, BeforeValidator(_column)]
LogFormat = Literal["csv", "parquet", "jsonl"]
TIME_FORMATS = ("auto", "seconds", "milliseconds", "microseconds", "iso")
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
        if self.every is not None and not PERIOD.fullmatch(self.every):
            raise ValueError(
                f"every is a number and hours, days, weeks, months or years, such as '1 week', "
                f"not {self.every!r}"
            )
        if (self.every is None) != (self.start is None):
            raise ValueError("every and from (where stage 1 begins) go together")
        return self


def _stages(value: Any) -> Any:
    """A bare number is how many stages: 0.6 of the events, the rest in equal parts. ``from`` is ``start``."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError("there is at least one stage")
        return {"fractions": [1.0] if value == 1 else [0.6, *[0.4 / (value - 1)] * (value - 1)]}
    if isinstance(value, Mapping) and "from" in value:
        if "start" in value:
            raise ValueError("takes from or start, which mean the same, not both")
        return {("start" if key == "from" else key): moment for key, moment in value.items()}
    return value


class ColumnsConfig(Section):
    """Where an event's fields stand: a name, or a number counted from 1 in CSV files without a header."""

    user: Column = "user"
    item: Column = "item"
    time: Column = "time"
    rating: Column | None = None


class ItemColumnsConfig(Section):
    """Where an item's fields stand. Several columns as ``text`` are joined to one."""

    item: Column = "item"
    title: Column | None = None
    text: Annotated[list[Column], BeforeValidator(_listed)] = []
    category: Column | None = None


class ItemTableConfig(Section):
    """The product table beside a log of one's own; other options as in ``data``."""

    path: str
    format: LogFormat | None = Field(None, description="none given: that of the log")
    columns: ItemColumnsConfig = ItemColumnsConfig()
    separator: str | None = Field(None, min_length=1, max_length=4)


class DataConfig(Section):
    """Where the events come from, how they are cleaned and cut into stages (docs/data.md)."""

    format: Literal[
        "peso-release",
        "simulate",
        "csv",
        "parquet",
        "jsonl",
        "amazon-2023",
        "movielens",
        "movietweetings",
        "yelp",
    ]
    path: str | None = Field(None, description="a file, a folder or a glob")
    columns: ColumnsConfig = ColumnsConfig()
    separator: str | None = Field(
        None, min_length=1, max_length=4, description="csv; none given: tab in .tsv, :: in .dat, else comma"
    )
    encoding: Literal["utf-8", "latin-1", "utf-16"] = Field("utf-8", description="csv only")
    time_format: str = Field(
        "auto", description="auto, seconds, milliseconds, microseconds, iso, or a pattern such as %d/%m/%Y"
    )
    items: ItemTableConfig | None = Field(None, description="csv, parquet and jsonl: the product table")
    min_rating: float | None = None
    repeats: Literal["keep", "drop"] = Field("keep", description="drop: a user's first event of an item only")
    min_user: int = Field(1, ge=1, description="events that every user is left with (k-core)")
    min_item: int = Field(1, ge=1, description="events that every item is left with (k-core)")
    stages: Annotated[StagesConfig, BeforeValidator(_stages)] = StagesConfig(
        fractions=[0.6, 0.1, 0.1, 0.1, 0.1]
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
        unused = {"columns", "separator", "encoding", "time_format", "items"} if not own else set()
        if own and self.format != "csv":
            unused |= {"separator", "encoding"}
        if self.format in ("peso-release", "simulate"):
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


class RqVaeConfig(Section):
    """The network of ``items.quantizer: rq-vae`` and how it is trained; unused by the other quantisers."""

    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        [256],
        min_length=1,
        description="widths between the vectors and the latent, mirrored in the decoder",
    )
    latent: int = Field(64, ge=2, description="width of the space that the codebooks quantise")
    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch_size: int = Field(1024, ge=1, description="items in one optimiser step")
    learning_rate: float = Field(1e-3, gt=0)
    commitment: float = Field(0.25, ge=0, description="weight that holds the encoder to its codes")


class ItemsConfig(Section):
    """How items get their semantic IDs (docs/items.md); unused where the data bring an index.

    ``encoder``: ``hashing``, ``vectors`` (those of the files in ``vectors`` alone), or a text encoder:
    ``all-minilm-l6-v2``, any sentence-transformers or Transformers name or path, causal LMs included.
    """

    encoder: str = Field("hashing", min_length=1)
    dimensions: int = Field(128, ge=2, description="hashing only: width of the vectors")
    template: str = Field(
        "{title}\n{category}\n{text}", description="a line whose fields are all empty is dropped"
    )
    max_tokens: int = Field(256, ge=1, description="text encoders only: tokens of an item that are read")
    vectors: list[str] = Field([], description="files of vectors, fused with those of the encoder")
    quantizer: Literal["rq-vae", "rq-kmeans", "balanced-rq-kmeans", "category-path", "release"] = "rq-vae"
    levels: int = Field(4, ge=1, le=25)
    codes: int = Field(256, ge=2, le=65_536, description="codes a level; fewer where the catalogue is small")
    collisions: Literal["reassign", "extra-level", "allow"] = "reassign"
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
            raise ValueError(f"items.template {self.template!r} is no template ({error})") from None
        if not named or not named <= fields:
            raise ValueError(
                f"items.template takes the fields {{title}}, {{text}} and {{category}}; got {self.template!r}"
            )
        if self.encoder == "vectors" and not self.vectors:
            raise ValueError("items.encoder: vectors needs files in items.vectors")
        return self


class BackboneConfig(Section):
    """``name``: a hub name, a path, an asset of ``peso pull``, ``scratch`` or ``tiny``."""

    name: str = "smollm2-135m"
    layers: int | None = Field(None, ge=1, description="keep the first n layers; for scratch: its depth")
    width: int | None = Field(None, ge=8, description="scratch and tiny only: hidden width")


class PromptConfig(Section):
    layout: Layout = "stream"
    window: int = Field(20, ge=1)


class AdapterConfig(Section):
    rank: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )


class NoneConfig(Section):
    """Only stage 0 is learnt; later stages inherit it unchanged."""

    name: Literal["none"]


class SingleConfig(Section):
    """One adapter, fine-tuned on every stage from where the last one left it."""

    name: Literal["single"]


class PesoConfig(Section):
    """``single``, held near its last state by the softmax-KL proximal term."""

    name: Literal["peso"]
    weight: float = Field(2.0, ge=0)
    reduction: Literal["sum", "mean"] = "mean"


StrategyConfig = NoneConfig | SingleConfig | PesoConfig


def _strategy(value: Any) -> Any:
    if value == "paper":
        return {"name": "peso", "weight": 2.0, "reduction": "mean"}
    if isinstance(value, str):
        return {"name": value}
    return {"name": "peso", **value} if isinstance(value, Mapping) else value


def _data(value: Any) -> Any:
    # design: `simulate` is itself a section (users, items, stages), so naming it alone is enough
    if value == "simulate":
        return {"format": "simulate"}
    if isinstance(value, Mapping) and "simulate" in value and "format" not in value:
        return {"format": "simulate", **value}
    return value


def _backbone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class TrainingConfig(Section):
    epochs: int = Field(4, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    later_learning_rate_scale: float = Field(0.1, gt=0)
    batch_size: int = Field(32, ge=1, description="targets in one optimiser step, in every layout")
    max_steps: int | None = Field(None, ge=1)
    loss_vocabulary: LossVocabulary = Field(
        STREAM_LOSS_VOCABULARY, description="the paper's preset and `instruct` have another default: full"
    )
    temperature: float = Field(0.8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.01, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    precision: Precision = "auto"
    device: str = "auto"
    validation_cases: int | None = Field(
        None, ge=1, description="validate on a seeded sample of so many cases; none given: on all"
    )


class DecodingConfig(Section):
    beams: int = Field(10, ge=1, le=500)
    batch_size: int = Field(64, ge=1, description="users decoded together")


class EvaluationConfig(Section):
    enabled: bool = True
    k: list[Annotated[int, Field(ge=1)]] = Field([5, 10], min_length=1)


class ReportConfig(Section):
    title: str | None = None


class Config(Section):
    """Everything a run is determined by. Field order is the order of the work."""

    data: Annotated[DataConfig, BeforeValidator(_data)]
    items: ItemsConfig = ItemsConfig()
    backbone: Annotated[BackboneConfig, BeforeValidator(_backbone)] = BackboneConfig()
    prompt: PromptConfig = PromptConfig()
    adapter: AdapterConfig = AdapterConfig()
    strategy: Annotated[StrategyConfig, Field(discriminator="name"), BeforeValidator(_strategy)] = PesoConfig(
        name="peso"
    )
    training: TrainingConfig = TrainingConfig()
    decoding: DecodingConfig = DecodingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="before")
    @classmethod
    def _default_quantizer(cls, tree: Any) -> Any:
        """The simulator's items come with a category tree, whose path is their ID unless told otherwise."""
        if not isinstance(tree, Mapping) or not isinstance(tree.get("items") or {}, Mapping):
            return tree
        data = _data(tree.get("data"))
        items = tree.get("items") or {}
        if not isinstance(data, Mapping) or data.get("format") != "simulate" or "quantizer" in items:
            return tree
        return {**tree, "items": {**items, "quantizer": "category-path"}}

    @model_validator(mode="after")
    def _lists_reach_k(self) -> Config:
        if max(self.evaluation.k) > self.decoding.beams:
            raise ValueError(
                f"evaluation.k asks for {max(self.evaluation.k)} items, but decoding.beams is "
                f"{self.decoding.beams}; give at least as many beams"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _default_loss_vocabulary(cls, tree: Any) -> Any:
        """``full`` for `instruct` and for the paper's preset; the default of `stream` is measured on real
        data (docs/training.md)."""
        if not isinstance(tree, Mapping):
            return tree
        training = tree.get("training") or {}
        prompt = tree.get("prompt") or {}
        if not isinstance(training, Mapping) or not isinstance(prompt, Mapping):
            return tree  # the types are refused further on
        paper = tree.get("strategy") == "paper" or prompt.get("layout") == "instruct"
        if training.get("loss_vocabulary") is not None or not paper:
            return tree
        return {**tree, "training": {**training, "loss_vocabulary": "full"}}


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), base: Path | None = None
) -> Config:
    """Read, override and validate a configuration.

    Args:
        source: a YAML file, or an already read tree.
        overrides: ``a.b=value`` texts, the value in YAML; later ones win.
        base: relative ``data.path`` is taken from here; by default from the file's own folder if it exists
            there, else from the working directory.

    Raises:
        ConfigError: names the key, the value and the nearest valid key.
    """
    if isinstance(source, Mapping):
        tree = dict(source)
    else:
        path = Path(source)
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"no configuration at {path}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} is not readable YAML: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(
                f"{path} holds no configuration (expected keys such as data, backbone, strategy)"
            )
        base = base or path.parent
    for text in overrides:
        _override(tree, text)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None
    return _absolute_paths(config, base)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the work."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed_keys(old: Config, new: Config) -> list[str]:
    """Dotted names of the keys whose values differ, in the order of the tree."""
    before, after = dict(_leaves(old.model_dump())), dict(_leaves(new.model_dump()))
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def _absolute_paths(config: Config, base: Path | None) -> Config:
    items = config.items.model_copy(
        update={"vectors": [_absolute(path, base) for path in config.items.vectors]}
    )
    if items.encoder.startswith((".", "~", "/")):  # everything else may be a name of the hub
        items = items.model_copy(update={"encoder": _absolute(items.encoder, base)})
    config = config.model_copy(update={"items": items})
    if config.data.path is None:
        return config
    update: dict[str, Any] = {"path": _absolute(config.data.path, base)}
    if config.data.items is not None:
        table = config.data.items
        update["items"] = table.model_copy(update={"path": _absolute(table.path, base)})
    data = config.data.model_copy(update=update)
    return config.model_copy(update={"data": data})


def _absolute(text: str, base: Path | None) -> str:
    path = Path(text).expanduser()
    if not path.is_absolute():
        beside = (base or Path()) / path
        path = beside if beside.exists() else path
    return str(path.resolve())


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, for example --set training.epochs=2; got {text!r}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value of --set {text!r} is not valid YAML") from None
    *parents, last = key.strip().split(".")
    for parent in parents:
        below = tree.get(parent)
        # a short form (`strategy: peso`, `backbone: tiny`) makes room for its options
        tree[parent] = (
            dict(below) if isinstance(below, Mapping) else {} if below is None else _expand(parent, below)
        )
        tree = tree[parent]
    tree[last] = parsed


def _expand(key: str, short: Any) -> dict[str, Any]:
    expanded = {"strategy": _strategy, "backbone": _backbone, "data": _data}.get(key, lambda v: v)(short)
    if not isinstance(expanded, dict):
        raise ConfigError(f"{key} is {short!r}, which has no keys below it")
    return dict(expanded)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The section types an annotation allows (several for a union)."""
    if get_origin(annotation) is None:
        return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def valid_keys() -> list[str]:
    """Every dotted key that a configuration may hold."""

    def below(section: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            yield prefix + name
            for inner in _sections(field.annotation):
                yield from below(inner, f"{prefix}{name}.")

    return list(dict.fromkeys(below(Config, "")))


def _explain(problem: Any) -> str:
    names = valid_keys()
    parts = [str(part) for part in problem["loc"]]
    if len(parts) > 2 and parts[0] == "strategy":
        del parts[1]  # pydantic names the chosen member of the union there
    key = ".".join(parts)
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        if key in names:  # known, but not for this strategy
            return f"strategy {problem['loc'][1]!r} has no option {parts[-1]!r} (given {value!r})"
        near = difflib.get_close_matches(key, names, n=1, cutoff=0) or names[:1]
        return f"unknown key {key!r} (value {value!r}); the nearest valid key is {near[0]!r}"
    if problem["type"] == "missing":
        return f"{key} is missing; a configuration needs at least data.format (and data.path)"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and (not parts or message.startswith(f"{parts[0]}.")):
        # raised by a section's own check, which names its keys
        return message
    if problem["type"] == "union_tag_invalid":
        known = problem["ctx"]["expected_tags"]
        return f"strategy.name: {problem['ctx']['tag']!r} is unknown; known are {known}"
    return f"{key}: {message}; got {value!r}"
