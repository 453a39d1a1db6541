"""A published model says what it is, answers as its stage, and comes back from hub and registry."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub, running_hub
from small_runs import trained

from peso.decoding import beam_search
from peso.errors import ExportError
from peso.model.exported import load_merged
from peso.runs import publish, retired
from peso.runs.place import NAMES
from peso.runs.recommender import Recommender
from peso.runs.rename import rename
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow

HISTORY = ["i11", "i14"]
HEADS = ["codes", "items"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recommender]:
    root = tmp_path_factory.mktemp("published")
    of_all = ("evaluation.enabled=true", "baselines=none", "training.loss_vocabulary=full")
    made = {head: trained(root / head, *of_all, f"head={head}")[0] for head in HEADS}
    made["contents"] = trained(root / "contents", *of_all, "head=items", "head.contents=true")[0]
    return {head: Recommender(workspace, device="cpu") for head, workspace in made.items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as running:
        running.use(monkeypatch, tmp_path / "hub")
        yield running


def code_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def ranked(answers: list[tuple[str, float]]) -> list[str]:
    return [item for item, _ in answers]


# -- the card -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["merged", "peft"])
@pytest.mark.parametrize("head", HEADS)
def test_the_code_in_the_card_answers_as_the_stage(
    runs: dict[str, Recommender],
    head: str,
    form: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs[head].export(tmp_path / "model", form)
    monkeypatch.chdir(tmp_path / "model")
    first, *others = code_of(Path("README.md").read_text())
    assert "peso" not in first
    assert len(others) == (form == "merged")
    names: dict[str, Any] = {}
    exec(first, names)
    wanted = ranked(runs[head].recommend(names["history"], k=10))
    if head == "codes":  # the same, but for the order of equal scores
        assert sorted(names["best"]) == sorted(wanted)
    else:  # without the codes' part of the mixture
        assert len({*names["best"]} & {*wanted}) >= 8
    assert names["best"][0] == wanted[0]
    for code in others:
        capsys.readouterr()
        exec(code, {})
        assert ranked(ast.literal_eval(capsys.readouterr().out)) == wanted


def test_the_card_has_data_stages_metrics_with_intervals_limits_and_no_path(
    runs: dict[str, Recommender], tmp_path: Path
) -> None:
    recommender = runs["items"]
    card = (recommender.export(tmp_path / "model") / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert "base_model" not in yaml.safe_load(header)
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == ["Data", "Training", "Metrics", "Limits", "Use without peso", "Use with peso", "Files"]
    for stage in recommender.workspace.stages:
        told = stage.metrics["test"]["metrics"]["ndcg@10"]
        assert f"{told['value']:.4f} ({told['low']:.4f} … {told['high']:.4f})" in text
        assert f"| {stage.number} | {recommender.workspace.stream.counts[stage.number]['events']:,} |" in text
    assert str(recommender.workspace.root.parent) not in card


def test_the_card_of_an_earlier_stage_knows_nothing_of_later_ones(
    runs: dict[str, Recommender], tmp_path: Path
) -> None:
    earlier = Recommender(runs["codes"].workspace, 0, "cpu")
    card = (earlier.export(tmp_path / "model") / "README.md").read_text()
    assert "| 0 | base |" in card
    assert "\n| 1 |" not in card
    assert "with all weights trained" in card


def test_a_known_backbone_is_named_with_its_license(runs: dict[str, Recommender]) -> None:
    from peso.runs.card import card_of

    recommender = runs["codes"]
    config = recommender.workspace.config
    known = config.model_copy(
        update={"backbone": config.backbone.model_copy(update={"name": "smollm2-135m"})}
    )
    stage = recommender.workspace.with_config(known).trained()
    header = yaml.safe_load(card_of(stage, "peft", "me/games").split("---\n")[1])
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (header["license"], header["library_name"]) == ("apache-2.0", "peft")


# -- without a workspace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [*HEADS, "contents"])
def test_an_exported_model_answers_as_its_stage(
    runs: dict[str, Recommender], head: str, tmp_path: Path
) -> None:
    model = load_merged(runs[head].export(tmp_path / "model"))
    histories = [[], HISTORY, [*runs[head].semantic_ids.item_ids[:30]]]
    for history, answer in zip(histories, beam_search(model, histories, 10), strict=True):
        own = runs[head].recommend(history, k=10, exclude_seen=False)
        assert ranked(answer) == ranked(own)
        assert [s for _, s in answer] == pytest.approx([s for _, s in own], abs=1e-4)


def test_a_history_may_have_earlier_ids_of_renamed_items(
    shop: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shop.export(tmp_path / "model")
    prompt = json.loads((folder / "prompt.json").read_text())
    assert prompt["earlier_ids"] == {HISTORY[0]: "new", "better": "new"}
    model = load_merged(folder)
    found = [*model.semantic_ids.item_ids]
    assert ("new" in found, HISTORY[0] in found) == (True, False)
    every = [[name, HISTORY[1]] for name in (HISTORY[0], "better", "new")]
    answers = beam_search(model, every, 10, exclude_seen=True)
    assert answers == [answers[2]] * 3
    assert not {item for item, _ in answers[0]} & {*HISTORY, "better", "new"}

    monkeypatch.chdir(folder)
    code = code_of(Path("README.md").read_text())[0]
    best = []
    for history in every:
        names: dict[str, Any] = {}
        exec(re.sub(r"\nhistory = .*", f"\nhistory = {history}", code, count=1), names)
        assert names["history"] == every[2]
        best.append(names["best"])
    assert best == [best[2]] * 3


def test_an_export_that_cannot_be_loaded_says_so(runs: dict[str, Recommender], tmp_path: Path) -> None:
    folder = runs["items"].export(tmp_path / "model")
    prompt = json.loads((folder / "prompt.json").read_text())
    (folder / "prompt.json").write_text(json.dumps({k: v for k, v in prompt.items() if k != "codes"}))
    with pytest.raises(ExportError, match="exported by an earlier version; export the model again"):
        load_merged(folder)
    (folder / "prompt.json").write_text(json.dumps({k: v for k, v in prompt.items() if k != "window"}))
    with pytest.raises(ExportError, match=r"is not readable \('window' is missing\); export the model again"):
        load_merged(folder)
    (folder / "prompt.json").write_text(json.dumps({**prompt, "earlier_ids": ["new"]}))
    with pytest.raises(ExportError, match=r"is not readable .*; export the model again"):
        load_merged(folder)
    (folder / "prompt.json").write_text(json.dumps(prompt))
    (folder / "transitions.safetensors").write_bytes(b"half")
    with pytest.raises(ExportError, match=r"transitions.safetensors is damaged .*\); export the model again"):
        load_merged(folder)
    (folder / "transitions.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ExportError, match=r"is not readable .*; export the model again"):
        load_merged(folder)


# -- the hub ------------------------------------------------------------------------------------------------


def test_a_pushed_model_comes_back_with_its_card(runs: dict[str, Recommender], hub: Hub, peso: Any) -> None:
    root = runs["items"].workspace.root
    status, out, err = peso("export", "-w", root, "--push-to-hub", "games")
    assert (status, out.strip()) == (0, f"{hub.endpoint}/me/games"), err
    assert hub.private["models/me/games"]
    assert 'snapshot_download("me/games")' in hub.repositories["models/me/games"]["README.md"].decode()
    status, out, err = peso("pull", "me/games")
    assert status == 0, err
    assert "backbone.name=me/games" in err
    answer = beam_search(load_merged(out.strip()), [HISTORY], 5)[0]
    assert ranked(answer) == ranked(runs["items"].recommend(HISTORY, k=5, exclude_seen=False))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give exactly one of -o, --push-to-hub and --register"),
        (["-o", "x", "--push-to-hub", "games"], "give exactly one of"),
        (["--push-to-hub", "games", "--format", "mlflow"], "--push-to-hub is for --format merged and peft"),
        (["--register", "games"], "--register needs --format mlflow, not merged"),
        (["-o", "x", "--public"], "--public needs --push-to-hub"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    runs: dict[str, Recommender], peso: Any, arguments: list[str], told: str
) -> None:
    status, _, err = peso("export", "-w", runs["codes"].workspace.root, *arguments)
    assert status != 0
    assert told in err


def test_nothing_is_uploaded_offline(
    runs: dict[str, Recommender], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE does not allow uploads"):
        publish.push_to_hub(runs["codes"], "games")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["two words", "me/games/2", "-games", "me/games..2"])
def test_a_name_that_the_hub_does_not_allow_is_refused_before_the_export(
    runs: dict[str, Recommender], hub: Hub, name: str
) -> None:
    with pytest.raises(ExportError, match=r"cannot be the name of a model .*; give OWNER/MODEL"):
        publish.push_to_hub(runs["codes"], name)
    assert hub.asked == []


# -- MLflow -------------------------------------------------------------------------------------------------


def test_without_mlflow_its_installation_is_named(
    runs: dict[str, Recommender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'peso\[mlflow\]'"):
        publish.save_mlflow(runs["codes"], tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.fixture
def shop(runs: dict[str, Recommender]) -> Iterator[Recommender]:
    """A recommender with a retired item, the best answer to the history, and a renamed one of the history."""
    workspace = runs["items"].workspace
    best = runs["items"].recommend(HISTORY, k=1, exclude_seen=False)[0][0]
    retired.retire(workspace, [best])
    rename(workspace, [(HISTORY[0], "better"), ("better", "new")])
    yield Recommender(Workspace.open(workspace.root), device="cpu")
    (workspace.root / NAMES).unlink()
    retired.restore(workspace, [best])


LOADS = """
import json, sys
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
found = model.predict(pd.DataFrame({"history": [["i11", "i14"], []]}), params={"k": 4})
print(json.dumps(found.to_dict("list")))
"""


def test_an_mlflow_model_answers_in_another_process_as_the_stage(
    shop: Recommender, tmp_path: Path, peso: Any
) -> None:
    pytest.importorskip("mlflow")
    status, _, err = peso("export", "-w", shop.workspace.root, "--format", "mlflow", "-o", tmp_path / "model")
    assert status == 0, err
    requirements = (tmp_path / "model" / "requirements.txt").read_text()
    assert "peso==" in requirements
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path / "model")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for row, history in enumerate([HISTORY, []]):
        own = shop.recommend(history, k=4)
        assert found["items"][row] == ranked(own)
        assert found["scores"][row] == pytest.approx([score for _, score in own], abs=1e-4)


def test_a_registered_model_gets_a_version_each_time(
    runs: dict[str, Recommender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    assert publish.register_mlflow(runs["codes"], "games") == "models:/games/1"
    assert publish.register_mlflow(runs["codes"], "games") == "models:/games/2"
    import pandas as pd

    found = mlflow.pyfunc.load_model("models:/games/2").predict(pd.DataFrame({"history": [HISTORY]}))
    assert found["items"][0] == ranked(runs["codes"].recommend(HISTORY))
    (run,) = mlflow.search_runs(experiment_names=["codes"], max_results=1, output_format="list")
    assert run.data.metrics["test/ndcg_at_10"] > 0


def test_a_registry_out_of_reach_is_told(
    runs: dict[str, Recommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(None)
    with pytest.raises(ExportError, match=r"MLflow at http://127\.0\.0\.1:9 did not accept the model"):
        publish.register_mlflow(runs["codes"], "games")
