"""A trained stage, ready to answer."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.errors import DataError, ExportError
from peso.items.semantic_ids import SemanticIds
from peso.runs.served import serving_stage
from peso.runs.workspace import Workspace, require_place
from peso.runtime.files import require_free, require_new, write_aside
from peso.runtime.machine import threads
from peso.runtime.progress import Observer, Silent

if TYPE_CHECKING:
    from peso.model.generative import GenerativeModel

ENDINGS = (".parquet", ".csv", ".jsonl")  # of a file of `recommend_all`
SCHEMA = pa.schema(
    [("user", pa.string()), ("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
)
ROW_GROUP = 512  # users of `recommend_all` that are held in memory together


def require_output(file: Path, force: bool = False) -> None:
    """Raise ExportError if recommendations for everybody cannot be written to a file."""
    if file.suffix.lower() not in ENDINGS:
        raise ExportError(f"{file}: name a file that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    require_place(file)
    require_new(file, force)


@contextmanager
def _rows_into(file: Path, ending: str) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """What writes the users' rows into a new file, in the format of an ending."""
    if ending == ".parquet":
        with pq.ParquetWriter(file, SCHEMA) as writer:
            yield lambda rows: writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        return
    with file.open("w", encoding="utf-8", newline="") as lines:
        if ending == ".jsonl":
            yield lambda rows: lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        table = csv.writer(lines)
        table.writerow(("user", "rank", "item", "score"))
        yield lambda rows: table.writerows(
            (row["user"], rank, item, score)
            for row in rows
            for rank, (item, score) in enumerate(zip(row["items"], row["scores"], strict=True), 1)
        )


