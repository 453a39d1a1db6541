"""A trained stage, ready to answer.

Knows a workspace's stage, its model and its catalogue; knows nothing of how the stage was learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso import decoding
from peso.durable import write_aside
from peso.errors import DataError
from peso.events.stream import Stream
from peso.model.generative import GenerativeModel
from peso.model.inference import for_inference
from peso.progress import Observer, Silent
from peso.stages import trained_model
from peso.workspace import Workspace

ROW_GROUP = 512  # users of `recommend_all` that are held in memory together


class Recommender:
    """Answers from one stage of one workspace.

    Attributes:
        model: the :class:`GenerativeModel` as it stood after the stage, in evaluation mode.
        stage: its number.
    """

    def __init__(self, workspace: Workspace, stage: int, model: GenerativeModel) -> None:
        self.workspace = workspace
        self.stage = stage
        self.model = model

    @classmethod
    def load(cls, workspace: str | Path, stage: int | None = None, device: str | None = None) -> Recommender:
        """Load a trained stage, the newest by default.

        Raises:
            WorkspaceError: no workspace, or the stage is not trained.
            BackboneError: the backbone cannot be loaded, or is not the one that was trained on.
        """
        opened = Workspace.open(workspace)
        number = opened.require_stage(stage)
        return cls(opened, number, trained_model(opened, number, device))

    # -- answers ---------------------------------------------------------------------------------

    def recommend(
        self,
        history: Sequence[str] | None = None,
        *,
        user: str | None = None,
        k: int = 10,
        exclude_seen: bool = False,
    ) -> list[tuple[str, float]]:
        """The k items most likely to come next, best first, with their log-probabilities.

        Args:
            history: item ids, oldest first; or
            user: whose stored history is taken.
            exclude_seen: leave out the items of the history.

        Raises:
            DataError: unknown items or user (told which), or k larger than the catalogue.
        """
        if (history is None) == (user is None):
            raise DataError("give either a history or a user")
        items = list(history) if history is not None else self.history(str(user))
        return decoding.beam_search(self._answering, [items], k, exclude_seen=exclude_seen)[0]

    def recommend_all(
        self, file: str | Path, *, k: int = 10, exclude_seen: bool = False, observer: Observer | None = None
    ) -> int:
        """Write user, items and scores for every user of the log up to this stage into a Parquet file.

        Returns how many users were written. The file appears whole or not at all.
        """
        observer = observer or Silent()
        users, histories = list(self.histories), list(self.histories.values())
        ids = np.array(self.model.semantic_ids.item_ids, dtype=object)
        schema = pa.schema(
            [("user", pa.string()), ("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
        )
        observer.begin("recommend", len(users), "users")
        with write_aside(Path(file)) as aside, pq.ParquetWriter(aside, schema) as writer:
            for start in range(0, len(users), ROW_GROUP):
                part = slice(start, start + ROW_GROUP)
                ranked = decoding.beam_search(
                    self._answering,
                    [ids[history].tolist() for history in histories[part]],
                    k,
                    exclude_seen=exclude_seen,
                )
                rows = [
                    {"user": user, "items": [i for i, _ in best], "scores": [s for _, s in best]}
                    for user, best in zip(users[part], ranked, strict=True)
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                observer.advance(start + len(rows))
        observer.end()
        return len(users)

    # -- what is known of users and items ----------------------------------------------------------

    @cached_property
    def histories(self) -> dict[str, np.ndarray]:
        """Item rows of every user of the stages 0 … `stage`, oldest first, the last `window` of them."""
        stream = Stream.open(self.workspace.stream_directory)
        window = self.model.layout.window
        known: dict[str, np.ndarray] = {}
        for number in range(min(self.stage + 1, stream.stages)):
            known.update(zip(*stream.stage(number).histories(window), strict=True))
        return known

    def history(self, user: str) -> list[str]:
        """The stored items of a user, oldest first. Raises DataError if the log does not know the user."""
        if user not in self.histories:
            raise DataError(
                f"user {user!r} is in none of the stages 0 to {self.stage} of {self.workspace.root}"
            )
        ids = self.model.semantic_ids.item_ids
        return [ids[row] for row in self.histories[user]]

    def title(self, item: str) -> str | None:
        """The item's title, where the log's item table has one."""
        return self._titles[self.model.semantic_ids.row(item)]

    def semantic_id(self, item: str) -> list[str]:
        """The item's semantic-ID tokens, e.g. ``["<a_128>", "<b_72>", "<c_95>", "<d_83>"]``."""
        return self.model.semantic_ids.semantic_id(item)

    def prompt_ids(self, history: Sequence[str]) -> list[int]:
        """Token ids of the prompt, as the exported merged model reads them.

        Raises:
            DataError: the history holds unknown items (told which).
        """
        rows = self.model.semantic_ids.rows(list(history))[-self.model.layout.window :]
        return self.model.layout.prompt(self.model.item_token_ids(rows)).tolist()

    @cached_property
    def _answering(self) -> GenerativeModel:
        answering: GenerativeModel = for_inference(self.model)
        return answering

    @cached_property
    def _titles(self) -> list[str | None]:
        return Stream.open(self.workspace.stream_directory).titles
