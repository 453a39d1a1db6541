"""The commands as a user calls them: what they print, what they write, how they fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from peso.cli import app as cli
from peso.events.stream import Stream
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        "data: {format: simulate, simulate: {users: 80, items: 40, stages: 3}}\n"
        "backbone: {name: tiny, layers: 1}\nstrategy: {name: peso, examples: 8}\n"
        "training: {epochs: 1, max_steps: 4, learning_rate: 3e-3}\n"
    )
    return path


@pytest.fixture(scope="module")
def workspace(config_file, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "w"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["peso", "run", str(config_file), "-w", str(root)])
        cli.app(standalone_mode=False)
    return root


COMMANDS = ("demo", "pull", "run", "ingest", "tokenize", "train", "update", "evaluate", "report")
COMMANDS += ("recommend", "diagnose", "export")


def test_help_lists_every_command_and_each_has_an_example(peso):
    status, out, _ = peso("--help")
    assert status == 0
    for command in COMMANDS:
        assert f" {command} " in out
        status, help_text, _ = peso(command, "--help")
        assert status == 0
        assert f"Example: peso {command}" in " ".join(help_text.split())


def test_ingest_prints_the_published_counts_and_writes_them_down(peso, release_dir, tmp_path):
    root = tmp_path / "games"
    status, out, _ = peso("ingest", "--format", "peso-release", release_dir, "-w", root)
    assert status == 0
    for count in (
        "12,447",
        "66,379",
        "1,035",
        "5,421",
        "1,091",
        "5,310",
        "1,949",
        "10,748",
        "1,791",
        "9,689",
    ):
        assert count in out
    manifest = json.loads((root / "stream" / "manifest.json").read_text())
    assert [s["training_targets"] for s in manifest["stages"]] == [66379, 5421, 5310, 10748, 9689]
    status, out, _ = peso("tokenize", "-w", root)
    assert status == 0
    assert "25,707" in out


def test_a_run_ends_with_a_table_and_a_report(peso, workspace, config_file):
    status, out, _ = peso("run", config_file, "-w", workspace)  # all is done: only the table and the report
    assert status == 0
    assert "Hit@10" in out
    assert "popularity" in out
    assert (workspace / "report" / "index.html").is_file()


def test_a_dry_run_says_what_is_left_and_writes_nothing(peso, config_file, tmp_path):
    status, out, _ = peso("run", config_file, "-w", tmp_path / "w", "--dry-run")
    assert status == 0
    assert "learn stage 2" in out
    assert "minutes" in out
    assert not (tmp_path / "w").exists()


def test_what_comes_after_a_dry_run_has_its_settings(peso, config_file, tmp_path):
    given = ["--set", "training.max_steps=3", "--set", "seed=2"]
    status, _, err = peso("run", config_file, "-w", tmp_path / "w", "--dry-run", *given)
    assert status == 0
    assert f"next: peso run {config_file} -w {tmp_path / 'w'} {' '.join(given)}" in err


def test_single_steps_make_the_same_run(peso, config_file, workspace, tmp_path):
    root = tmp_path / "w"
    assert peso("run", config_file, "-w", root, "--set", "data.format=simulate", "--dry-run")[0] == 0
    assert peso("ingest", "--format", "simulate", "-w", root, *_flags(config_file))[0] == 0
    for command in ("tokenize", "train", "update", "update"):
        status, _, err = peso(command, "-w", root)
        assert status == 0, err
    for stage in range(3):
        name = f"stages/{stage}/vocabulary.safetensors"
        assert (root / name).read_bytes() == (workspace / name).read_bytes()
    status, out, _ = peso("update", "-w", root)
    assert status == 0
    assert "all 3 stages are trained; there is nothing to do" in out


def _flags(config_file: Path) -> list[str]:
    import yaml

    tree = yaml.safe_load(config_file.read_text())
    flat = {"backbone.name": "tiny", "backbone.layers": 1, "strategy.examples": 8}
    flat |= {f"data.simulate.{k}": v for k, v in tree["data"]["simulate"].items()}
    flat |= {f"training.{k}": v for k, v in tree["training"].items()}
    return [text for key, value in flat.items() for text in ("--set", f"{key}={value}")]


def test_evaluate_tests_any_stage_on_any_cases(peso, workspace):
    status, out, _ = peso("evaluate", "-w", workspace, "--stage", "0", "--on", "2", "--json")
    assert status == 0
    metrics = json.loads(out)
    assert (metrics["stage"], metrics["on"]) == (0, 2)
    ranking = {"hit@5", "hit@10", "ndcg@5", "ndcg@10", "mrr@10"}
    levels = {name for name in metrics["metrics"] if name.startswith("log_probability_level_")}
    assert set(metrics["metrics"]) == ranking | {"log_probability"} | levels
    whole = metrics["metrics"]["log_probability"]["value"]
    assert sum(metrics["metrics"][name]["value"] for name in levels) == pytest.approx(whole)


def test_reports_of_several_runs_stand_side_by_side(peso, workspace, config_file, tmp_path, request):
    other = tmp_path / "none"
    assert peso("run", config_file, "-w", other, "--set", "strategy=none", "--base", workspace)[0] == 0
    request.getfixturevalue("drawn")
    status, out, _ = peso("report", "-w", workspace, "-w", other, "-o", tmp_path / "report")
    assert status == 0
    assert "none" in out
    page = (tmp_path / "report" / "index.html").read_text()
    assert "popularity" in page
    assert {path.suffix for path in (tmp_path / "report").rglob("*")} >= {
        ".html",
        ".csv",
        ".md",
        ".tex",
        ".svg",
    }


def test_recommend_prints_titles_scores_and_ids(peso, workspace):
    user = Stream.open(workspace / "stream").stage(0).users[0]
    status, out, _ = peso("recommend", "-w", workspace, "--user", user, "-k", "3", "--json")
    assert status == 0
    answer = json.loads(out)
    assert len(answer["recommendations"]) == 3
    best = answer["recommendations"][0]
    assert best["title"]
    assert best["semantic_id"][0].startswith("<a_")
    history = ",".join(answer["history"])
    status, out, _ = peso("recommend", "-w", workspace, "--history", history, "-k", "3")
    assert status == 0
    assert best["item"] in out


def test_recommend_answers_for_everybody(peso, workspace, tmp_path):
    file = tmp_path / "all.parquet"
    status, out, _ = peso("recommend", "-w", workspace, "--all", "-o", file, "-k", "2", "--json")
    assert status == 0
    told = json.loads(out)
    newest = Workspace.open(workspace).finished_stages[-1]
    assert told == {"stage": newest, "users": told["users"], "file": str(file), "exclude_seen": False}
    assert file.is_file()


def test_export_writes_a_directory_for_others(peso, workspace, tmp_path):
    status, _, err = peso("export", "-w", workspace, "--format", "merged", "-o", tmp_path / "merged")
    assert status == 0, err
    assert (tmp_path / "merged" / "config.json").is_file()
    status, _, err = peso("export", "-w", workspace, "-o", tmp_path / "merged")
    assert status == 1
    assert "merged" in err


@pytest.mark.parametrize(
    ("status", "arguments", "words"),
    [
        (1, ["run", "absent.yaml"], ["no configuration at absent.yaml"]),
        (1, ["update", "-w", "nowhere"], ["nowhere is not a workspace"]),
        (2, ["recommend", "-w", "nowhere", "--user", "x", "--history", "y"], ["exactly one of"]),
        (2, ["recommend", "-w", "nowhere", "--all"], ["-o"]),
        (1, ["pull", "gpt-9"], ["gpt-9", "smollm2-135m"]),
        (2, ["ingest"], ["-w"]),
        (1, ["ingest", "--format", "peso-release", "nowhere", "-w", "w"], ["nowhere"]),
    ],
)
def test_a_mistake_is_one_line_and_its_exit_status(peso, status, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _, err = peso(*arguments)
    assert found == status
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []  # and it leaves nothing behind


def test_an_interruption_says_how_to_go_on(peso, monkeypatch, config_file, tmp_path):
    from peso.runs import pipeline

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupt)
    status, _, err = peso("run", config_file, "-w", tmp_path / "w")
    assert status == 130
    assert "run the same command again to continue" in err


def test_a_data_set_is_recognized_named_and_can_be_overridden(peso, tmp_path):
    rows = [f"u{k % 3}\ti{k % 4}\t{1_600_000_000 + k}\n" for k in range(36)]
    data = tmp_path / "shop"
    data.mkdir()
    (data / "shop.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "".join(rows))
    status, _, err = peso("ingest", data, "--set", "data.stages=2", "-w", tmp_path / "a")
    assert status == 0
    assert "format: recbole, recognized from the files of" in err
    assert "--format FORMAT overrides it" in err
    named = [
        f"data.columns.{key}={name}"
        for key, name in (("user", "user_id:token"), ("item", "item_id:token"), ("time", "timestamp:float"))
    ]
    own = [part for text in [*named, "data.separator=\\t", "data.stages=2"] for part in ("--set", text)]
    status, _, err = peso("ingest", data, "--format", "csv", *own, "-w", tmp_path / "b")
    assert (status, "recognized from" in err) == (0, False)
    status, out, _ = peso("ingest", data, "--set", "data.stages=2", "-w", tmp_path / "c", "--json")
    assert json.loads(out)["source"]["format"] == "recbole"
