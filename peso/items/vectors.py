"""From the item table to one vector an item, by an encoder that is fitted once and then frozen.

An item without a known vector (no text at all, a text without one known word, no row in any file of vectors)
gets the centre of the catalogue, the zero of the fused space: its codes are those nearest to the centre.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import numpy as np
import pyarrow as pa

from peso.config import ItemsConfig
from peso.config.items import FILES, HASHING
from peso.errors import DataError
from peso.items.encoders.fusion import Fusion
from peso.items.encoders.hashing import HashingEncoder
from peso.items.encoders.vector_files import read_vectors
from peso.items.index_files import ITEM_ID
from peso.runtime.progress import Observer

FIELDS = ("title", "text", "category")


def item_texts(items: pa.Table, template: str) -> list[str | None]:
    """Fill the template for every item.

    The template is read line by line. A line that names fields is dropped where all of them are empty, so
    that no label stands without its value. An item whose every field of the template is empty has no text:
    None (what becomes of it: :mod:`peso.items.vectors`).

    Args:
        items: with the columns ``title``, ``text`` and ``category`` (string or null); a missing column
            counts as empty.
        template: such as ``"{title}\\n{category}\\n{text}"``.

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


def _fill(lines: list[tuple[str, list[str]]], filled: Mapping[str, str]) -> str | None:
    if not any(filled[name] for _, names in lines for name in names):
        return None
    kept = [line for line, names in lines if not names or any(filled[name] for name in names)]
    return "\n".join(kept).format(**filled)


def _fields(line: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(line) if name is not None]


@dataclass(frozen=True)
class ItemVectors:
    """One row an item: ``vectors`` float32 (items, width), ``known`` bool (items,)."""

    vectors: np.ndarray
    known: np.ndarray

    def take(self, rows: np.ndarray) -> ItemVectors:
        return ItemVectors(self.vectors[rows], self.known[rows])


@dataclass(frozen=True)
class ItemEncoder:
    """The frozen way from an item to its vector. ``hashing`` is None for any other encoder."""

    hashing: HashingEncoder | None
    fusion: Fusion

    @classmethod
    def fit(
        cls,
        items: pa.Table,
        rows: np.ndarray,
        config: ItemsConfig,
        seed: int,
        cache: Path | None,
        observer: Observer,
    ) -> tuple[ItemEncoder, ItemVectors]:
        """Fit to the items of ``rows``; the vectors are those of all items.

        Raises:
            ConfigError: an encoder that cannot be loaded.
            DataError: bad files of vectors.
        """
        texts = item_texts(items, config.template)
        hashing = None
        if config.encoder == HASHING:
            observer.begin("item text to vectors: hashed TF-IDF, reduced by truncated SVD", 0, "")
            fitted = [text for row in rows if (text := texts[row]) is not None]
            hashing = HashingEncoder.fit(fitted, config.dimensions, seed)
            observer.end()
        sources = _sources(items, texts, hashing, config, cache, observer)
        fusion = Fusion.fit(sources, rows)
        return cls(hashing, fusion), ItemVectors(*fusion.apply(sources))

    def encode(
        self, items: pa.Table, config: ItemsConfig, cache: Path | None, observer: Observer
    ) -> ItemVectors:
        """Encode items as the fitted ones were.

        Raises:
            DataError: a source whose width is not the fitted one's.
        """
        texts = item_texts(items, config.template)
        sources = _sources(items, texts, self.hashing, config, cache, observer)
        fitted = [len(centre) for centre in self.fusion.centres]
        given = [source.shape[1] for source in sources]
        if given != fitted:
            raise DataError(
                f"the vectors of the items are {given} wide, those the codebooks were fitted to {fitted}; "
                "use the encoder and files of then, or ingest everything into a new workspace"
            )
        return ItemVectors(*self.fusion.apply(sources))

    def arrays(self) -> dict[str, np.ndarray]:
        """Named arrays of an ``encoder.safetensors``."""
        named = {f"fusion.{name}": array for name, array in self.fusion.arrays().items()}
        if self.hashing is not None:
            named |= {f"hashing.{name}": array for name, array in self.hashing.arrays().items()}
        return named

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> ItemEncoder:
        parts: dict[str, dict[str, np.ndarray]] = {"fusion": {}, "hashing": {}}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = array
        hashing = HashingEncoder.from_arrays(parts["hashing"]) if parts["hashing"] else None
        return cls(hashing, Fusion.from_arrays(parts["fusion"]))


def _sources(
    items: pa.Table,
    texts: Sequence[str | None],
    hashing: HashingEncoder | None,
    config: ItemsConfig,
    cache: Path | None,
    observer: Observer,
) -> list[np.ndarray]:
    """The encoder's vectors, then those of each file: float32 (items, width) each, zeros where missing."""
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
    for path in config.vectors:
        sources.append(read_vectors(path, item_ids, observer))
    return sources


def _model_vectors(
    texts: Sequence[str], config: ItemsConfig, cache: Path | None, observer: Observer
) -> np.ndarray:
    from peso.items.encoders.cache import encode_cached
    from peso.items.encoders.language_model import load_text_encoder

    encoder = load_text_encoder(config.encoder, config.max_tokens)
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            observer.begin("item text to vectors", total, "texts")
            started = True
        observer.advance(done)

    # a text that is not there is never encoded; a catalogue without any still tells the width
    vectors = encode_cached(list(texts) or [""], encoder.encode, encoder.identity, cache, progress)
    if started:
        observer.end()
    if not np.isfinite(vectors).all():
        raise DataError(f"items.encoder {config.encoder!r} gives vectors with NaN; use another encoder")
    return vectors[: len(texts)]
