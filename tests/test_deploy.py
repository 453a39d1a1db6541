"""What deploy/ contains fits the command line and the server: units, compose file, image, nightly script.
The audit of dependencies fails only where it should."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from small_runs import trained

from peso.cli.app import app
from peso.serving.guard import OPEN
from peso.serving.routes import create_app

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
NIGHTLY = DEPLOY / "nightly.sh"
UNITS = sorted((DEPLOY / "systemd").iterdir())
COMMANDS = typer.main.get_command(app)


def parse(arguments: list[str]) -> dict[str, Any]:
    """The values that a command of `peso` gets from its arguments; raises where it does not take them.

    Paths are strings in some versions of typer, which converts them when it calls the command.
    """
    name, *rest = arguments
    command = COMMANDS.commands[name]  # type: ignore[attr-defined]
    return command.make_context(name, rest).params


def settings(unit: Path) -> list[tuple[str, str]]:
    """The keys and values of a unit file; a key can occur several times."""
    lines = unit.read_text().splitlines()
    return [tuple(line.split("=", 1)) for line in lines if line and line[0] not in "#["]  # type: ignore[misc]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, with continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(None, 1)[1].strip()) for line in joined if line.strip()]


def test_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="--from-event"):
        parse(["update", "--from-event", "-w", "workspace"])
    with pytest.raises(KeyError):
        parse(["upgrade", "-w", "workspace"])


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.suffix == ".service"], ids=lambda u: u.name)
def test_a_service_runs_commands_that_exist_and_not_as_root(unit: Path):
    found = settings(unit)
    started = [shlex.split(value) for key, value in found if key == "ExecStart"]
    assert started
    for program, *arguments in started:
        assert program == "/opt/peso/bin/peso"
        assert Path(parse(arguments)["workspace"]) == Path("/var/lib/peso/workspace")
    assert dict(found)["User"] == "peso"
    assert dict(found)["NoNewPrivileges"] == "yes"


def test_the_server_gets_tokens_as_a_credential():
    found = dict(settings(DEPLOY / "systemd/peso-serve.service"))
    credential = found["LoadCredential"].partition(":")[0]
    assert Path(parse(shlex.split(found["ExecStart"])[1:])["token_file"]) == Path(f"%d/{credential}")


def test_the_nightly_service_makes_a_stage_from_events_and_the_timer_starts_it_every_night():
    update = settings(DEPLOY / "systemd/peso-update.service")
    first = next(value for key, value in update if key == "ExecStart")
    assert parse(shlex.split(first)[1:])["from_events"]
    timer = dict(settings(DEPLOY / "systemd/peso-update.timer"))
    assert (DEPLOY / "systemd" / timer["Unit"]).is_file()
    assert re.fullmatch(r"\*-\*-\* \d\d:\d\d:\d\d", timer["OnCalendar"])


def test_the_cron_line_runs_the_nightly_script_with_one_workspace():
    (line,) = [text for text in (DEPLOY / "peso.cron").read_text().splitlines() if re.match(r"[\d*]", text)]
    *when, user, command = line.split(None, 6)
    assert all(re.fullmatch(r"\d+|\*", field) for field in when)
    assert user == "peso"
    words = shlex.split(command.partition("|")[0].partition("2>&1")[0])
    assert words == ["nice", f"/opt/peso/bin/{NIGHTLY.name}", "/var/lib/peso/workspace"]


def test_the_compose_file_serves_with_tokens_and_updates_every_night():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    serve, update = compose["services"]["serve"], compose["services"]["update"]
    served = parse(serve["command"])
    token_file = Path(served["token_file"]).name
    assert token_file in compose["secrets"]
    assert serve["secrets"] == [token_file]
    assert all(
        port.startswith("127.0.0.1:") and port.endswith(f":{served['port']}") for port in serve["ports"]
    )
    assert update["entrypoint"] == [NIGHTLY.name]
    option, _, workspace = update["command"]
    assert (option, Path(workspace)) == ("--daily", Path(served["workspace"]))
    for service in (serve, update):
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert {volume.split(":")[0] for volume in service["volumes"]} >= set(compose["volumes"])


def test_the_image_does_not_run_as_root_and_is_healthy_where_the_server_answers():
    found = instructions(DEPLOY / "Dockerfile")
    last = max(place for place, (name, _) in enumerate(found) if name == "FROM")
    final = dict(found[last:])
    user = final["USER"].split(":")[0]
    assert int(user) > 0
    assert f"--uid {user}" in " ".join(value for name, value in found[last:] if name == "RUN")
    (program,) = json.loads(final["ENTRYPOINT"])
    assert program == "peso"
    served = parse(json.loads(final["CMD"]))
    check = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", final["HEALTHCHECK"])
    assert check is not None
    port, path = check.groups()
    routes = {getattr(route, "path", None) for route in create_app(SimpleNamespace()).routes}  # type: ignore[arg-type]
    assert path in routes
    assert path in OPEN, "the health check has no token"
    assert int(port) == served["port"] == int(final["EXPOSE"])


def test_what_the_image_copies_is_in_the_build_context():
    allowed = {
        line[1:]
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for name, value in instructions(DEPLOY / "Dockerfile"):
        copied = [word for word in value.split()[:-1] if not word.startswith("--")] if name == "COPY" else []
        bound = re.findall(r"type=bind,source=([^,]+)", value)
        for source in [*copied, *bound]:
            assert source in allowed
            assert (ROOT / source).exists()


def commands_of(page: Path) -> Iterator[list[str]]:
    """The `peso` commands in a page's console blocks."""
    for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for line in re.findall(r"^\$ (peso (?:\\\n|.)*)", block, re.M):
            yield shlex.split(line.replace("\\\n", " "), comments=True)[1:]


