"""Text of data on a terminal, in JSON and in tables: it cannot steer, and it is read back."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest

from peso.cli import app, display
from peso.cli.display import Terminal
from peso.evaluation.report.page import render_page
from peso.evaluation.report.sections.section import Section
from peso.evaluation.report.tables import Quantity, Table, to_csv, to_latex, to_markdown

HOSTILE = "a\x1b]0;owned\x07\x9b31m\u202eb\x7f\r\nx"


def test_text_of_data_cannot_steer_the_terminal(capsys):
    display.table(HOSTILE, [HOSTILE, "n"], [[HOSTILE, 1]])
    display.say(HOSTILE)
    display.say_json({HOSTILE: HOSTILE})
    Terminal().note(HOSTILE)
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert not set(text) & set("\x1b\x07\x9b\u202e\x7f\r"), text
        assert "owned" in text


def test_errors_cannot_steer_the_terminal_either(peso):
    assert "\x1b" not in peso("pull", "\x1b[31mred")[2]


def test_json_is_read_back_whatever_it_holds(capsys):
    value = {HOSTILE: ["é", "😀", "\ud800"]}
    display.say_json(value)
    assert json.loads(capsys.readouterr().out) == value


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_can_show_any_text(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    app._prepare_streams()
    display.say("naïve – 日本 \udc80")
    display.table("naïve – 日本", ["é", "n"], [["日本", 1.5]])
    display.say_json({"日本": "é\udc80"})
    sys.stdout.seek(0)
    assert json.loads(sys.stdout.read().splitlines()[-1]) == {"日本": "é\udc80"}


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-x", "@SUM(A1)", "\t=1", "\r=1", "＝1"])
def test_a_table_holds_no_formula(text):
    table = Table("t", "T", [text, "n"], [[text, Quantity(-5.3, decimals=1)]])
    header, row = csv.reader(io.StringIO(to_csv(table)))
    for cell in (header[0], row[0]):
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "＝"))
    assert row[1] == "-5.3"


@pytest.mark.parametrize("number", ["-5.3", "+2", "-1e-3"])
def test_a_number_stays_a_number_in_a_table(number):
    assert to_csv(Table("t", "T", ["n"], [[number]])).splitlines()[1] == number


def test_no_control_character_reaches_a_table_or_the_page():
    table = Table("t", HOSTILE, [HOSTILE], [[HOSTILE]], note=HOSTILE)
    section = Section("s", HOSTILE, tables=[table])
    for text in (to_csv(table), to_markdown(table), to_latex(table), render_page([section], HOSTILE)):
        assert not set(text.replace("\r\n", "\n")) & set("\x1b\x07\x9b\u202e\x7f\r"), text