class Recommender:
    """Answers from one stage of one workspace. The model is loaded when it is first needed.

    Args:
        stage: whose model answers, with the histories up to this stage. Default: the stage that serves
            (``peso promote``; the newest trained one where none was promoted), with the histories up to the
            newest trained stage.
        device: as configured by default.

    Raises:
        WorkspaceError: the stage is not trained, or the record of what serves is damaged.
    """

    def __init__(self, workspace: Workspace, stage: int | None = None, device: str | None = None) -> None:
        self.workspace = workspace
        chosen = serving_stage(workspace) if stage is None else workspace.trained(stage)
        self.stage = chosen.number
        self.newest = workspace.finished_stages[-1] if stage is None else self.stage  # of the histories
        self.device = device

    @cached_property
    def model(self) -> GenerativeModel:
        """The model as it stood after the stage, in evaluation mode.

        Raises:
            BackboneError: the backbone cannot be loaded, or is not the one that was trained on.
        """
        return self.workspace.stage(self.stage).model(self.device)

    @classmethod
    def load(
        cls,
        workspace: str | Path,
        stage: int | None = None,
        device: str | None = None,
        trust: Iterable[str] = (),
    ) -> Recommender:
        """Load a trained stage. Default: the one that serves, or the newest where none was promoted.

        Args:
            trust: classes of custom strategies that may be imported, see :meth:`Workspace.open`.

        Raises:
            WorkspaceError: no workspace, or the stage is not trained.
            BackboneError: the backbone cannot be loaded, or is not the one that was trained on.
        """
        recommender = cls(Workspace.open(workspace, trust), stage, device)
        _ = recommender.model
        return recommender

    # -- answers ---------------------------------------------------------------------------------

    def recommend(
        self,
        history: Sequence[str] | None = None,
        *,
        user: str | None = None,
        k: int = 10,
        exclude_seen: bool | None = None,
    ) -> list[tuple[str, float]]:
        """The k items most likely to come next, best first, with their log-probabilities; fewer where
        ``exclude_seen`` leaves no more.

        Args:
            history: item ids, oldest first; or
            user: whose stored history is taken.
            exclude_seen: leave out the items of the history. None: see :attr:`leaves_out_seen`.

        Raises:
            DataError: unknown items or user (told which), or k larger than the catalogue.
        """
        if (history is None) == (user is None):
            raise DataError("give either a history or a user")
        items = list(history) if history is not None else self.history(str(user))
        return self._search([items], k, exclude_seen=exclude_seen)[0]

    def recommend_all(
        self,
        file: str | Path,
        *,
        k: int = 10,
        exclude_seen: bool | None = None,
        force: bool = False,
        observer: Observer | None = None,
    ) -> int:
        """Write user, items and scores for every user of the log up to this stage into a file.

        Its ending decides: ``.parquet`` and ``.jsonl`` have a row a user (``user``, ``items``, ``scores``),
        ``.csv`` a row an item (``user``, ``rank``, ``item``, ``score``).

        Returns how many users were written. The file appears whole or not at all. A user to whom
        ``exclude_seen`` leaves fewer than ``k`` items gets those; the observer is told.

        Args:
            exclude_seen: leave out the items of the history. None: see :attr:`leaves_out_seen`.
            force: overwrite the file if it is there.

        Raises:
            ExportError: another ending, a file that is there already, or one that belongs to a workspace.
            DataError: ``k`` larger than the catalogue.
        """
        file, observer = Path(file), observer or Silent()
        require_output(file, force)
        self._require_length(k)
        users, histories = list(self.histories), list(self.histories.values())
        ids = np.array(self.semantic_ids.item_ids, dtype=object)
        short: dict[str, int] = {}  # users with fewer than k items, and how many they got
        observer.begin("recommend", len(users), "users")
        with write_aside(file) as aside, _rows_into(aside, file.suffix.lower()) as write:
            for start in range(0, len(users), ROW_GROUP):
                part = slice(start, start + ROW_GROUP)
                ranked = self._search(
                    [ids[history].tolist() for history in histories[part]],
                    k,
                    exclude_seen=exclude_seen,
                )
                rows = [
                    {"user": user, "items": [i for i, _ in best], "scores": [s for _, s in best]}
                    for user, best in zip(users[part], ranked, strict=True)
                ]
                write(rows)
                short |= {
                    user: len(best) for user, best in zip(users[part], ranked, strict=True) if len(best) < k
                }
                observer.advance(start + len(rows))
        observer.end()
        if short:
            user = min(short, key=lambda each: short[each])
            observer.note(
                f"{len(short):,} of {len(users):,} users got fewer than {k} items, since they have had the "
                f"others; user {user!r} got the fewest: {short[user]}"
            )
        return len(users)

    # -- what is known of users and items ----------------------------------------------------------

    @cached_property
    def leaves_out_seen(self) -> bool:
        """Whether items of the history are left out unless a call says otherwise, as in the tests of the
        stage: ``decoding.repeats``, under ``auto`` if no user of the stages so far had an item twice."""
        return self.workspace.stage(self.stage).leaves_out_seen

    @cached_property
    def histories(self) -> dict[str, np.ndarray]:
        """Item rows of every user of the stages 0 … `newest`, oldest first: all of them, of which the model
        reads the last `window` and ``exclude_seen`` leaves out every one."""
        stream = self.workspace.stream
        known: dict[str, np.ndarray] = {}
        for number in range(min(self.newest + 1, stream.stages)):
            known.update(zip(*stream.stage(number).histories(), strict=True))
        return known

    def history(self, user: str) -> list[str]:
        """The stored items of a user, oldest first. Raises DataError if the log does not know the user."""
        if user not in self.histories:
            raise DataError(
                f"user {user!r} is in none of the stages 0 to {self.newest} of {self.workspace.root}"
            )
        ids = self.semantic_ids.item_ids
        return [ids[row] for row in self.histories[user]]

    def export(self, directory: str | Path, format: Literal["merged", "peft", "index"] = "merged") -> Path:
        """Write the stage's model, or the semantic IDs, for other tools: as `peso export` does.

        Args:
            directory: a new one; with ``index`` a new file.
            format: ``merged``: one plain Transformers model; ``peft``: backbone and adapter; ``index``: the
                semantic IDs of all items as an index.json, as research code reads them.

        Returns:
            Where it is written.

        Raises:
            ExportError: the place is taken, or the model has no such form.
        """
        place = Path(directory)
        require_place(place)
        if format == "index":
            from peso.runs.pipeline import export_index

            export_index(self.workspace, place)
            return place
        require_free(place)
        from peso.model.export import export_merged, export_peft

        on_cpu = self if self.device == "cpu" else Recommender(self.workspace, self.stage, "cpu")
        write = export_merged if format == "merged" else export_peft
        write(on_cpu.model, place, leaves_out_seen=self.leaves_out_seen)
        return place

    def title(self, item: str) -> str | None:
        """The item's title, where the log's item table has one."""
        return self._titles[self.semantic_ids.row(item)]

    def semantic_id(self, item: str) -> list[str]:
        """The item's semantic-ID tokens, e.g. ``["<a_128>", "<b_72>", "<c_95>", "<d_83>"]``."""
        return self.semantic_ids.semantic_id(item)

    def prompt_ids(self, history: Sequence[str]) -> list[int]:
        """Token ids of the prompt, as the exported merged model reads them.

        Raises:
            DataError: the history holds unknown items (told which).
        """
        rows = self.semantic_ids.rows(list(history))[-self.workspace.config.prompt.window :]
        ids: list[int] = self.model.layout.prompt(self.model.item_token_ids(rows)).tolist()
        return ids

    def _search(
        self, histories: list[list[str]], k: int, *, exclude_seen: bool | None
    ) -> list[list[tuple[str, float]]]:
        """The k best items of each history; what cannot be answered is refused before the model is loaded."""
        if exclude_seen is None:
            exclude_seen = self.leaves_out_seen
        for history in histories:
            self.semantic_ids.rows(history)
        self._require_length(k)
        from peso.decoding import beam_search

        with threads(self._answering, self.workspace.config.training.threads):
            return beam_search(self._answering, histories, k, exclude_seen=exclude_seen)

    def _require_length(self, k: int) -> None:
        """Raise DataError if the catalogue has fewer than k items."""
        if k > (items := len(self.semantic_ids.item_ids)):
            raise DataError(f"k = {k} is more than the {items} items of the catalogue; ask for fewer")

    @cached_property
    def semantic_ids(self) -> SemanticIds:
        return self.workspace.semantic_ids

    @cached_property
    def _answering(self) -> GenerativeModel:
        from peso.model.inference import for_inference

        answering: GenerativeModel = for_inference(self.model)
        return answering

    @cached_property
    def _titles(self) -> list[str | None]:
        return self.workspace.stream.titles
