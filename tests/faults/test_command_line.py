"""What the command line does with mistakes, failures and odd text, whatever the command."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
import zlib
from importlib.metadata import version
from pathlib import Path

import duckdb
import pytest
import safetensors
import torch
import yaml

from peso.adapters.lora import add_adapter
from peso.adapters.proximal.term import TERMS
from peso.cli import app
from peso.config.baselines import BASELINES
from peso.config.strategy import STRATEGIES
from peso.model.backbone import small_llama
from peso.runs.compare.schedule import Schedule
from peso.runs.place import HISTORIES
from peso.runtime import assets
from peso.runtime.failures import sentence

SLOW = ("torch", "transformers", "peft", "accelerate", "scipy", "sklearn", "matplotlib", "faiss")


REFUSED = [
    ["frob"],
    ["run", "--nope"],
    ["run", "absent.yaml"],
    ["compare", "absent.yaml"],
    ["ingest", "absent.csv", "-w", "w"],
    ["pull", "gpt-9"],
    *(
        [*command.split(), "-w", "nowhere"]
        for command in (
            *("tokenize", "train", "update", "evaluate", "report", "diagnose", "baseline ease", "serve"),
            *("status", "rollback", "promote --stage 0", "undo --yes"),
        )
    ),
    ["recommend", "-w", "nowhere", "--user", "u"],
    ["export", "-w", "nowhere", "-o", "x"],
]

REFUSED_THERE = [  # in a workspace whose stages are trained
    ["train"],
    ["ingest"],
    ["tokenize"],
    ["evaluate", "--stage", "9"],
    ["evaluate", "--on", "9"],
    ["recommend", "--user", "nobody"],
    ["recommend", "--history", "ghost"],
    ["export", "-o", "w"],
    ["baseline", "nope"],
    ["train", "--set", "training.epochs=7"],
    ["diagnose", "--directions", "3", "--stage", "9"],
    ["diagnose", "--directions", "3", "--plot", "x.pdf"],
    ["diagnose", "--directions", "3", "--stage", "0"],
    ["diagnose", "--directions", "3", "--free", "nowhere"],
    ["export", "-o", "c.yaml/x"],
    ["export", "-o", "/proc/x"],
    ["export", "-o", "c.yaml/x", "--format", "index"],
    ["report", "-o", "c.yaml"],
    ["report", "-o", "/proc/x"],
    ["recommend", "--history", "i1", "-k", "1000"],
    ["recommend", "--all", "-o", "/proc/x.csv"],
    ["recommend", "--all", "-o", "x.xls"],
    ["update", "--set", "training.later.batch_size=0"],
    ["evaluate", "--set", "decoding.beams=1000000"],
    ["baseline", "ease", "--set", "baselines=[frob]"],
    ["ingest", "--items", "absent.csv"],
    ["ingest", "--items", "items.csv", "--set", "data.items.columns.title=nope"],
    ["ingest", "log.csv", "--append", "--set", "data.columns.user=nope"],
    ["serve", "--stage", "9"],
    ["serve", "--port", "abc"],
    ["promote", "--stage", "9"],
    ["rollback"],
    ["update", "--alert", "no-such-program"],
    ["export", "--stage", "9", "-o", "x"],
    ["recommend", "--all", "-o", "x.csv", "--stage", "9"],
]

REFUSED_FOR = [  # of `peso run c.yaml -w x`
    ["--base", "nowhere"],
    ["--base", "w", "--set", "seed=3"],
    ["--set", "backbone=nope"],
    ["--set", "adapter.targets=[nope]"],
    ["--set", "prompt.window=100000"],
    ["--set", "training.device=nope"],
    ["--set", "strategy={name: custom, module: no.such}"],
    ["--set", "strategy={name: custom, module: json.nothing}"],
    ["--set", "strategy={name: custom, module: os.getcwd}"],
    ["--set", "strategy={proximal: json.nothing}"],
    ["--dry-run", "-w", "c.yaml"],
    ["--set", "strategy={proximal: nope}"],
    *(
        ["--set", f"{key}={value}", "--set", "backbone=nope"]
        for key, values in {
            "strategy": [*STRATEGIES.built_in(), *(f"{{proximal: {term}}}" for term in TERMS.built_in())],
            "baselines": [*BASELINES.built_in(), "{name: hybrid, two_tower: {width: 8}}"],
        }.items()
        for value in values
    ),
]

REFUSED_LOG = [  # of a run, or a comparison, on a log
    "data.columns.user=nope",
    "data.items.columns.title=nope",
    "data.path=log.parquet",
    "backbone=nobody/nothing",
    "items.encoder=nobody/nothing",
    "items.encoder=all-minilm-l6-v2",
    *([] if torch.cuda.is_available() else ["training.device=cuda", "training.device=cuda:1"]),
    *([] if sys.platform == "darwin" else ["training.device=mps"]),
]


def a_log(folder):
    """A log with a product table, a configuration of a run and one of a comparison."""
    lines = [f"u{n % 9},i{n % 7},{1_700_000_000 + n}" for n in range(300)]
    (folder / "log.csv").write_text("\n".join(["user,item,time", *lines]) + "\n")
    (folder / "items.csv").write_text("item,title\n" + "".join(f"i{n},Cup {n}\n" for n in range(7)))
    columns = {"item": "item", "title": "title"}
    data = {"format": "csv", "path": "log.csv", "items": {"path": "items.csv", "columns": columns}}
    tree = {"data": data, "backbone": "tiny", "evaluation": {"k": [5]}}
    (folder / "log.yaml").write_text(yaml.safe_dump(tree))
    compare = {"strategies": ["single", "none"], "workers": 1, "baselines": []}
    (folder / "compare.yaml").write_text(yaml.safe_dump({**tree, "compare": compare}))


@pytest.mark.slow
def test_a_refused_call_loads_no_slow_library(peso, tmp_path):
    """Loading PyTorch and its kin costs seconds; modules are counted, since seconds depend on the machine. So
    it is whatever part of peso a configuration names."""
    (tmp_path / "c.yaml").write_text(
        "data: {format: simulate, simulate: {users: 40, items: 20, stages: 2}}\n"
        "backbone: tiny\ntraining: {epochs: 1, max_steps: 1}\nevaluation: {enabled: false}\nstrategy: none\n"
    )
    assert peso("run", tmp_path / "c.yaml", "-w", tmp_path / "w")[0] == 0
    refused = [*REFUSED, *(["run", "c.yaml", "-w", "x", *options] for options in REFUSED_FOR)]
    refused += [[*call, "-w", "w"] for call in REFUSED_THERE]
    a_log(tmp_path)
    (tmp_path / "taken" / "results.parquet").mkdir(parents=True)
    for call in (["run", "log.yaml"], ["compare", "compare.yaml"]):
        refused += [[*call, "-w", "x", "--set", wrong] for wrong in REFUSED_LOG]
        refused += [[*call, "-w", "x", "--dry-run", "--set", "data.columns.user=nope"]]
    refused += [["compare", "compare.yaml", "-w", "x", "-o", "taken"]]
    before = set(tmp_path.rglob("*"))
    program = f"""
