"""The model of a stage: at the start of its training, and after it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
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
from peso.model.inference import for_inference
from peso.model.sharding import mesh_of, shard
from peso.runs.stage import RunStage
from peso.runs.trust import strategy_of
from peso.runs.workspace import Workspace
from peso.runtime.device import Precision
from peso.runtime.hugging_face import loading
from peso.runtime.manifest import all_intact
from peso.runtime.processes import ALONE, Processes, current
from peso.training.plan import StageExamples
from peso.training.strategies.strategy import StageContext

MEMORY = "state.safetensors"
AIDS = {"inputs", "replay"}  # kinds of memory that only training uses, not predictions


def trains_backbone(stage: RunStage) -> bool:
    """Whether the stage trains all weights of the backbone: at stage 0 if it is randomly initialized, later
    if the strategy does so."""
    if stage.number == 0:
        return stage.workspace.config.backbone.trained_at_base
    return strategy_of(stage.workspace).trains_backbone(stage.number)


def fresh_model(workspace: Workspace, *, whole: bool) -> GenerativeModel:
    """The untrained model, on the device.

    Args:
        whole: all weights of the backbone will be trained; it gets no adapter.

    Raises:
        BackboneError: the backbone cannot be loaded.
    """
    return _placed(workspace, lambda: _rounded(workspace, _build(workspace.stage(0), whole=whole)))


def starting_model(stage: RunStage) -> GenerativeModel:
    """The model at the start of a stage: in the state after the previous one, on the device. With
    ``training.sharding: full``, the processes that train together share its weights.

    Raises:
        BackboneError: the backbone cannot be loaded or is not the one that stage 0 was trained on.
        WorkspaceError: a file of an earlier stage is missing or damaged.
    """
    workspace, whole = stage.workspace, trains_backbone(stage)

    def start() -> GenerativeModel:
        if stage.number and whole and not trains_backbone(stage.before.as_trained):
            model = _build(stage, whole=False)
            _inherit(stage, model)
            return model.merged()
        model = _build(stage, whole=whole)
        if stage.number:
            _inherit(stage, model)
        model = _rounded(workspace, model)
        if _shares(workspace, current()):  # no process will have all weights
            model.backbone_sha256 = backbone_fingerprint(model)
        return model

    return _placed(workspace, start, processes=current())


def trained_model(stage: RunStage, device: str | None) -> GenerativeModel:
    """See :meth:`RunStage.model`."""
    return _placed(stage.workspace, lambda: _trained(stage, device), device)


def answering_model(stage: RunStage, device: str | None, processes: Processes) -> GenerativeModel:
    """See :meth:`RunStage.answering_model`."""
    if not _shares(stage.workspace, processes):
        return for_inference(trained_model(stage, device))
    # merge first: the adapters are whole, the weights soon are not
    return _placed(stage.workspace, lambda: for_inference(_trained(stage, device)), device, processes)


def _trained(stage: RunStage, device: str | None) -> GenerativeModel:
    """The model after a stage, in the precision for a device, on the CPU."""
    repeats = not stage.leaves_out_seen  # as configured now
    stage = stage.workspace.trained(stage.number).as_trained
    workspace = stage.workspace
    model = _build(stage, whole=trains_backbone(stage))
    _load(stage, model)
    if model.transitions is not None:
        model.transitions = replace(model.transitions, repeats=repeats)
    model = _rounded(workspace, model, device)
    memory = stored_memory(stage)
    if (past := Past.of_state(memory)) is not None:
        put_past(model.backbone, past)
    if stage.number:
        model = strategy_of(workspace).answer(model, memory)
    return model.eval()


@torch.no_grad()
def put_back(stage: RunStage, model: GenerativeModel) -> None:
    """Reset adapter and vocabulary of a model to their initial values, with the seed of the stage. If stage 0
    trained the backbone itself, the vocabulary is reset to its state after stage 0."""
    with current().in_turn() if model.sharded else nullcontext():
        fresh, base = _build(stage, whole=False), stage.workspace.stage(0)
        if trains_backbone(base):
            load_stage(base, fresh)
            carry_over(stage, fresh, base)
            begin_new_codes(stage, fresh, learned=1)
        values = dict(fresh.named_parameters())
        for name, p in model.named_parameters():
            if name in values and (".lora_" in name or name.startswith("vocabulary.")):
                p.copy_(values[name])


def changed_codes(stage: RunStage, source: RunStage | None = None) -> np.ndarray:
    """The rows of the items known at the stage whose codes differ from those of an earlier stage, by default
    the previous one."""
    known = stage.workspace.stream.items_known(stage.number)
    before, now = (each.semantic_ids.codes[:known] for each in (source or stage.before, stage))
    return np.flatnonzero((before != now).any(axis=1))


def carry_over(stage: RunStage, model: GenerativeModel, source: RunStage) -> None:
    """Map the vocabulary of an earlier stage, with which a model was loaded, to the codes of this stage, see
    :meth:`peso.model.vocabulary.SemanticVocabulary.carry_over`. Without changed codes, nothing changes."""
    if len(changed_codes(stage, source)):
        tokens = source.semantic_ids.token_numbers[: stage.workspace.stream.items_known(stage.number)]
        known = _met(stage, range(source.number + 1))
        model.vocabulary.carry_over(tokens, stage.semantic_ids.token_numbers[: len(tokens)], known)


def _met(stage: RunStage, stages: Iterable[int]) -> np.ndarray:
    """bool (items known at the stage,): the items that the training sequences of some stages have."""
    stream = stage.workspace.stream
    result = np.zeros(stream.items_known(stage.number), dtype=bool)
    for number in stages:
        for sequence in stream.stage(number).training_sequences():
            result[sequence.items] = True
    return result


def begin_new_codes(stage: RunStage, model: GenerativeModel, learned: int) -> None:
    """Initialize the rows of codes that first occur in the stage, see
    :meth:`peso.model.vocabulary.SemanticVocabulary.begin_new_codes`.

    Args:
        learned: number of stages that the vocabulary was trained on.
    """
    # items that are appended later must not change the stage
    tokens = stage.semantic_ids.token_numbers[: stage.workspace.stream.items_known(stage.number)]
    arriving, known = _met(stage, range(learned, stage.number + 1)), _met(stage, [])
    for number in range(learned):
        known |= _met(stage, [number])
        if not len(np.setdiff1d(tokens[arriving], tokens[known])):
            return  # in most streams, stage 0 is enough to see this
    model.vocabulary.begin_new_codes(tokens, known, arriving)


def context_of(stage: RunStage, model: GenerativeModel, memory: dict[str, Tensor]) -> StageContext:
    """The context of a strategy before its training starts."""
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
    """Load a stage's weights into a model, after checking each file's sha256.

    Raises:
        WorkspaceError: a file is missing, damaged or not listed, or has weights of another shape.
    """
    stage.require_weights()
    all_intact(stage.directory, WEIGHTS, stage.manifest)
    load_stage_weights(model, stage.directory)


def stored_memory(stage: RunStage) -> dict[str, Tensor]:
    """The tensors that a stage's strategy stored (``StageContext.memory``), by name.

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
    """The stored tensors of the previous stage that the strategy of this one uses.

    Raises:
        WorkspaceError: a file is damaged, or another strategy trained the previous stage and the configured
            one cannot continue from what it stored.
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
        why = f"cannot use what it stored ({', '.join(sorted(unknown))})"
        if not unknown:
            why = f"needs what only {now.name} itself stores ({', '.join(sorted(lacking))})"
        raise WorkspaceError(
            f"stage {stage.before.number} of {stage.workspace.root} was trained with strategy {before.name}, "
            f"and {now.name} {why}; continue with {before.name}, or run {now.name} in a new workspace with "
            "--base"
        )
    return {} if anew else {n: t for n, t in memory.items() if n.partition(".")[0] in strategy.reads}


def write_memory(directory: Path, memory: Mapping[str, Tensor]) -> None:
    """Write the tensors that a stage's strategy stores; without any, there is no file."""
    if memory:
        save_file({name: t.detach().cpu().contiguous() for name, t in memory.items()}, directory / MEMORY)


