"""What can be wrong with a configuration, found before anything long starts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from peso.config import Config
from peso.config.baselines import NetworkOptions, SasRecConfig
from peso.config.model import BUILT_IN
from peso.errors import BackboneError, ConfigError
from peso.events.columns import ITEM_ID, ITEMS
from peso.runtime.machine import require_memory

if TYPE_CHECKING:
    from peso.runs.workspace import Workspace

TRAINED = 16  # bytes a parameter: float32 weights, their gradients, two moments of AdamW
LAYER = 50_000  # bytes of Python objects, at least, that a decoder layer consists of
USER = 4_000  # bytes, at least, while a simulated user's events are drawn


def check_configuration(config: Config) -> None:
    """Sizes against this machine's memory, and what is named against what is there. Loads no library of
    models.

    Raises:
        ConfigError: names the key, the value and what to do.
        DataError: a user table that cannot be read.
    """
    _check_sizes(config)
    for key, path in [("items.vectors", path) for path in config.items.vectors] + [
        ("items.index", config.items.index),
        ("items.encoder", config.items.encoder if config.items.encoder.startswith(("/", "~", ".")) else None),
    ]:
        if path is not None and not Path(path).expanduser().exists():
            raise ConfigError(f"{key}: there is nothing at {path}")
    if config.report.users is not None or config.report.segments:
        from peso.runs.report import read_user_table

        users = read_user_table(config.report.users) if config.report.users is not None else {}
        known = [name for name in ITEMS.names if name != ITEM_ID] + list(users)
        for segment in config.report.segments:
            if segment not in known:
                raise ConfigError(
                    f"report.segments: neither the item table nor the user table has a column {segment!r}; "
                    f"they have {', '.join(known)}"
                )
    asked, sold = max(config.evaluation.k), config.data.simulate.items
    if config.evaluation.enabled and config.data.format == "simulate" and asked > sold:
        raise ConfigError(f"evaluation.k asks for {asked} items, but data.simulate.items is {sold}")


def _check_sizes(config: Config) -> None:
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
        if isinstance(baseline, NetworkOptions):
            layers = baseline.layers if isinstance(baseline, SasRecConfig) else 1
            require_memory(
                TRAINED * (12 * layers if isinstance(baseline, SasRecConfig) else 1) * baseline.width**2,
                f"baselines: {baseline.name} of width {baseline.width:,}",
            )


def rehearse(workspace: Workspace, seen: set[str] | None = None) -> None:
    """Make everything that a workspace's stages need and that does not depend on the data: device, strategy,
    backbone and adapter.

    Args:
        seen: what was loaded already, and is not loaded again; it is added to.

    Raises:
        ConfigError, BackboneError, TrainingError: as the stage would that comes upon it.
    """
    from peso.adapters.lora import add_adapter
    from peso.model.backbone import load_backbone
    from peso.model.backbone_checks import check_reach
    from peso.model.build import longest_sequence
    from peso.model.layout import make_layout
    from peso.runs.models import strategy_of
    from peso.runtime.device import Precision

    config = workspace.config
    check_configuration(config)
    strategy_of(workspace)
    Precision.of(config.training.precision, config.training.device)
    shape = config.model_dump_json(include={"backbone", "prompt", "adapter", "items", "data"})
    seen = set() if seen is None else seen
    if shape in seen:
        return
    seen.add(shape)
    backbone, adapter = config.backbone, config.adapter
    causal_lm, tokenizer = load_backbone(backbone.name, layers=backbone.layers, width=backbone.width)
    layout = make_layout(config.prompt.layout, tokenizer, config.prompt.window)
    of_data = config.data.format == "peso-release" or config.items.index is not None
    of_data = of_data or config.items.quantizer == "category-path"  # then the data say how many levels
    check_reach(causal_lm, longest_sequence(layout, 1 if of_data else config.items.levels))
    try:
        add_adapter(causal_lm, adapter.rank, adapter.alpha, adapter.dropout, adapter.targets, seed=0)
    except (RuntimeError, MemoryError) as error:
        raise BackboneError(f"adapter: a rank of {adapter.rank:,} cannot be made: {error}") from None
