"""Compute one vector per item with an encoder that is fitted once and then frozen.

An item without a known vector (it has no text, none of its words is known, or no vector file has it) gets the
center of the catalog, which is zero in the fused space. Its codes are those nearest to the center.

Several sources (text, images, behavior) are fused into one vector (:mod:`peso.items.fusion`).

Vectors of texts are cached by the content of the text:

    cache/{digest of the encoder}/{digest of the part}.safetensors    sha256 of each text, vector of each text
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from peso.config import ItemsConfig
from peso.config.items import FILES, HASHING
from peso.config.parsing import shown
from peso.errors import DataError
from peso.items.behavior import Behavior
from peso.items.fusion import Fusion
from peso.items.hashing import HashingEncoder
from peso.items.semantic_ids import ITEM_ID
from peso.items.vector_files import read_vectors
from peso.runtime.files import digest, write_aside
from peso.runtime.progress import Observer

FIELDS = ("title", "text", "category")
MANY = 0.1  # the share of items without vectors of their own from which there is a warning
NAMES = "names"  # column of an item table: all ids of each item, for files that have one of them


def item_texts(items: pa.Table, template: str) -> list[str | None]:
    """Fill the template for every item.

    A line of the template is dropped if all of its fields are empty, so that no label appears without a
    value. An item for which all fields of the template are empty has no text: the result is None (see
    :mod:`peso.items.vectors`).

    Args:
        items: a table with the columns ``title``, ``text`` and ``category`` (string or null). A missing
            column counts as empty.
        template: a text with fields, such as ``"{title}\\n{category}\\n{text}"``.

    >>> table = pa.table({"title": ["Tea", " ", None], "category": ["Home", "Garden", None]})
    >>> item_texts(table, "{title}\\nIn {category}")
    ['Tea\\nIn Home', 'In Garden', None]
    """
    lines = [(line, _fields(line)) for line in template.split("\n")]
    empty = [None] * len(items)
    columns = [items[name].to_pylist() if name in items.column_names else empty for name in FIELDS]
    texts = []
    for values in zip(*columns, strict=True):
        filled = {name: (value or "").strip() for name, value in zip(FIELDS, values, strict=True)}
        texts.append(_fill(lines, filled))
    return texts


def warning_on_texts(texts: Sequence[str | None]) -> str | None:
    """A warning if more than a tenth of the items have no text, or the same text as an earlier item.

    Args:
        texts: the text of each item (:func:`item_texts`).
    """
    empty = sum(text is None for text in texts)
    times = Counter(text for text in texts if text is not None)
    same = sum(times.values()) - len(times)
    if empty + same <= MANY * len(texts):
        return None
    of = f"of {len(texts):,}"
    found = [f"items without a text ({empty:,} {of})"] * (empty > 0)
    if same:
        text = shown(times.most_common(1)[0][0])
        found.append(f"items with the same text as another one ({same:,} {of}; for example {text})")
    return (
        f"warning: the semantic IDs of {' and '.join(found)} are arbitrary; check items.template, "
        "data.items.columns and the product table"
    )


def _fill(lines: list[tuple[str, list[str]]], filled: Mapping[str, str]) -> str | None:
    if not any(filled[name] for _, names in lines for name in names):
        return None
    kept = [line for line, names in lines if not names or any(filled[name] for name in names)]
    return "\n".join(kept).format(**filled)


def _fields(line: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(line) if name is not None]


@dataclass(frozen=True)
class ItemVectors:
    """The vectors of items, float32 (items, width), and whether each one is known, bool (items,).

    With ``items.behavior``, the last ``behavior_width`` columns are the part of behavior, ``has_behavior``
    says which items have one, and ``has_contents`` which have any other part.
    """

    vectors: np.ndarray
    known: np.ndarray
    behavior_width: int = 0
    has_behavior: np.ndarray | None = None
    has_contents: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> ItemVectors:
        """The vectors of these items only."""
        behavior, contents = (
            None if flags is None else flags[rows] for flags in (self.has_behavior, self.has_contents)
        )
        return ItemVectors(self.vectors[rows], self.known[rows], self.behavior_width, behavior, contents)

    @property
    def behavior(self) -> np.ndarray:
        """float32 (items, behavior_width): the part of behavior."""
        return self.vectors[:, self.vectors.shape[1] - self.behavior_width :]

    @property
    def contents(self) -> np.ndarray:
        """float32 (items, width of the other parts): the part of texts and vector files."""
        return self.vectors[:, : self.vectors.shape[1] - self.behavior_width]

    def as_new(self) -> ItemVectors:
        """The same items as they would be if they were new: known by their contents alone."""
        if self.has_contents is None:
            return self
        vectors = self.vectors.copy()
        vectors[:, vectors.shape[1] - self.behavior_width :] = 0
        return ItemVectors(vectors, self.has_contents)


@dataclass(frozen=True)
class ItemEncoder:
    """The frozen encoder of items. ``hashing`` is None if another text encoder is used; ``behavior`` is None
    if vectors are made from the items' contents alone."""

    hashing: HashingEncoder | None
    fusion: Fusion
    behavior: Behavior | None = None

    @classmethod
    def fit(
        cls,
        items: pa.Table,
        rows: np.ndarray,
        config: ItemsConfig,
        seed: int,
        cache: Path | None,
        observer: Observer,
        sequences: Iterable[np.ndarray] = (),
    ) -> tuple[ItemEncoder, ItemVectors]:
        """Fit the encoder to the items of ``rows``.

        Args:
            rows: the rows of the items to fit to.
            seed: the seed of everything random.
            cache: a directory that keeps vectors of text encoders between runs; None to keep none.
            sequences: with ``items.behavior``, the item rows of each user in the stages to fit to, oldest
                first.

        Returns:
            The encoder, and the vectors of all items.

        Raises:
            ConfigError: an encoder cannot be loaded.
            DataError: a vector file is invalid, or no two items occur together.
        """
        texts = item_texts(items, config.template)
        hashing = behavior = None
        if config.encoder == HASHING:
            observer.begin("item text to vectors: hashed TF-IDF, reduced by truncated SVD", 0, "")
            fitted = [text for row in rows if (text := texts[row]) is not None]
            hashing = HashingEncoder.fit(fitted, config.dimensions, seed)
            observer.end()
        if config.behavior is not None:
            observer.begin("behavior to vectors: shifted PPMI, reduced by truncated SVD", 0, "")
            keep = config.refresh is not None
            behavior = Behavior.fit(sequences, len(items), config.behavior, seed, keep_basis=keep)
            observer.end()
        sources = _sources(items, texts, hashing, behavior, config, cache, observer)
        fusion = Fusion.fit(sources, rows, config.behavior.weight if config.behavior else None)
        encoder = cls(hashing, fusion, behavior)
        return encoder, encoder._fused(sources)

    def encode(
        self, items: pa.Table, config: ItemsConfig, cache: Path | None, observer: Observer
    ) -> ItemVectors:
        """Encode items in the same way as the fitted ones.

        Raises:
            DataError: the vectors of a source have another width than those that were fitted.
        """
        texts = item_texts(items, config.template)
        sources = _sources(items, texts, self.hashing, self.behavior, config, cache, observer)
        fitted = [len(center) for center in self.fusion.centers]
        given = [source.shape[1] for source in sources]
        if given != fitted:
            raise DataError(
                f"the widths of the items' vectors are {given}, but the codebooks were fitted to {fitted}; "
                "use the same encoder and vector files as before, or ingest everything into a new workspace"
            )
        return self._fused(sources)

    def _fused(self, sources: Sequence[np.ndarray]) -> ItemVectors:
        vectors, present = self.fusion.apply(sources)
        if self.behavior is None:
            return ItemVectors(vectors, np.asarray(present.any(0)))
        width = self.behavior.vectors.shape[1]
        known, contents = np.asarray(present.any(0)), np.asarray(present[:-1].any(0))
        return ItemVectors(vectors, known, width, present[-1], contents)

    def arrays(self) -> dict[str, np.ndarray]:
        """The named arrays that are stored in ``encoder.safetensors``."""
        named = {f"fusion.{name}": array for name, array in self.fusion.arrays().items()}
        if self.hashing is not None:
            named |= {f"hashing.{name}": array for name, array in self.hashing.arrays().items()}
        if self.behavior is not None:
            named |= {f"behavior.{name}": array for name, array in self.behavior.arrays().items()}
        return named

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> ItemEncoder:
        parts: dict[str, dict[str, np.ndarray]] = {"fusion": {}, "hashing": {}, "behavior": {}}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = array
        hashing = HashingEncoder.from_arrays(parts["hashing"]) if parts["hashing"] else None
        behavior = Behavior.from_arrays(parts["behavior"]) if parts["behavior"] else None
        return cls(hashing, Fusion.from_arrays(parts["fusion"]), behavior)


