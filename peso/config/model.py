"""The sections `backbone`, `prompt`, `adapter`, `head`, `training`, `decoding`, `evaluation` and `report`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from peso.config.parsing import Section, new_key
from peso.errors import ConfigError

# whether items of the history may be recommended; auto: only if a training target was one
Repeats = Literal["auto", "keep", "leave-out"]
# Backbones that are built in code, randomly initialized and fully trained at stage 0: name → default
# (width, layers).
BUILT_IN = {"scratch": (128, 4), "tiny": (32, 2)}
AUTO = "auto"  # scratch, with sizes that follow from the log, see peso.config.recipe
CONTEXT = 4096  # the context of these backbones in tokens
# the linear layers of these backbones
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOST_BEAMS, MOST_EPOCHS = 500, 100_000
WIDEST = 16_384  # the largest width of a layer that is built in code
DEVICE = re.compile(r"auto|cpu|(cuda|xpu|hpu|mps)(:\d{1,3})?")
SCRATCH_DROPOUT = 0.2
INITIALIZER_RANGE = 0.02  # of the weights of scratch and tiny, as in Llama
# keys of `training` that change only the cost of a step
COST_ONLY = ("gradient_checkpointing", "compile", "threads", "sharding")


def is_path(name: str) -> bool:
    """Whether the name of a model is written as a path; any other may be known, or a name on the hub."""
    return name.startswith((".", "~", "/"))


def is_on_hub(name: str) -> bool:
    """Whether the name of a model has the form of those on the hub, owner/model."""
    return name.count("/") == 1 and not is_path(name)


class BackboneConfig(Section):
    """The language model. ``name`` is a name on the hub, a path, an asset of ``peso pull``, ``scratch``,
    ``tiny`` or ``auto``."""

    name: str = Field(
        "smollm2-135m",
        description="a name on the hub, a path, an asset of `peso pull`, or scratch or tiny (built in), or "
        "auto: scratch, with the sections backbone, head and training chosen by the size of the log",
    )
    layers: int | None = Field(
        None, ge=1, description="use only the first n layers; for scratch and tiny: the number of layers"
    )
    width: int | None = Field(None, ge=8, description="scratch and tiny only: the hidden width")
    dropout: float | None = new_key(
        None,
        ge=0,
        lt=1,
        description="scratch and tiny only: dropout of the embeddings and of the outputs of attention and "
        f"feed-forward layers; none given: {SCRATCH_DROPOUT} for scratch, 0 for tiny and with pretrained",
    )
    initializer_range: float | None = new_key(
        None,
        gt=0,
        le=1,
        description="scratch and tiny only: standard deviation of the initial weights, as in Transformers; "
        f"none given: {INITIALIZER_RANGE}; which value is better depends on width and learning rate "
        "(docs/results/recipe.md)",
    )
    pretrained: str | None = new_key(
        None,
        description="scratch and tiny only: a workspace whose stage 0 trained such a backbone, usually on "
        "another stream; the backbone is used as it is, frozen, and stage 0 trains an adapter",
    )

    @property
    def trained_at_base(self) -> bool:
        """Whether stage 0 trains all weights of the backbone instead of an adapter."""
        return self.name in (*BUILT_IN, AUTO) and self.pretrained is None

    @property
    def is_auto(self) -> bool:
        """Whether the sizes are chosen later, when the stream is known."""
        return self.name == AUTO

    @model_validator(mode="before")
    @classmethod
    def _default_dropout(cls, tree: Any) -> Any:
        if isinstance(tree, Mapping) and tree.get("dropout") is None and tree.get("name") in BUILT_IN:
            trained = tree["name"] == "scratch" and tree.get("pretrained") is None
            return {**tree, "dropout": SCRATCH_DROPOUT if trained else 0.0}
        return tree

    @model_validator(mode="after")
    def _fits_together(self) -> BackboneConfig:
        if self.pretrained is not None and self.is_auto:
            raise ValueError(
                "backbone.pretrained gives a backbone with its sizes, so backbone.name: auto has nothing to "
                "choose; set backbone.name=scratch"
            )
        if self.pretrained is not None and self.name not in BUILT_IN:
            raise ValueError(
                f"backbone.pretrained is for {' and '.join(BUILT_IN)} only; {self.name!r} is pretrained "
                "already, so leave it out"
            )
        if self.dropout is not None and self.name not in (*BUILT_IN, AUTO):
            raise ValueError(
                f"backbone.dropout is for {' and '.join(BUILT_IN)} only; {self.name!r} is trained by its "
                "adapter, which has adapter.dropout; leave it out"
            )
        if self.initializer_range is not None:
            if self.name not in (*BUILT_IN, AUTO):
                raise ValueError(
                    f"backbone.initializer_range is for {' and '.join(BUILT_IN)} only; {self.name!r} has its "
                    "weights already, so leave it out"
                )
            if self.pretrained is not None:
                raise ValueError(
                    "backbone.initializer_range has no effect with backbone.pretrained, which gives the "
                    "weights; leave one of them out"
                )
        if self.width is not None and self.name not in (*BUILT_IN, AUTO):
            raise ValueError(
                f"backbone.width is for {' and '.join(BUILT_IN)} only; {self.name!r} has a fixed width, so "
                "leave it out"
            )
        if self.width is not None and self.width % (head := head_size(self.width)):
            raise ValueError(
                f"backbone.width {self.width} is not a multiple of the head size {head}; the next one is "
                f"{-(-self.width // head) * head}"
            )
        return self


def head_size(width: int) -> int:
    """The size of an attention head in a backbone that is built in code."""
    return 32 if width >= 64 else 16


def _device(name: str) -> str:
    if not DEVICE.fullmatch(name):
        raise ValueError(
            "a device must be auto, cpu, cuda, mps, xpu or hpu, with a number if there are several: cuda:1"
        )
    return name


class PromptConfig(Section):
    """How a history becomes the model's input."""

    layout: Literal["stream", "instruct"] = Field(
        "stream", description="stream: only the items; instruct: items within an instruction, as in the paper"
    )
    window: int = Field(
        20, ge=1, description="number of items, the newest of a history, that the model reads"
    )


