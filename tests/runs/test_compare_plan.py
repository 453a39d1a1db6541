"""Many runs from one file: what they are, what they share, and what is refused before anything starts."""

from __future__ import annotations

import pytest
import yaml
from comparisons import COMMON, do, names, plan_of

from peso.config import load_config
from peso.errors import ConfigError, DataError, WorkspaceError
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow  # whole runs


# -- which runs ----------------------------------------------------------------------------------------


def test_every_strategy_comes_with_the_first_seed_before_any_with_the_second(tmp_path):
    plan = plan_of(tmp_path, {"strategies": ["single", "paper"], "seeds": [3, 1]})
    assert names(plan) == ["single/seed=3", "paper/seed=3", "single/seed=1", "paper/seed=1"]


def test_a_grid_is_one_run_for_every_combination_and_each_has_its_own_directory(tmp_path):
    grid = {"p": {"name": "peso", "weight": [0.5, 8], "reduction": ["sum", "mean"]}}
    plan = plan_of(tmp_path, {"grid": grid})
    assert [run.strategy for run in plan.runs] == [
        "p[weight=0.5,reduction=sum]",
        "p[weight=0.5,reduction=mean]",
        "p[weight=8,reduction=sum]",
        "p[weight=8,reduction=mean]",
    ]
    chosen = plan.runs[2]
    assert (chosen.task.config.strategy.weight, chosen.task.config.strategy.reduction) == (8, "sum")
    assert chosen.options == {"strategy.name": "peso", "strategy.weight": 8, "strategy.reduction": "sum"}
    assert len({run.task.root for run in plan.runs}) == 4
    assert not any(character in str(chosen.task.root) for character in "[]* ")  # nothing that a shell minds


def test_a_strategy_may_change_keys_beside_its_own_and_leaves_the_others_runs_alone(tmp_path):
    strategies = {
        "plain": "single",
        "slow": {"strategy": "single", "set": {"training.later_learning_rate_scale": 0.05}},
        "small": {"strategy": "single", "adapter": {"rank": 2}, "set": {"adapter.alpha": 4}},
    }
    plain, slow, small = (run.task.config for run in plan_of(tmp_path, {"strategies": strategies}).runs)
    assert slow.training.later_learning_rate_scale == 0.05
    assert plain.training.later_learning_rate_scale == 0.5
    assert slow.training.max_steps == plain.training.max_steps == 6
    assert (small.adapter.rank, small.adapter.alpha, plain.adapter.rank) == (2, 4, 8)
    assert small.adapter.dropout == plain.adapter.dropout


def test_options_of_the_common_strategy_do_not_leak_into_another(tmp_path):
    common = {"strategy": {"name": "peso", "weight": 7.0}}
    run = plan_of(tmp_path, {"strategies": {"p": "peso"}}, **common).runs[0]
    assert run.task.config.strategy.weight != 7.0


def test_the_papers_preset_is_compared_at_the_common_loss_vocabulary(tmp_path):
    paper, single = plan_of(tmp_path, {"strategies": ["paper", "single"]}).runs
    assert paper.task.config.training == single.task.config.training
    assert paper.task.base == single.task.base


def test_data_sets_and_backbones_are_crossed(tmp_path):
    smaller = {"simulate": {"users": 60, "items": 40, "stages": 2}}
    compare = {
        "data": {"all": {}, "few": {"format": "simulate", **smaller}},
        "backbones": {
            "thin": {"backbone": {"name": "tiny", "width": 16}, "training": {"epochs": 2}},
            "t": "tiny",
        },
        "strategies": ["single"],
    }
    runs = plan_of(tmp_path, compare).runs
    assert [(run.data, run.backbone) for run in runs] == [
        (d, b) for d in ("all", "few") for b in ("thin", "t")
    ]
    assert [run.task.config.training.epochs for run in runs] == [2, 1, 2, 1]
    assert [run.task.config.data.simulate.users for run in runs] == [80, 80, 60, 60]
    assert len({run.task.data.root for run in runs}) == 2


def test_stage_0_is_shared_by_all_that_would_learn_the_same_and_by_nobody_else(tmp_path):
    strategies = {
        "single": "single",
        "peso": "paper",
        "slow": {"strategy": "single", "set": {"training.later_learning_rate_scale": 0.05}},
        "rank": {"strategy": "single", "set": {"adapter.rank": 2}},  # tiny learns stage 0 without adapter
        "fast": {"strategy": "single", "set": {"training.learning_rate": 1e-2}},
    }
    shared = plan_of(tmp_path, {"strategies": strategies, "seeds": [0, 1]})
    base = {run.name.split("/")[2:][0]: run.task.base for run in shared.runs}
    assert base["single"] == base["peso"] == base["slow"] == base["rank"] != base["fast"]
    assert len({run.task.base.root for run in shared.runs}) == 2
    apart = plan_of(tmp_path, {"strategies": strategies, "seeds": [0, 1], "share_base": False})
    assert len({run.task.base.root for run in apart.runs}) == 4
    assert len({run.task.data.root for run in apart.runs}) == 1  # the same cases


