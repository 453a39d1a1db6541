"""Training interrupted anywhere ends bit for bit where uninterrupted training does."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from plain_path import cases_of, random_sequences, with_adapter
from torch import Tensor

from peso.config import TrainingConfig
from peso.errors import TrainingError
from peso.model.generative import GenerativeModel
from peso.training.checkpoint import Checkpoint, TrainingLog, fingerprint
from peso.training.loop import train_stage
from peso.training.strategies.peso import Peso
from peso.training.task import Progress, StageResult, StageTask

pytestmark = pytest.mark.slow

SEQUENCES = random_sequences(0, count=12, longest=8)
EVERY_STEP, EPOCH_ENDS = 0.0, 1e9  # checkpoint_seconds


def train(
    model: GenerativeModel,
    directory: Path,
    checkpoint_seconds: float = EVERY_STEP,
    on_progress: Callable[[Progress], None] | None = None,
    learning_rate: float = 1e-2,
    weight: float = 100.0,
    **settings: Any,
) -> StageResult:
    defaults = {"epochs": 3, "batch_size": 8, "device": "cpu"}
    return train_stage(
        model,
        StageTask(
            SEQUENCES,
            cases_of(SEQUENCES, model.layout.window),
            TrainingConfig(**{**defaults, **settings}),
            stage=2,
            learning_rate=learning_rate,
            strategy=Peso(weight=weight, reduction="sum"),
            seed=7,
            directory=directory / "checkpoint",
            log=directory / "log.jsonl",
            on_progress=on_progress,
            checkpoint_seconds=checkpoint_seconds,
        ),
    )


def trained(model: GenerativeModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def log_without_speed(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def check_same(one: GenerativeModel, two: GenerativeModel) -> None:
    expected = trained(two)
    for name, value in trained(one).items():
        assert torch.equal(value, expected[name]), name


class Stop:
    """Interrupts after given steps, as Ctrl-C does."""

    def __init__(self, *steps: int) -> None:
        self.steps = set(steps)

    def __call__(self, progress: Progress) -> None:
        if progress.step in self.steps:
            self.steps.remove(progress.step)
            raise KeyboardInterrupt


@pytest.mark.parametrize("every", [EVERY_STEP, EPOCH_ENDS])
@pytest.mark.parametrize("stops", [(1,), (4,), (2, 7, 8), (11,)])
def test_interrupted_training_ends_the_same(
    make_model: Callable[..., GenerativeModel], tmp_path: Path, every: float, stops: tuple[int, ...]
) -> None:
    def fresh() -> GenerativeModel:
        return with_adapter(make_model("instruct", layers=1), dropout=0.1)

    whole = fresh()
    result = train(whole, tmp_path / "whole")
    assert result.steps >= 12

    stop = Stop(*stops)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            train(fresh(), tmp_path / "parts", every, stop)
    parts = fresh()
    resumed_at: list[int] = []
    again = train(parts, tmp_path / "parts", every, lambda p: resumed_at.append(p.step))
    if every == EVERY_STEP:
        assert resumed_at[0] == stops[-1]  # the step in which it was stopped is done again, no more
    check_same(parts, whole)
    assert again.validation_losses == result.validation_losses
    assert again.training_losses == result.training_losses
    assert (again.best_epoch, again.steps, again.targets, again.tokens) == (
        result.best_epoch,
        result.steps,
        result.targets,
        result.tokens,
    )
    assert log_without_speed(tmp_path / "parts") == log_without_speed(tmp_path / "whole")


def test_finished_training_called_again_only_puts_the_best_epoch_back(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    whole, again = (with_adapter(make_model()) for _ in range(2))
    result = train(whole, tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    steps: list[Progress] = []
    repeated = train(again, tmp_path, on_progress=steps.append)
    assert steps == []
    assert repeated.validation_losses == result.validation_losses
    assert repeated.seconds == result.seconds
    assert (tmp_path / "log.jsonl").read_bytes() == log
    check_same(again, whole)


SCRIPT = """
import sys, torch
from pathlib import Path
here = Path(sys.argv[1])
sys.path[:0] = [str(here), str(here.parent)]
from test_checkpoint import train
torch.set_num_threads(1)
model = torch.load(sys.argv[2], weights_only=False)
done = Path(sys.argv[3]).with_name("done")
train(model, Path(sys.argv[3]), on_progress=lambda progress: done.write_text(f"{progress.step}\\n"))
torch.save({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, sys.argv[4])
"""


def test_a_killed_process_continues_bit_for_bit(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    start, kept = tmp_path / "model.pt", tmp_path / "kept.pt"
    torch.save(with_adapter(make_model("stream", "semantic"), dropout=0.1), start)
    script, done = tmp_path / "script.py", tmp_path / "done"
    script.write_text(SCRIPT)
    arguments = (Path(__file__).parent, start, tmp_path / "parts", kept)
    for last in (3, 9):
        process = forked.script(script, *arguments)
        while process.poll() is None:
            told = done.read_text() if done.exists() else ""
            if told.endswith("\n") and int(told) >= last:
                process.kill()
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL
        assert not kept.exists()
    assert forked.script(script, *arguments).wait() == 0

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = torch.load(start, weights_only=False)
    train(whole, tmp_path / "whole")
    torch.set_num_threads(threads)
    found = torch.load(kept)
    for name, value in trained(whole).items():
        assert torch.equal(value, found[name]), name
    assert log_without_speed(tmp_path / "parts") == log_without_speed(tmp_path / "whole")


def test_a_checkpoint_of_another_training_is_refused(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(with_adapter(make_model()), tmp_path, on_progress=Stop(3))
    changes: list[tuple[GenerativeModel, dict[str, Any]]] = [
        (with_adapter(make_model()), {"learning_rate": 2e-2}),
        (with_adapter(make_model()), {"temperature": 0.7}),
        (with_adapter(make_model()), {"rows_learning_rate_scale": 0.5}),
        (with_adapter(make_model()), {"weight": 50.0}),  # of the strategy
        (with_adapter(make_model(seed=1)), {}),  # other starting weights
        (with_adapter(make_model(loss_vocabulary="level")), {}),
        (with_adapter(make_model(window=5)), {}),
    ]
    before = (tmp_path / "log.jsonl").read_bytes()
    for model, settings in changes:
        with pytest.raises(TrainingError, match=r"other settings.*remove .*checkpoint\.pt"):
            train(model, tmp_path, **settings)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    train(with_adapter(make_model()), tmp_path)  # the same training goes on


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "digest")
    assert checkpoint.load() is None
    checkpoint.save(step=3, tensors={"a": torch.arange(1000)})
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded["step"] == 3
    whole = checkpoint.path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        checkpoint.path.write_bytes(content)
        with pytest.raises(TrainingError, match=r"checkpoint\.pt cannot be read"):
            checkpoint.load()


def test_a_log_that_lost_lines_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with TrainingLog(path, keep=0) as log:
        log.write(step=1)
        kept = log.sync()
        log.write(step=2)
    with TrainingLog(path, keep=kept) as log:
        log.write(step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
    with pytest.raises(TrainingError, match="truncated or removed"):
        TrainingLog(path, keep=1000)


def test_the_length_of_a_shortened_log_is_known_before_its_next_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"{}\n{}\n")
    with TrainingLog(path, keep=3) as log:
        assert log.sync() == 3
    assert path.read_bytes() == b"{}\n"


def test_a_fingerprint_sees_every_bit() -> None:
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    other = tensor.clone()
    other[3] = 1e-30
    prints = [fingerprint(x) for x in ({"a": tensor}, {"b": tensor}, {"a": other}, {"a": tensor.view(2, 2)})]
    assert len(set(prints)) == 4
    assert fingerprint({"a": tensor.clone()}) == prints[0]


def test_patience_ends_a_training_and_a_stop_at_any_step_changes_nothing(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    def fresh() -> GenerativeModel:
        return with_adapter(make_model(layers=1), dropout=0.1)

    settings = {"epochs": 12, "learning_rate": 1.0, "weight": 0.0}  # soon gets worse
    patient = fresh()
    all_epochs = train(patient, tmp_path / "all", **settings)
    whole = fresh()
    result = train(whole, tmp_path / "whole", patience=2, **settings)
    losses = all_epochs.validation_losses
    ends = next(n for n in range(3, 12) if losses.index(min(losses[:n])) == n - 3)
    assert result.validation_losses == losses[:ends]
    assert result.best_epoch == ends - 2
    assert result.steps < all_epochs.steps
    for every in (EVERY_STEP, EPOCH_ENDS):
        parts, directory = fresh(), tmp_path / f"parts {every}"
        for step in (2, result.steps - 1, result.steps):
            with pytest.raises(KeyboardInterrupt):
                train(fresh(), directory, every, Stop(step), patience=2, **settings)
        again = train(parts, directory, every, patience=2, **settings)
        check_same(parts, whole)
        assert (again.validation_losses, again.steps) == (result.validation_losses, result.steps)
        assert log_without_speed(directory) == log_without_speed(tmp_path / "whole")