class AdapterConfig(Section):
    """The LoRA adapter, which is trained while the backbone stays frozen."""

    rank: int = Field(8, ge=1, le=8192, description="the rank of the adapter matrices A and B")
    alpha: float = Field(16.0, gt=0, description="B·A is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout of the adapter's input in training")
    targets: list[str] = Field(
        [*LINEAR_LAYERS],
        min_length=1,
        description="the linear layers that get an adapter; by default all seven projections",
    )


OF_ITEMS = ("reads", "transitions")  # true by default with an item head


class HeadConfig(Section):
    """How items are scored: with ``codes``, by the semantic IDs that the model generates; with ``items``,
    also by an item head (docs/explanation/item-head.md)."""

    name: Literal["codes", "items"] = Field(
        "codes", description="codes: semantic IDs only; items: semantic IDs and a vector for each item"
    )
    weight: float = Field(
        1.0, gt=0, description="items only: weight of an item's loss relative to the loss of all its codes"
    )
    negatives: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="items only: number of negative items sampled for each forward pass, with a correction "
        "for the sampling; none given: a softmax over all items up to 100,000 items, beyond that 8,192; a "
        "number that is not below that of the items: a softmax over all of them",
    )
    reads: bool | None = new_key(
        None,
        description="items only: whether the model also reads the vectors of the history's items, which are "
        "added to the embedding of each item's last code; none given: true",
    )
    transitions: bool | None = new_key(
        None,
        description="items only: whether counts of the transitions between items are used in addition to "
        "what the model has learned; none given: true",
    )
    contents: bool = new_key(
        False,
        description="items only: whether a learned projection of an item's content vector, from which its "
        "semantic ID is made, is added to the item's vector; needs items with texts or vectors",
    )
    arrivals: bool = new_key(
        False,
        description="items only: whether the probability of items that are new in a stage is corrected after "
        "training, because their share of the targets is larger in validation than in training",
    )
    learning_rate_scale: float = new_key(
        1.0,
        gt=0,
        description="items only: the learning rate of the item head, relative to that of the other rows of "
        "the vocabulary; below 1 where the head overfits before the codes are learned",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_items(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping) or tree.get("name") != "items":
            return tree
        return {**tree, **{key: True for key in OF_ITEMS if tree.get(key) is None}}

    @model_validator(mode="after")
    def _with_a_head(self) -> HeadConfig:
        for key in (*OF_ITEMS, "contents", "arrivals"):
            if getattr(self, key) and self.name != "items":
                raise ValueError(
                    f"head.{key} needs the item head: set head.name=items, or, for codes alone, replace the "
                    "whole section: --set head=codes"
                )
        return self


class TrialsConfig(Section):
    """The short training runs that choose, at each stage, the values of ``training.later`` that are auto."""

    scales: list[Annotated[float, Field(gt=0)]] = Field(
        [0.1, 0.3, 1.0, 3.0],
        min_length=2,
        max_length=64,
        description="learning rates to try, relative to training.learning_rate",
    )
    rows: list[Annotated[float, Field(gt=0)]] = Field(
        [0.3, 1.0, 3.0],
        min_length=2,
        max_length=64,
        description="values of rows_learning_rate_scale to try if that is auto",
    )
    budget: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="total steps of all trials of a stage, relative to those of its training",
    )


