"""Recommendations from a trained stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from peso.errors import ConfigError, DataError, ExportError
from peso.items.semantic_ids import SemanticIds
from peso.runs.hybrids import HybridAnswers
from peso.runs.names import current_names
from peso.runs.place import require_place
from peso.runs.retired import retired_items
from peso.runs.served import serving_stage
from peso.runs.user_histories import UserHistories
from peso.runs.workspace import Workspace
from peso.runtime import remote
from peso.runtime.files import digest, require_free
from peso.runtime.machine import threads
from peso.runtime.progress import Observer, Silent

if TYPE_CHECKING:
    from peso.model.generative import GenerativeModel


Format = Literal["merged", "peft", "index", "catalog"]  # of an export


class Recommender:
    """Recommendations from one stage of a workspace. The model is loaded on first use.

    Args:
        workspace: the workspace.
        stage: the stage whose model is used. Default: the serving stage (``peso promote``), or the newest
            trained one if none was promoted.
        device: default: as configured.
        live: use current histories: all stages of the stream and the events received since. Otherwise,
            histories as they were after the stage. Default: True unless ``stage`` is given.
        hybrid: use this hybrid of the stage's model and baselines, which ``peso baseline`` has run: its
            label, or ``hybrid`` if there is only one.

    Raises:
        WorkspaceError: the stage is not trained, ``served.json`` is damaged, or the hybrid was not run for
            the stage.
        ConfigError: there is no such hybrid.
    """

    def __init__(
        self,
        workspace: Workspace,
        stage: int | None = None,
        device: str | None = None,
        *,
        live: bool | None = None,
        hybrid: str | None = None,
    ) -> None:
        self.workspace = workspace
        chosen = serving_stage(workspace) if stage is None else workspace.trained(stage)
        self.stage = chosen.number
        self.device = device
        self.live = stage is None if live is None else live
        self._ids: SemanticIds | None = None
        self.hybrid = None if hybrid is None else HybridAnswers(workspace, hybrid, self.stage)
        self._retired, self._names = retired_items(workspace.root), current_names(workspace.root)

    @cached_property
    def model(self) -> GenerativeModel:
        """The model after the stage, in evaluation mode.

        Raises:
            BackboneError: the backbone cannot be loaded, or is not the one used in training.
        """
        return self.workspace.stage(self.stage).model(self.device)

    @classmethod
    def load(
        cls,
        workspace: str | Path,
        stage: int | None = None,
        device: str | None = None,
        trust: Iterable[str] = (),
        hybrid: str | None = None,
    ) -> Recommender:
        """Open a workspace and load the model.

        Args:
            workspace: the directory.
            stage, device, hybrid: see :class:`Recommender`.
            trust: classes of custom strategies that may be imported, see :meth:`Workspace.open`.

        Raises:
            WorkspaceError: there is no workspace, the stage is not trained, or the hybrid was not run for it.
            BackboneError: the backbone cannot be loaded, or is not the one used in training.
        """
        recommender = cls(Workspace.open(workspace, trust), stage, device, hybrid=hybrid)
        _ = recommender.model if recommender.hybrid is None else recommender.hybrid.models
        return recommender

    # -- recommendations -------------------------------------------------------------------------

    def recommend(
        self,
        history: Sequence[str] | None = None,
        *,
        user: str | None = None,
        k: int = 10,
        exclude_seen: bool | None = None,
    ) -> list[tuple[str, float]]:
        """Recommend the k most likely next items. Give either a history or a user.

        Args:
            history: item ids, oldest first.
            user: a user id; the user's stored history is used.
            k: the number of items.
            exclude_seen: leave out the items of the history. None: see :attr:`leaves_out_seen`.

        Returns:
            Pairs of item id and log-probability, best first; fewer than k if ``exclude_seen`` leaves fewer.

        Raises:
            DataError: the items or the user are unknown, or k is larger than the catalog.
            ConfigError: k is not positive.
        """
        if (history is None) == (user is None):
            raise DataError("give either a history or a user")
        if isinstance(history, str):
            raise DataError(f"history must be a list of item ids, not a text: [{history!r}]")
        items = list(history) if history is not None else self.history(str(user))
        asking = user and self.histories.now(user)
        return self.search([items], k, exclude_seen=exclude_seen, users=[asking])[0]

    def recommend_all(
        self,
        file: str | Path,
        *,
        k: int = 10,
        exclude_seen: bool | None = None,
        force: bool = False,
        part: tuple[int, int] | None = None,
        parts: int | None = None,
        executor: str | Mapping[str, Any] | None = None,
        observer: Observer | None = None,
    ) -> int:
        """Write recommendations for every user of the log (without :attr:`live`, of the log up to the stage).

        The ending of the file determines its format: ``.parquet`` and ``.jsonl`` have one row per user
        (``user``, ``items``, ``scores``), ``.csv`` one row per item (``user``, ``rank``, ``item``,
        ``score``). A user without any item that has a semantic ID gets :meth:`popular`, without scores.

        Finished batches of users are stored in ``.FILE.parts`` beside the file until it is complete. If
        interrupted and called again with the same arguments, it continues with the same result, whatever the
        number of processes. The file is written atomically.

        Args:
            file: the path, or an address (``s3://``, ``gs://``) as text.
            k: the number of items for each user.
            exclude_seen: leave out the items of the history. None: see :attr:`leaves_out_seen`. Users with
                fewer than ``k`` items left get fewer, which is reported to the observer.
            force: overwrite an existing file.
            part: i and n: only the i-th of n parts (counted from 1) into which users are divided by a
                checksum of their names. None: all users.
            parts: let this many processes share the work, see ``executor``. None: as many as there is room
                for, or this process alone if no executor is given.
            executor: where these processes run: ``processes`` (on this machine, the default), ``ray``,
                ``dask`` or ``slurm``, or a mapping with the options of `compare.executor`. A process that
                dies is replaced; the result is the same as with one process.
            observer: receives the progress; by default nothing is printed.

        Returns:
            The number of users written.

        Raises:
            ExportError: an unknown ending, the file exists, or it is inside a workspace.
            DataError: ``k`` is larger than the catalog, or there is no such part.
            ConfigError: the executor, ``parts`` or ``k`` is not valid.
            WorkspaceError: another call is writing the same file.
            PesoError: the executor cannot be used, or a part of the work failed.
        """
        from peso.runs.recommend_all import AllUsers, require_output
        from peso.runs.recommend_parts import parts_of

        require_output(file, force)
        left_out = self.leaves_out_seen if exclude_seen is None else exclude_seen
        call = AllUsers(self, k, left_out, part or (1, 1))
        elsewhere = parts_of(call, executor, parts)
        with remote.output(str(file), observer) as place:
            return call.write(place, observer or Silent(), elsewhere)

    def popular(self, k: int) -> list[str]:
        """The k items with the most events in the newest stage, most events first, without retired ones: a
        fallback for users without a history.

        Raises:
            DataError: k is larger than the catalog.
            ConfigError: k is not positive.
        """
        self.require_length(k)
        retired, ids = self.retired, self.semantic_ids.item_ids
        return [ids[row] for row in self._by_popularity if ids[row] not in retired][:k]

    @property
    def retired(self) -> frozenset[str]:
        """The items that are never recommended, as recorded now (`peso items retire`)."""
        return frozenset(map(self._names.current().now, self._retired.current()))

    # -- users and items -------------------------------------------------------------------------

    @cached_property
    def leaves_out_seen(self) -> bool:
        """Whether items of the history are left out by default, as in the tests of the stage:
        ``decoding.repeats``; ``auto``: if no user had an item twice in the stages so far."""
        return self.workspace.stage(self.stage).leaves_out_seen

    @property
    def determined_by(self) -> str:
        """Digest of everything that determines the recommendations for a history."""
        own = self.workspace.stage(self.stage).determined_by
        return own if self.hybrid is None else digest(own, self.hybrid.determined_by)

    @cached_property
    def histories(self) -> UserHistories:
        """The complete histories of the users, read from disk on demand. The model reads the last `window`
        items; ``exclude_seen`` leaves out all of them."""
        return UserHistories(self.workspace, through=None if self.live else self.stage)

    def history(self, user: str) -> list[str]:
        """The items of a user that have a semantic ID, oldest first; see ``live`` in :class:`Recommender`.

        Raises:
            DataError: neither the stream nor the received events have the user.
        """
        known = self.histories.of(user)
        if known is None:
            where = f"the stages 0 to {self.stage} of {self.workspace.root}"
            if self.live:
                where = f"the stages of {self.workspace.root}, nor in the events received since"
            raise DataError(
                f"user {user!r} is in none of {where}; check the id (spaces, zeros in front and case count), "
                "or give a history"
            )
        return [*map(self._names.current().now, known.items)]

    def export(self, directory: str | Path, format: Format = "merged", *, repository: str = "") -> Path | str:
        """Write the stage's model, or the semantic IDs, for other tools, as `peso export` does. A model has a
        card (``README.md``).

        Args:
            directory: path of a new directory, or with ``index`` of a new file; or an address (``s3://``,
                ``gs://``) as text.
            format: ``merged``: a plain Transformers model; ``peft``: backbone and adapter; ``index``: the
                semantic IDs of all items as index.json, the format of released research code; ``catalog``:
                the same as arrays for serving stacks.
            repository: the name that the model will have on the Hugging Face hub; its card then shows how to
                load it from there.

        Returns:
            The path or the address.

        Raises:
            ExportError: there is no such format, the path exists or is inside a workspace, or the model
                cannot be exported in this format.
        """
        if format not in get_args(Format):
            raise ExportError(f"{format!r} is not a format; choose one of {', '.join(get_args(Format))}")
        if remote.is_remote(address := str(directory)):
            remote.require_output(address)
            with remote.output(address) as aside:
                self.export(aside, format, repository=repository)
            return address
        place = Path(directory)
        require_place(place)
        if format == "index" or format == "catalog":
            from peso.runs.preparation import export_index

            export_index(self.workspace, place, form=format, ids=self.semantic_ids)
            return place
        require_free(place)
        from peso.model.export import export_merged, export_peft
        from peso.runs.card import card_of

        on_cpu = self if self.device == "cpu" else Recommender(self.workspace, self.stage, "cpu")
        write = export_merged if format == "merged" else export_peft
        card = card_of(self.workspace.stage(self.stage), format, repository)
        model = on_cpu.model  # may have been loaded before an item was renamed
        model.semantic_ids = model.semantic_ids.named(self._names.current())
        write(model, place, leaves_out_seen=self.leaves_out_seen, retired=self.retired, card=card)
        return place

    def title(self, item: str) -> str | None:
        """The item's title, or None if the item table has none. Raises DataError if the item is unknown."""
        return self._titles[self.semantic_ids.row(item)]

    def semantic_id(self, item: str) -> list[str]:
        """The item's semantic-ID tokens, for example ``["<a_128>", "<b_72>", "<c_95>", "<d_83>"]``. Raises
        DataError if the item is unknown."""
        return self.semantic_ids.semantic_id(item)

    def prompt_ids(self, history: Sequence[str]) -> list[int]:
        """Token ids of the prompt for a history, valid for the exported merged model too.

        Raises:
            DataError: the history contains unknown items.
        """
        rows = self.semantic_ids.rows(list(history))[-self.workspace.config.prompt.window :]
        ids: list[int] = self.model.layout.prompt(self.model.item_token_ids(rows)).tolist()
        return ids

    def search(
        self,
        histories: list[list[str]],
        k: int,
        *,
        exclude_seen: bool | None,
        users: Sequence[str | None] | None = None,
    ) -> list[list[tuple[str, float]]]:
        """The k best items of each history without retired ones, as :meth:`recommend` returns them. Arguments
        are checked before the model is loaded.

        Args:
            histories: item ids of each user, oldest first.
            k, exclude_seen: see :meth:`recommend`.
            users: the user of each history, for hybrids with user embeddings; None: not known.

        Raises:
            DataError, ConfigError: as :meth:`recommend`.
        """
        if exclude_seen is None:
            exclude_seen = self.leaves_out_seen
        ids, retired = self.semantic_ids, self.retired
        try:
            rows = [ids.rows(history) for history in histories]
        except DataError as error:
            raise DataError(f"{error}; give ids as the log has them, or leave these out") from None
        self.require_length(k)
        if self.hybrid is not None:
            gone = ids.rows(sorted(item for item in retired if item in ids))
            out = [np.concatenate([history, gone]) if exclude_seen else gone for history in rows]
            return self.hybrid.recommend(users or [None] * len(rows), rows, k, out=out, ids=ids)
        from peso.decoding import beam_search

        config = self.workspace.config
        with threads(self._answering, config.training.threads):
            return beam_search(
                self._answering,
                histories,
                k,
                beams=max(config.decoding.beams, k),  # as tested
                exclude_seen=exclude_seen,
                allow=frozenset(ids.item_ids) - retired if retired else None,
                ids=ids,
            )

    def require_length(self, k: int) -> None:
        """Raise DataError if the catalog has fewer than k items, and ConfigError if k is not positive."""
        if k < 1:
            raise ConfigError(f"k is {k}, but must be at least 1")
        if k > (items := len(self.semantic_ids.item_ids)):
            raise DataError(f"k = {k} is more than the {items} items of the catalog; ask for fewer")

    @property
    def semantic_ids(self) -> SemanticIds:
        """The semantic IDs of the stage's model, with the current names of renamed items."""
        names = self._names.current()
        if self._ids is None or self._ids.names != names:
            ids = self.workspace.stage(self.stage).semantic_ids if self._ids is None else self._ids
            self._ids = ids.named(names)
        return self._ids

    @cached_property
    def _answering(self) -> GenerativeModel:
        from peso.model.inference import for_inference

        answering: GenerativeModel = for_inference(self.model, packed=True)
        return answering

    @cached_property
    def _by_popularity(self) -> list[int]:
        stream, items = self.workspace.stream, len(self.semantic_ids.item_ids)
        newest = stream.stages - 1 if self.live else min(self.stage, stream.stages - 1)
        counts = np.stack([stream.item_counts(number) for number in range(newest + 1)])[:, :items]
        by_newest = np.lexsort((-counts.sum(axis=0), -counts[-1]))  # by the newest stage, then by all stages
        order: list[int] = by_newest.tolist()
        return order

    @cached_property
    def _titles(self) -> list[str | None]:
        return self.workspace.stream.titles
