"""The configuration: complete when resolved, exact in its errors, overridable from the command line."""

from __future__ import annotations

import pytest
import yaml

from peso.config import Config, changed_keys, dump_config, load_config, valid_keys
from peso.config.compare import CompareConfig
from peso.config.reading import leaves, sections, with_earlier_defaults
from peso.config.registry import Options
from peso.config.shape import stage_shape
from peso.errors import ConfigError

SIMULATED = {"data": "simulate"}


def test_a_resolved_configuration_reads_back_to_itself(tmp_path):
    config = load_config({**SIMULATED, "strategy": "paper", "backbone": "tiny"}, ["training.epochs=2"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_defaults_are_the_papers_protocol():
    training = load_config({**SIMULATED, "strategy": "paper"}).training
    assert (training.epochs, training.learning_rate, training.later_learning_rate_scale) == (4, 2e-4, 0.1)
    assert (training.batch_size, training.temperature, training.max_grad_norm) == (32, 0.8, 1.0)
    assert (training.weight_decay, training.warmup, training.schedule) == (0.01, 0.01, "cosine")


def test_the_papers_preset_keeps_the_full_loss_vocabulary_and_an_explicit_choice_wins():
    assert load_config({**SIMULATED, "strategy": "paper"}).training.loss_vocabulary == "full"
    assert load_config({**SIMULATED, "prompt": {"layout": "instruct"}}).training.loss_vocabulary == "full"
    chosen = load_config({**SIMULATED, "strategy": "paper", "training": {"loss_vocabulary": "level"}})
    assert chosen.training.loss_vocabulary == "level"


@pytest.mark.slow
def test_every_key_can_be_set_on_the_command_line():
    config = load_config(SIMULATED)
    leaves = [key for key in valid_keys() if not any(other.startswith(f"{key}.") for other in valid_keys())]
    tree = config.model_dump()
    for key in leaves:
        value = tree
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) and part in value else None
        if value is not None:
            assert load_config(SIMULATED, [f"{key}={yaml.safe_dump(value, default_flow_style=True)}"]), key


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=2", ["'training.epoch'", "2", "'training.epochs'"]),
        (
            "training.later.rate=1",
            ["'training.later.learning_rate'", "training.later has the keys learning_rate, epochs"],
        ),
        ("baselines=[{name: ease, foo: 3}]", ["'ease' has no option 'foo'", "the options are "]),
        ("trainin.epochs=2", ["'trainin'", "'training'"]),
        ("training.epochs=x", ["training.epochs", "'x'", "integer"]),
        ("training.epochs=0", ["training.epochs", "0", "greater"]),
        ("strategy.weight=-1", ["strategy.weight", "-1"]),
        ("strategy=pesso", ["strategy.name", "'pesso'", "'peso'"]),
        ("data.format=nonsense", ["data.format", "'nonsense'", "simulate"]),
        ("data.format=peso-release", ["data.path"]),
        ("evaluation.k=[0]", ["evaluation.k", "0"]),
        ("seed", ["key=value"]),
    ],
)
def test_an_error_names_the_key_the_value_and_the_way_out(override, words):
    with pytest.raises(ConfigError) as error:
        load_config(SIMULATED, [override])
    for word in words:
        assert word in str(error.value)


def test_an_option_of_another_strategy_is_refused():
    with pytest.raises(ConfigError, match="'single' has no option 'weight'"):
        load_config(SIMULATED, ["strategy={name: single, weight: 3}"])


def test_a_list_of_k_longer_than_the_beams_is_refused():
    with pytest.raises(ConfigError, match=r"evaluation\.k.*20.*decoding\.beams"):
        load_config(SIMULATED, ["evaluation.k=[5,20]"])


def test_changed_keys_are_the_leaves_that_differ():
    old = load_config(SIMULATED)
    new = load_config(SIMULATED, ["training.epochs=7", "strategy=single"])
    # which `single` does not have
    options = {f"strategy.{name}" for name, value in old.strategy if value is not None}
    assert set(changed_keys(old, new)) == {*options, "training.epochs"}