class LaterTrainingConfig(Section):
    """The settings of the updates after stage 0. A key that is not given has the value of stage 0."""

    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] | None = new_key(
        None,
        description="auto: chosen by trials; none given: training.learning_rate x "
        "training.later_learning_rate_scale",
    )
    epochs: int | None = new_key(None, ge=1, description="none given: as stage 0")
    rows_learning_rate_scale: Annotated[float, Field(gt=0)] | Literal["auto"] | None = new_key(
        None, description="auto: chosen by trials; none given: as stage 0"
    )
    batch_size: int | None = new_key(None, ge=1, description="none given: as stage 0")
    patience: int | None = new_key(None, ge=1, description="none given: as stage 0")
    trials: TrialsConfig | None = new_key(
        None, description="the trials for the values that are auto; unused if none is"
    )

    @model_validator(mode="before")
    @classmethod
    def _trials_where_something_is_auto(cls, tree: Any) -> Any:
        """Add the defaults of the trials if they are used, because they determine the stage."""
        if not isinstance(tree, Mapping) or tree.get("trials") is not None:
            return tree
        auto = "auto" in (tree.get("learning_rate"), tree.get("rows_learning_rate_scale"))
        return {**tree, "trials": {}} if auto else tree


class TrainingConfig(Section):
    """The training of a stage."""

    epochs: int = Field(
        4, ge=1, description="passes over a stage's data; the epoch with the lowest validation loss is kept"
    )
    learning_rate: float = Field(2e-4, gt=0, description="the highest learning rate of stage 0")
    later_learning_rate_scale: float = Field(
        0.1, gt=0, description="the learning rate of later stages, relative to that of stage 0"
    )
    batch_size: int = Field(32, ge=1, description="targets in one optimizer step, in every layout")
    max_steps: int | None = Field(
        None, ge=1, description="the largest number of steps in each stage; none given: no limit"
    )
    loss_vocabulary: Literal["full", "semantic", "level"] = Field(
        "semantic",
        description="the tokens that compete with a target; the default of the paper's preset and of "
        "`instruct` is full",
    )
    temperature: float = Field(0.8, gt=0, description="logits are divided by it in training; decoding uses 1")
    max_grad_norm: float = Field(
        1.0, gt=0, description="gradients with a larger norm are scaled to this norm"
    )
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW")
    warmup: float = Field(0.01, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate decreases after the warmup"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on a CPU, bfloat16 for frozen weights and products on a GPU"
    )
    device: Annotated[str, AfterValidator(_device)] = Field(
        "auto", description="auto: the GPU if there is one; or a PyTorch device such as cpu or cuda:1"
    )
    validation_cases: int | None = Field(
        None, ge=1, description="validate on a random sample of this number of cases; none given: on all"
    )
    # not written if not used, so that the files of earlier versions stay the same
    patience: int | None = new_key(
        None,
        ge=1,
        description="end a stage after this number of epochs without a lower validation loss; none given: "
        "train all epochs",
    )
    rows_learning_rate_scale: float = new_key(
        1.0,
        gt=0,
        description="the learning rate of the vocabulary's rows and the item head, relative to that of the "
        "adapter (or of the backbone where its weights are trained)",
    )
    rows: Literal["semantic", "all"] = new_key(
        "semantic",
        description="which rows of embedding and head are trained beside the adapter: those of the semantic "
        "tokens, or all, words included, as in the paper's released code (the paper's preset: all)",
    )
    users: Literal["tested", "all"] = new_key(
        "tested",
        description="whose events are training targets, for models and baselines alike. tested: users with "
        "at least three events in the stage, without the last two, as in the paper; all: also all events of "
        "users with one or two",
    )
    later: LaterTrainingConfig = new_key(LaterTrainingConfig())
    gradient_checkpointing: bool = new_key(
        False, description="use less memory for a third more computation; same results"
    )
    compile: bool | Literal["auto"] = new_key(
        False, description="use torch.compile; auto: only on a GPU; results differ only by rounding"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = new_key(
        "auto", description="PyTorch threads on a CPU; auto: OMP_NUM_THREADS, else by the size of the model"
    )
    sharding: Literal["none", "full"] = new_key(
        "none",
        description="full: several processes share the weights of a frozen backbone, each stores a part "
        "(docs/how-to/several-processes.md); none: each stores all",
    )

    def determining(self) -> dict[str, Any]:
        """The keys that determine the result of training: all except those that change only the cost of a
        step, and those of other stages."""
        return self.model_dump(mode="json", exclude={*COST_ONLY, "later"})

    def of_update(self) -> TrainingConfig:
        """The settings of an update: those of stage 0, replaced by the values given in ``later``. The
        learning rate and values that are ``auto`` are not replaced."""
        given = self.later.model_dump(exclude={"learning_rate", "trials"})
        given = {key: value for key, value in given.items() if value != "auto"}
        return self.model_copy(update={**given, "later": LaterTrainingConfig()})

    @property
    def rate_of_update(self) -> float:
        """The highest learning rate of an update.

        Raises:
            ConfigError: if it is ``auto``.
        """
        if self.later.learning_rate == "auto":
            raise ConfigError(
                "training.later.learning_rate is auto, which each stage chooses; give a number here"
            )
        return self.later.learning_rate or self.learning_rate * self.later_learning_rate_scale


class DecodingConfig(Section):
    """The search for the best items."""

    beams: int = Field(
        10, ge=1, le=MOST_BEAMS, description="width of the beam search, and the most items in a ranked list"
    )
    # not written if not given, as above
    batch_size: int | None = new_key(
        None, ge=1, description="users decoded together; none given: 64, or 256 on a GPU"
    )
    repeats: Repeats = new_key(
        "auto",
        description="whether items of the history may be recommended; auto: only if some training target was "
        "one (the paper's preset: keep)",
    )


class EvaluationConfig(Section):
    """The tests of the trained stages."""

    enabled: bool = Field(
        True, description="false: stages are only trained; nothing is tested, and no report is written"
    )
    k: list[Annotated[int, Field(ge=1)]] = Field(
        [5, 10], min_length=1, description="lengths of the lists that Hit, NDCG and MRR are computed on"
    )


class ReportConfig(Section):
    """The report of a run."""

    title: str | None = Field(None, description="none given: the names of the runs")
    segments: list[str] = Field(
        [], description="columns of the item or user table by which the cases are also divided"
    )
    users: str | None = Field(
        None, description="the user table: CSV, Parquet or JSON lines with a column user_id"
    )
