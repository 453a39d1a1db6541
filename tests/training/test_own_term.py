"""The proximal term of docs/how-to/use-a-proximal-term.md, in a loop and in a configuration."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from strategy_runs import Runs, factors

from peso.adapters.proximal import find_term
from peso.adapters.proximal.term import TERMS
from peso.config import load_config
from peso.errors import ConfigError
from peso.runs import pipeline
from peso.runs.trust import strategy_of
from peso.runs.workspace import Workspace
from peso.training.strategies.strategy import make_strategy

DOC = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "use-a-proximal-term.md"


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The module of the page where Python finds it; its configuration."""
    text = DOC.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# log_cosh\.py\n.*?)```", text, re.DOTALL)
    (tmp_path / "log_cosh.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "log_cosh", raising=False)
    (configured,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    yield yaml.safe_load(configured)["strategy"]
    TERMS._known.pop("log_cosh", None)


def moved(workspace: Workspace) -> float:
    """Distance of stage 1 from its anchor."""
    before = factors(workspace, 0)
    squares = [
        (now - then).square().sum()
        for module, pair in factors(workspace, 1).items()
        for now, then in zip(pair, before[module], strict=True)
    ]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.slow
def test_a_stage_is_trained_with_it_in_both_couplings(
    runs: Runs, documented: dict[str, Any], tmp_path: Path
) -> None:
    distances = {"single": moved(runs("single"))}
    for coupling, amount in (("loss", {"weight": 1e3}), ("decoupled", {"strength": 3.0})):
        strategy = {"name": "peso", "proximal": documented["proximal"], "coupling": coupling, **amount}
        workspace = runs.start(tmp_path / coupling, strategy)
        pipeline.run(workspace, base=runs("none").root)
        distances[coupling] = moved(workspace)
    assert distances["loss"] < 0.9 * distances["single"]
    assert distances["decoupled"] < 0.9 * distances["single"]


def test_it_is_the_penalty_and_pull_of_its_page(documented: dict[str, Any]) -> None:
    kind = find_term(documented["proximal"])
    anchor = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    values = [(a + torch.randn_like(a)).requires_grad_() for a in anchor]
    term = kind(weight=2.0)
    term.anchor(anchor)
    wanted = 2 * sum(torch.cosh(v - a).log().sum() for v, a in zip(values, anchor, strict=True))
    assert term(values).item() == pytest.approx(wanted.item())
    pairs = zip(torch.autograd.grad(term(values), values), torch.autograd.grad(wanted, values), strict=True)
    for found, true in pairs:
        torch.testing.assert_close(found, true)
    assert term.metric_trace() == 17
    decoupled = kind(strength=0.5, coupling="decoupled")
    decoupled.anchor(anchor)
    before = [value.detach().clone() for value in values]
    decoupled.after_step(values, 0.1, 0.1)
    for v, a, old in zip(values, anchor, before, strict=True):
        torch.testing.assert_close(v.detach() - a, (old - a) * torch.exp(torch.tensor(-0.5)))


def test_its_name_is_known_once_it_is_imported(documented: dict[str, Any]) -> None:
    kind = find_term(documented["proximal"])
    assert find_term("log_cosh") is kind
    assert load_config({"data": {"format": "simulate"}, "strategy": {"proximal": "log_cosh"}})
    with pytest.raises(TypeError, match="proximal term 'log_cosh' is defined twice"):
        type("Other", (kind,), {"name": "log_cosh"})


@pytest.mark.parametrize(
    ("proximal", "message"),
    [
        ("no_such_module.Term", "cannot be imported.*No module named 'no_such_module'.*PYTHONPATH"),
        ("fractions.Nothing", "cannot be imported"),
        (".fractions.Fraction", "cannot be imported"),
        ("fractions.Fraction", r"is not a subclass of peso\.adapters\.proximal\.Term"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(proximal: str, message: str) -> None:
    config = load_config({"data": {"format": "simulate"}, "strategy": {"name": "peso", "proximal": proximal}})
    with pytest.raises(ConfigError, match=message):
        make_strategy(config.strategy)


@pytest.mark.parametrize(
    ("code", "cause"), [("1 / 0", "ZeroDivisionError"), ("{}['x']", "KeyError"), ("(", "SyntaxError")]
)
def test_a_module_that_fails_when_it_is_imported_is_named(
    code: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"failing_{cause.lower()}"
    (tmp_path / f"{name}.py").write_text(code)
    with pytest.raises(ConfigError, match=f"{name}.Mine cannot be imported .{cause}"):
        find_term(f"{name}.Mine")


@pytest.mark.parametrize(
    ("proximal", "message"),
    [
        ("l3", r"strategy\.proximal: 'l3' is not a proximal term; use one of fisher, l2, .*MyTerm"),
        (3, r"strategy\.proximal"),
    ],
)
def test_an_unknown_name_is_refused_with_the_configuration(proximal: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"data": {"format": "simulate"}, "strategy": {"name": "peso", "proximal": proximal}})


def test_a_term_that_only_the_workspace_names_is_not_imported(
    documented: dict[str, Any], tmp_path: Path
) -> None:
    config = load_config({"data": {"format": "simulate"}, "strategy": documented})
    given = Workspace.create_or_open(tmp_path / "w", config)
    received = Workspace.open(given.root)
    with pytest.raises(ConfigError, match=r"names the class log_cosh\.LogCosh.*--trust log_cosh\.LogCosh"):
        strategy_of(received)
    assert "log_cosh" not in sys.modules
    for trusted in (given, Workspace.open(given.root, trust=["log_cosh.LogCosh"])):
        assert strategy_of(trusted).term.name == "log_cosh"
