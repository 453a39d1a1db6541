"""Training of one stage of a workspace, by its strategy, into stages/{t}/."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from peso.adapters.anchor_report import AnchorMonitor, anchor_effect, anchor_report
from peso.adapters.groups import find_groups
from peso.baselines.popularity import item_counts
from peso.config import Config, TrainingConfig
from peso.errors import WorkspaceError
from peso.items.semantic_ids import INDEX_FILE
from peso.model.build import has_adapter, save_stage_weights
from peso.model.generative import GenerativeModel
from peso.model.item_head import LENGTHS
from peso.runs.models import (
    backbone_fingerprint,
    context_of,
    inherited_memory,
    starting_model,
    strategy_of,
    trains_backbone,
    write_memory,
)
from peso.runs.stage import FORMAT, LOG, METRICS, RunStage
from peso.runs.workspace import Workspace, provenance
from peso.runtime import assets
from peso.runtime.files import (
    commit_directory,
    read_json_lines,
    read_sealed,
    size_of,
    write_json,
    write_sealed,
)
from peso.runtime.machine import threads
from peso.runtime.manifest import write_manifest
from peso.runtime.processes import current
from peso.runtime.progress import Observer
from peso.training.loop import Progress, StageResult, StageTask, train_stage
from peso.training.strategies.strategy import StageContext, Strategy

TUNED_ON = 2048  # validation cases that choose the shares of the item head
CANDIDATES = ("leaves", "codes", "items")
FINISHED_PHASE = "finished.safetensors"  # what a finished phase of a stage in training left


def learn_stage(stage: RunStage, observer: Observer) -> None:
    """Learn one stage from where the last one left the model, and commit stages/{t}/.

    Interrupted, it continues from its newest checkpoint and ends with the same bits. Several processes
    (:mod:`peso.runtime.processes`) learn it together; the main one writes.

    Raises:
        TrainingError: see :func:`peso.training.loop.train_stage`.
    """
    workspace, determined_by = stage.workspace, stage.determination()
    unfinished = stage.unfinished / determined_by[:16]

    def prepare() -> None:
        pull_backbone(workspace, observer)
        for stale in set(unfinished.parent.glob("*")) - {unfinished}:  # of a configuration changed since
            shutil.rmtree(stale)

    current().on_main(prepare)
    strategy = strategy_of(workspace)  # one that cannot be made says so before stage 0 is trained
    if stage.number == 0:
        strategy = Strategy()  # the base stage is the same for all
    memory = inherited_memory(stage)
    model = starting_model(stage)
    training: dict[str, Any] = {}
    if strategy.learns(stage.number):
        with threads(model, workspace.config.training.threads, observer):
            training = _train(stage, model, strategy, memory, unfinished, observer)
    else:
        observer.note(f"stage {stage.number}: strategy {workspace.config.strategy.name} keeps the last state")
    current().on_main(partial(_commit, stage, model, memory, training, unfinished, determined_by))


def _commit(
    stage: RunStage,
    model: GenerativeModel,
    memory: dict[str, Tensor],
    training: dict[str, Any],
    unfinished: Path,
    determined_by: str,
) -> None:
    """stages/{stage}/, whole, in place of what training kept on the way."""
    workspace, number = stage.workspace, stage.number
    with commit_directory(stage.directory) as directory:
        save_stage_weights(model, directory, whole_backbone=trains_backbone(stage))
        write_memory(directory, memory)
        served = size_of(directory)
        if (unfinished / LOG).exists():
            shutil.copyfile(unfinished / LOG, directory / LOG)
        write_json(directory / METRICS, {"training": training})
        parent = {"stage": number - 1, "determined_by": stage.before.determined_by} if number else None
        manifest = {
            "stage": number,
            "determined_by": determined_by,
            "parent": parent,
            "inputs": {
                "stream": workspace.stream.fingerprint(number),
                "semantic_ids": workspace.semantic_ids_manifest["files"][INDEX_FILE],
            },
            "backbone_sha256": backbone_fingerprint(model),
            "bytes_on_disk": served,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "configuration": workspace.config.model_dump(mode="json"),
            "seed": workspace.config.seed_of_stage(number),
            **provenance(),
        }
        write_manifest(directory, FORMAT, manifest)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def _train(
    stage: RunStage,
    model: GenerativeModel,
    strategy: Strategy,
    memory: dict[str, Tensor],
    unfinished: Path,
    observer: Observer,
) -> dict[str, Any]:
    """All phases of the stage; returns the figures of the last one, with the time of all."""
    workspace, number = stage.workspace, stage.number
    config, stream = workspace.config, workspace.stream
    before = [group.snapshot() for group in find_groups(model.backbone)] if has_adapter(model) else []
    context = context_of(stage, model, memory)
    if (head := model.vocabulary.item_head) is not None:
        seen = [stream.stage(earlier) for earlier in range(number + 1)]
        head.compete(item_counts(seen, len(model.semantic_ids.item_ids)))
    *earlier, last = strategy.phases(number)
    spent = 0.0
    for phase in earlier:
        finished = unfinished / phase / FINISHED_PHASE
        if finished.is_file():
            spent += _restore(model, memory, finished)
            continue
        here = replace(context, phase=phase)
        spent += _train_phase(workspace, model, strategy, here, unfinished / phase, observer).seconds
        current().on_main(partial(_keep, model, memory, spent, finished))
    result = _train_phase(
        stage.workspace, model, strategy, replace(context, phase=last), unfinished, observer
    )
    shares = None
    if head is not None:
        shares = _tune_shares(stage, model, observer)
    if not current().is_main:  # the figures are told, and written, once
        return {}
    _, rate = training_of(config, strategy, number, last)
    figures: dict[str, Any] = {"learning_rate": rate, **asdict(result)}
    figures["seconds"] += spent
    if shares is not None:
        figures["item_head"] = shares
    if told := strategy.figures():
        figures["strategy"] = told
    if number and before:
        figures["moved"] = anchor_report(before, find_groups(model.backbone))
        figures["anchor"] = anchor_effect(number, read_json_lines(unfinished / LOG), told.get("rho"))
        if says := figures["anchor"]["says"]:
            observer.note(says)
    return figures


def _train_phase(
    workspace: Workspace,
    model: GenerativeModel,
    strategy: Strategy,
    context: StageContext,
    directory: Path,
    observer: Observer,
) -> StageResult:
    config, stage = workspace.config, context.number
    settings, rate = training_of(config, strategy, stage, context.phase)
    data = workspace.stream.stage(stage)
    title = f"learn stage {stage}" + (f", {context.phase}" if context.phase else "")
    begun, monitor = False, AnchorMonitor(stage, 0)

    def show(progress: Progress) -> None:
        nonlocal begun, monitor
        if not begun:
            observer.begin(title, progress.steps, "steps")
            begun = True
            monitor = AnchorMonitor(stage, progress.steps, strategy.figures().get("rho"))
        if stage and (warning := monitor.add(progress.record)):
            observer.note(f"warning: {warning}")
        observer.advance(
            progress.step,
            epoch=f"{progress.epoch}/{progress.epochs}",
            loss=progress.loss,
            tokens_per_second=progress.tokens_per_second,
        )

    directory.mkdir(parents=True, exist_ok=True)
    chosen = strategy.choose(context)
    result = train_stage(
        model,
        StageTask(
            data.training_sequences() if chosen is None else chosen,
            data.validation_cases(config.prompt.window),
            settings,
            stage=stage,
            learning_rate=rate,
            strategy=strategy,
            seed=context.seed,
            directory=directory,
            log=directory / LOG,
            context=context,
            on_progress=show,
            processes=current(),
            item_weight=0.0 if model.vocabulary.item_head is None else config.head.weight,
        ),
    )
    observer.end()
    return result


def _tune_shares(stage: RunStage, model: GenerativeModel, observer: Observer) -> dict[str, Any]:
    """Set the item head's shares to those that rank the validation targets best; returns them, with the mean
    NDCG that each share would give to all cases."""
    from peso.decoding.beam import search
    from peso.decoding.pool import SHARES, Candidates, best_shares

    head, config = model.vocabulary.item_head, stage.workspace.config
    assert head is not None
    cases = stage.workspace.stream.stage(stage.number).validation_cases(config.prompt.window)
    rows = np.linspace(0, len(cases) - 1, min(len(cases), TUNED_ON)).astype(np.int64)
    cases = cases.take(np.unique(rows))
    targets = torch.from_numpy(model.semantic_ids.trie.leaf_of[cases.targets].astype(np.int64))
    lengths = torch.tensor([len(history) for history in cases.histories])
    parts, order = list[Candidates](), list[np.ndarray]()

    def keep(users: np.ndarray, found: Candidates) -> None:
        order.append(users)
        parts.append(Candidates(found.leaves.cpu(), found.codes.cpu(), found.items.cpu()))

    observer.begin(f"stage {stage.number}: weigh item head and codes on validation", len(cases), "users")
    search(
        model,
        cases.histories,
        beams=config.decoding.beams,
        batch_size=config.decoding.batch_size,
        exclude=cases.seen if stage.leaves_out_seen else None,
        on_progress=observer.advance,
        on_candidates=keep,
    )
    observer.end()
    every = Candidates(*(torch.cat([getattr(part, name) for part in parts]) for name in CANDIDATES))
    users = np.concatenate(order)
    depth = min(10, config.decoding.beams)
    chosen, means = best_shares(every, targets[users], lengths[users], depth)
    head.shares.copy_(torch.tensor(chosen))
    by_length = dict(zip([*(f"to {length}" for length in LENGTHS), "longer"], chosen, strict=True))
    return {"shares": by_length, f"ndcg@{depth}": dict(zip(map(str, SHARES), means, strict=True))}


def training_of(config: Config, strategy: Strategy, stage: int, phase: str) -> tuple[TrainingConfig, float]:
    """Settings and highest learning rate of a training. One that begins anew is trained as stage 0 is."""
    training = config.training
    if stage == 0 or strategy.starts_anew(phase):
        return training, training.learning_rate
    return training.of_update(), training.rate_of_update


def _keep(model: GenerativeModel, memory: dict[str, Tensor], seconds: float, file: Path) -> None:
    """Write what a phase left in model and memory, whole or not at all."""
    kept = {f"memory.{name}": tensor for name, tensor in memory.items()}
    kept |= {f"model.{name}": p.detach().cpu().contiguous() for name, p in _learnable(model).items()}
    write_sealed(file, save({**kept, "seconds": torch.tensor(seconds)}))


@torch.no_grad()
def _restore(model: GenerativeModel, memory: dict[str, Tensor], file: Path) -> float:
    """What :func:`_keep` wrote, into model and memory; returns the seconds.

    Raises:
        WorkspaceError: it is damaged.
    """
    try:
        kept = load(read_sealed(file))
    except (OSError, SafetensorError, WorkspaceError) as error:
        raise WorkspaceError(
            f"{file} is damaged ({error}); remove {file.parent} to train this phase again"
        ) from error
    for name, p in _learnable(model).items():
        p.copy_(kept[f"model.{name}"])
    memory.clear()
    memory.update(
        {name.removeprefix("memory."): tensor for name, tensor in kept.items() if name.startswith("memory.")}
    )
    return float(kept["seconds"])


def _learnable(model: GenerativeModel) -> dict[str, Tensor]:
    """Adapter and vocabulary, by name."""
    return {
        name: p for name, p in model.named_parameters() if ".lora_" in name or name.startswith("vocabulary.")
    }


def pull_backbone(workspace: Workspace, observer: Observer) -> None:
    """Fetch a backbone that is an asset of ours, unless it is in the cache."""
    name = workspace.config.backbone.name
    if name in assets.names("backbone") and assets.find(name) is None:
        observer.note(f"fetching {name}, which is not in the cache yet")
        assets.pull(name, on_progress=None)
