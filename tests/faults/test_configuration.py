"""What a configuration means: stages keep the settings they were trained with, and edits are noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from event_logs import write_log
from plugins import Install
from strategy_runs import TREE, Runs, check_same_results

from peso.config import TrainingConfig, load_config
from peso.config.shape import stage_shape
from peso.errors import ConfigError, PesoError, WorkspaceError
from peso.model.backbone import small_llama
from peso.runs import pipeline
from peso.runs.recommender import Recommender
from peso.runs.trust import strategy_of
from peso.runs.workspace import Workspace
from peso.runtime.files import digest
from peso.runtime.progress import Silent
from peso.training.strategies.strategy import Strategy

pytestmark = pytest.mark.slow

MADE = []


class Recorded(Strategy):
    """Somebody's own strategy."""

    def __init__(self, answer: int = 0) -> None:
        MADE.append(answer)


OWN = f"{__name__}.Recorded"


@pytest.fixture(scope="session")
def trained(runs: Runs) -> Workspace:
    """Stages 0 to 3 of `single`."""
    return runs("single", backbone="tiny")


@pytest.fixture
def copied(trained: Workspace, tmp_path: Path) -> Callable[[int], Workspace]:
    """copied(n): a copy of the workspace with its first n stages."""

    def copy(stages: int) -> Workspace:
        shutil.copytree(trained.root, tmp_path / "w")
        for stage in range(stages, 4):
            shutil.rmtree(tmp_path / "w" / "stages" / str(stage))
        return Workspace.open(tmp_path / "w")

    return copy


def everything(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def edit(workspace: Workspace, **keys: Any) -> None:
    """Change keys of config.yaml by hand, ``a__b`` for a.b."""
    path = workspace.root / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    for key, value in keys.items():
        *above, last = key.split("__")
        section = tree
        for name in above:
            section = section[name]
        section[last] = value
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


# -- config.yaml ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seed": 8}, "seed was 0, is 8"),
        ({"training__learning_rate": 1.0}, r"training\.learning_rate was 0\.003, is 1\.0"),
        ({"training__epochs": 9}, r"training\.epochs was 1, is 9"),
        ({"training__temperature": 0.1}, r"training\.temperature"),
        ({"training__loss_vocabulary": "full"}, r"training\.loss_vocabulary"),
        ({"prompt__window": 3}, r"prompt\.window"),
        ({"backbone__width": 64}, r"backbone\.width"),
        ({"adapter__rank": 1}, r"adapter\.rank"),
    ],
)
def test_an_edited_configuration_is_noticed(
    copied: Callable[[int], Workspace], keys: dict[str, Any], message: str
) -> None:
    workspace = copied(2)
    edit(workspace, **keys)
    with pytest.raises(WorkspaceError, match=rf"config\.yaml was edited.*{message}.*Restore the old values"):
        Workspace.open(workspace.root)


def test_every_command_looks_for_edits(copied: Callable[[int], Workspace], peso: Any) -> None:
    workspace = copied(2)
    edit(workspace, seed=8)
    commands = (
        "update",
        "evaluate",
        "report",
        "diagnose",
        "train",
        "tokenize",
        "recommend",
        "export",
        "baseline",
    )
    for command in commands:
        more = {"recommend": ["--user", "u1"], "export": ["-o", workspace.root.parent / "out"]}.get(
            command, []
        )
        status, _, said = peso(command, "-w", workspace.root, *more)
        assert (status, "seed was 0, is 8" in said) == (1, True), command


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data__simulate__users": 61}, "its stream was made: data.simulate.users was 60, is 61"),
        (
            {"data__split": "user-disjoint"},
            "its stream was made: data.split was 'natural', is 'user-disjoint'",
        ),
        ({"data_seed": 8}, "its stream was made: data_seed was 0, is 8"),
        ({"items__codes": 16}, "its semantic IDs were made: items.codes was 8, is 16"),
        ({"items__fit": "all"}, "its semantic IDs were made: items.fit was 'base', is 'all'"),
        ({"items__rq_vae__steps": 1}, "its semantic IDs were made: items.rq_vae.steps was 1000, is 1"),
        ({"items__index": "/x.json"}, "its semantic IDs were made: items.index was None, is '/x.json'"),
    ],
)
def test_edited_data_and_items_are_noticed(
    copied: Callable[[int], Workspace], peso: Any, keys: dict[str, Any], message: str
) -> None:
    root = copied(2).root
    edit(Workspace.open(root), **keys)
    before = everything(root)
    for command in ("update", "recommend --user u1", "tokenize", "tokenize --append", "train", "ingest"):
        status, _, said = peso(*command.split(), "-w", root)
        assert (status, message in said) == (1, True), command
        assert "Restore the old values, or use a new workspace (-w) for the new ones" in said
    assert everything(root) == before