def test_content_vectors_are_kept_for_the_runs_that_use_them(tmp_path):
    with_contents = {"strategy": "single", "set": {"head.contents": True}}
    plan = plan_of(
        tmp_path, {"strategies": {"single": "single", "contents": with_contents}}, head={"name": "items"}
    )
    plan.check()
    made = []
    for run in plan.runs:
        assert run.task.data is not None
        do(run.task.data)
        made.append(Workspace(run.task.data.root, run.task.data.config).semantic_ids)
    without, kept = made
    assert without.contents is None
    assert kept.required_contents.any()
    assert (without.codes == kept.codes).all()


def test_what_is_not_random_is_run_once(tmp_path):
    assert names(plan_of(tmp_path, {"strategies": ["none", "single"], "seeds": [0, 1]})) == [
        "none",
        "single/seed=0",
        "single/seed=1",
    ]
    apart = plan_of(tmp_path, {"strategies": ["none"], "seeds": [0, 1], "share_base": False})
    assert names(apart) == ["none/seed=0", "none/seed=1"]


def test_baselines_are_run_once_where_nothing_is_drawn_and_with_each_seed_where_something_is(tmp_path):
    baselines = ["popularity", {"name": "popularity", "last": 1}, "sasrec", "hybrid"]
    backbones = {"a": {"backbone": {"name": "tiny", "width": 16}}, "b": "tiny"}
    compare = {"backbones": backbones, "strategies": ["none", "single"], "seeds": [0, 1]}
    plan = plan_of(tmp_path, {**compare, "baselines": baselines})
    for backbone in ("a", "b"):
        assert [run.name for run in plan.baselines if run.backbone == backbone] == [
            f"simulate/{backbone}/baselines/{name}"
            for name in (
                "popularity",
                "popularity last=1",
                "sasrec/seed=0",
                "sasrec/seed=1",
                "hybrid with single/seed=0",
                "hybrid with single/seed=1",
            )
        ]
    places = {run.name: run.task.root for run in plan.baselines}
    shared = [name for name in places if "/a/" in name and places[name] == places[name.replace("/a/", "/b/")]]
    assert len(shared) == 4  # all but the hybrid, which has a backbone
    assert len(set(places.values())) == 4 + 2 * 2
    order = [run.name for run in plan.all]
    assert order.index("simulate/b/baselines/sasrec/seed=0") < order.index("simulate/a/single/seed=1")


def test_a_hybrid_with_partners_can_be_compared(tmp_path):
    hybrid = {"name": "hybrid", "partners": ["item-knn", {"name": "popularity", "last": 1}]}
    plan = plan_of(tmp_path, {"strategies": ["single"], "baselines": [hybrid, "ease"]})
    plan.check()
    assert len(plan.baselines) == 2


def test_baselines_have_the_training_data_of_the_strategies(tmp_path):
    compare = {"strategies": ["single"], "baselines": ["popularity", "sasrec"]}
    tested, everyone = (
        plan_of(tmp_path, compare, training={**COMMON["training"], "users": users})
        for users in ("tested", "all")
    )
    assert [run.task.config.training.users for run in tested.baselines] == ["tested"] * 2
    assert [run.task.config.training.users for run in everyone.baselines] == ["all"] * 2
    # a comparison that is repeated with the other value does not take over their results
    assert not {run.task.root for run in tested.baselines} & {run.task.root for run in everyone.baselines}
    # and that with the default is where earlier versions put it
    default = plan_of(tmp_path, compare)
    assert [run.task.root for run in default.baselines] == [run.task.root for run in tested.baselines]


def test_baselines_do_not_have_what_a_strategy_changes_for_itself(tmp_path):
    own = {
        "strategy": "single",
        "training": {"users": "all"},
        "prompt": {"window": 5},
        "decoding": {"beams": 11},
        "evaluation": {"k": [3]},
    }
    plan = plan_of(tmp_path, {"strategies": {"own": own, "single": "single"}, "baselines": ["sasrec"]})
    alone = plan_of(tmp_path, {"strategies": ["single"], "baselines": ["sasrec"]})
    assert [run.task.config.training.users for run in plan.runs] == ["all", "tested"]
    assert [run.task.config for run in plan.baselines] == [run.task.config for run in alone.baselines]
    assert [run.task.root for run in plan.baselines] == [run.task.root for run in alone.baselines]


def test_baselines_of_a_comparison_and_common_ones_mean_the_same(tmp_path):
    inside = plan_of(tmp_path, {"strategies": ["single"], "baselines": ["ease"]})
    outside = plan_of(tmp_path, {"strategies": ["single"]}, baselines=["ease"])
    assert [run.task.root for run in inside.baselines] == [run.task.root for run in outside.baselines]