def _sources(
    items: pa.Table,
    texts: Sequence[str | None],
    hashing: HashingEncoder | None,
    behavior: Behavior | None,
    config: ItemsConfig,
    cache: Path | None,
    observer: Observer,
) -> list[np.ndarray]:
    """The vectors of the encoder, of each file and of behavior, float32 (items, width), with zeros for
    missing vectors."""
    sources = []
    if config.encoder != FILES:
        present = np.array([text is not None for text in texts], bool)
        given = [text for text in texts if text is not None]
        if hashing is not None:
            encoded = hashing.encode(given)
        else:
            encoded = _model_vectors(given, config, cache, observer)
        spread = np.zeros((len(texts), encoded.shape[1]), np.float32)
        spread[present] = encoded
        sources.append(spread)
    item_ids = items[ITEM_ID].to_pylist()
    names = items[NAMES].to_pylist() if NAMES in items.column_names else None
    for path in config.vectors:
        sources.append(read_vectors(path, item_ids, observer, names))
    if behavior is not None:
        sources.append(behavior.spread(len(items)))
    return sources


def _model_vectors(
    texts: Sequence[str], config: ItemsConfig, cache: Path | None, observer: Observer
) -> np.ndarray:
    from peso.items.language_model import load_text_encoder

    encoder = load_text_encoder(config.encoder, config.max_tokens)
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            observer.begin("item text to vectors", total, "texts")
            started = True
        observer.advance(done)

    # without any text, encode an empty one to find the width
    vectors = encode_cached(list(texts) or [""], encoder.encode, encoder.identity, cache, progress)
    if started:
        observer.end()
    if not np.isfinite(vectors).all():
        raise DataError(f"items.encoder {config.encoder!r} gives vectors with NaN; use another encoder")
    return vectors[: len(texts)]