def backbone_fingerprint(model: GenerativeModel, dtype: torch.dtype = torch.float32) -> str:
    """sha256 of the backbone's weights in a precision, without the adapter. For a backbone in lower precision
    than its files, that of the files (``model.backbone_sha256``)."""
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
        stage.semantic_ids,
        seed=config.seed_of_stage(stage.number),
        head=config.head,
        train_words=config.training.rows == "all",
    )


def _inherit(stage: RunStage, model: GenerativeModel) -> None:
    """Load the state after the previous stage into a model with the codes of this one."""
    _load(stage.before, model)
    carry_over(stage, model, stage.before)


def _load(stage: RunStage, model: GenerativeModel) -> None:
    stage.require_as_determined()
    backbone = stage.workspace.config.backbone
    if stage.number and backbone.trained_at_base:
        load_stage(stage.workspace.stage(0), model)  # only stage 0 stores the backbone's weights
    load_stage(stage, model)
    known = stage.manifest.get("backbone_sha256")
    # earlier versions computed it in the precision of the training
    if not any(known == backbone_fingerprint(model, dtype) for dtype in (torch.float32, torch.bfloat16)):
        raise BackboneError(
            f"the backbone {backbone.name!r} has other weights than the one that {stage.directory} was "
            "trained on; download that one again, or use a new workspace"
        )


def _rounded(workspace: Workspace, model: GenerativeModel, device: str | None = None) -> GenerativeModel:
    """The model with its frozen weights in the configured precision."""
    training = workspace.config.training
    frozen = Precision.of(training.precision, device or training.device).frozen
    if frozen != torch.float32 and has_adapter(model):
        model.backbone_sha256 = backbone_fingerprint(model)
        round_frozen(model, frozen)
    return model


@loading()
def _placed(
    workspace: Workspace,
    build: Callable[[], GenerativeModel],
    device: str | None = None,
    processes: Processes = ALONE,
) -> GenerativeModel:
    """The model that ``build`` makes on the CPU, on the device. If processes share its weights, those of one
    machine build it one after another, so that its memory has to hold only one whole model."""
    training = workspace.config.training
    place = Precision.of(training.precision, device or training.device).device
    if not _shares(workspace, processes):
        return build().to(place)
    mesh = mesh_of(place.type, processes.count)
    gc.collect()  # an earlier sharded model has circular references
    with processes.in_turn():
        model = build()
        shard(model, mesh, place)
    return model


def _shares(workspace: Workspace, processes: Processes) -> bool:
    """Whether processes that work together share the weights of the backbone."""
    return workspace.config.training.sharding != "none" and processes.count > 1
