#!/usr/bin/env python3
"""Look up known vulnerabilities of the versions in constraints.txt with pip-audit.

Exit status 0: none are known, or no index of advisories could be reached (a note says so). Else 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
# pip-audit's own message, and the exceptions of requests that it does not catch
UNREACHABLE = (
    "Could not connect to",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.ProxyError",
)


def audit(command: str = "pip-audit") -> int:
    """Run pip-audit. Packages that the index does not know are listed; if it knows none of them, it has no
    advisories."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "audit.json"
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json", "-o", str(report)]
        done = subprocess.run(
            [command, "-r", str(CONSTRAINTS), *options], stderr=subprocess.PIPE, text=True, check=False
        )
        if not report.exists():
            if any(text in done.stderr for text in UNREACHABLE):
                return _skip("no index of advisories can be reached")
            print(done.stderr, file=sys.stderr)
            return 1
        packages = json.loads(report.read_text())["dependencies"]
    checked = [package for package in packages if "skip_reason" not in package]
    if not checked:
        return _skip("the index that can be reached has no advisories")
    for package in packages:
        for found in package.get("vulns", ()):
            fixed = ", ".join(found["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    if unknown := [package["name"] for package in packages if "skip_reason" in package]:
        print(f"::notice::not audited, because the index does not know them: {', '.join(unknown)}")
    print(f"{len(checked)} packages audited")
    return int(any(package["vulns"] for package in checked))


def _skip(reason: str) -> int:
    print(f"::notice::the dependencies were not audited: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(audit(*sys.argv[1:]))
