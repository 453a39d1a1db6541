"""What `import peso` offers: to a caller, to help(), to a type checker, and before PyTorch is loaded."""

from __future__ import annotations

import importlib.metadata
import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import peso
from peso.errors import ExportError, UsageError
from peso.runs import pipeline
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TREE = {
    "data": {"format": "simulate", "simulate": {"users": 60, "items": 40, "stages": 2}},
    "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
    "backbone": {"name": "tiny", "layers": 1},
    "strategy": {"name": "peso", "examples": 8},
    "training": {"epochs": 1, "max_steps": 2},
    "baselines": "none",
    "evaluation": {"enabled": False},
}


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(peso.__all__) == [
        *("Fisher", "L2", "Orthogonal", "OutputKL", "PerRankKL", "PesoError", "Recommender"),
        *("ReleasedL2", "ReleasedOrthogonal", "SoftmaxKL"),
        *("StageContext", "Strategy", "Workspace", "__version__", "decoding", "load_config", "run"),
    ]
    assert set(peso.__all__) <= set(dir(peso))
    text = pydoc.plain(pydoc.render_doc(peso))
    for name in set(peso.__all__) - {"__version__", "decoding"}:
        assert getattr(peso, name).__doc__
        assert name in text
    assert callable(peso.decoding.beam_search)
    with pytest.raises(AttributeError, match="no attribute 'Workspce'"):
        _ = peso.Workspce
    namespace: dict[str, object] = {}
    exec("from peso import *", namespace)
    assert set(peso.__all__) <= set(namespace)


def test_the_version_is_that_of_the_distribution() -> None:
    assert peso.__version__ == importlib.metadata.version("peso")


def test_importing_it_loads_nothing_else() -> None:
    program = (
        "import sys, peso; print([n for n in ('numpy', 'torch', 'pydantic', 'yaml') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_type_checker_sees_the_names(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    assert (Path(peso.__file__).parent / "py.typed").is_file()
    (tmp_path / "use.py").write_text(
        "import peso\n"
        "reveal_type(peso.Recommender.load('w').recommend(['a'], k=3))\n"
        "reveal_type(peso.run('c.yaml'))\n"
        "reveal_type(peso.SoftmaxKL(weight=2.0).weight)\n"
        "peso.Recommender.load('w').export('x', format='onnx')\n"
        "peso.nothing\n"
    )
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    out, _, _ = mypy.run([*settings, str(tmp_path / "use.py")])
    revealed = re.findall(r'Revealed type is "(.*)"', out)
    assert [text.replace("builtins.", "") for text in revealed] == [
        "list[tuple[str, float]]",
        "peso.runs.workspace.Workspace",
        "float | None",
    ]
    assert 'use.py:5: error: Argument "format"' in out
    assert 'use.py:6: error: Module has no attribute "nothing"' in out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return peso.run(TREE, tmp_path_factory.mktemp("runs") / "w", overrides=["training.max_steps=3"])


def test_run_does_what_the_command_does(
    finished: Workspace, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(TREE))
    override = ("--set", "training.max_steps=3")
    status, _, err = request.getfixturevalue("peso")(
        "run", tmp_path / "shop.yaml", "-w", tmp_path / "w", *override
    )
    assert status == 0, err
    other = Workspace.open(tmp_path / "w")
    assert other.config == finished.config
    assert other.finished_stages == finished.finished_stages == [0, 1]
    for stage in (0, 1):
        digests = [w.stage(stage).manifest["files"] for w in (finished, other)]
        assert digests[0].keys() == digests[1].keys()
        assert digests[0]["vocabulary.safetensors"] == digests[1]["vocabulary.safetensors"]


def test_run_takes_a_file_a_mapping_or_a_configuration_and_resumes(
    finished: Workspace, tmp_path: Path
) -> None:
    config = peso.load_config(TREE, ["training.max_steps=3"])
    before = (finished.root / "stages" / "1" / "manifest.json").stat().st_mtime_ns
    for given in (config, {**TREE, "training": {"epochs": 1, "max_steps": 3}}):
        assert peso.run(given, finished.root).root == finished.root
    assert (finished.root / "stages" / "1" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="give a workspace"):
        peso.run(config)
    with pytest.raises(peso.PesoError, match=r"training\.epoch"):
        peso.run(TREE, tmp_path / "w", overrides=["training.epoch=3"])
    assert not (tmp_path / "w").exists()


def test_the_report_of_a_run_compares_the_newest_model_with_the_previous_one(tmp_path: Path) -> None:
    finished = peso.run(TREE, tmp_path / "w", overrides=["evaluation.enabled=true", "evaluation.k=[5]"])
    page = (finished.report_directory / "index.html").read_text(encoding="utf-8")
    summary = page.index("The model after stage 1 is ")
    assert "the model after stage 0 on the " in page[summary : page.index("</p>", summary)]
    assert page.count("<h4>After stage 0</h4>") == page.count("<h4>After stage 1</h4>") > 0
    assert list(pipeline.missing_steps(finished, 2, previous=True)) == []


def test_run_holds_the_lock(finished: Workspace) -> None:
    config = finished.config
    with Workspace.hold(finished.root, config):
        program = f"""
import json, peso
try:
    peso.run(json.loads({json.dumps(json.dumps(config.model_dump(mode="json")))}), {str(finished.root)!r})
except peso.PesoError as error:
    print(type(error).__name__, error)
"""
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("WorkspaceError")
    assert "writ" in found.stdout


def test_export_writes_what_others_load(finished: Workspace, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recommender = peso.Recommender.load(finished.root)
    assert recommender.export(tmp_path / "merged") == tmp_path / "merged"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size > 0
    recommender.export(str(tmp_path / "peft"), format="peft")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "backbone")
    PeftModel.from_pretrained(backbone, tmp_path / "peft" / "adapter")
    recommender.export(tmp_path / "ids.json", "index")
    assert len(json.loads((tmp_path / "ids.json").read_text())) == 40
    with pytest.raises(ExportError):
        recommender.export(tmp_path / "merged")
    with pytest.raises(ExportError):
        recommender.export(finished.root / "stages" / "x")
