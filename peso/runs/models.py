"""A workspace's stage as a model: as it starts to learn, and as it stood afterwards.

Which files of which stage make up a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peso.adapters.earlier import Past, put_past
from peso.adapters.lora import weights_without_adapter
from peso.config.model import BUILT_IN
from peso.errors import BackboneError, ConfigError, WorkspaceError
from peso.items.index_files import read_semantic_ids
from peso.model.build import WEIGHTS, build_model, has_adapter, load_stage_weights, round_frozen
from peso.model.generative import GenerativeModel
from peso.model.inference import for_inference
from peso.runs.determination import require_as_determined
from peso.runs.workspace import FORMAT, Workspace
from peso.runtime.device import Precision
from peso.runtime.manifest import all_intact, read_manifest
from peso.training.strategies.strategy import Strategy, make_strategy

MEMORY = "state.safetensors"
AIDS = {"inputs", "replay"}  # kinds of memory that training uses and no answer depends on


def strategy_of(workspace: Workspace) -> Strategy:
    """A fresh strategy, as configured.

    Raises:
        ConfigError: a class of somebody's own that nobody has named in this call, or that cannot be made.
    """
    for module in set(workspace.config.strategy.foreign) - workspace.trusted:
        raise ConfigError(
            f"strategy: {workspace.root} names the class {module}, and importing it runs its code. If "
            f"you trust it, name it: --trust {module} (in Python: trust=[{module!r}])"
        )
    return make_strategy(workspace.config.strategy)


def trains_backbone(workspace: Workspace, stage: int) -> bool:
    """A backbone built in code knows nothing yet: at stage 0 all of its weights are trained. Later it is the
    strategy's choice."""
    if stage == 0:
        return workspace.config.backbone.name in BUILT_IN
    return strategy_of(workspace).trains_backbone(stage)


def fresh_model(workspace: Workspace, *, whole: bool) -> GenerativeModel:
    """The model before anything was learnt, on the device; ``whole``: its backbone is to be trained.

    Raises:
        BackboneError: the backbone cannot be loaded.
    """
    return _placed(workspace, _rounded(workspace, _build(workspace, 0, whole=whole)))


def starting_model(workspace: Workspace, stage: int) -> GenerativeModel:
    """The model that a stage starts to learn with: what the stage before left, on the device.

    Raises:
        BackboneError: the backbone cannot be loaded or is not the one that stage 0 was learnt on.
        WorkspaceError: a missing or damaged file of an earlier stage.
    """
    whole = trains_backbone(workspace, stage)
    if stage and whole and not trains_backbone(workspace.as_trained(stage - 1), stage - 1):
        model = _build(workspace, stage, whole=False)
        _load(workspace, model, stage - 1)
        return _placed(workspace, model.merged())
    model = _build(workspace, stage, whole=whole)
    if stage:
        _load(workspace, model, stage - 1)
    return _placed(workspace, _rounded(workspace, model))


def trained_model(workspace: Workspace, stage: int, device: str | None = None) -> GenerativeModel:
    """The model as it stood after a stage, in evaluation mode, on ``device`` (default: as configured).

    Raises:
        WorkspaceError: the stage is not learnt, or its files are damaged.
        BackboneError: the backbone cannot be loaded or is not the one that the stage was learnt on.
    """
    stage = workspace.require_stage(stage)
    workspace = workspace.as_trained(stage)
    model = _build(workspace, stage, whole=trains_backbone(workspace, stage))
    _load(workspace, model, stage)
    model = _rounded(workspace, model, device)
    memory = stored_memory(workspace.stage_directory(stage))
    if (past := Past.of_state(memory)) is not None:
        put_past(model.backbone, past)
    if stage:
        model = strategy_of(workspace).answer(model, memory)
    return _placed(workspace, model, device).eval()


def answering_model(workspace: Workspace, stage: int, device: str | None = None) -> GenerativeModel:
    """As :func:`trained_model`, ready to answer: without adapters, faster (:mod:`peso.model.inference`)."""
    answering: GenerativeModel = for_inference(trained_model(workspace, stage, device))
    return answering


