"""The distance that a stage moves at a strength, and whether it is the same for other shapes and settings.

    python benchmarks/strength.py WORKSPACE [--steps N] [--settings NAME;NAME] [--terms NAME,NAME]
                                  [--cells FILE] [--quick] [--json]

In a workspace with a trained stage 0, stage 1 is trained repeatedly: with `single`, with an anchor of
strength 0.3, 1 and 3 in both couplings, and with one raw weight; as configured, with doubled rank, batch
size or learning rate, and with two of the seven modules (another width needs another workspace). The output
is the distance from the beginning of the stage, divided by that of `single` with the same settings
("shortening"), together with two predictions: 1 / (1 + s), the interpolation at the optimum with λ = s · ρ̄;
and (1 - e^-s) / s, the remainder of a steady drift that is shrunk in every step (the decoupled form).
Nothing is tested, and the workspace does not change. Results are stored in FILE (JSON lines), so that
another call continues.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peso.adapters.anchor_report import anchor_report
from peso.adapters.groups import Group, find_groups
from peso.config import Config
from peso.runs.models import starting_model
from peso.runs.workspace import Workspace
from peso.training.loop import train_stage
from peso.training.plan import StageExamples
from peso.training.strategies.peso import Peso
from peso.training.strategies.single import SingleAdapter
from peso.training.strategies.strategy import StageContext, Strategy
from peso.training.task import StageTask

STRENGTHS = (0.3, 1.0, 3.0)
STAGE = 1


@dataclass(frozen=True)
class Setting:
    """A change of the configuration; ``rate``: what the learning rate is multiplied by."""

    name: str
    changes: dict[str, dict[str, Any]]
    rate: float = 1.0


SETTINGS = (
    Setting("as configured", {}),
    Setting("rank x 2", {"adapter": {"rank": 16, "alpha": 32}}),
    Setting("2 of 7 modules", {"adapter": {"targets": ["q_proj", "v_proj"]}}),
    Setting("batch x 2", {"training": {"batch_size": 64}}),
    Setting("learning rate x 2", {}, 2.0),
)


def anchors(weight: float, terms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The anchors tried in every setting, by name; ``weight``: the raw one, of summed softmax-KL."""
    tried: dict[str, dict[str, Any]] = {"single": {}}
    for proximal in terms:
        for coupling in ("decoupled", "loss"):
            for strength in STRENGTHS:
                name = f"{proximal}, {coupling}, strength {strength:g}"
                tried[name] = {"proximal": proximal, "strength": strength, "coupling": coupling}
    tried[f"softmax_kl, weight {weight:g}"] = {"weight": weight, "reduction": "sum", "coupling": "loss"}
    return tried


class Measured(Strategy):
    """Another strategy, and how far the adapter had moved after the last step."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner
        self.distance = 0.0
        self._before: list[Group] = []
        self._steps = 0

    def begin(self, context: StageContext) -> None:
        self._before = [group.snapshot() for group in find_groups(context.backbone)]
        self.inner.begin(context)

    def penalty(self, context: StageContext) -> Any:
        return self.inner.penalty(context)

    def after_step(self, context: StageContext, learning_rate: float) -> None:
        self.inner.after_step(context, learning_rate)
        self._steps += 1
        if self._steps == context.total_steps:
            self.distance = anchor_report(self._before, find_groups(context.backbone))["distance"]


def measure(
    workspace: Workspace, setting: Setting, options: dict[str, Any], steps: int | None
) -> dict[str, Any]:
    """Train stage 1 once; returns distance, weight and ρ̄."""
    parts = {
        name: getattr(workspace.config, name).model_copy(update=values)
        for name, values in setting.changes.items()
    }
    training = parts.get("training", workspace.config.training)
    training = training.model_copy(update={"max_steps": steps, "validation_cases": 64})
    config: Config = workspace.config.model_copy(update={**parts, "training": training})
    changed = Workspace(workspace.root, config)
    model = starting_model(changed.stage(STAGE))
    stage = workspace.stream.stage(STAGE)
    strategy = Measured(Peso(**options) if options else SingleAdapter())
    examples = StageExamples(model, workspace.stream.stage, STAGE, training, config.seed)
    context = StageContext(
        STAGE, model.backbone, 0, seed=config.seed, vocabulary=model.vocabulary, examples=examples
    )
    rate = training.rate_of_update * setting.rate
    with tempfile.TemporaryDirectory() as directory:
        train_stage(
            model,
            StageTask(
                stage.training_sequences(),
                stage.validation_cases(config.prompt.window),
                training,
                stage=STAGE,
                learning_rate=rate,
                strategy=strategy,
                seed=config.seed,
                directory=Path(directory),
                log=Path(directory) / "log.jsonl",
                context=context,
            ),
        )
    told = strategy.inner.figures()
    return {"distance": strategy.distance, "weight": told.get("weight"), "rho": told.get("rho")}


def predictions(strength: float) -> dict[str, float]:
    """What is left of the distance, by either reading of a strength.

    >>> {name: round(value, 3) for name, value in predictions(1.0).items()}
    {'stationary': 0.5, 'drift': 0.632}
    """
    return {"stationary": 1 / (1 + strength), "drift": -math.expm1(-strength) / strength}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--steps", type=int, help="optimizer steps; none given: all epochs")
    parser.add_argument("--weight", type=float, default=5.0, help="a raw weight to test in addition")
    parser.add_argument("--cells", type=Path, help="file of results, which are not measured again")
    parser.add_argument("--settings", help="names, separated by semicolons; none given: all")
    parser.add_argument("--terms", default="softmax_kl,l2", help="proximal terms, separated by commas")
    parser.add_argument("--quick", action="store_true", help="only the configured settings")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    workspace = Workspace.open(arguments.workspace)
    known: dict[str, dict[str, Any]] = {}
    if arguments.cells and arguments.cells.exists():
        known = {line["cell"]: line for line in map(json.loads, arguments.cells.open(encoding="utf-8"))}
    settings = {setting.name: setting for setting in SETTINGS[: 1 if arguments.quick else None]}
    chosen = arguments.settings.split(";") if arguments.settings else list(settings)
    if unknown := [name for name in chosen if name not in settings]:
        parser.error(f"--settings {unknown[0]!r} is none of {', '.join(settings)}")
    rows = []
    for setting in (settings[name] for name in chosen):
        alone = 0.0
        for name, options in anchors(arguments.weight, arguments.terms.split(",")).items():
            cell = f"{setting.name}: {name}"
            if cell not in known:
                known[cell] = {"cell": cell, **measure(workspace, setting, options, arguments.steps)}
                if arguments.cells:
                    with arguments.cells.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(known[cell]) + "\n")
            alone = alone or known[cell]["distance"]
            row = {"setting": setting.name, "anchor": name, "left": known[cell]["distance"] / alone}
            expected = predictions(options["strength"]) if "strength" in options else {}
            rows.append(
                {**row, **expected, **{key: known[cell][key] for key in ("distance", "weight", "rho")}}
            )
    if arguments.json:
        print(json.dumps({"workspace": str(arguments.workspace), "rows": rows}))
        return
    print(f"{'setting':20}{'anchor':36}{'left':>8}{'drift':>8}{'stationary':>12}{'distance':>10}")
    for row in rows:
        told = "".join(
            f"{row[key]:>{width}.3f}" if key in row else " " * width
            for key, width in (("drift", 8), ("stationary", 12))
        )
        print(f"{row['setting']:20}{row['anchor']:36}{row['left']:8.3f}{told}{row['distance']:10.3f}")


if __name__ == "__main__":
    main()
