"""The size and shape of the package: folders, files, lines, longest functions, floors of the import graph.

    python benchmarks/structure.py [--quick] [--json] [--write]

A folder's floor is one more than the highest floor of the folders it imports from, so an arrow never runs
back up as long as the folders form no circle. `--quick` is accepted like in every benchmark and changes
nothing: the whole count takes about a second. `--write` puts the counts into CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import grimp

ROOT = Path(__file__).resolve().parents[1] / "peso"
GUIDE = ROOT.parent / "CONTRIBUTING.md"
BEGIN, END = "<!-- structure -->\n", "<!-- end of structure -->"
SHOWN = 5  # of the longest functions and files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    found = structure(ROOT)
    if arguments.write:
        before, _, after = GUIDE.read_text().partition(BEGIN)
        GUIDE.write_text(f"{before}{BEGIN}\n{block(found)}\n\n{END}{after.partition(END)[2]}")
    print(json.dumps(found, indent=2) if arguments.json else text(found))


def structure(package: Path) -> dict[str, Any]:
    """Counts over the Python files of a package; `floors`: its folders, the lowest floor first."""
    files = sorted(package.rglob("*.py"))
    lines = {str(file.relative_to(package)): len(file.read_text().splitlines()) for file in files}
    functions = sorted((length for file in files for length in _functions(file, package)), reverse=True)
    loose = [name for name in lines if "/" not in name and name not in ("__init__.py", "__main__.py")]
    return {
        "folders": sum((path / "__init__.py").is_file() for path in package.iterdir() if path.is_dir()),
        "files": len(files),
        "lines": sum(lines.values()),
        "modules_at_the_root": loose,
        "longest_files": sorted(((n, name) for name, n in lines.items()), reverse=True)[:SHOWN],
        "longest_functions": functions[:SHOWN],
        "floors": floors(package.name),
    }


def floors(package: str) -> list[list[str]]:
    """The folders and modules directly below a package, by floor.

    Raises:
        CycleError: some of them import each other in a circle.
    """
    graph = grimp.build_graph(package, cache_dir=None)
    children = sorted(graph.find_children(package))
    below = {
        child: {other for other in children if other != child and _imports(graph, child, other)}
        for child in children
    }
    result: list[list[str]] = []
    sorter = TopologicalSorter(below)
    sorter.prepare()
    while sorter.is_active():
        floor = sorter.get_ready()
        result.append(sorted(name.partition(".")[2] for name in floor))
        sorter.done(*floor)
    return result


def _imports(graph: grimp.ImportGraph, importer: str, imported: str) -> bool:
    return graph.direct_import_exists(importer=importer, imported=imported, as_packages=True)


def _functions(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Lines of each function's body, docstring left out, with its name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            length = (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1
            yield length, f"{file.relative_to(package)}:{node.name}"


def text(found: dict[str, Any]) -> str:
    parts = [f"{found['folders']} folders, {found['files']} files, {found['lines']:,} lines"]
    parts.append(f"modules at the root: {', '.join(found['modules_at_the_root'])}")
    for title, key in (("longest files", "longest_files"), ("longest functions", "longest_functions")):
        parts.append(f"{title}: " + ", ".join(f"{name} ({n})" for n, name in found[key]))
    levels = found["floors"]
    parts += [f"floor {number}: {', '.join(levels[number - 1])}" for number in range(len(levels), 0, -1)]
    return "\n".join(parts)


def block(found: dict[str, Any]) -> str:
    """The counts as an indented block of Markdown, wrapped."""
    lines = [textwrap.wrap(line, 110, subsequent_indent="  ") for line in text(found).splitlines()]
    return "\n".join(f"    {part}" for parts in lines for part in parts)


if __name__ == "__main__":
    try:
        main()
    except CycleError as error:
        raise SystemExit(f"folders import each other in a circle: {' -> '.join(error.args[1])}") from None
