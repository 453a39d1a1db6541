"""The card of an exported model: its data, training, metrics and limits, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from peso import __version__
from peso.config.model import BUILT_IN, is_on_hub
from peso.events.histories import trained_counts
from peso.events.stream import Stream
from peso.model.build import ADAPTER
from peso.model.transitions import FILE
from peso.runs.health import known_warnings
from peso.runs.report import strategy_label
from peso.runs.retired import retired
from peso.runs.stage import RunStage
from peso.runtime import assets
from peso.runtime.downloads import Hub

Form = Literal["merged", "peft"]
TAGS = ["recommendation", "generative-retrieval", "semantic-ids", "continual-learning", "peso"]
MOST_METRICS = 5  # columns of the table
FILES = {
    "model.safetensors": "the model for Transformers, with `config.json` and the tokenizer",
    "backbone/": "the backbone for Transformers, with its tokenizer",
    "adapter/": "the adapter for PEFT, for this backbone only",
    "prompt.json": "how a history is written as text",
    "index.json": "the semantic ID of every item",
    "item_head.safetensors": "a vector and a bias for every item",
    "transitions.safetensors": "counts of transitions between items",
}


def card_of(stage: RunStage, form: Form, repository: str = "") -> str:
    """The card of a stage's model in Markdown, with the header that the Hugging Face hub reads.

    It has no paths of this machine.

    Args:
        stage: the stage, which is trained.
        form: the format in which the model is exported.
        repository: the name of the model on the hub, which the examples then use.
    """
    workspace, number, stream = stage.workspace, stage.number, stage.workspace.stream
    config = workspace.config
    base, licence, backbone = _backbone(config.backbone)
    catalogue, item_head = workspace.semantic_ids.item_ids, config.head.name == "items"
    transitions = (stage.directory / FILE).is_file()
    adapted = (stage.directory / ADAPTER).is_dir()
    tested = [each for each in workspace.stages[: number + 1] if each.is_tested]
    names = [*tested[-1].metrics["test"]["metrics"]][:MOST_METRICS] if tested else []
    values: dict[str, Any] = {
        "title": repository or f"{workspace.root.resolve().name}, stage {number}",
        "version": __version__,
        "metadata": _metadata(base, licence, form),
        "licensed": bool(licence),
        "backbone": backbone,
        "how": f"with LoRA of rank {config.adapter.rank}" if adapted else "with all weights trained",
        "stage": number,
        "levels": workspace.semantic_ids.levels,
        "data": _data(stream),
        "time": _span(stream),
        "stages": [
            {"number": n, **trained_counts(row, stream.target_users)}
            for n, row in enumerate(stream.counts[: number + 1])
        ],
        "items": len(catalogue),
        "retired": len(retired(workspace.root)),
        "training": [_trained(each) for each in workspace.stages[: number + 1]],
        "machine": _machine(stage.manifest.get("hardware", {})),
        "seed": config.seed,
        "metrics": [_tested(each, names) for each in tested],
        "names": names,
        "leaves_out_seen": stage.leaves_out_seen,
        "loss_vocabulary": config.training.loss_vocabulary,
        "window": config.prompt.window,
        "warnings": known_warnings(stage) if stage.is_tested else (),
        "item_head": item_head,
        "head_alone": _head_alone(stage),
        "transitions": transitions,
        "needs": ", ".join(
            ["Transformers", *["PEFT"] * (form == "peft"), *["SciPy"] * (item_head and transitions)]
        ),
        "files": _files(form, item_head, transitions),
        "form": form,
        "repository": repository,
        "history": [*catalogue[: min(2, len(catalogue))]],
    }
    environment = Environment(
        loader=PackageLoader("peso.runs"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    values["code"] = environment.get_template("use_without_peso.py.j2").render(values)
    return environment.get_template("model_card.md.j2").render(values) + "\n"


def _head_alone(stage: RunStage) -> dict[str, str] | None:
    """What the item head is worth on validation cases without and with the codes; None if that is not
    known."""
    chosen = stage.training.get("item_head", {})
    for metric, by_share in chosen.items():
        if metric.startswith("ndcg@"):
            both = max(by_share.values())
            return {
                "metric": metric.replace("ndcg", "NDCG"),
                "head": f"{by_share['1.0']:.4f}",
                "both": f"{both:.4f}",
            }
    return None


def _metadata(base: str, licence: str, form: Form) -> str:
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        base_model=base or None,
        license=licence or None,
        library_name="peft" if form == "peft" else "transformers",
        tags=TAGS,
    )
    return header.to_yaml()


def _backbone(config: Any) -> tuple[str, str, str]:
    """Name on the hub and license of the backbone, "" if they are not known, and a description."""
    if config.name in BUILT_IN:
        width, layers = (
            own or usual
            for own, usual in zip((config.width, config.layers), BUILT_IN[config.name], strict=True)
        )
        return "", "", f"a Llama of {layers} layers and width {width} that was trained from scratch"
    for asset in assets.ASSETS:
        if asset.name == config.name:
            hub = next(source for source in asset.sources if isinstance(source, Hub))
            return hub.repository, asset.licence.lower(), f"the backbone {hub.repository}"
    if is_on_hub(config.name):
        return config.name, "", f"the backbone {config.name}"
    return "", "", "a backbone from a local directory"


def _data(stream: Stream) -> str:
    """The source of the events and how they were cleaned, in a sentence."""
    manifest = stream.manifest
    source: Mapping[str, Any] = manifest.get("source", {})
    rules = [f"`{key}: {source[key]}`" for key in ("min_rating", "min_user", "min_item", "repeats", "events")
             if key in source]  # fmt: skip
    kept = f" Cleaning: {', '.join(rules)}." if rules else ""
    events = sum(row["events"] for row in stream.counts)
    what = "simulated" if source.get("format") == "simulate" else f"of format `{source.get('format')}`"
    return f"A log of {events:,} events and {int(manifest['items']):,} items, {what}.{kept}"


def _span(stream: Stream) -> tuple[str, str] | None:
    time = stream.manifest.get("time")
    if not time:
        return None
    appended = [entry["time"] for entry in stream.manifest.get("appended", []) if entry.get("time")]
    return time["from"][:10], (appended[-1] if appended else time)["until"][:10]


def _trained(stage: RunStage) -> dict[str, Any]:
    training = stage.training
    rate = training.get("learning_rate")
    return {
        "number": stage.number,
        "strategy": strategy_label(stage.config) if stage.number else "base",
        "learning_rate": f"{rate:g}" if isinstance(rate, float) else "",
        **{key: training.get(key, "") for key in ("best_epoch", "steps")},
        "seconds": round(training["seconds"]) if "seconds" in training else "",
    }


def _tested(stage: RunStage, names: list[str]) -> dict[str, Any]:
    told = stage.metrics["test"]["metrics"]
    return {
        "number": stage.number,
        "cases": max(told[name]["cases"] for name in told),
        "values": [_with_interval(told[name]) if name in told else "" for name in names],
    }


def _with_interval(told: Mapping[str, Any]) -> str:
    interval = "" if told["low"] is None else f" ({told['low']:.4f} … {told['high']:.4f})"
    return f"{told['value']:.4f}{interval}"


def _machine(hardware: Mapping[str, Any]) -> str:
    device = hardware.get("accelerator") or hardware.get("processor") or "unknown"
    return f"{device}, {hardware['cores']} cores" if "cores" in hardware else str(device)


def _files(form: Form, item_head: bool, transitions: bool) -> list[tuple[str, str]]:
    names = ["model.safetensors", "prompt.json"] if form == "merged" else ["backbone/", "adapter/"]
    names += ["index.json", *["item_head.safetensors"] * item_head]
    return [(name, FILES[name]) for name in [*names, *["transitions.safetensors"] * transitions]]
