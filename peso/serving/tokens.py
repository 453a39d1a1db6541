"""Bearer tokens: only their sha256 is kept, and compared in a time that tells nothing about them."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path

from peso.errors import UsageError

VARIABLE = "PESO_TOKENS"
SHORTEST = 16  # characters of a token
HASHED = "sha256:"
ADVICE = 'make one with `python -c "import secrets; print(secrets.token_urlsafe())"`'


class Tokens:
    """
    Args:
        lines: one token each, or ``sha256:`` and the digest of one; empty lines and those that begin with #
            do not count.
        source: where they come from, for messages.

    Raises:
        UsageError: a token that is too short or a digest that is not one.
    """

    def __init__(self, lines: Iterable[str], source: str) -> None:
        self._digests: list[bytes] = []
        for number, line in enumerate(lines, 1):
            token = line.strip()
            if not token or token.startswith("#"):
                continue
            if token.startswith(HASHED):
                digest = token.removeprefix(HASHED).lower()
                if not re.fullmatch("[0-9a-f]{64}", digest):
                    raise UsageError(f"{source}, line {number}: after {HASHED} come 64 hexadecimal digits")
                self._digests.append(bytes.fromhex(digest))
                continue
            if not re.fullmatch(r"[\x21-\x7e]+", token) or len(token) < SHORTEST:
                raise UsageError(
                    f"{source}, line {number}: a token has at least {SHORTEST} visible ASCII characters and "
                    f"no spaces; {ADVICE}"
                )
            self._digests.append(hashlib.sha256(token.encode()).digest())
        if not self._digests:
            raise UsageError(f"{source} has no token; {ADVICE}")

    def place(self, token: str) -> int | None:
        """Which of the tokens it is, by its place among them; None if it is none of them."""
        digest = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        found = None
        for place, known in enumerate(self._digests):  # all of them, so that the time does not tell which
            if hmac.compare_digest(known, digest):
                found = place
        return found


def read_tokens(file: Path | None) -> Tokens | None:
    """From a file, or else from the environment variable, where they are separated by commas; None where
    there are neither.

    Raises:
        UsageError: the file cannot be read, or as :class:`Tokens`.
    """
    if file is not None:
        try:
            return Tokens(file.read_text(encoding="utf-8").splitlines(), str(file))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UsageError(f"--token-file {file} cannot be read: {reason}") from None
    text = os.environ.get(VARIABLE)
    return None if text is None else Tokens(text.split(","), f"the environment variable {VARIABLE}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_tokens(host: str, tokens: Tokens | None) -> None:
    """Raise UsageError if other machines could call a server without a token."""
    if tokens is None and not is_loopback(host):
        raise UsageError(
            f"--host {host} can be reached from other machines, so callers need a token: name a file of "
            f"tokens with --token-file, or set {VARIABLE}; {ADVICE}"
        )
