"""The explorer in a real Chromium: what it shows, and that it fits a phone and a desk."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from browser import CONTRAST, STICKS_OUT, Browser

from peso.runs.served import promote, served
from peso.runs.workspace import Workspace
from peso.serving.server import Settings, _listening, guarded, make_service
from peso.serving.snapshot import Snapshot
from peso.serving.tokens import Tokens

pytestmark = [pytest.mark.browser, pytest.mark.slow]
TOKEN = "a-token-of-the-shop"
MARKUP = "<img src=x onerror=\"document.title='caught'\"> & <b>bold</b> " + "averylongwordwithoutanyblank" * 4
WINDOWS = {"desk": (1200, 900, False, "light"), "phone": (390, 844, True, "dark")}
WITHIN = 60.0  # seconds, on a machine with other work
UNNAMED = """
[...document.querySelectorAll('input, select, button')].filter(e => !e.labels?.length && !e.ariaLabel
  && !e.textContent.trim()).map(e => e.outerHTML)
"""


@pytest.fixture(scope="module")
def address(every_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Workspace]]:
    root = Path(shutil.copytree(every_file, tmp_path_factory.mktemp("served") / "w"))
    workspace = Workspace.open(root)
    promote(workspace, 1, reason="first")
    promote(workspace, 2, reason="better on new items", force=True)
    settings = Settings(host="127.0.0.1", port=0)
    service = make_service(root, settings)
    service.live.refresh()
    first, title = workspace.semantic_ids.item_ids[0], Snapshot.title
    app = guarded(service, settings, Tokens([TOKEN], "the test"))
    with _listening(settings) as listener, pytest.MonkeyPatch.context() as patched:
        patched.setattr(Snapshot, "title", lambda each, item: MARKUP if item == first else title(each, item))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/", workspace
        server.should_exit = True
        thread.join(WITHIN)


def until(browser: Browser, expression: str) -> None:
    end = time.monotonic() + WITHIN
    while not browser.evaluate(expression):
        told = browser.evaluate("document.getElementById('problem').textContent")
        assert time.monotonic() < end, (expression, told, browser.evaluate("document.body.innerText"))
        time.sleep(0.05)


def submit(browser: Browser, form: str, **values: str) -> None:
    for name, value in values.items():
        browser.evaluate(f"document.getElementById({json.dumps(name)}).value = {json.dumps(value)}")
    browser.evaluate(f"document.getElementById({json.dumps(form)}).requestSubmit()")


def photograph(browser: Browser, folder: Path, name: str) -> None:
    folder = Path(os.environ.get("PESO_SCREENSHOTS", folder))
    folder.mkdir(parents=True, exist_ok=True)
    browser.photograph(folder / f"{name}.png", whole=True)


def sound(browser: Browser, width: int) -> None:
    assert browser.evaluate("innerWidth") == width  # a phone zooms out where something is too wide
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(UNNAMED) == []
    assert browser.evaluate(STICKS_OUT.replace(".scroll", ".skip")) == []
    ratio, where = browser.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    assert browser.evaluate("document.title") == "peso explorer"
    assert browser.problems == []


@pytest.mark.parametrize("window", WINDOWS)
def test_the_page_works_and_fits(browser, address, tmp_path, window):
    (url, workspace), (width, height, phone, scheme) = address, WINDOWS[window]
    browser.allowed = url
    browser.open(url, width, height, scheme, phone=phone)
    browser.evaluate("sessionStorage.clear()")
    browser.open(url, width, height, scheme, phone=phone)
    until(browser, "!document.getElementById('sign-in').hidden")
    assert browser.evaluate("document.activeElement.id") == "token"
    photograph(browser, tmp_path, f"{window}-token")
    # an answer of status 401 is what the page expects here
    browser.problems[:] = [each for each in browser.problems if "401" not in each]
    submit(browser, "token-form", token=TOKEN)
    until(browser, "document.querySelectorAll('#lineage li').length == 3")
    until(browser, "document.querySelector('#chart svg') && !document.getElementById('stages').hidden")
    assert browser.evaluate("document.querySelectorAll('#chart circle').length") >= 2

    marked = workspace.semantic_ids.item_ids[0]
    user = workspace.stream.stage(1).users[0]
    browser.evaluate("document.getElementById('browse').open = true")
    until(browser, "document.activeElement.id == 'prefix' && !!document.querySelector('#users button')")
    browser.evaluate(f"document.getElementById('prefix').value = {json.dumps(user)}")
    browser.evaluate("document.getElementById('prefix').dispatchEvent(new Event('input'))")
    begins = f"every(each => each.textContent.startsWith({json.dumps(user)}))"
    until(browser, f"[...document.querySelectorAll('#users button')].{begins}")
    photograph(browser, tmp_path, f"{window}-users")
    sound(browser, width)
    browser.evaluate("document.querySelector('#users button').click()")
    assert browser.evaluate("document.getElementById('who').value") == user
    until(browser, "document.querySelectorAll('#before > li').length == 10")
    until(browser, "document.querySelectorAll('#serving .badge:not(:empty)').length == 10")
    assert browser.evaluate("[...document.querySelectorAll('#before .gone')].length") == browser.evaluate(
        "document.querySelectorAll('#serving .new').length"
    )
    submit(browser, "event", item=marked)
    until(browser, "/^Event stored.*list of the serving/.test(document.getElementById('said').textContent)")
    until(browser, f"document.querySelector('#history li').textContent.includes({json.dumps(MARKUP)})")
    assert browser.evaluate("document.querySelectorAll('main img, main b').length") == 0
    browser.evaluate("document.querySelector('#serving details').open = true")
    browser.evaluate(
        "document.querySelector('#before .gone, #before li').closest('li')"
        ".querySelector('details').open = true"
    )
    until(browser, "document.querySelectorAll('#serving .near > li').length == 5")
    until(browser, "document.querySelectorAll('#before .near > li').length == 5")
    told = browser.evaluate("document.querySelector('#serving .insight p').textContent")
    assert "Its log-probability" in told
    assert "in stage 2" in told
    levels = workspace.semantic_ids.levels
    assert browser.evaluate("document.querySelectorAll('#serving .insight tbody tr').length") == levels + 1
    with_head = "{stage: 2, score: -3, codes: [{code: 'a', log_probability: -1}], item_head: -2}"
    without = "{stage: 1, score: -1.5, codes: [{code: 'a', log_probability: -1.5}], item_head: null}"
    rows = f"[...codeTable({{serving: {with_head}, before: {without}}}).tBodies[0].rows]"
    assert browser.evaluate(f"{rows}.map(row => [...row.cells].map(cell => cell.textContent))") == [
        ["a", "-1.50", "-1.00", "+0.50"],
        ["item head", "0.00", "-2.00", "-2.00"],
        ["in the list", "-1.50", "-3.00", "-1.50"],
    ]
    until(browser, "!!document.querySelector('#metric optgroup[label^=Drift]')")
    metric = "document.getElementById('metric')"
    browser.evaluate(f"{metric}.value = 'divergence of items', {metric}.dispatchEvent(new Event('change'))")
    assert browser.evaluate("document.querySelectorAll('#chart circle').length") == 2
    assert "Data: " in browser.evaluate("document.querySelector('#lineage li').textContent")
    photograph(browser, tmp_path, f"{window}-explore")
    sound(browser, width)

    browser.evaluate("document.querySelector('input[value=history]').click()")
    ids = workspace.semantic_ids.item_ids[1:4]
    submit(browser, "ask", who=" ".join(ids[:2]))
    until(browser, "document.querySelectorAll('#history li').length == 2")
    submit(browser, "event", item=ids[2])  # belongs to the page alone
    until(browser, "document.querySelectorAll('#history li').length == 3")
    assert browser.evaluate("document.getElementById('who').value") == " ".join(ids)

    changes = len(served(workspace).changes)
    browser.evaluate("document.getElementById('rollback').click()")
    until(browser, "document.getElementById('confirm').open")
    photograph(browser, tmp_path, f"{window}-dialog")
    target = browser.evaluate("lineage.previous")
    submit(browser, "confirm-form", reason="complaints since noon")
    until(browser, f"answering === {target}")
    assert len(served(workspace).changes) == changes + 1
    assert served(workspace).latest.reason == "complaints since noon (token 1 over HTTP)"
    until(browser, "document.getElementById('serves').textContent.includes('complaints since noon')")
    sound(browser, width)
