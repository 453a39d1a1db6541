"""A MkDocs hook: writes the tables of configuration keys and of command options from the code itself.

A page asks for them with `<!-- generated: NAME -->`, where NAME is keys, compare or commands.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from peso.cli.app import app
from peso.config import Config
from peso.config.compare import CompareConfig
from peso.config.executors import AnyExecutor
from peso.config.reading import sections
from peso.config.registry import Options

os.environ["JUPYTER_CONFIG_DIR"] = os.path.dirname(__file__)  # what a cell prints in pieces is one output


def on_page_markdown(markdown: str, **_: Any) -> str:
    for name, make in {"keys": keys, "compare": compare, "commands": commands}.items():
        mark = f"<!-- generated: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, "\n".join(make()))
    return markdown


def keys() -> Iterator[str]:
    """A table for every section of the configuration, in the order of the work."""
    yield from _section("", Config)


def compare() -> Iterator[str]:
    """The keys of the section `compare`; the sections that it shares with a run are not repeated."""
    yield from _table(CompareConfig)
    for section in get_args(AnyExecutor):
        yield from ("", f"### `compare.executor: {section.model_fields['name'].default}`")
        yield from ("", section.__doc__ or "")
        yield from _table(section)


def _section(path: str, model: type[BaseModel]) -> Iterator[str]:
    yield from _table(model)
    nested = [
        (f"{path}{name}", *section)
        for name, field in model.model_fields.items()
        for section in sections(field.annotation, field.metadata, within=model)
    ]
    for where, named, part, section in nested:
        yield from ("", f"### `{where}: {named}`" if named else f"### `{where}`")
        if text := (part or section).__doc__:
            yield from ("", " ".join(text.split("\n\n")[0].replace("``", "`").split()))
        yield from _section(f"{where}.", section)


def _table(model: type[BaseModel]) -> Iterator[str]:
    rows = [
        (name, _kind(field.annotation), _default(field), field.description or "")
        for name, field in model.model_fields.items()
        if not (issubclass(model, Options) and name == "name")
    ]
    if rows:
        yield from ("", "| key | type | default | |", "|---|---|---|---|")
    yield from ("| " + " | ".join(_cell(text) for text in _quoted(row)) + " |" for row in rows)


def _quoted(row: tuple[str, str, str, str]) -> tuple[str, ...]:
    name, kind, default, text = row
    return f"`{name}`", kind, f"`{default}`" if default else "", text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required() or value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel | list | dict):
        return ""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _kind(annotation: Any) -> str:
    """An annotation as a reader of YAML would say it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is Literal:
        return ", ".join(f"`{part}`" if part != "" else '`""`' for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(part) for part in parts if part is not type(None)))
    if origin in (list, tuple):
        return f"list of {_kind(parts[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {int: "integer", float: "number", str: "text", bool: "true, false", dict: "mapping"}
    return names.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def commands() -> Iterator[str]:
    """Every command with its help text and its options."""
    group: Any = typer.main.get_command(app)
    for name, command in sorted(_leaves(group, "")):
        context = typer.Context(command, info_name=f"peso {name}")
        usage = " ".join([f"peso {name}", *command.collect_usage_pieces(context)])
        yield from ("", f"### `peso {name}`", "", f"    {usage}", "", _help(command.help or ""), "")
        rows = [record for part in command.params if (record := part.get_help_record(context))]
        if rows:
            yield from ("| option | |", "|---|---|")
            yield from (f"| `{_cell(option)}` | {_cell(text)} |" for option, text in rows)


def _leaves(group: Any, before: str) -> Iterator[tuple[str, Any]]:
    """The commands of a group, and those of the groups in it, by their names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _help(text: str) -> str:
    """Docstrings are wrapped for the terminal; examples stand on lines of their own."""
    paragraphs = [" ".join(part.split()) for part in text.replace("\f", "").split("\n\n")]
    mark = "Example: "
    return "\n\n".join(f"    {part[len(mark) :]}" if part.startswith(mark) else part for part in paragraphs)