def test_a_missing_or_broken_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no configuration at"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("data: [")
    with pytest.raises(ConfigError, match="not readable YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="no configuration"):
        load_config(tmp_path / "empty.yaml")


# What the first version wrote for simulated data. A later key is written only where it is not at its default
# (``exclude_if``): config.yaml is refused where a key that is always written is missing.
FIRST_KEYS = """
    adapter.alpha adapter.dropout adapter.rank adapter.targets backbone.layers backbone.name
    backbone.width base_seed baselines data.columns.item data.columns.rating data.columns.time
    data.columns.user data.encoding data.format data.items data.min_item data.min_rating
    data.min_user data.on_error data.path data.repeats data.separator data.simulate.items
    data.simulate.stages data.simulate.users data.split data.stages.boundaries data.stages.every
    data.stages.fractions data.stages.start data.time_format data_seed decoding.beams
    evaluation.enabled evaluation.k items.codes items.collisions items.dimensions items.encoder
    items.fit items.index items.levels items.max_tokens items.quantizer items.rq_vae.batch_size
    items.rq_vae.commitment items.rq_vae.hidden items.rq_vae.latent items.rq_vae.learning_rate
    items.rq_vae.steps items.template items.vectors prompt.layout prompt.window report.segments
    report.title report.users seed strategy.coupling strategy.examples strategy.groups strategy.name
    strategy.proximal strategy.reduction strategy.strength strategy.temperature strategy.vocabulary
    strategy.weight training.batch_size training.device training.epochs
    training.later_learning_rate_scale training.learning_rate training.loss_vocabulary
    training.max_grad_norm training.max_steps training.precision training.schedule
    training.temperature training.validation_cases training.warmup training.weight_decay
"""


def test_a_configuration_of_the_first_version_is_complete():
    tree = yaml.safe_load(dump_config(load_config(SIMULATED)))
    assert {key for key, _ in leaves(tree)} == set(FIRST_KEYS.split())


DATA = {"format": "peso-release", "path": "x"}


def test_scratch_is_trained_with_dropout_unless_told_otherwise():
    def dropout(backbone):
        return load_config({"data": DATA, "backbone": backbone}).backbone.dropout

    assert dropout("scratch") == dropout({"name": "scratch", "width": 64}) == 0.2
    assert dropout({"name": "scratch", "dropout": 0}) == dropout("tiny") == 0
    assert dropout("smollm2-135m") is None
    with pytest.raises(ConfigError, match=r"backbone.dropout is for scratch and tiny only.*adapter\.dropout"):
        dropout({"name": "smollm2-135m", "dropout": 0.1})


def test_the_spread_of_initial_weights_is_for_backbones_that_have_none_yet():
    def backbone(**options):
        return load_config({"data": DATA, "backbone": options}).backbone

    assert backbone(name="scratch", initializer_range=0.1).initializer_range == 0.1
    assert backbone(name="auto", initializer_range=0.1).initializer_range == 0.1
    for refused, message in [
        ({"name": "smollm2-135m"}, r"initializer_range is for scratch and tiny only; 'smollm2-135m' has its"),
        ({"name": "scratch", "pretrained": "/a"}, r"has no effect with backbone\.pretrained"),
        ({"name": "scratch", "initializer_range": 0}, "greater than 0"),
        ({"name": "scratch", "initializer_range": 1.5}, "less than or equal to 1"),  # Transformers
    ]:
        with pytest.raises(ConfigError, match=message):
            backbone(**{"initializer_range": 0.1, **refused})
    # not a part of what determined stages before there was the key
    shape = stage_shape(load_config({"data": DATA, "backbone": "scratch"}), 0)
    assert "initializer_range" not in shape["backbone"]


def test_a_workspace_of_the_first_version_had_no_dropout_and_keeps_its_digests():
    written = load_config({"data": DATA, "backbone": {"name": "scratch", "dropout": 0.0}}).model_dump(
        mode="json"
    )
    earlier = {**written, "backbone": {k: v for k, v in written["backbone"].items() if k != "dropout"}}
    read = load_config(with_earlier_defaults(earlier))
    assert read.backbone.dropout == 0
    for stage in (0, 1):
        assert "dropout" not in stage_shape(read, stage)["backbone"]
    now = load_config({"data": DATA, "backbone": "scratch"})
    assert stage_shape(now, 0)["backbone"]["dropout"] == 0.2


@pytest.mark.parametrize("key", ["reads", "transitions"])
def test_an_item_head_reads_and_counts_unless_told_otherwise_or_trained_before_it_could(key):
    def head(value):
        return load_config({"data": DATA, "backbone": "tiny", "head": value})

    for given in ("items", {"name": "items", "weight": 2.0}):
        assert getattr(head(given).head, key) is True
    assert getattr(head("codes").head, key) is None
    with pytest.raises(ConfigError, match=rf"head\.{key} needs the item head"):
        head({"name": "codes", key: True})
    written = head({"name": "items", key: False}).model_dump(mode="json")
    earlier = {**written, "head": {k: v for k, v in written["head"].items() if k != key}}
    read = load_config(with_earlier_defaults(earlier))
    assert getattr(read.head, key) is False
    assert key not in stage_shape(read, 0)["head"]  # so that its stages keep their digests
    assert stage_shape(head("items"), 0)["head"][key] is True


@pytest.mark.parametrize("key", ["contents", "arrivals"])
def test_these_parts_of_the_head_are_used_only_on_request_and_change_no_earlier_digest(key):
    def head(value):
        return load_config({"data": DATA, "backbone": "tiny", "head": value})

    assert key not in stage_shape(head("items"), 0)["head"]
    assert stage_shape(head({"name": "items", key: True}), 0)["head"][key] is True
    with pytest.raises(ConfigError, match=rf"head\.{key} needs the item head"):
        head({"name": "codes", key: True})


def test_every_key_says_in_the_reference_what_it_means():
    def unexplained(model, path: str) -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            inner = sections(field.annotation, field.metadata, within=model)
            named = name == "name" and issubclass(model, Options)
            missing += [] if field.description or inner or named else [f"{path}{name}"]
            for part, _, section in inner:
                missing += unexplained(section, f"{path}{name}.{part}")
        return missing

    assert [*unexplained(Config, ""), *unexplained(CompareConfig, "compare.")] == []


@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("partners", "baselines.partners"),
        ("recency", "baselines.recency"),
        ("strength", "strategy.strength"),
        ("contents", "head.contents"),
        ("epoch", "training.epochs"),
    ],
)
def test_an_unknown_key_without_its_section_is_told_where_it_belongs(key, suggested):
    with pytest.raises(ConfigError, match=f"unknown key '{key}'.*nearest valid key is '{suggested}'"):
        load_config(SIMULATED, [f"{key}=1"])