@torch.no_grad()
def put_back(workspace: Workspace, model: GenerativeModel, stage: int) -> None:
    """Make adapter and vocabulary of a model what they were before anything was learnt, drawn from the seed
    of ``stage``; where stage 0 trained the backbone itself, the vocabulary that it left."""
    fresh = _build(workspace, stage, whole=False)
    if trains_backbone(workspace, 0):
        load_stage(workspace, fresh, 0)
    values = dict(fresh.named_parameters())
    for name, p in model.named_parameters():
        if name in values and (".lora_" in name or name.startswith("vocabulary.")):
            p.copy_(values[name])


def load_stage(workspace: Workspace, model: GenerativeModel, stage: int) -> None:
    """Read a stage's weights into a model, each file checked against its sha256 first.

    Raises:
        WorkspaceError: a file is missing, damaged or not listed, or has weights of another shape.
    """
    directory = workspace.stage_directory(stage)
    all_intact(directory, WEIGHTS, workspace.stage_manifest(stage))
    load_stage_weights(model, directory)


def stored_memory(directory: Path) -> dict[str, Tensor]:
    """What a stage's strategy kept beside the adapter, by name; {} where it kept nothing.

    Raises:
        WorkspaceError: the file is missing, damaged or not listed.
    """
    all_intact(directory, (MEMORY,), read_manifest(directory, FORMAT))
    if not (directory / MEMORY).is_file():
        return {}
    try:
        return load_file(directory / MEMORY)
    except (OSError, SafetensorError) as error:
        raise WorkspaceError(f"{directory / MEMORY} is damaged ({error}); train the stage again") from error


def inherited_memory(workspace: Workspace, stage: int) -> dict[str, Tensor]:
    """What the stage before has kept for a stage that is to be trained.

    Raises:
        WorkspaceError: a damaged file, or another strategy trained that stage, and the configured one cannot
            go on from what it kept.
    """
    if not stage:
        return {}
    directory = workspace.stage_directory(stage - 1)
    memory, now = stored_memory(directory), workspace.config.strategy
    before = workspace.config_of(stage - 1).strategy
    if stage == 1 or before.keeper == now.keeper:
        return memory
    strategy = strategy_of(workspace)
    anew = strategy.starts_anew(strategy.phases(stage)[0])
    kept = {name.partition(".")[0] for name in memory}
    kept |= {"backbone"} if (directory / "backbone").is_dir() else set()
    unknown = (kept & {"backbone"} if anew else kept - AIDS) - strategy.reads
    if unknown or (lacking := strategy.needs - kept):
        why = f"does not understand what it kept ({', '.join(sorted(unknown))})"
        if not unknown:
            why = f"needs what it keeps itself from stage to stage ({', '.join(sorted(lacking))})"
        raise WorkspaceError(
            f"stage {stage - 1} of {workspace.root} was trained with strategy {before.name}, and "
            f"{now.name} {why}; go on with {before.name}, or run {now.name} into a new workspace with --base"
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


def _build(workspace: Workspace, stage: int, *, whole: bool) -> GenerativeModel:
    config = workspace.config
    return build_model(
        config.backbone,
        config.prompt,
        None if whole else config.adapter,
        config.training.loss_vocabulary,
        read_semantic_ids(workspace.semantic_ids_directory),
        seed=config.seed_of_stage(stage),
    )


def _load(workspace: Workspace, model: GenerativeModel, stage: int) -> None:
    require_as_determined(workspace, stage)
    if stage and workspace.config.backbone.name in BUILT_IN:
        load_stage(workspace, model, 0)  # the backbone's weights are there alone
    load_stage(workspace, model, stage)
    known = workspace.stage_manifest(stage).get("backbone_sha256")
    # earlier versions took it in the precision of the training
    if not any(known == backbone_fingerprint(model, dtype) for dtype in (torch.float32, torch.bfloat16)):
        raise BackboneError(
            f"the backbone {workspace.config.backbone.name!r} has other weights than the one that "
            f"{workspace.stage_directory(stage)} was trained on; fetch that one again, or use a new workspace"
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