def test_the_commands_of_the_page_on_production_exist():
    found = list(commands_of(ROOT / "docs/how-to/production.md"))
    assert {"init", "run", "promote", "serve", "update", "status", "rollback", "forget", "prune"} <= {
        arguments[0] for arguments in found
    }
    for arguments in found:
        parse(arguments)


@pytest.fixture
def stub(tmp_path: Path):
    """stub(script): a command that notes its arguments, one call a line, and then runs a script."""

    def make(script: str) -> tuple[Path, Path]:
        calls, program = tmp_path / "calls", tmp_path / "peso"
        calls.touch()
        program.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(calls))}\n{script}\n')
        program.chmod(0o755)
        return program, calls

    return make


def nightly(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(NIGHTLY), *arguments],
        env={"PATH": "/usr/bin:/bin", "PESO_COMMAND": str(program), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_nightly_script_updates_and_then_prunes(stub):
    program, calls = stub("exit 0")
    done = nightly(program, "some place", PESO_ALERT="mail -s peso ops", PESO_KEEP="3")
    assert (done.returncode, done.stderr) == (0, "")
    update, prune = calls.read_text().splitlines()
    assert update == "update --from-events --alert mail -s peso ops -w some place"
    assert parse(shlex.split("update --from-events --alert 'mail -s peso ops' -w 'some place'"))[
        "from_events"
    ]
    assert parse(shlex.split(prune.replace("some place", "w")))["keep"] == 3


def test_a_failed_update_gives_its_status_and_removes_nothing(stub):
    program, calls = stub("exit 3")
    assert nightly(program, "w").returncode == 3
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [[], ["--daily"], ["--daily", "3:17"], ["w", "v"], ["--daily", "noon!", "w"]]
)
def test_the_nightly_script_refuses_wrong_arguments(stub, arguments: list[str]):
    program, calls = stub("exit 0")
    assert nightly(program, *arguments).returncode == 2
    assert calls.read_text() == ""


def start(ready: Path, program: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The nightly script, as soon as what it waits for has made a file."""
    path = f"{ready.parent}:/usr/bin:/bin"
    script = subprocess.Popen([NIGHTLY, *arguments], env={"PATH": path, "PESO_COMMAND": str(program)})
    while not ready.exists() and script.poll() is None:
        time.sleep(0.01)
    return script


def test_sigterm_reaches_the_update_and_no_further_command_starts(stub, tmp_path: Path):
    ready, end = tmp_path / "ready", tmp_path / "end"
    program, calls = stub(f"trap 'echo stopped > {end}; exit 143' TERM\n: > {ready}\nsleep 30 & wait")
    script = start(ready, program, "w")
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 143
    assert end.read_text() == "stopped\n"
    assert len(calls.read_text().splitlines()) == 1


def test_the_daily_script_waits_for_its_time_and_ends_with_status_0_on_sigterm(stub, tmp_path: Path):
    program, calls = stub("exit 0")
    ready, waiting = tmp_path / "ready", tmp_path / "sleep"
    waiting.write_text(f'#!/bin/sh\necho "$1" > {ready}.new\nmv {ready}.new {ready}\nexec /bin/sleep "$1"\n')
    waiting.chmod(0o755)
    an_hour_ago = time.strftime("%H:%M", time.localtime(time.time() - 3600))
    script = start(ready, program, "--daily", an_hour_ago, "w")
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 0
    assert 22 * 3600 < int(ready.read_text()) <= 24 * 3600
    assert calls.read_text() == ""


@pytest.mark.slow
def test_a_night_without_events_ends_with_status_0_and_trains_nothing(tmp_path: Path):
    workspace, _ = trained(tmp_path / "w")
    stages = workspace.finished_stages
    program = tmp_path / "peso"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m peso "$@"\n')
    program.chmod(0o755)
    done = nightly(program, str(workspace.root), PYTHONPATH=str(ROOT), HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "there is nothing to do" in done.stdout
    assert workspace.finished_stages == stages


PACKAGE = {"name": "h11", "version": "0.1"}
FOUND = {"id": "CVE-1", "fix_versions": ["0.2"]}


@pytest.mark.parametrize(
    ("packages", "stderr", "status", "said"),
    [
        ([PACKAGE | {"vulns": []}], "", 0, "1 packages audited"),
        ([PACKAGE | {"vulns": [FOUND]}], "", 1, "h11 0.1: CVE-1, fixed in 0.2"),
        ([{"name": "h11", "skip_reason": "?"}], "", 0, "has no advisories"),
        ([PACKAGE | {"vulns": []}, {"name": "torch", "skip_reason": "?"}], "", 0, "not know them: torch"),
        (None, "ERROR:pip_audit._cli:Could not connect to the feed", 0, "no index of advisories"),
        (None, "invalid requirements input", 1, ""),
    ],
)
def test_the_audit_fails_on_vulnerabilities_and_is_skipped_without_advisories(
    tmp_path: Path, packages: list[dict[str, Any]] | None, stderr: str, status: int, said: str
):
    stub = tmp_path / "pip-audit"
    write = (
        ""
        if packages is None
        else f"open(sys.argv[-1], 'w').write({json.dumps(json.dumps({'dependencies': packages}))})"
    )
    stub.write_text(
        f"#!{sys.executable}\nimport sys\n{write}\nprint({stderr!r}, file=sys.stderr)\nsys.exit(1)\n"
    )
    stub.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci/audit.py"), str(stub)], capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert said in done.stdout


def test_the_workflow_runs_the_audit():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert any("python .ci/audit.py" in step.get("run", "") for step in jobs["audit"]["steps"])
