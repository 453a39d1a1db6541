"""`peso init`: writes a commented configuration for a log, with guessed columns, and tests it on the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import yaml

from peso.config import Config, load_config
from peso.config.data import LOG_FORMATS, STREAMS
from peso.config.reading import given, override
from peso.config.recipe import from_scratch, given_head_of, with_given
from peso.errors import DataError, UntrainableStage
from peso.events.histories import trained_counts
from peso.events.ingest import ingest
from peso.events.sources import format_at
from peso.events.sources.files import kind_of
from peso.events.sources.guess import Sampled, examples, guess_items, guess_log, guess_time, kinds, sample
from peso.events.stream import Stream
from peso.items.vectors import item_texts, warning_on_texts
from peso.runs.checks import check_configuration
from peso.runtime.progress import Observer
from peso.runtime.remote import is_remote, local

WIDTH = 100  # of a line with its comment
STAGES = (5, 4, 3, 2)  # numbers of stages, tried in this order
SMALL = 20_000  # training targets; with fewer, item-kNN can be better than a model (docs/results/recipe.md)
BASELINES = [
    {"name": "popularity", "last": 1},
    "item-knn",
    "ease",
    {"name": "hybrid", "partners": ["item-knn"]},
]
ITEMS = {"encoder": "hashing", "quantizer": "rq-kmeans"}
COMMENTS = {
    "data": "Where the events come from, how they are cleaned and cut: docs/how-to/prepare-a-log.md",
    "data.columns": "names of the columns in the log",
    "data.items": "the product table; titles and texts become semantic IDs",
    "data.time_format": "recognized from the values; auto, seconds, iso or a pattern",
    "data.stages": "60 % of the events, then equal parts; or {every: 1 week, from: 2024-03-04}",
    "items": "How items get semantic IDs: docs/reference/items.md",
    "items.encoder": "no download; better: all-minilm-l6-v2, after `peso pull all-minilm-l6-v2`",
    "backbone": "The language model. scratch: a small Llama, fully trained at stage 0, no download.",
    "backbone.name": "pretrained, for a GPU: smollm2-135m, without width, layers and dropout "
    "(learning_rate 2e-4, batch_size 32)",
    "head": "How items are scored: docs/explanation/item-head.md",
    "head.arrivals": "corrects the probability of the items that are new in a stage",
    "head.contents": "items are also scored by their texts",
    "strategy": "How later stages are trained: docs/reference/strategies.md",
    "training": "For a quick try: --set training.max_steps=20",
    "training.users": "tested: train only on users with at least three events in a stage, as in the paper",
    "training.epochs": "maximum; the epoch with the lowest validation loss is kept",
    "training.patience": "training stops after this many epochs without a lower validation loss",
    "training.later": "for updates; auto: rates are chosen by short trials on validation",
    "baselines": "Tested on the same cases. If item-knn beats the model, use `peso recommend --with hybrid`",
    "seed": "determines all results on the same machine",
}


@dataclass(frozen=True)
class FirstConfig:
    """``text``: the YAML. ``columns``: rows of file, role, column name and example values. ``manifest``: of
    the stream that the configuration gives."""

    text: str
    columns: list[tuple[str, str, str, str]]
    manifest: dict[str, Any]


def first_config(
    log: str,
    target: Path,
    observer: Observer,
    *,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    items: str | None = None,
    item_columns: Mapping[str, list[str]] | None = None,
    overrides: Sequence[str] = (),
) -> FirstConfig:
    """Make a configuration for a log, and test it by ingesting the data into a temporary directory.

    Args:
        log: a file, a directory of files of one kind, or an address.
        target: the file to which the configuration will be written; paths below its directory are made
            relative to it.
        form: the ``data.format``; None: guessed.
        columns: column names of the log, by ``user``, ``item``, ``time``, ``rating``; missing ones are
            guessed.
        items: the product table; None: the log itself, if it has titles.
        item_columns: column names of the product table, by ``item``, ``title``, ``text``, ``category``;
            missing ones are guessed.
        overrides: ``a.b=value`` texts, which become part of the configuration.

    Raises:
        DataError: there is no such file, a column cannot be guessed, the data cannot be ingested,
            or ``head.contents`` asks for texts that the items do not have.
        ConfigError: an unknown format or an invalid override.
    """
    form = form or format_at(log, observer, columns_given=bool(columns))
    data: dict[str, Any] = {"format": form, "path": _relative(log, target)}
    here = local(log, observer)
    guessed: list[tuple[str, str, str, str]] = []
    hint = ""
    if form in LOG_FORMATS:
        early = [text for text in overrides if text.startswith(("data.", "items."))]
        first = load_config({"data": {"format": form, "path": log}, "items": ITEMS}, early, base=Path())
        of_log, of_items = first.data, first.items
        sampled = sample(here, form, of_log.separator, of_log.encoding, "the path of the log")
        found = guess_log(sampled, dict(columns or {}), of_log.time_format)
        kind = found.pop("kind", None)
        shown = {**found, **({"event type": kind} if kind else {})}
        guessed += [(log, role, name, examples(sampled, name)) for role, name in shown.items()]
        hint = "min_rating: 4   # leave out events with a lower rating" if "rating" in found else ""
        if kind:
            types = ", ".join(kinds(sampled, kind))
            hint = f"events: {{column: {kind}, keep: [{types}]}}   # the event types to use"
        data |= {"separator": sampled.separator} if sampled.separator else {}
        data["columns"] = {role: _column(sampled, name) for role, name in found.items()}
        time_format = guess_time(sampled, found["time"]) if of_log.time_format == "auto" else None
        data |= {"time_format": time_format} if time_format not in ("auto", None) else {}
        if not of_log.items or items:
            table, product_kind = items or log, (kind_of(items) if items else None) or form
            there = local(items, observer) if items else here
            encoding = of_log.encoding if product_kind == "csv" else "utf-8"
            sampled = sample(there, product_kind, None, encoding, "--items")
            fields = guess_items(
                sampled,
                dict(item_columns or {}),
                None if items else found["item"],
                without_texts=not of_items.needs_texts,
            )
            guessed += [
                (table, role, name, examples(sampled, name))
                for role, names in fields.items()
                for name in names
                if items or role != "item"
            ]
            if items or len(fields) > 1:
                data["items"] = {
                    "path": _relative(table, target),
                    **({"separator": sampled.separator} if sampled.separator else {}),
                    "columns": {
                        role: [_column(sampled, n) for n in names]
                        if role == "text"
                        else _column(sampled, names[0])
                        for role, names in fields.items()
                    },
                }
    tree: dict[str, Any] = {
        "data": data,
        "items": ITEMS,
        "backbone": "scratch",
        "head": "items",
        "strategy": "peso",
        "training": {"users": "all"},
        "seed": 0,
    }
    if form in STREAMS:  # with semantic IDs, stages and a protocol of their own
        del tree["items"], tree["training"]["users"]
    for text in overrides:
        override(tree, text)
    config, manifest, described = _tested(tree, target.parent, observer)
    if config.head.contents and described is None and not config.items.vectors:
        raise DataError(
            "head.contents needs items with texts or vectors, but the log has none; give a product table "
            "with --items, or leave head.contents out"
        )
    if described and config.items.needs_texts and config.items.quantizer != "category-path":
        warning = warning_on_texts(item_texts(described, config.items.template))
        if warning:
            observer.note(warning)
    targets = trained_counts(manifest["stages"][0], config.training.users)["training_targets"]
    kept = given(config)
    sections, reason = from_scratch(targets, manifest["items"], given_head_of(kept))
    if config.backbone.name == "scratch":
        if described:
            sections["head"]["contents"] = True
        tree |= with_given(sections, kept)
        if "baselines" not in tree and targets < SMALL:
            tree["baselines"] = BASELINES
    if not tree["training"]:  # a section without keys is refused
        del tree["training"]
    if (asked := max(config.evaluation.k)) > manifest["items"]:
        raise DataError(
            f"the log has {manifest['items']} items, fewer than evaluation.k asks for ({asked}); "
            "ask for fewer with --set evaluation.k=[1]"
        )
    return FirstConfig(_text(tree, hint, log, reason), guessed, manifest)


def _tested(
    tree: dict[str, Any], base: Path, observer: Observer
) -> tuple[Config, dict[str, Any], pa.Table | None]:
    """The configuration with the most stages that the log allows, the manifest of its stream, and the item
    table; None if no item has a title, a text or a category."""
    fixed = "stages" in tree["data"] or tree["data"]["format"] in STREAMS
    for stages in STAGES:
        if not fixed:
            tree["data"]["stages"] = stages
        config = load_config(tree, base=base)
        check_configuration(config)
        try:
            with TemporaryDirectory() as aside:
                manifest = ingest(config.data, Path(aside), config.seed_of_data, observer)
                stream = Stream.open(Path(aside))
                return config, manifest, stream.items if stream.is_described else None
        except UntrainableStage as error:
            if fixed or stages == STAGES[-1]:
                raise
            observer.note(f"{stages} stages are too many: {error}")
    raise AssertionError


def _column(sampled: Sampled, name: str) -> str | int:
    return name if sampled.header else int(name)


def _relative(path: str, target: Path) -> str:
    """The path, relative to the directory of ``target`` if it is below it. An address stays as it is."""
    if is_remote(path):
        return path
    whole, folder = Path(path).expanduser().absolute(), target.parent.absolute()
    return str(whole.relative_to(folder)) if whole.is_relative_to(folder) else str(whole)


def _text(tree: Mapping[str, Any], hint: str, log: str, reason: str) -> str:
    """The tree as YAML, one line per key, with comments.

    Args:
        hint: a commented-out line for the section ``data``.
        reason: comment on the size of the model.
    """
    comments = {**COMMENTS, "backbone.width": reason}
    lines = [
        f"# A first configuration for {Path(log).name}, written by `peso init`.",
        "# Every key has a default; they are listed in docs/reference/configuration.md.",
    ]
    for section, value in tree.items():
        lines += ["", *([f"# {comments[section]}"] if section in comments else [])]
        lines.append(f"{section}:" if isinstance(value, Mapping) else _flow({section: value}))
        if not isinstance(value, Mapping):
            continue
        for key, below in value.items():
            about, entry = comments.get(f"{section}.{key}"), f"  {_flow({key: below})}"
            if about and len(entry) + len(about) < WIDTH:
                entry += f"  # {about}"
            elif about:
                lines.append(f"  # {about}")
            lines.append(entry)
            lines += [f"  # {hint}"] if hint and key == "columns" else []
    return "\n".join(lines) + "\n"


def _flow(entry: Mapping[str, Any]) -> str:
    """One key with its value on one line."""
    dumped = yaml.safe_dump(
        dict(entry), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
    )
    return dumped.strip()[1:-1]
