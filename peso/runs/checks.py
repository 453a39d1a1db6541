"""Checks of a configuration before any long computation starts."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from peso.config import Config, HeadConfig, ItemsConfig, baseline_label
from peso.config.data import LOG_FORMATS
from peso.config.items import FILES, HASHING
from peso.config.model import BUILT_IN, CONTEXT, LINEAR_LAYERS, MOST_EPOCHS, is_path
from peso.errors import BackboneError, ConfigError, PesoError
from peso.events.columns import ITEM_ID, ITEMS
from peso.items.encoder_assets import find_encoder
from peso.model.source import source_of, source_of_pretrained
from peso.runs.sizes import provisional
from peso.runs.trust import strategy_of
from peso.runtime import assets
from peso.runtime.downloads import Unavailable, require_reachable
from peso.runtime.machine import LAYER, TRAINED, require_device, require_memory
from peso.runtime.processes import current

if TYPE_CHECKING:
    from peso.runs.workspace import Workspace


USER = 4_000  # bytes per simulated user, at least


def check_configuration(config: Config) -> None:
    """Check sizes against this machine's memory, and that named files, classes and models exist. Does not
    import PyTorch or Transformers.

    Raises:
        ConfigError, BackboneError: a check failed; the message names key, value and fix.
        DataError: the user table cannot be read.
    """
    config = provisional(config)
    _check_sizes(config)
    _check_backbone(config)
    _check_head(config.head)
    for named in config.strategy.foreign:
        module = named.partition(".")[0]
        if not module or find_spec(module) is None:
            raise ConfigError(
                f"strategy: {named} cannot be imported (there is no module {module!r}); give the import path "
                "of a class (PYTHONPATH applies)"
            )
    for key, path in [("items.vectors", path) for path in config.items.vectors] + [
        ("items.index", config.items.index),
        ("items.encoder", config.items.encoder if is_path(config.items.encoder) else None),
    ]:
        if path is not None and not Path(path).expanduser().exists():
            raise ConfigError(f"{key}: {path} does not exist; correct the path")
    encoder = Path(config.items.encoder).expanduser()
    is_model = any((encoder / name).is_file() for name in ("config.json", "modules.json"))
    if config.items.encoder not in (HASHING, FILES) and encoder.is_dir() and not is_model:
        raise ConfigError(
            f"items.encoder: {encoder} has no config.json and no modules.json, so it is not a model; give "
            "the directory of a sentence encoder"
        )
    if config.report.users is not None or config.report.segments:
        from peso.runs.report import read_user_table

        known = [name for name in ITEMS.names if name != ITEM_ID] + list(read_user_table(config.report.users))
        for segment in config.report.segments:
            if segment not in known:
                raise ConfigError(
                    f"report.segments: neither the item table nor the user table has a column {segment!r}; "
                    f"they have {', '.join(known)}"
                )
    asked, items = max(config.evaluation.k), config.data.simulate.items
    if config.evaluation.enabled and config.data.format == "simulate" and asked > items:
        raise ConfigError(
            f"evaluation.k asks for {asked} items, but data.simulate.items is {items}; ask for fewer, or "
            "simulate more"
        )


def _check_head(head: HeadConfig) -> None:
    """Refuse options of the item head for a model without one: they would have no effect."""
    if head.name == "items":
        return
    for key in ("weight", "negatives", "learning_rate_scale"):
        if (value := getattr(head, key)) != HeadConfig.model_fields[key].default:
            raise ConfigError(
                f"head.{key}: {value} has no effect without the item head; set head.name=items, or leave "
                "it out"
            )


def check_surroundings(workspace: Workspace, data: bool = True, models: bool = True) -> None:
    """Check the environment of a run: device, models of the Hugging Face hub, and the first lines of the data
    files. Does not import PyTorch or Transformers, except for a custom strategy.

    Args:
        data: check the data files, unless the workspace has a stream.
        models: check that models of the hub are available.

    Raises:
        TrainingError: a GPU is configured, and there is none.
        ConfigError: a custom class that cannot be created or is not trusted; a tracker that is not installed.
        BackboneError, ConfigError: a model of the hub that cannot be reached.
        DataError: see :func:`check_sources`.
    """
    config = provisional(workspace.config)
    require_device(config.training.device)
    _require_trackers(config)
    if config.strategy.foreign:  # built-in strategies were checked with the configuration
        strategy_of(workspace)
    if data and not workspace.has_stream:
        check_sources(config)
    if models:
        _require_models(config, workspace.has_semantic_ids)


def require_shareable(workspace: Workspace) -> None:
    """Check that ``training.sharding`` is possible with these processes and this strategy.

    Raises:
        ConfigError: it is not.
    """
    sharding = workspace.config.training.sharding
    if sharding == "none":
        return
    if current().count == 1:
        raise ConfigError(
            f"training.sharding: {sharding} distributes the backbone over several processes, but this is the "
            "only one (`peso compare` runs each training in one process); start several with torchrun, as in "
            "docs/how-to/several-processes.md, or set training.sharding=none"
        )
    strategy = strategy_of(workspace)
    if strategy.uses_frozen_weights or strategy.trains_backbone(1):
        raise ConfigError(
            f"strategy {workspace.config.strategy.name} uses all weights of the backbone, so they cannot be "
            f"distributed over processes by training.sharding: {sharding}; set training.sharding=none, or "
            "choose another strategy"
        )


def _require_trackers(config: Config) -> None:
    """Raise ConfigError if the library of a configured tracker is not installed."""
    for name in config.tracking:
        if find_spec(name) is None:
            raise ConfigError(
                f"tracking: {name} is not installed; install it with pip install 'peso[{name}]', or remove "
                "it from tracking"
            )


def _require_item_content(config: Config) -> None:
    """Raise ConfigError if the configuration has no source of semantic IDs: texts, vectors, categories or an
    index."""
    table, items = config.data.items, config.items
    if config.data.format not in LOG_FORMATS or items.index is not None:
        return
    if items.quantizer == "category-path":
        if table is None or table.columns.category is None:
            raise ConfigError(
                "items.quantizer: category-path needs data.items.columns.category, the column with the path "
                "of each item's category"
            )
    elif table is None and items.needs_texts:
        raise ConfigError(
            "no item has a text or a vector to make its semantic ID from; set data.items to a product table, "
            "set items.vectors, items.index or items.behavior, or read the log alone with `peso ingest`"
        )


def _require_models(config: Config, has_semantic_ids: bool) -> None:
    if config.backbone.pretrained is not None:
        source_of_pretrained(config.backbone.pretrained)
    if config.backbone.name not in (*BUILT_IN, *assets.names("backbone")):
        source = source_of(config.backbone.name)
        if not Path(source).is_dir():
            _require_model(f"backbone {source!r}", source, BackboneError)
    imported = config.data.format == "peso-release" or config.items.index is not None
    if not has_semantic_ids and not imported:
        _require_encoder(config.items.encoder)


def _require_encoder(name: str) -> None:
    if name in (HASHING, FILES):
        return
    if name in (*assets.names("encoder"), *assets.names("backbone")):
        find_encoder(name)
    elif not Path(name).expanduser().exists():
        _require_model(f"items.encoder {name!r}", name, ConfigError, ", or use `hashing`, which needs none")


def _require_model(what: str, model: str, error: type[PesoError], otherwise: str = "") -> None:
    try:
        require_reachable(model)
    except Unavailable as reason:
        raise error(
            f"{what} is not in the cache of the Hugging Face hub and cannot be downloaded: {reason}; check "
            f"the name and the connection, or give the directory of a model{otherwise}"
        ) from None


def check_sources(config: Config) -> None:
    """Check that data files, their columns and a source of semantic IDs exist. Reads only the first lines.

    Raises:
        DataError, ConfigError: a file or a column is missing, or a file is empty.
    """
    from peso.events.release import release_files
    from peso.events.sources import open_source

    if config.data.format == "peso-release":
        release_files(str(config.data.path))
    elif config.data.format != "simulate":
        open_source(config.data)
    _require_item_content(config)


def _check_backbone(config: Config) -> None:
    """Check that the backbone exists; for a built-in one, also target layers and context length."""
    if config.backbone.name not in BUILT_IN:
        if config.backbone.name not in assets.names("backbone"):  # a run downloads these
            source_of(config.backbone.name)
        return
    if config.backbone.pretrained is not None:
        source_of_pretrained(config.backbone.pretrained)
    if missing := [t for t in config.adapter.targets if t.rpartition(".")[2] not in LINEAR_LAYERS]:
        raise BackboneError(
            f"adapter.targets: the backbone has no linear layer named {', '.join(missing)}; it has: "
            f"{', '.join(sorted(LINEAR_LAYERS))}"
        )
    if (least := 2 * config.prompt.window * _least_levels(config)) > CONTEXT:
        raise BackboneError(
            f"prompts reach {least:,} tokens or more, but the backbone's context is {CONTEXT:,}; lower "
            "prompt.window or choose another backbone"
        )


def _least_levels(config: Config) -> int:
    """Minimum number of tokens per item; 1 if it depends on the data."""
    of_data = config.data.format == "peso-release" or config.items.index is not None
    return 1 if of_data or config.items.quantizer == "category-path" else config.items.levels


def _check_sizes(config: Config) -> None:
    longest = max(config.training.epochs, config.training.later.epochs or 1)
    if longest > MOST_EPOCHS and config.training.max_steps is None:
        raise ConfigError(
            f"training.epochs {longest:,}: at most {MOST_EPOCHS:,} are allowed without training.max_steps"
        )
    simulate, backbone, network = config.data.simulate, config.backbone, config.items.rq_vae
    if config.data.format == "simulate":
        require_memory(
            USER * simulate.users + 32 * simulate.stages * simulate.items,
            f"data.simulate: {simulate.users:,} users, {simulate.items:,} items, {simulate.stages:,} stages",
        )
    if backbone.name in BUILT_IN:
        width, layers = BUILT_IN[backbone.name]
        width, layers = backbone.width or width, backbone.layers or layers
        require_memory(
            layers * (LAYER + TRAINED * 12 * width**2),
            f"backbone: a width of {width:,} and {layers:,} layers",
        )
        require_memory(
            layers * TRAINED * 2 * width * config.adapter.rank * len(config.adapter.targets),
            f"adapter.rank {config.adapter.rank:,}",
        )
    if config.items.quantizer == "rq-vae":
        widths = [*network.hidden, network.latent]
        require_memory(
            2 * TRAINED * sum(a * b for a, b in pairwise(widths)),
            f"items.rq_vae: hidden {network.hidden}, latent {network.latent}",
        )
    for baseline in config.baselines:
        needed = baseline.memory(items=0, users=0, window=config.prompt.window)
        require_memory(needed, f"baselines: {baseline_label(baseline)}")


def rehearse(workspace: Workspace, seen: set[str] | None = None) -> None:
    """Check that a stage can be trained, by creating strategy, backbone and adapter on the device. Imports
    PyTorch; call :func:`check_surroundings` first.

    Args:
        seen: shapes that were checked already; updated in place.

    Raises:
        ConfigError, BackboneError, TrainingError: as training would.
    """
    config = provisional(workspace.config)
    check_configuration(config)
    require_shareable(workspace)
    from peso.adapters.lora import add_adapter
    from peso.model.backbone import load_backbone
    from peso.model.backbone_checks import check_reach
    from peso.model.build import longest_sequence
    from peso.model.layout import make_layout
    from peso.runtime.device import Precision

    strategy_of(workspace)
    Precision.of(config.training.precision, config.training.device)
    shape = config.model_dump_json(include={"backbone", "prompt", "adapter", "items", "data"})
    seen = set() if seen is None else seen
    if shape in seen:
        return
    seen.add(shape)
    if not workspace.has_semantic_ids and config.data.format != "peso-release":
        _rehearse_items(config.items)
    backbone, adapter = config.backbone, config.adapter
    causal_lm, tokenizer = load_backbone(
        backbone.name, layers=backbone.layers, width=backbone.width, pretrained=backbone.pretrained
    )
    layout = make_layout(config.prompt.layout, tokenizer, config.prompt.window)
    check_reach(causal_lm, longest_sequence(layout, _least_levels(config)))
    layers = [m for name, m in causal_lm.named_modules() if name.endswith(tuple(adapter.targets))]
    sizes = [m.in_features + m.out_features for m in layers if hasattr(m, "in_features")]
    require_memory(TRAINED * adapter.rank * sum(sizes), f"adapter.rank {adapter.rank:,}")
    try:
        add_adapter(causal_lm, adapter.rank, adapter.alpha, adapter.dropout, adapter.targets, seed=0)
    except (RuntimeError, MemoryError) as error:
        raise BackboneError(f"adapter: a rank of {adapter.rank:,} cannot be created: {error}") from None


def _rehearse_items(items: ItemsConfig) -> None:
    """Load the index file or the text encoder that semantic IDs are made with."""
    if items.index is not None:
        from peso.items.semantic_ids import read_release_index

        read_release_index(items.index)
    elif items.encoder not in (HASHING, FILES):
        from peso.items.language_model import load_text_encoder

        load_text_encoder(items.encoder, items.max_tokens)
