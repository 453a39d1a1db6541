"""How good the learning rates are that later stages choose by trials (`training.later.learning_rate: auto`).

    python benchmarks/later_rates.py WORKSPACE [--stages 1,2] [--strategies single,sum_lora]
                                     [--budgets 0.5,1,2] [--quick] [--json]

Each stage of a trained workspace is learned anew from the stage before it, whole, at every candidate rate of
the configuration (the default candidates where it has none), and then the trials choose among them at each
budget. Reported are the lowest validation losses, in nats an item, what the choice loses against the best
candidate (regret), and the steps that the trials cost beyond the training itself. The workspace stays as it
is. A strategy other than the workspace's begins with what the workspace's strategy left.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peso.config import Config, LaterTrainingConfig, TrialsConfig, strategy_options
from peso.model.generative import GenerativeModel
from peso.runs.models import strategy_of
from peso.runs.phases import begin, training_of
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent
from peso.training.likelihood import tokens_of_target
from peso.training.loop import train_stage
from peso.training.rate_trials import Rates, choose_rates, trial_rounds, trial_steps
from peso.training.strategies.strategy import StageContext, Strategy
from peso.training.task import StageTask


def with_auto(config: Config, strategy: str) -> Config:
    """The configuration with rates that are to be chosen, and a strategy at its defaults."""
    given = config.training.later.model_dump(exclude={"learning_rate"})
    later = LaterTrainingConfig.model_validate({**given, "learning_rate": "auto"})
    options = config.strategy if config.strategy.name == strategy else strategy_options(strategy)
    training = config.training.model_copy(update={"later": later})
    return config.model_copy(update={"training": training, "strategy": options})


def start(stage: RunStage) -> tuple[GenerativeModel, Strategy, StageContext]:
    model, context = begin(stage)
    return model, strategy_of(stage.workspace), context


def task_of(stage: RunStage, directory: Path) -> tuple[GenerativeModel, StageTask, list[Rates]]:
    """The last training of a stage, at the first of its candidate rates."""
    model, strategy, context = start(stage)
    config, data = stage.workspace.config, stage.workspace.stream.stage(stage.number)
    settings, candidates = training_of(config, strategy, stage.number, strategy.phases(stage.number)[-1])
    chosen = strategy.choose(context)
    task = StageTask(
        data.training_sequences() if chosen is None else chosen,
        data.validation_cases(config.prompt.window),
        settings,
        stage=stage.number,
        learning_rate=candidates[0].learning_rate,
        strategy=strategy,
        seed=context.seed,
        directory=directory,
        log=directory / "log.jsonl",
        context=context,
        item_weight=0.0 if model.vocabulary.item_head is None else config.head.weight,
        head_scale=config.head.learning_rate_scale,
    )
    return model, task, candidates


def measure(stage: RunStage, budgets: Sequence[float]) -> dict[str, Any]:
    """Lowest validation loss by learning rate, and by budget what the trials chose."""
    losses, steps = dict[float, float](), 1
    with tempfile.TemporaryDirectory() as directory:
        _, _, candidates = task_of(stage, Path(directory))
    for rates in candidates:
        with tempfile.TemporaryDirectory() as directory:
            model, task, _ = task_of(stage, Path(directory))
            result = train_stage(model, replace(task, learning_rate=rates.learning_rate))
        losses[rates.learning_rate] = min(result.validation_losses) * tokens_of_target(model)
    chosen = {}
    for budget in budgets:
        trials = stage.workspace.config.training.later.trials or TrialsConfig()
        trials = trials.model_copy(update={"budget": budget})
        with tempfile.TemporaryDirectory() as directory:
            model, task, _ = task_of(stage, Path(directory))
            task, choice = choose_rates(model, task, candidates, trials, partial(start, stage), Silent())
            steps = train_stage(model, task).steps
        rounds = trial_rounds(steps, task.settings, trials, len(candidates))
        chosen[budget] = {
            "learning_rate": choice.rates.learning_rate,
            "regret": losses[choice.rates.learning_rate] - min(losses.values()),
            "extra": trial_steps(rounds) / steps,
        }
    return {"losses": losses, "chosen": chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--stages", default="1", help="numbers, separated by commas")
    parser.add_argument("--strategies", help="names, separated by commas; none given: the workspace's")
    parser.add_argument("--budgets", default="0.5,1,2", help="of all trials, relative to the training")
    parser.add_argument("--quick", action="store_true", help="twenty steps a training")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    workspace = Workspace.open(arguments.workspace)
    rows = []
    for strategy in (arguments.strategies or workspace.config.strategy.name).split(","):
        config = with_auto(workspace.config, strategy)
        if arguments.quick:
            training = config.training.model_copy(update={"max_steps": 20})
            config = config.model_copy(update={"training": training})
        for number in map(int, arguments.stages.split(",")):
            stage = Workspace(workspace.root, config).stage(number)
            found = measure(stage, [float(budget) for budget in arguments.budgets.split(",")])
            rows.append({"strategy": strategy, "stage": number, **found})
    if arguments.json:
        print(json.dumps({"workspace": str(arguments.workspace), "rows": rows}))
        return
    for row in rows:
        print(f"{row['strategy']}, stage {row['stage']}")
        for rate, loss in row["losses"].items():
            print(f"  learning rate {rate:<10g}{loss:10.4f}")
        for budget, choice in row["chosen"].items():
            told = f"{choice['learning_rate']:<10g}regret {choice['regret']:.4f}"
            print(f"  budget {budget:<9g}{told}, {choice['extra']:.0%} more steps")


if __name__ == "__main__":
    main()