def test_transfer_is_of_the_first_seed_of_what_is_named_and_comes_last(tmp_path):
    compare = {
        "strategies": ["none", "single"],
        "grid": {"g": {"name": "peso", "weight": [1, 2]}},
        "seeds": [4, 5],
    }

    def across(transfer: object) -> list[str]:
        plan = plan_of(tmp_path, {**compare, "transfer": transfer})
        assert plan.all[len(plan.all) - len(plan.transfers) :] == plan.transfers
        return [run.name.removeprefix("simulate/tiny/") for run in plan.transfers]

    assert across(True) == ["none/transfer", "single/seed=4/transfer"]
    assert across(False) == []
    assert across(["g"]) == ["g[weight=1]/seed=4/transfer", "g[weight=2]/seed=4/transfer"]
    assert across(["single"]) == ["single/seed=4/transfer"]


# -- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compare", "words"),
    [
        ({"strategys": ["none"]}, ["'compare.strategys'", "'compare.strategies'"]),
        ({}, ["compare.strategies", "compare.grid"]),
        ({"strategies": ["none", "none"]}, ["none", "two variants"]),
        ({"strategies": ["none", {"name": "peso"}]}, ["compare.strategies", "only have names", "{a: single"]),
        ({"strategies": ["single"], "seeds": [1, 1]}, ["compare.seeds", "twice"]),
        ({"strategies": ["single"], "seeds": []}, ["compare.seeds", "1"]),
        ({"strategies": {"a/b": "single"}}, ["a/b", "letters"]),
        ({"strategies": {"x": {"name": "pesso"}}}, ["x:", "'pesso'", "'peso'"]),
        (
            {"strategies": {"x": {"strategy": "single", "set": {"training.epoch": 1}}}},
            ["x:", "'training.epochs'"],
        ),
        (
            {"strategies": {"x": {"strategy": "single", "training.users": "all"}}},
            ["compare.strategies.x", "{set: {training.users: all}}"],
        ),
        ({"strategies": {"x": {"name": "peso", "wait": 2}}}, ["x:", "'strategy.wait'"]),
        ({"grid": {"g": {"name": "peso", "weight": []}}}, ["compare.grid.g", "empty"]),
        ({"grid": {"g": {"name": "peso", "weight": 2}}}, ["compare.grid.g", "no option is a list"]),
        ({"grid": {"g": {"name": "peso", "weight": [1, 1.0]}}}, ["several runs", "g[weight=1]"]),
        ({"strategies": ["single"], "tune": {"single": {"name": "peso", "weight": [1, 2]}}}, ["single"]),
        (
            {"tune": {"a": {"name": "peso", "weight": [1, 2]}, "b": {"name": "peso", "weight": [1, 2, 3]}}},
            ["more trials", "a 2", "b 3"],
        ),
        ({"strategies": ["single"], "workers": 0}, ["compare.workers", "0"]),
        ({"strategies": ["single"], "transfer": ["singel"]}, ["compare.transfer", "'singel'", "single"]),
        ({"strategies": ["single"], "hybrid_with": ["x"]}, ["compare.hybrid_with", "'x'", "single"]),
        ({"strategies": ["single"], "baselines": ["eese"]}, ["compare.baselines", "eese"]),
    ],
)
def test_a_mistake_is_named_before_anything_starts(tmp_path, compare, words):
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, compare)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "w").exists()


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    data = {"here": {}, "gone": {"format": "movietweetings", "path": "nowhere"}}
    with pytest.raises(DataError, match=r"gone.*nowhere"):
        plan_of(tmp_path, {"data": data, "strategies": ["single"]})


def test_run_and_compare_send_each_others_files_on(tmp_path, peso):
    plan_of(tmp_path, {"strategies": ["single"]})
    status, _, err = peso("run", tmp_path / "c.yaml", "-w", tmp_path / "r")
    assert status == 1
    assert "peso compare" in err
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(COMMON))
    status, _, err = peso("compare", tmp_path / "plain.yaml", "-w", tmp_path / "r")
    assert status == 1
    assert "peso run" in err
    assert not (tmp_path / "r").exists()


def test_the_workspace_of_a_single_run_is_not_taken_for_a_comparisons(tmp_path):
    plan = plan_of(tmp_path, {"strategies": ["single"]})
    Workspace.create_or_open(tmp_path / "w", load_config(COMMON))
    with pytest.raises(WorkspaceError, match="one run"):
        plan.refuse_changes()


def test_changed_options_of_a_finished_run_are_refused(tmp_path):
    do(plan_of(tmp_path, {"strategies": {"x": "none"}}).runs[0].task)
    with pytest.raises(WorkspaceError, match="strategy"):
        plan_of(tmp_path, {"strategies": {"x": "single"}}).refuse_changes()


def test_a_budget_that_is_no_time_is_refused(tmp_path, peso):
    plan_of(tmp_path, {"strategies": ["single"]})
    for budget, words in (("soon", "90m"), ("10", "90m"), ("1d", "90m"), ("", "--budget is empty")):
        status, _, err = peso("compare", tmp_path / "c.yaml", "-w", tmp_path / "w", "--budget", budget)
        assert status == 2
        assert words in err