import json, sys
from peso.cli import app
loaded = {{}}
for arguments in {[["--help"], *refused]!r}:
    sys.argv = ["peso", *arguments]
    try:
        app.main()
    except SystemExit as stop:
        loaded[" ".join(arguments)] = [stop.code, [name for name in {SLOW!r} if name in sys.modules]]
print(json.dumps(loaded), file=sys.__stderr__)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PESO_CACHE": str(tmp_path / "no cache")}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    calls = json.loads(found.stderr.splitlines()[-1])
    assert len(calls) == len(refused) + 1
    assert set(tmp_path.rglob("*")) - {tmp_path / "w" / HISTORIES} == before  # an index, made by reading
    for call, (status, loaded) in calls.items():
        assert (status == 0) == (call == "--help"), call
        assert loaded == [], call


def test_version_and_exit_statuses_are_told(peso):
    status, out, _ = peso("--version")
    assert (status, out.strip()) == (0, f"peso {version('peso')}")
    _, out, _ = peso("--help")
    assert "Exit status: 0 success, 1 failure, 2 incorrect use" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize(
    "call",
    [
        *("frob", "run", "run --nope", "train --set", "diagnose -k", "compare"),
        *("diagnose -w w --examples 30", "diagnose -w w --at end", "report -w w -w ./w"),
    ],
)
def test_wrong_use_is_exit_status_2(peso, call):
    status, _, err = peso(*call.split())
    assert status == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("ingest | -w w", "SOURCE"),
        ("ingest log.csv -w |", "-w/--workspace"),
        ("ingest --items | -w w", "--items"),
        ("run | -w w", "CONFIG"),
        ("run c.yaml -w |", "-w/--workspace"),
        ("run c.yaml --base | -w w", "--base"),
        ("report -w w -w |", "-w/--workspace"),
        ("report -w w -o |", "-o/--output"),
        ("recommend --all -o | -w w", "-o/--output"),
        ("compare c.yaml --workspace=", "-w/--workspace"),
    ],
)
def test_an_empty_argument_is_not_the_current_directory(peso, tmp_path, monkeypatch, call, name):
    """As a shell gives it for a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text("user,item,time\n")
    (tmp_path / "c.yaml").write_text("data: {format: simulate}\n")
    before = set(tmp_path.iterdir())
    status, _, err = peso(*(word.replace("|", "") for word in call.split()))
    assert (status, err) == (2, f"error: {name} is empty; give a value, or omit it\n")
    assert set(tmp_path.iterdir()) == before


class ArrowInvalid(ValueError):
    """Recognized by its name, as the libraries' own classes are."""

    __module__, __qualname__ = "pyarrow.lib", "ArrowException"