@pytest.fixture
def read_log(tmp_path: Path, peso: Any) -> Workspace:
    """A log with its semantic IDs; nothing is trained."""
    events = [(f"u{k % 5}", f"i{k % 12}", 1_600_000_000 + k) for k in range(100)]
    write_log(tmp_path / "log.csv", events[:80])
    write_log(tmp_path / "week.csv", events[80:])
    write_log(tmp_path / "products.csv", [(f"i{k}", f"thing {k}") for k in range(12)], "item,title")
    (tmp_path / "c.yaml").write_text(
        "data: {format: csv, path: log.csv, stages: 2,\n"
        "  items: {path: products.csv, columns: {title: title}}}\n"
        "items: {quantizer: rq-kmeans, levels: 2, codes: 8}\nbackbone: tiny\n"
    )
    assert peso("ingest", tmp_path / "c.yaml", "-w", tmp_path / "w")[0] == 0
    assert peso("tokenize", "-w", tmp_path / "w")[0] == 0
    return Workspace.open(tmp_path / "w")


def test_what_was_edited_can_be_read_and_made_again_until_a_stage_is_trained(
    read_log: Workspace, tmp_path: Path, peso: Any
) -> None:
    root, week = read_log.root, tmp_path / "week.csv"
    before = everything(root)
    edit(read_log, data__min_user=2, items__codes=4)
    edited = everything(root)
    for command in (["ingest", week, "--append"], ["tokenize"], ["tokenize", "--append"], ["train"]):
        status, _, said = peso(*command, "-w", root)
        assert (status, "data.min_user was 1, is 2" in said) == (1, True), command
        assert f"read the data again: `peso ingest -w {root}`" in said
        assert everything(root) == edited
    assert peso("ingest", "-w", root)[0] == 0
    for command in (["ingest", week, "--append"], ["tokenize", "--append"], ["train"]):
        status, _, said = peso(*command, "-w", root)
        assert (status, "items.codes was 8, is 4" in said) == (1, True), command
        assert f"make the IDs again: `peso tokenize -w {root}`" in said
    assert peso("tokenize", "-w", root)[0] == 0
    assert peso("ingest", week, "--append", "--set", "data.min_user=1", "-w", root)[0] == 0
    edit(read_log, data__path=str(week))
    status, _, said = peso("ingest", "--append", "-w", root)
    assert status == 1
    assert "data.path was" in said
    assert "peso ingest NEW --append" in said
    assert "read the data again" not in said  # which would lose the append
    assert before != edited


def test_files_of_vectors_may_be_others_for_new_items(read_log: Workspace) -> None:
    edit(read_log, items__vectors=["/elsewhere/v.npy"])
    assert Workspace.open(read_log.root).config.items.vectors == ["/elsewhere/v.npy"]


# -- where things are ----------------------------------------------------------------------------------


def test_another_device_is_no_other_training(copied: Callable[[int], Workspace], peso: Any) -> None:
    root = copied(2).root
    edit(Workspace.open(root), training__device="cpu")
    assert peso("update", "-w", root)[0] == 0
    assert Workspace.open(root).stage(2).config.training.device == "cpu"
    assert peso("recommend", "-w", root, "--stage", "1", "--user", "u1")[0] == 0
    edit(Workspace.open(root), training__device="cuda:77")  # the one that is configured now is used
    status, _, said = peso("recommend", "-w", root, "--stage", "1", "--user", "u1")
    assert status == 1
    assert "training.device 'cuda:77' cannot be used" in said


