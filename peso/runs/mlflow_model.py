"""The code of an exported MLflow model. MLflow stores this file with the model and runs it when it is loaded.

It needs ``peso`` and pandas, but no workspace.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from peso.decoding import beam_search
from peso.model.export import PROMPT
from peso.model.exported import load_merged
from peso.model.inference import for_inference
from peso.runtime.files import read_json_object

EXPORT = "export"  # name of the artifact: a directory of the format merged


class HistoryRecommender(mlflow.pyfunc.PythonModel):
    """Answers the ``history`` of each row (ids of items, oldest first) with ``items`` and ``scores``."""

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts[EXPORT])
        prompt = read_json_object(folder / PROMPT)
        self._leaves_out_seen = bool(prompt["leaves_out_seen"])
        self._model = for_inference(load_merged(folder), packed=True)
        catalogue = frozenset(self._model.semantic_ids.item_ids)
        retired = frozenset(prompt.get("retired", {}))
        self._allowed = catalogue - retired if retired else None

    # without type hints, from which MLflow would make a schema of its own
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        given = params or {}
        found = beam_search(
            self._model,
            [[str(item) for item in history] for history in model_input["history"]],
            int(given.get("k", 10)),
            exclude_seen=bool(given.get("exclude_seen", self._leaves_out_seen)),
            allow=self._allowed,
        )
        return pd.DataFrame(
            {
                "items": [[item for item, _ in answer] for answer in found],
                "scores": [[float(score) for _, score in answer] for answer in found],
            }
        )


mlflow.models.set_model(HistoryRecommender())
