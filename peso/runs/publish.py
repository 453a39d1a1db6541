"""Publish a stage's model: to the Hugging Face hub, as an MLflow model, or in an MLflow registry."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peso import __version__
from peso.errors import ExportError
from peso.runs.card import Form
from peso.runs.place import TRACKING, require_place
from peso.runs.recommender import Recommender
from peso.runtime import hub
from peso.runtime.failures import first_line
from peso.runtime.files import commit_directory, require_free


def push_to_hub(recommender: Recommender, name: str, form: Form = "merged", *, private: bool = True) -> str:
    """Export a stage's model and upload it to the Hugging Face hub with its card.

    Args:
        name: ``owner/model``, or ``model`` for the user's own.
        form: as in :meth:`Recommender.export`.
        private: whether a new repository is private; an existing one does not change.

    Returns:
        The address of the model.

    Raises:
        ExportError: the model cannot be exported so, or the hub does not accept it; see
            :mod:`peso.runtime.hub`.
    """
    hub.require_name(name)
    user = hub.account()
    full = name if "/" in name else f"{user}/{name}"
    with TemporaryDirectory() as aside:
        folder = Path(aside) / "model"
        recommender.export(folder, form, repository=full)
        message = f"Stage {recommender.stage}, exported by peso {__version__}"
        return hub.upload(folder, full, message, private=private)


def save_mlflow(recommender: Recommender, directory: str | Path) -> Path:
    """Write a stage's model as an MLflow model, which ``mlflow.pyfunc.load_model`` loads.

    It answers a history as the stage does. Loading it needs ``peso``, but no workspace.

    Args:
        directory: a new directory.

    Raises:
        ExportError: MLflow is not installed, the directory is not empty or is inside a workspace, or the
            model cannot be exported.
    """
    place = Path(directory)
    require_place(place)
    require_free(place)
    with _exported(recommender) as (mlflow, model), commit_directory(place) as aside:
        mlflow.pyfunc.save_model(path=aside, **model)
    return place


def register_mlflow(recommender: Recommender, name: str) -> str:
    """Log a stage's model to MLflow in a run of its own, and register it under a name.

    The run goes to ``MLFLOW_TRACKING_URI``, or else to the database in ``tracking/mlflow`` of the workspace,
    where the runs of ``tracking: [mlflow]`` are.

    Args:
        name: the name of the registered model; every call adds a version.

    Returns:
        The address of the version, ``models:/NAME/VERSION``.

    Raises:
        ExportError: MLflow is not installed, or its server or database refuses the model.
    """
    from peso.runs.tracking import use_mlflow

    stage = recommender.workspace.stage(recommender.stage)
    with _exported(recommender) as (mlflow, model):
        artifacts = use_mlflow(recommender.workspace.root / TRACKING / "mlflow")
        group = recommender.workspace.root.resolve().name
        try:
            if mlflow.get_experiment_by_name(group) is None:
                mlflow.create_experiment(group, artifacts)
            mlflow.set_experiment(group)
            with mlflow.start_run(run_name=f"stage-{stage.number} exported"):
                if stage.is_tested:
                    told = stage.metrics["test"]["metrics"]
                    mlflow.log_metrics(
                        {
                            f"test/{key.replace('@', '_at_')}": float(each["value"])
                            for key, each in told.items()
                        }
                    )
                mlflow.pyfunc.log_model(name="model", registered_model_name=name, **model)
            versions = mlflow.MlflowClient().search_model_versions(f"name='{name}'")
        except Exception as error:  # of the server, the database or its driver
            raise ExportError(
                f"MLflow at {mlflow.get_tracking_uri()} did not accept the model ({first_line(error)}); "
                "check MLFLOW_TRACKING_URI and the name, or write it to a directory with -o"
            ) from error
    return f"models:/{name}/{max(int(each.version) for each in versions)}"


@contextmanager
def _exported(recommender: Recommender) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The module of MLflow, and the arguments that describe the model."""
    if find_spec("mlflow") is None:
        raise ExportError("--format mlflow needs MLflow: pip install 'peso[mlflow]'")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a command contacts only what it is about
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    from peso.runs import card

    names, numbers = Array(DataType.string), Array(DataType.double)
    rules = [
        ParamSpec("k", DataType.long, default=10),
        ParamSpec("exclude_seen", DataType.boolean, default=recommender.leaves_out_seen),
    ]
    with TemporaryDirectory() as aside, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow asks for an example of the input, and for type hints
        folder = recommender.export(Path(aside) / "export")
        yield (
            mlflow,
            {
                "python_model": str(Path(card.__file__).with_name("mlflow_model.py")),
                "artifacts": {"export": str(folder)},
                "signature": ModelSignature(
                    Schema([ColSpec(names, "history")]),
                    Schema([ColSpec(names, "items"), ColSpec(numbers, "scores")]),
                    ParamSchema(rules),
                ),
                "pip_requirements": [f"peso=={__version__}", "mlflow", "pandas"],
                "metadata": {"stage": recommender.stage, "determined_by": recommender.determined_by},
            },
        )