def test_a_backbone_may_move_and_a_relative_path_is_one(
    runs: Runs, tmp_path: Path, peso: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = runs("none")
    shutil.copytree(done.config.backbone.name, tmp_path / "here" / "models" / "mine")
    shutil.copytree(done.root, tmp_path / "here" / "w")
    tree = yaml.safe_load((done.root / "config.yaml").read_text()) | {"strategy": "single"}
    tree["backbone"]["name"] = "models/mine"
    (tmp_path / "here" / "c.yaml").write_text(yaml.safe_dump(tree))
    there = (tmp_path / "here").rename(tmp_path / "there")  # workspace, configuration and backbone alike
    ask = ("recommend", "--user", "u1", "--json", "-w")
    before = peso(*ask, done.root)[:2]
    assert peso(*ask, there / "w")[:2] == before  # the old place is still there
    for stage in (2, 3):
        shutil.rmtree(there / "w" / "stages" / str(stage))
    edit(Workspace.open(there / "w"), backbone__name=str(there / "models" / "mine"))
    assert peso("update", "-w", there / "w")[0] == 0
    assert Workspace.open(there / "w").stage(2).config.backbone.name == str(there / "models" / "mine")
    assert peso(*ask, there / "w", "--stage", "1")[0] == 0

    monkeypatch.chdir("/")
    fresh = Workspace.create_or_open(tmp_path / "fresh", load_config(there / "c.yaml"))
    assert fresh.config.backbone.name == str(there / "models" / "mine")
    pipeline.run(fresh, base=done.root)
    assert fresh.stage(0).determined_by == done.stage(0).determined_by
    assert Recommender.load(fresh.root)

    small_llama(32, 2, seed=77).save_pretrained(there / "models" / "mine")
    status, _, said = peso(*ask, there / "w")
    assert status == 1
    assert "has other weights than the one that" in said
    edit(Workspace.open(there / "w"), backbone__name=str(there / "gone"))
    status, _, said = peso(*ask, there / "w")
    assert status == 1
    assert "in its config.yaml" in said
    edit(Workspace(there / "w", done.config), backbone__name="tiny")
    assert "backbone.name was" in peso(*ask, there / "w")[2]


def test_an_adapter_may_be_chosen_until_a_stage_has_one(copied: Callable[[int], Workspace]) -> None:
    workspace = copied(1)  # a whole backbone was trained
    edit(workspace, adapter__rank=1)
    assert Workspace.open(workspace.root).config.adapter.rank == 1


def test_a_part_of_a_configuration_is_an_error_and_no_defaults(copied: Callable[[int], Workspace]) -> None:
    workspace = copied(1)
    path = workspace.root / "config.yaml"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    for cut in range(0, len(lines), 7):
        path.write_text("".join(lines[:cut]))
        with pytest.raises(PesoError, match=r"config\.yaml"):
            Workspace.open(workspace.root)
    for cut in range(1, len(whole) - 1, 197):
        path.write_text(whole[:cut])
        with pytest.raises(PesoError, match=r"config\.yaml"):
            Workspace.open(workspace.root)
    path.write_text(whole.replace("  temperature: 0.8\n", "", 1))
    with pytest.raises(WorkspaceError, match=r"incomplete: training\.temperature.*manifest"):
        Workspace.open(workspace.root)


def test_a_stage_of_another_run_is_not_served(copied: Callable[[int], Workspace], runs: Runs) -> None:
    workspace = copied(2)
    other = runs("single", "seed=8", "data_seed=0", backbone="tiny")
    shutil.rmtree(workspace.stage(1).directory)
    shutil.copytree(other.stage(1).directory, workspace.stage(1).directory)
    with pytest.raises(WorkspaceError):
        Recommender.load(workspace.root)


# -- what earlier versions wrote -----------------------------------------------------------------------


def test_digests_of_earlier_versions_stay_valid() -> None:
    tree = {"data": "simulate", "backbone": "tiny", "strategy": "single"}
    config = load_config(tree, ["training.later_learning_rate_scale=0.5"])
    assert [digest(stage_shape(config, stage))[:16] for stage in (0, 1)] == [
        "e6aa35aa9a2aa4f5",
        "b973961d9aa33000",
    ]
    rest = {"prompt": {"layout": "stream"}, "training": {"rows": "semantic"}}
    paper = load_config({"data": "simulate", "strategy": "paper", **rest})  # what the preset did not set then
    assert digest(stage_shape(paper, 1))[:16] == "2cbf19291074965c"


def test_a_resolved_configuration_of_an_earlier_version_is_complete(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(EARLIER)
    assert Workspace.open(tmp_path).config.training.later.epochs is None


EARLIER = """\
data:
  format: simulate
  path: null
  columns:
    user: user
    item: item
    time: time
    rating: null
  separator: null
  encoding: utf-8
  time_format: auto
  items: null
  min_rating: null
  repeats: keep
  min_user: 1
  min_item: 1
  stages:
    fractions:
    - 0.6
    - 0.1
    - 0.1
    - 0.1
    - 0.1
    every: null
    start: null
    boundaries: null
  split: natural
  on_error: fail
  simulate:
    users: 600
    items: 400
    stages: 5
items:
  encoder: hashing
  dimensions: 128
  template: '{title}

    {category}

    {text}'
  max_tokens: 256
  vectors: []
  index: null
  quantizer: category-path
  levels: 4
  codes: 256
  collisions: reassign
  fit: base
  rq_vae:
    hidden:
    - 256
    latent: 64
    steps: 1000
    batch_size: 1024
    learning_rate: 0.001
    commitment: 0.25
backbone:
  name: tiny
  layers: null
  width: null
prompt:
  layout: stream
  window: 20
adapter:
  rank: 8
  alpha: 16.0
  dropout: 0.05
  targets:
  - q_proj
  - k_proj
  - v_proj
  - o_proj
  - gate_proj
  - up_proj
  - down_proj
strategy:
  name: single
training:
  epochs: 4
  learning_rate: 0.0002
  later_learning_rate_scale: 0.5
  batch_size: 32
  max_steps: null
  loss_vocabulary: semantic
  temperature: 0.8
  max_grad_norm: 1.0
  weight_decay: 0.01
  warmup: 0.01
  schedule: cosine
  precision: auto
  device: auto
  validation_cases: null
decoding:
  beams: 10
evaluation:
  enabled: true
  k:
  - 5
  - 10
baselines: []
report:
  title: null
  segments: []
  users: null
seed: 0
data_seed: null
base_seed: null
"""


# -- later stages --------------------------------------------------------------------------------------


def test_stage_0_depends_on_nothing_that_is_for_later_stages(runs: Runs, tmp_path: Path) -> None:
    base = runs("none", backbone="tiny")
    changes = [
        "training.later_learning_rate_scale=0.3",
        "training.later.learning_rate=0.01",
        "training.later.epochs=3",
        "training.later.batch_size=16",
        "training.later.patience=1",
        "training.later.rows_learning_rate_scale=0.5",
        "adapter.rank=3",
    ]
    workspace = runs.start(tmp_path / "w", "peso", *changes, backbone="tiny")
    pipeline._prepare(workspace, base.root, Silent(), previous=False)
    assert workspace.finished_stages == [0]
    check_same_results(base, workspace, 0)
    other = runs.start(tmp_path / "v", "peso", "training.learning_rate=0.5", backbone="tiny")
    with pytest.raises(WorkspaceError, match=r"training\.learning_rate is 0\.003 there and 0\.5 here"):
        pipeline._prepare(other, base.root, Silent(), previous=False)


def test_later_stages_have_their_own_settings() -> None:
    given = {"learning_rate": 0.5, "epochs": 2, "batch_size": 8, "patience": 3}
    training = TrainingConfig(epochs=7, later={**given, "rows_learning_rate_scale": 0.1})
    update = training.of_update()
    assert training.rate_of_update == 0.5
    assert (training.rows_learning_rate_scale, update.rows_learning_rate_scale) == (1.0, 0.1)
    assert (update.epochs, update.batch_size, update.patience) == (2, 8, 3)
    plain = TrainingConfig(epochs=7, patience=5, learning_rate=0.2)
    assert plain.rate_of_update == pytest.approx(0.02)
    assert plain.of_update() == plain


def test_settings_of_later_stages_may_change_from_stage_to_stage(
    copied: Callable[[int], Workspace], peso: Any
) -> None:
    workspace = copied(2)
    before = Recommender.load(workspace.root, stage=1).recommend(user="u1", k=5)
    keys = [
        "strategy={name: peso, strength: 3}",
        "training.later.batch_size=16",
        "training.later.max_steps=2",
    ]
    status, _, said = peso("update", "-w", workspace.root, *(f"--set={key}" for key in keys))
    assert status == 1
    assert "unknown key 'training.later.max_steps'" in said
    status, _, said = peso("update", "-w", workspace.root, *(f"--set={key}" for key in keys[:2]))
    assert status == 0, said
    manifests = [json.loads((workspace.stage(t).directory / "manifest.json").read_text()) for t in (1, 2)]
    assert [m["configuration"]["strategy"]["name"] for m in manifests] == ["single", "peso"]
    assert "later" not in manifests[0]["configuration"]["training"]
    assert manifests[1]["configuration"]["training"]["later"] == {"batch_size": 16}
    now = Workspace.open(workspace.root)
    assert now.config.strategy.strength == 3
    assert Recommender.load(workspace.root, stage=1).recommend(user="u1", k=5) == before
    Recommender.load(workspace.root, stage=2)
    # a run describes all stages, so it must not differ from any
    for config in (now.config, now.stage(1).config):
        with pytest.raises(WorkspaceError, match=r"stage [12] was trained: .*strategy\.name.*peso update"):
            Workspace.create_or_open(workspace.root, config)
    status, _, said = peso("update", "-w", workspace.root, "--set", "training.epochs=5")
    assert status == 1
    assert "training.epochs" in said
    # a command that changes none of these settings does not ask with which ones each stage was trained
    status, _, said = peso("evaluate", "-w", workspace.root, "--stage", "1", "--set", "evaluation.k=[3]")
    assert status == 0, said
    status, _, said = peso("evaluate", "-w", workspace.root, "--set", "strategy.strength=1")
    assert status == 1
    assert "strategy" in said


@pytest.mark.parametrize(
    ("first", "then", "allowed"),
    [
        ("single", "average", True),
        ("single", "sum_lora", True),
        ("sum_lora", "o_lora", True),
        ("replay", "peso", True),
        ("sum_lora", "retrain", True),
        ("sum_lora", "single", "cannot use what it stored .past"),
        ("single", "replay", "needs what only .* itself stores .replay"),
        ("single", "inf_lora", "needs what only .* itself stores .inputs"),
        ("lsat", "single", "cannot use what it stored .lsat"),
        ("full", "single", "cannot use what it stored .backbone"),
        ("full", "retrain", "cannot use what it stored .backbone"),
        ("single", "full", True),
    ],
)
def test_another_strategy_goes_on_only_from_what_it_understands(
    runs: Runs, tmp_path: Path, first: str, then: str, allowed: bool | str
) -> None:
    source = runs(first, backbone="tiny")
    shutil.copytree(source.root, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "stages" / "3")
    config = load_config(tmp_path / "w" / "config.yaml", [f"strategy={then}"])
    workspace = Workspace.create_or_open(tmp_path / "w", config, later=True)
    if allowed is True:
        assert pipeline.update(workspace, Silent()) == 3
        Recommender.load(workspace.root, stage=2)
        Recommender.load(workspace.root, stage=3).recommend(user="u1")
        return
    with pytest.raises(WorkspaceError, match=str(allowed)):
        pipeline.update(workspace, Silent())
    assert workspace.finished_stages == [0, 1, 2]


# -- what a workspace may run --------------------------------------------------------------------------


def test_a_workspace_runs_no_code_that_nobody_named(copied: Callable[[int], Workspace], peso: Any) -> None:
    workspace = copied(1)
    strategy = {"name": "custom", "module": OWN, "arguments": {"answer": 5}}
    edit(workspace, strategy=strategy)
    MADE.clear()
    place = ["-w", workspace.root]
    status, _, said = peso("update", *place)
    assert (status, MADE) == (1, [])
    assert f"--trust {OWN}" in said
    status, _, said = peso("update", *place, "--trust", "os.system")
    assert (status, MADE) == (1, [])
    status, _, said = peso("update", *place, "--trust", OWN)
    assert status == 0, said
    assert set(MADE) == {5}
    MADE.clear()
    for command in (
        ["recommend", "--user", "u1"],
        ["export", "-o", workspace.root.parent / "x"],
        ["evaluate"],
    ):
        status, _, said = peso(*command, *place)
        assert (status, MADE) == (1, []), command
        assert f"--trust {OWN}" in said
        status, _, said = peso(*command, *place, "--trust", OWN)
        assert status == 0, said
        assert MADE, command
        MADE.clear()
    with pytest.raises(ConfigError, match="trust="):
        Recommender.load(workspace.root)
    Recommender.load(workspace.root, trust=[OWN])


def test_what_this_call_names_is_trusted(copied: Callable[[int], Workspace], peso: Any) -> None:
    workspace = copied(1)
    MADE.clear()
    status, _, said = peso(
        "update", "-w", workspace.root, "--set", f"strategy={{name: custom, module: {OWN}}}"
    )
    assert status == 0, said
    assert MADE
    MADE.clear()
    status, _, said = peso("update", "-w", workspace.root, "--set", "strategy.arguments={answer: 3}")
    assert (status, MADE) == (1, [])
    status, _, said = peso("update", "-w", workspace.root, "--set", f"strategy.module={OWN}")
    assert status == 0, said


def test_a_proximal_term_that_this_call_names_is_trusted(
    copied: Callable[[int], Workspace], peso: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_term.py").write_text(
        "from peso.adapters.proximal import find_term\nclass Mine(find_term('l2')): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    root = copied(1).root
    options = ("--set", "strategy=peso", "--set")
    status, _, said = peso("update", "-w", root, *options, "strategy.proximal=a_term.Mine")
    assert status == 0, said
    status, _, said = peso("update", "-w", root, "--set", "strategy.strength=2")
    assert status == 1
    assert "--trust a_term.Mine" in said


def test_the_file_of_a_workspace_is_not_the_caller_s_own(
    copied: Callable[[int], Workspace], peso: Any, tmp_path: Path
) -> None:
    workspace = copied(1)
    edit(workspace, strategy={"name": "custom", "module": OWN, "arguments": {}})
    file = workspace.root / "config.yaml"
    MADE.clear()
    for place in (workspace.root, tmp_path / "new"):
        for more in ([], ["--dry-run"]):
            status, _, said = peso("run", file, "-w", place, *more)
            assert (status, MADE) == (1, [])
            assert f"--trust {OWN}" in said
    assert peso("run", file, "-w", workspace.root, "--trust", OWN)[0] == 0
    assert MADE
    own = shutil.copy(file, tmp_path / "config.yaml")
    assert peso("run", own, "-w", workspace.root)[0] == 0


@pytest.mark.parametrize(
    "module", ["os.system", "os.path.join", "builtins.exec", "pathlib.Path", "json", "", ".x"]
)
def test_only_a_strategy_is_constructed(module: str, tmp_path: Path) -> None:
    config = load_config({**TREE, "strategy": {"name": "custom", "module": module, "arguments": {"x": 1}}})
    with pytest.raises(ConfigError, match=r"is not a subclass of|cannot be imported"):
        strategy_of(Workspace(tmp_path, config))


def test_what_an_import_raises_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('no network')")
    (tmp_path / "unreadable_module.py").write_text("class :")
    monkeypatch.syspath_prepend(tmp_path)
    for module, cause in (
        ("broken_module", "RuntimeError: no network"),
        ("unreadable_module", "SyntaxError"),
    ):
        config = load_config({**TREE, "strategy": {"name": "custom", "module": f"{module}.Mine"}})
        with pytest.raises(ConfigError, match=f"cannot be imported.*{cause}"):
            strategy_of(Workspace(tmp_path, config))


# -- parts of other distributions ------------------------------------------------------------------------

HALVES = """
from peso.adapters.proximal import DistanceTerm
from peso.baselines.baseline import Baseline
from peso.events.sources.tables import DataSet

class Tape(DataSet): pass
class Hollow(DataSet):
    @staticmethod
    def open(path): return None
class Euclid(DistanceTerm): pass
class Newest(Baseline): pass
"""
HALF_ENTRIES = [
    "peso.data_sets tape = halves:Tape",
    "peso.data_sets hollow = halves:Hollow",
    "peso.proximal_terms euclid = halves:Euclid",
    "peso.baselines newest = halves:Newest",
]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data={format: tape, path: .}", "data set 'tape' is halves.Tape, which does not define open"),
        ("data={format: hollow, path: .}", "'hollow': halves.Hollow.open gave NoneType, not a Source"),
        (
            "strategy={proximal: euclid}",
            "term 'euclid' is halves.Euclid, which does not define metric; correct that class",
        ),
        ("baselines=[newest]", "baseline 'newest' is halves.Newest, which does not define learn, scores"),
    ],
)
def test_a_part_that_lacks_a_method_is_refused_before_anything_is_done(
    install: Install, tmp_path: Path, peso: Any, override: str, said: str
) -> None:
    install("halves", HALVES, *HALF_ENTRIES)
    (tmp_path / "c.yaml").write_text("data: {format: simulate}\nbackbone: tiny\n")
    status, _, err = peso("run", tmp_path / "c.yaml", "-w", tmp_path / "w", "--set", override)
    assert status == 1
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "w").exists()