PART = 10_000  # texts encoded between two writes, the most that an interrupted run can lose


def encode_cached(
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], np.ndarray],
    identity: Sequence[object],
    directory: Path | None,
    on_progress: Callable[[int, int], None],
) -> np.ndarray:
    """Encode texts. Each distinct text is encoded once, unless it is in the cache.

    Args:
        encode: a function from texts to vectors, float32 (texts, width).
        identity: JSON values that determine the results of ``encode``.
        directory: the cache; None to keep nothing.
        on_progress: called with the number of texts encoded so far and the number to encode.

    Returns:
        float32 (texts, width).

    Raises:
        WorkspaceError: there is no space left for the cache.
    """
    keys = [hashlib.sha256(text.encode()).digest() for text in texts]
    distinct = dict(zip(keys, texts, strict=True))
    folder = directory / digest(*identity)[:32] if directory is not None else None
    known = _read(folder) if folder is not None else {}
    missing = [key for key in distinct if key not in known]
    # sort texts by length over all parts, so that batches have little padding
    missing.sort(key=lambda key: len(distinct[key]), reverse=True)
    for start in range(0, len(missing), PART):
        part = missing[start : start + PART]
        vectors = encode([distinct[key] for key in part])
        known.update(zip(part, vectors, strict=True))
        if folder is not None:
            _write(folder, part, vectors)
        on_progress(start + len(part), len(missing))
    return np.stack([known[key] for key in keys]) if keys else np.empty((0, 0), np.float32)


def _read(folder: Path) -> dict[bytes, np.ndarray]:
    known: dict[bytes, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            arrays = load_file(path)
            keys, vectors = arrays["keys"], arrays["vectors"]
        except (SafetensorError, OSError, KeyError):
            path.unlink()  # the texts of a damaged part are encoded again
            continue
        known.update((key.tobytes(), vector) for key, vector in zip(keys, vectors, strict=True))
    return known


def _write(folder: Path, keys: Sequence[bytes], vectors: np.ndarray) -> None:
    rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
    name = hashlib.sha256(rows.tobytes()).hexdigest()[:32]
    with write_aside(folder / f"{name}.safetensors") as aside:
        save_file({"keys": rows.copy(), "vectors": np.ascontiguousarray(vectors)}, aside)
