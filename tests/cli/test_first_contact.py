"""What a newcomer meets: `peso` alone, `peso init`, `peso doctor`, completion, the next step."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peso.config import baseline_label, load_config
from peso.events.stream import Stream

START = datetime(2024, 3, 4, 8, 30, tzinfo=UTC)
ITEMS = [f"i{number}" for number in range(12)]
USERS = [f"u{number}" for number in range(8)]
EVENTS = [
    (USERS[step % 8], ITEMS[(step * 5 + step % 7) % 12], START + timedelta(hours=step)) for step in range(400)
]


def write_csv(path: Path, rows: list[tuple], header: tuple[str, ...] | None, separator: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([header, *rows] if header else rows)
    return path


def products(folder: Path) -> Path:
    rows = [(item, f"Cup, size {number}", "Kitchen > Cups", "white") for number, item in enumerate(ITEMS)]
    return write_csv(folder / "products.csv", rows, ("sku", "product name", "category", "description"))


def log_with_dates(folder: Path, pattern: str) -> Path:
    rows = [(user, item, when.strftime(pattern)) for user, item, when in EVENTS]
    return write_csv(folder / "log.csv", rows, ("customerId", "articleId", "ordered"))


def shop(folder: Path) -> Path:
    rows = [(n, u, "x", i, t.isoformat(" "), n % 5) for n, (u, i, t) in enumerate(EVENTS)]
    header = ("event_id", "user_id", "user_city", "parent_asin", "created_at", "stars")
    return write_csv(folder / "shop.csv", rows, header)


def semicolons(folder: Path) -> Path:
    rows = [(u, i, int(t.timestamp()), "1,50", "view" if u < "u4" else "buy") for u, i, t in EVENTS]
    return write_csv(folder / "log.csv", rows, ("visitorid", "itemid", "timestamp", "price", "event"), ";")


def without_header(folder: Path) -> Path:
    rows = [(u[1:], i, 3, int(t.timestamp())) for u, i, t in EVENTS]
    return write_csv(folder / "log.tsv", rows, None, "\t")


def json_lines(folder: Path) -> Path:
    path = folder / "log.jsonl"
    rows = [{"reviewerID": u, "asin": i, "unixReviewTime": int(t.timestamp())} for u, i, t in EVENTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder: Path) -> Path:
    users, items, times = (pa.array(column) for column in zip(*EVENTS, strict=True))
    pq.write_table(pa.table({"member": users, "film": items, "seen": times}), folder / "log.parquet")
    return folder / "log.parquet"


LOGS = {
    shop: {"user": "user_id", "item": "parent_asin", "time": "created_at", "rating": "stars"},
    semicolons: {"user": "visitorid", "item": "itemid", "time": "timestamp", "rating": None},
    without_header: {"user": 1, "item": 2, "time": 4, "rating": None},
    json_lines: {"user": "reviewerID", "item": "asin", "time": "unixReviewTime", "rating": None},
    parquet: {"user": "member", "item": "film", "time": "seen", "rating": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("make", LOGS, ids=lambda make: make.__name__)
def test_init_finds_the_columns_and_what_it_writes_can_be_ingested(peso, tmp_path, make):
    log, table, written = make(tmp_path), products(tmp_path), tmp_path / "log.yaml"
    status, out, err = peso("init", log, "--items", table, "-o", written)
    assert status == 0, err
    config = load_config(written)
    assert config.data.columns.model_dump() == LOGS[make]
    found = config.data.items.columns
    assert (found.item, found.title, found.category) == ("sku", "product name", "category")
    assert found.text == ["description"]
    named = [baseline_label(options) for options in config.baselines]
    assert named == ["popularity last=1", "item-knn", "ease", "hybrid partners=item-knn"]  # the log is small
    assert f"next: peso run {written} --dry-run" in err
    status, _, err = peso("ingest", written, "-w", tmp_path / "w")
    assert status == 0, err
    stream = Stream.open(tmp_path / "w" / "stream")
    assert sum(stage["events"] for stage in stream.manifest["stages"]) == len(EVENTS)
    assert f"{len(EVENTS):,} events, {len(ITEMS)} items, {stream.stages} stages" in out


@pytest.mark.parametrize("pattern", ["%d.%m.%Y %H:%M", "%d/%m/%Y", "%Y%m%d"])
def test_init_recognizes_dates_that_are_not_iso(peso, tmp_path, pattern):
    log, written = log_with_dates(tmp_path, pattern), tmp_path / "log.yaml"
    status, _, err = peso("init", log, "--items", products(tmp_path), "-o", written)
    assert status == 0, err
    assert load_config(written).data.time_format == pattern


def test_init_does_not_guess_which_of_two_numbers_is_the_month(peso, tmp_path):
    rows = [
        (user, item, when.replace(day=1 + when.day % 9).strftime("%d/%m/%Y")) for user, item, when in EVENTS
    ]
    log = write_csv(tmp_path / "log.csv", rows, ("user", "item", "date"))
    arguments = ("init", log, "--items", products(tmp_path), "-o", tmp_path / "log.yaml")
    status, _, err = peso(*arguments)
    assert status == 1
    assert "%d/%m/%Y or %m/%d/%Y" in err
    assert not (tmp_path / "log.yaml").exists()
    status, _, err = peso(*arguments, "--set", "data.time_format=%m/%d/%Y")
    assert status == 0, err
    assert load_config(tmp_path / "log.yaml").data.time_format == "%m/%d/%Y"


def test_init_takes_columns_and_settings_that_it_is_given(peso, tmp_path):
    rows = [(user, item, when.isoformat(), f"Cup {item}") for user, item, when in EVENTS]
    log = write_csv(tmp_path / "log.csv", rows, ("who", "what", "moment", "what it is"))
    written = tmp_path / "log.yaml"
    status, _, err = peso("init", log, "-o", written)
    assert status == 1
    assert "which column is the user? Name it with --user" in err
    assert f"who ({EVENTS[0][0]})" in err
    columns = ("--user", "who", "--item", "what", "--title", "what it is")
    given = ("data.stages=2", "evaluation.k=[3]", "strategy.strength=2", "backbone.width=128", "baselines=[]")
    settings = [word for text in given for word in ("--set", text)]
    status, _, err = peso("init", log, *columns, *settings, "-o", written)
    assert status == 0, err
    config = load_config(written)
    assert config.data.columns.time == "moment"
    assert config.data.items.columns.title == "what it is"
    assert (len(config.data.stages.fractions), config.evaluation.k) == (2, [3])
    assert (config.strategy.strength, config.baselines) == (2, [])
    assert (config.backbone.width, config.training.learning_rate) == (128, pytest.approx(2e-3))


def test_init_guesses_that_spaces_separate_only_if_nothing_else_does(peso, tmp_path):
    log, written = tmp_path / "log.txt", tmp_path / "log.yaml"
    log.write_text("user item time\n" + "".join(f"{u} {i} {int(t.timestamp())}\n" for u, i, t in EVENTS))
    status, _, err = peso("init", log, "--items", products(tmp_path), "-o", written)
    assert status == 0, err
    assert load_config(written).data.separator == " "
    written.unlink()
    rows = [(user, item, when.isoformat(" ")) for user, item, when in EVENTS]
    write_csv(log, rows, ("user", "item", "time"))
    status, _, err = peso("init", log, "--items", products(tmp_path), "-o", written)
    assert status == 0, err
    assert load_config(written).data.separator is None  # the usual one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user,item,time\nu1,caf\u00e9,1700000000\n".encode("latin-1"), "line 2 is not UTF-8 .*latin-1"),
        ("user,item,time\nu1,i1,1700000000\n".encode("utf-16"), "--set data.encoding="),
        (b"user,item,time\nu1,i1\n", "line 2 has 2 columns instead of 3"),
        (b"user,user,item,when\nu1,u2,i1,soon\n", r"columns are user \(u2\); item \(i1\); when \(soon\)"),
    ],
)
def test_init_says_what_is_wrong_with_a_log(peso, tmp_path, content, message):
    log = tmp_path / "log.csv"
    log.write_bytes(content)
    status, _, err = peso("init", log, "--items", products(tmp_path))
    assert status == 1
    assert re.search(message, err), err


def test_init_names_the_option_of_a_missing_file(peso, tmp_path):
    status, _, err = peso("init", tmp_path / "none.csv")
    assert (status, "check the path of the log" in err) == (1, True)
    status, _, err = peso("init", shop(tmp_path), "--items", tmp_path / "none.csv")
    assert (status, "none.csv; check --items" in err) == (1, True)


@pytest.mark.parametrize("backbone", ["smollm2-135m", "auto", "scratch"])
def test_what_init_writes_for_any_backbone_can_be_read(peso, tmp_path, backbone):
    written = tmp_path / "log.yaml"
    log, table = shop(tmp_path), products(tmp_path)
    status, _, err = peso("init", log, "--items", table, "-o", written, "--set", f"backbone={backbone}")
    assert status == 0, err
    config = load_config(written)
    assert config.backbone.name == backbone
    sized = backbone == "scratch"  # `auto` is chosen when the log is read
    assert (config.head.arrivals, config.head.contents) == (sized, sized)


def test_init_cuts_a_small_log_into_fewer_stages(peso, tmp_path):
    few = [(f"u{n % 2}", ITEMS[n % 12], (START + timedelta(hours=n)).isoformat(), "Cup") for n in range(24)]
    log = write_csv(tmp_path / "log.csv", few, ("user", "item", "time", "title"))
    status, _, err = peso("init", log, "-o", tmp_path / "log.yaml")
    assert status == 0, err
    assert "5 stages are too many" in err
    assert 2 <= len(load_config(tmp_path / "log.yaml").data.stages.fractions) < 5


def test_init_warns_if_many_titles_are_empty_or_the_same(peso, tmp_path):
    log, written = shop(tmp_path), tmp_path / "log.yaml"
    table = products(tmp_path)
    assert "same text" not in peso("init", log, "--items", table, "-o", written)[2]
    rows = [(item, "" if number % 3 == 0 else "Cup") for number, item in enumerate(ITEMS)]
    write_csv(table, rows, ("sku", "product name"))
    _, _, err = peso("init", log, "--items", table, "-o", written, "--force")
    assert "items without a text (4 of 12) and items with the same text as another one (7 of 12" in err
    write_csv(table, [(item, "Cup", "Kitchen > Cups") for item in ITEMS], ("sku", "product name", "category"))
    quantizer = "items.quantizer=category-path"  # there, items of a category share codes by design
    assert (
        "same text"
        not in peso("init", log, "--items", table, "-o", written, "--force", "--set", quantizer)[2]
    )


def test_init_trains_on_all_users_and_ingest_counts_their_targets(peso, tmp_path):
    long = [(f"u{n % 8}", ITEMS[(n * 5 + n % 7) % 12], 1_700_000_000 + n) for n in range(160)]
    short = [(f"few{n}", ITEMS[n], 1_700_000_001 + 20 * n) for n in range(6)]
    log = write_csv(tmp_path / "log.csv", [*long, *short], ("user", "item", "time"))
    products(tmp_path)
    written = tmp_path / "log.yaml"
    status, _, err = peso("init", log, "--items", tmp_path / "products.csv", "-o", written)
    assert status == 0, err
    assert load_config(written).training.users == "all"
    counted = {}
    for users in ("all", "tested"):
        root = tmp_path / users
        status, out, err = peso("ingest", written, "-w", root, "--set", f"training.users={users}")
        assert status == 0, err
        stream = Stream.open(root / "stream", users)
        stages = (stream.stage(number) for number in range(stream.stages))
        counted[users] = [sum(s.targets for s in stage.training_sequences()) for stage in stages]
        # one row per stage: its number, users, events, training targets, …
        rows = [re.findall(r"[\d,]+", line) for line in out.splitlines() if line.startswith("│")]
        assert [int(row[3]) for row in rows[-stream.stages :]] == counted[users]
    assert sum(counted["all"]) >= sum(counted["tested"]) + 6


def test_init_keeps_what_is_there_and_asks_for_texts(peso, tmp_path):
    log, written = without_header(tmp_path), tmp_path / "log.yaml"
    status, _, err = peso("init", log, "-o", written)
    assert status == 1
    assert "--items FILE" in err
    written.write_text("mine")
    status, _, err = peso("init", log, "--items", products(tmp_path), "-o", written)
    assert status == 2
    assert "--force" in err
    assert written.read_text() == "mine"
    assert peso("init", log, "--items", products(tmp_path), "-o", written, "--force")[0] == 0


def test_a_log_without_any_text_gets_its_semantic_ids_from_behavior(peso, tmp_path):
    log, written = without_header(tmp_path), tmp_path / "log.yaml"
    assert "--set items.behavior={}" in peso("init", log, "-o", written)[2]
    contents = ("--set", "items.behavior={}", "--set", "head.contents=true")
    status, _, err = peso("init", log, "-o", written, *contents)
    assert status != 0
    assert "head.contents needs items with texts or vectors, but the log has none" in err
    assert not written.exists()
    status, _, err = peso("init", log, "-o", written, "--set", "items.behavior={}")
    assert status == 0, err
    config = load_config(written)
    assert config.data.items is None
    assert config.items.behavior is not None
    status, _, err = peso("ingest", written, "-w", tmp_path / "w")
    assert status == 0, err
    status, _, err = peso("tokenize", "-w", tmp_path / "w")
    assert status == 0, err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("customer,sku,ordered\n", "has columns but no rows"),
        ("customer,sku,ordered,type\nu1,i1\nu2,i1\n", "line 2 has 2 columns instead of 4"),
    ],
)
def test_init_says_what_is_wrong_with_a_file_without_readable_rows(peso, tmp_path, content, said):
    (tmp_path / "log.csv").write_text(content)
    status, _, err = peso("init", tmp_path / "log.csv", "-o", tmp_path / "log.yaml")
    assert (status, said in err) == (1, True), err
    assert not (tmp_path / "log.yaml").exists()


def test_init_names_the_argument_that_has_no_file(peso, tmp_path):
    written = tmp_path / "log.yaml"
    assert "no file at none.csv; check the path of the log" in peso("init", "none.csv", "-o", written)[2]
    err = peso("init", shop(tmp_path), "--items", "none.csv", "-o", written)[2]
    assert "no file at none.csv; check --items" in err


def test_peso_alone_says_what_it_is_and_what_to_try(peso):
    status, out, _ = peso()
    assert status == 0
    for command in ("demo", "init LOG", "doctor"):
        assert f"  peso {command} " in out


def test_doctor_says_what_there_is_and_what_is_used(peso, monkeypatch, tmp_path):
    monkeypatch.setenv("PESO_CACHE", str(tmp_path / "cache"))
    status, out, err = peso("doctor", "--json")
    assert status == 0
    found = {name: (there, used) for name, there, used in json.loads(out)["machine"]}
    assert {"cores", "memory", "GPU", "precision", "cache", "sentence-transformers"} <= found.keys()
    assert found["cache"][0].startswith(str(tmp_path / "cache"))
    assert found["cache"][1] == "pulled: nothing"
    status, out, err = peso("doctor")
    assert status == 0
    assert "training.device: c" in out
    assert "next: peso demo" in err


def test_the_shell_completes_commands_and_values():
    completed = {"_PESO_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": "peso do"}
    command = [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'peso'; from peso.cli.app import main; main()",
    ]
    for words, expected in {
        "peso do": ["doctor"],
        "peso export --format ": ["merged", "peft", "mlflow", "index", "catalog"],
    }.items():
        completed |= {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(command, env={**os.environ, **completed}, capture_output=True, text=True)
        assert done.stdout.split() == expected, done.stderr


@pytest.mark.slow
def test_an_error_during_a_bar_stays_and_the_cursor_comes_back(tmp_path):
    rows = [(user, item, int(when.timestamp())) for user, item, when in EVENTS]
    log = write_csv(tmp_path / "log.csv", [*rows, ("u", "i", "noon")], ("user", "item", "time"))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "peso", "ingest", log, "-w", tmp_path / "w"],
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        shown += part
    os.close(ours)
    assert process.wait() == 1
    hidden, visible = b"\x1b[?25l", b"\x1b[?25h"
    assert shown.rindex(visible) > shown.rindex(hidden)
    assert shown.rindex(b"error: ") > shown.rindex(visible)


@pytest.mark.slow
def test_every_command_says_what_is_next_and_that_is_a_command(peso, tmp_path):
    root, config = tmp_path / "w", tmp_path / "shop.yaml"
    peso("init", shop(tmp_path), "--items", products(tmp_path), "-o", config)
    small = ("--set", "backbone.name=tiny", "--set", "backbone.width=16", "--set", "backbone.layers=1")
    small = (*small, "--set", "strategy.examples=4", "--set", "items.levels=2")
    quick = (*small, "--set", "training.max_steps=2", "--set", "data.stages=3")
    calls = [
        ("run", config, "-w", root, "--dry-run", *quick),
        ("ingest", config, "-w", root, *quick),
        ("tokenize", "-w", root),
        ("train", "-w", root),
        ("evaluate", "-w", root),
        ("update", "-w", root),
        ("diagnose", "-w", root),
        ("diagnose", "-w", root, "--directions", "1", "--examples", "20"),
        ("baseline", "popularity", "-w", root),
        ("recommend", "-w", root, "--user", "u1"),
        ("recommend", "-w", root, "--all", "-o", tmp_path / "all.csv"),
        ("report", "-w", root),
        ("export", "-w", root, "--format", "index", "-o", tmp_path / "index.json"),
        ("items", "retire", "i3", "-w", root),
        ("items", "list", "-w", root),
        ("items", "restore", "i3", "-w", root),
        ("items", "rename", "i3", "cup-3", "--dry-run", "-w", root),
        ("items", "rename", "i3", "cup-3", "-w", root),
        ("users", "merge", "u6", "u5", "--yes", "-w", root),
        ("users", "list", "-w", root),
        ("forget", "--user", "u7", "--yes", "-w", root),
        ("prune", "--keep", "1", "--yes", "-w", root),
        ("promote", "-w", root, "--stage", "0"),
        ("status", "-w", root),
        ("undo", "-w", root, "--yes"),
    ]
    status, listed, _ = peso("--help")
    for call in calls:
        status, _, err = peso(*call)
        assert status == 0, (call, err)
        *_, first = (line for line in err.splitlines() if line.startswith("next: "))
        program, command, *_ = shlex.split(first.removeprefix("next: "))
        assert program == "peso"
        assert f" {command} " in listed
