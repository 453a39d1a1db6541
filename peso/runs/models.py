"""A workspace's stage as a model: as it starts to learn, and as it stood afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peso.adapters.lora import Past, put_past, weights_without_adapter
from peso.errors import BackboneError, WorkspaceError
from peso.model.build import WEIGHTS, build_model, has_adapter, load_stage_weights, round_frozen
from peso.model.generative import GenerativeModel
from peso.runs.stage import RunStage
from peso.runs.trust import strategy_of
from peso.runs.workspace import Workspace
from peso.runtime.device import Precision
from peso.runtime.manifest import all_intact
from peso.training.plan import StageExamples
from peso.training.strategies.strategy import StageContext

MEMORY = "state.safetensors"
AIDS = {"inputs", "replay"}  # kinds of memory that training uses and no answer depends on


def trains_backbone(stage: RunStage) -> bool:
    """A backbone built in code knows nothing yet: at stage 0 all of its weights are trained, unless it was
    trained before. Later it is the strategy's choice."""
    if stage.number == 0:
        return stage.workspace.config.backbone.trained_at_base
    return strategy_of(stage.workspace).trains_backbone(stage.number)


def fresh_model(workspace: Workspace, *, whole: bool) -> GenerativeModel:
    """The model before anything was learned, on the device; ``whole``: its backbone is to be trained.

    Raises:
        BackboneError: the backbone cannot be loaded.
    """
    return _placed(workspace, _rounded(workspace, _build(workspace.stage(0), whole=whole)))


def starting_model(stage: RunStage) -> GenerativeModel:
    """The model that a stage starts to learn with: what the stage before left, on the device.

    Raises:
        BackboneError: the backbone cannot be loaded or is not the one that stage 0 was trained on.
        WorkspaceError: a missing or damaged file of an earlier stage.
    """
    workspace, whole = stage.workspace, trains_backbone(stage)
    if stage.number and whole and not trains_backbone(stage.before.as_trained):
        model = _build(stage, whole=False)
        _load(stage.before, model)
        return _placed(workspace, model.merged())
    model = _build(stage, whole=whole)
    if stage.number:
        _load(stage.before, model)
    return _placed(workspace, _rounded(workspace, model))


def trained_model(stage: RunStage, device: str | None) -> GenerativeModel:
    """See :meth:`RunStage.model`."""
    stage = stage.workspace.trained(stage.number).as_trained
    workspace = stage.workspace
    model = _build(stage, whole=trains_backbone(stage))
    _load(stage, model)
    model = _rounded(workspace, model, device)
    memory = stored_memory(stage)
    if (past := Past.of_state(memory)) is not None:
        put_past(model.backbone, past)
    if stage.number:
        model = strategy_of(workspace).answer(model, memory)
    return _placed(workspace, model, device).eval()


@torch.no_grad()
def put_back(stage: RunStage, model: GenerativeModel) -> None:
    """Make adapter and vocabulary of a model what they were before anything was learned, drawn from the seed
    of the stage; where stage 0 trained the backbone itself, the vocabulary that it left."""
    fresh, base = _build(stage, whole=False), stage.workspace.stage(0)
    if trains_backbone(base):
        load_stage(base, fresh)
        begin_new_codes(stage, fresh, learned=1)
    values = dict(fresh.named_parameters())
    for name, p in model.named_parameters():
        if name in values and (".lora_" in name or name.startswith("vocabulary.")):
            p.copy_(values[name])


def begin_new_codes(stage: RunStage, model: GenerativeModel, learned: int) -> None:
    """Give codes that the stage brings their first rows, see
    :meth:`peso.model.vocabulary.SemanticVocabulary.begin_new_codes`.

    learned: the number of stages that the vocabulary was trained on.
    """
    stream, ids = stage.workspace.stream, stage.workspace.semantic_ids
    # items that are appended later must not change the stage
    tokens = ids.token_numbers[: stream.items_known(stage.number)]

    def met(stages: Iterable[int]) -> np.ndarray:
        result = np.zeros(len(tokens), dtype=bool)
        for number in stages:
            for sequence in stream.stage(number).training_sequences():
                result[sequence.items] = True
        return result

    arriving, known = met(range(learned, stage.number + 1)), met([])
    for number in range(learned):
        known |= met([number])
        if not len(np.setdiff1d(tokens[arriving], tokens[known])):
            return  # as in most streams, after stage 0 alone
    model.vocabulary.begin_new_codes(tokens, known, arriving)


def context_of(stage: RunStage, model: GenerativeModel, memory: dict[str, Tensor]) -> StageContext:
    """What a strategy is told of a stage before its training starts."""
    config, number = stage.workspace.config, stage.number
    seed, stream = config.seed_of_stage(number), stage.workspace.stream
    return StageContext(
        number,
        model.backbone,
        total_steps=0,
        seed=seed,
        vocabulary=model.vocabulary,
        examples=StageExamples(model, stream.stage, number, config.training, seed),
        memory=memory,
        reset=lambda: put_back(stage, model),
    )


