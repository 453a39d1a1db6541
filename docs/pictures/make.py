"""Makes the pictures of the README from a run of `peso demo`: needs a Chromium.

python docs/pictures/make.py
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
WIDTH = 118  # columns of the terminal
SCREEN = (1200, 860)  # pixels of the report's first screen


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        peso = [sys.executable, "-m", "peso"]
        environment = {**os.environ, "FORCE_COLOR": "1", "PYTHONPATH": str(HERE.parents[1])}
        demo = subprocess.run(
            [*peso, "demo", "-o", "demo"], cwd=folder, env=environment, stdout=subprocess.PIPE, check=True
        )
        terminal(demo.stdout.decode())
        report(Path(folder) / "demo" / "report" / "index.html")


def terminal(printed: str) -> None:
    """What the command printed, as in a terminal."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print("[bold green]$[/] peso demo")
    console.print(Text.from_ansi(printed))
    drawn = console.export_svg(title="peso demo")
    fonts_of_the_network = r"@font-face \{.*?\}\s*"
    (HERE / "terminal.svg").write_text(re.sub(fonts_of_the_network, "", drawn, flags=re.DOTALL))


def report(page: Path) -> None:
    """The first screen of the report."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium is not None, "no Chromium is installed"
    size = ",".join(map(str, SCREEN))
    shot = page.with_name("screen.png")
    command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={size}"]
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True)
    Image.open(shot).convert("RGB").quantize(64).save(HERE / "report.png", optimize=True)


if __name__ == "__main__":
    main()