FAILURES = [
    OSError("Couldn't deserialize thrift"),
    gzip.BadGzipFile("Not a gzipped file"),
    zipfile.BadZipFile("File is not a zip file"),
    zlib.error("Error -3"),
    EOFError("Compressed file ended before the end-of-stream marker was reached"),
    yaml.scanner.ScannerError(problem="found a tab"),
    json.JSONDecodeError("Expecting value", "x", 0),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    UnicodeEncodeError("utf-8", "\udc80", 0, 1, "surrogates not allowed"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …"),
    RecursionError("maximum recursion depth exceeded"),
    ModuleNotFoundError("No module named 'faiss'", name="faiss"),
    ArrowInvalid("Parquet magic bytes not found"),
    duckdb.IOException("IO Error: Could not read"),
    duckdb.OutOfMemoryException("Out of Memory Error: failed to pin block"),
    safetensors.SafetensorError("Error while deserializing header"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    ValueError("embedded null byte"),
]  # fmt: skip


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_what_a_library_raises_is_one_sentence_with_a_cure(peso, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(assets, "pull", fail)
    status, _, err = peso("pull", "ml-100k")
    assert status == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "; " in err  # cause; cure
    assert "defect" not in err


def test_every_error_of_the_system_names_the_path_and_a_cure():
    for number in sorted(errno.errorcode):
        told = sentence(OSError(number, os.strerror(number), "/some/where"))
        assert told, number
        assert "/some/where" in told, told
        assert len(told.split("; ")[-1]) > 10, told


def test_a_lost_process_is_no_bug():
    closed = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [::1]:4512"
    for error in (RuntimeError(closed), torch.distributed.DistBackendError("NCCL error in …")):
        told = sentence(error)
        assert told.startswith("another process that trains with this one has ended")
        assert "continues from the newest checkpoint" in told


def test_an_unexpected_error_says_how_to_report_it_and_debug_shows_the_traceback(peso, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyError("codebook")

    monkeypatch.setenv("PESO_DEBUG", "0")
    monkeypatch.setattr(assets, "pull", fail)
    status, _, err = peso("pull", "ml-100k")
    assert status == 1
    assert "Traceback" not in err
    for part in ("KeyError: 'codebook'", f"peso {version('peso')}", "command: peso pull ml-100k", "report"):
        assert part in err
    status, _, err = peso("--debug", "pull", "ml-100k")
    assert status == 1
    assert "Traceback" in err


def test_a_library_error_shows_its_traceback_on_demand(peso, monkeypatch):
    monkeypatch.setenv("PESO_DEBUG", "1")
    assert "Traceback" in peso("run", "absent.yaml")[2]


HELP = f"{sys.executable} -m peso --help"


@pytest.mark.parametrize("closing", ["| head -1", ">&- 2>&-"])
def test_a_closed_output_is_no_traceback(closing, tmp_path):
    found = subprocess.run(f"{HELP} {closing}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0
    assert found.stderr == ""


def test_a_full_disk_behind_stdout_is_an_error(tmp_path):
    found = subprocess.run(f"{HELP} > /dev/full", shell=True, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.startswith("error: no space left")
    assert found.stderr.count("\n") == 1


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", text) for text in ("abc", "-1", "0", "1.5", "٣", "9" * 5000)]
    + [("RANK", text) for text in ("", "abc", "2", "-1")]
    + [("LOCAL_RANK", "x"), ("MASTER_PORT", "http"), ("MASTER_PORT", "70000")],
)  # fmt: skip
def test_nonsense_of_a_launcher_is_an_error(peso, monkeypatch, name, value):
    for variable, text in LAUNCHED.items():
        monkeypatch.setenv(variable, text)
    monkeypatch.setenv(name, value)
    status, _, err = peso("run", "absent.yaml")
    assert status == 1
    assert err.startswith(f"error: the environment variable {name} is ")
    assert "torchrun" in err


@pytest.mark.slow
@pytest.mark.parametrize("text", ["abc", "0", "-3", "1.5", "9" * 30, "٣", "2;3"])
def test_nonsense_for_the_number_of_threads_is_an_error(peso, monkeypatch, text):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    status, _, err = peso("run", "absent.yaml")
    assert status == 1
    assert err.startswith("error: the environment variable OMP_NUM_THREADS is ")
    for text in ("1", "16", " 4,2 ", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert "no configuration at absent.yaml" in peso("run", "absent.yaml")[2]


WORK = """
import sys, time
from pathlib import Path
from peso.cli import app
from peso.runtime import assets, processes
from peso.runtime.files import write_aside

def pull(*_, **__):
    with write_aside(Path("whole")) as aside:
        aside.write_text("half")
        print("ready", flush=True)
        {work}

assets.pull = pull
processes.NATIVE_SECONDS = 0.2
sys.argv = ["peso", "pull", "x"]
app.main()
"""
IN_PYTHON = "time.sleep(600)"
IN_NATIVE_CODE = "import ctypes; ctypes.CDLL(None).sleep(60)"  # Python cannot interrupt it


@pytest.mark.parametrize("work", [IN_PYTHON, IN_NATIVE_CODE])
def test_sigterm_ends_with_a_message_and_its_own_exit_status(work, tmp_path):
    call = [sys.executable, "-c", WORK.format(work=work)]
    process = subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143
    assert err.strip() == "terminated by SIGTERM; run the same command again to continue"
    if work == IN_PYTHON:
        assert list(tmp_path.iterdir()) == []  # nothing half-written


IN_A_QUERY = """signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            signal.raise_signal({number})
        except BaseException:  # as DuckDB does where a signal arrives during a query
            raise RuntimeError("Query interrupted") from None"""


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated by SIGTERM")],
)
def test_an_interruption_of_a_query_is_not_a_defect(number, status, message, tmp_path):
    program = "import signal" + WORK.format(work=IN_A_QUERY.format(number=int(number))).replace("0.2", "60")
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == status
    assert found.stderr.strip() == f"{message}; run the same command again to continue"
    assert list(tmp_path.iterdir()) == []  # nothing half-written


LOADING = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Interrupting())
from peso.__main__ import main
sys.argv = ["peso", "pull", "frob"]
main()
"""


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated by SIGTERM")],
)
@pytest.mark.parametrize("module", ["typer", "peso.cli.app", "peso.runtime.assets"])
def test_an_interruption_while_the_command_is_loaded_is_one_too(module, number, status, message):
    program = LOADING.format(module=module, number=int(number))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == status
    assert found.stderr.strip() == f"{message}; run the same command again to continue"


def test_an_interruption_outside_of_a_command_is_one_too(peso, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "app", interrupted)
    status, _, err = peso("pull", "x")
    assert (status, err.strip()) == (130, "interrupted; run the same command again to continue")


def test_an_interruption_after_the_work_changes_nothing():
    """Python takes a moment to end, longer where PyTorch was loaded."""
    program = (
        "import atexit, os, signal, sys; from peso.__main__ import main\n"
        "atexit.register(lambda: [os.kill(os.getpid(), n) for n in (signal.SIGINT, signal.SIGTERM)])\n"
        "sys.argv = ['peso', '--version']; main()"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_sigterm_ends_the_processes_of_a_comparison_too(peso, monkeypatch, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "data: {format: simulate, simulate: {users: 60, items: 30, stages: 2}}\n"
        "backbone: tiny\ncompare: {strategies: [single, peso], workers: 1}\n"
    )
    begin, started = Schedule._start, []

    def start_and_terminate(schedule: Schedule, task: object) -> None:
        begin(schedule, task)
        started.extend(working.handle.process for working in schedule._working.values())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Schedule, "_start", start_and_terminate)
    status, _, err = peso("compare", tmp_path / "c.yaml", "-w", tmp_path / "w")
    assert status == 143
    assert err.strip().endswith("terminated by SIGTERM; run the same command again to continue")
    assert [process.poll() is not None for process in started] == [True]


def test_a_whole_alpha_is_written_as_peft_writes_it():
    for alpha in (16, 16.0):
        lora = add_adapter(small_llama(32, 2, 0), 4, alpha, 0.0, ["q_proj"], seed=0)
        assert json.dumps(lora.peft_config["default"].lora_alpha) == "16"


def test_commands_print_by_say_alone():
    for path in sorted(Path(app.__file__).parent.glob("*.py")):
        if path.stem not in ("app", "display"):
            assert not re.search(r"(?<![\w.])print\(", path.read_text()), path


def test_files_that_help_names_exist():
    root = Path(__file__).resolve().parents[2]
    named = set()
    for path in sorted(Path(app.__file__).parent.glob("*.py")):
        named |= set(re.findall(r"\b(?:examples|docs)/[\w/-]+\.\w+", path.read_text()))
    assert len(named) > 3
    assert [name for name in sorted(named) if not (root / name).is_file()] == []