def load_stage(stage: RunStage, model: GenerativeModel) -> None:
    """Read a stage's weights into a model, each file checked against its sha256 first.

    Raises:
        WorkspaceError: a file is missing, damaged or not listed, or has weights of another shape.
    """
    stage.require_weights()
    all_intact(stage.directory, WEIGHTS, stage.manifest)
    load_stage_weights(model, stage.directory)


def stored_memory(stage: RunStage) -> dict[str, Tensor]:
    """What a stage's strategy kept beside the adapter, by name; {} where it kept nothing.

    Raises:
        WorkspaceError: the file is missing, damaged or not listed.
    """
    stage.require_weights()
    path = stage.directory / MEMORY
    all_intact(stage.directory, (MEMORY,), stage.manifest)
    try:
        return load_file(path) if path.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise WorkspaceError(f"{path} is damaged ({error}); train the stage again") from error


def inherited_memory(stage: RunStage) -> dict[str, Tensor]:
    """What the stage before has kept for a stage that is to be trained.

    Raises:
        WorkspaceError: a damaged file, or another strategy trained that stage, and the configured one cannot
            go on from what it kept.
    """
    if not stage.number:
        return {}
    memory, now = stored_memory(stage.before), stage.workspace.config.strategy
    before = stage.before.config.strategy
    if stage.number == 1 or before.keeper == now.keeper:
        return memory
    strategy = strategy_of(stage.workspace)
    anew = strategy.starts_anew(strategy.phases(stage.number)[0])
    kept = {name.partition(".")[0] for name in memory}
    kept |= {"backbone"} if (stage.before.directory / "backbone").is_dir() else set()
    unknown = (kept & {"backbone"} if anew else kept - AIDS) - strategy.reads
    if unknown or (lacking := strategy.needs - kept):
        why = f"does not understand what it kept ({', '.join(sorted(unknown))})"
        if not unknown:
            why = f"needs what it keeps itself from stage to stage ({', '.join(sorted(lacking))})"
        raise WorkspaceError(
            f"stage {stage.before.number} of {stage.workspace.root} was trained with strategy {before.name}, "
            f"and {now.name} {why}; go on with {before.name}, or run {now.name} into a new workspace with "
            "--base"
        )
    return {} if anew else {n: t for n, t in memory.items() if n.partition(".")[0] in strategy.reads}


def write_memory(directory: Path, memory: Mapping[str, Tensor]) -> None:
    """Write what a stage's strategy keeps; no file where it keeps nothing."""
    if memory:
        save_file({name: t.detach().cpu().contiguous() for name, t in memory.items()}, directory / MEMORY)


def backbone_fingerprint(model: GenerativeModel, dtype: torch.dtype = torch.float32) -> str:
    """sha256 over the backbone's weights in a precision, adapter left out, so that no other one is mistaken
    for it. A backbone that is held in a lower precision than its files is known by them:
    ``model.backbone_sha256``."""
    if dtype == torch.float32 and model.backbone_sha256 is not None:
        return model.backbone_sha256
    result = hashlib.sha256()
    for name, tensor in sorted(weights_without_adapter(model.causal_lm).items()):
        held = tensor.to(dtype) if tensor.is_floating_point() else tensor
        result.update(f"{name} {held.dtype} {tuple(held.shape)}".encode())
        result.update(held.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def _build(stage: RunStage, *, whole: bool) -> GenerativeModel:
    config = stage.workspace.config
    return build_model(
        config.backbone,
        config.prompt,
        None if whole else config.adapter,
        config.training.loss_vocabulary,
        stage.workspace.semantic_ids,
        seed=config.seed_of_stage(stage.number),
        head=config.head,
        train_words=config.training.rows == "all",
    )


def _load(stage: RunStage, model: GenerativeModel) -> None:
    stage.require_as_determined()
    backbone = stage.workspace.config.backbone
    if stage.number and backbone.trained_at_base:
        load_stage(stage.workspace.stage(0), model)  # the backbone's weights are there alone
    load_stage(stage, model)
    known = stage.manifest.get("backbone_sha256")
    # earlier versions took it in the precision of the training
    if not any(known == backbone_fingerprint(model, dtype) for dtype in (torch.float32, torch.bfloat16)):
        raise BackboneError(
            f"the backbone {backbone.name!r} has other weights than the one that {stage.directory} was "
            "trained on; fetch that one again, or use a new workspace"
        )


def _rounded(workspace: Workspace, model: GenerativeModel, device: str | None = None) -> GenerativeModel:
    """The model with its frozen weights in the precision that is configured for the device."""
    training = workspace.config.training
    frozen = Precision.of(training.precision, device or training.device).frozen
    if frozen != torch.float32 and has_adapter(model):
        model.backbone_sha256 = backbone_fingerprint(model)
        round_frozen(model, frozen)
    return model


def _placed(workspace: Workspace, model: GenerativeModel, device: str | None = None) -> GenerativeModel:
    training = workspace.config.training
    return model.to(Precision.of(training.precision, device or training.device).device)
