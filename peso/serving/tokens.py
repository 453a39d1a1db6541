"""Bearer tokens: only their sha256 is stored, and the comparison takes constant time."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path

from peso.errors import UsageError
from peso.runtime.files import read_given

VARIABLE = "PESO_TOKENS"
SHORTEST = 16  # characters of a token
HASHED = "sha256:"
ADVICE = 'create one with `python -c "import secrets; print(secrets.token_urlsafe())"`'


class Tokens:
    """The accepted tokens.

    Args:
        lines: a token on each line, or ``sha256:`` and the digest of a token. Empty lines and lines that
            start with # are ignored.
        source: where the lines come from, for messages.

    Raises:
        UsageError: a token is too short, a digest is malformed, or there is no token.
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
                    raise UsageError(
                        f"{source}, line {number}: {HASHED} must be followed by 64 hexadecimal digits"
                    )
                self._digests.append(bytes.fromhex(digest))
                continue
            if not re.fullmatch(r"[\x21-\x7e]+", token) or len(token) < SHORTEST:
                raise UsageError(
                    f"{source}, line {number}: a token needs at least {SHORTEST} visible ASCII characters "
                    f"without spaces; {ADVICE}"
                )
            self._digests.append(hashlib.sha256(token.encode()).digest())
        if not self._digests:
            raise UsageError(f"{source} has no token; {ADVICE}")

    def place(self, token: str) -> int | None:
        """The index of a token among the accepted ones; None if it is not accepted."""
        digest = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        found = None
        for place, known in enumerate(self._digests):  # no early exit: constant time
            if hmac.compare_digest(known, digest):
                found = place
        return found


def read_tokens(file: Path | None) -> Tokens | None:
    """Read tokens from a file, one per line, or from the environment variable ``PESO_TOKENS``, separated by
    commas.

    Args:
        file: the file; None: the environment variable.

    Returns:
        The tokens; None if there is neither a file nor the variable.

    Raises:
        UsageError: the file cannot be read, or as :class:`Tokens`.
    """
    if file is not None:
        return Tokens(read_given(file, "--token-file").splitlines(), str(file))
    text = os.environ.get(VARIABLE)
    return None if text is None else Tokens(text.split(","), f"the environment variable {VARIABLE}")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_tokens(host: str, tokens: Tokens | None) -> None:
    """Raise UsageError if other machines could call the server without a token."""
    if tokens is None and not is_loopback(host):
        raise UsageError(
            f"--host {host} can be reached from other machines, so a token is required: give a file of "
            f"tokens with --token-file, or set {VARIABLE}; {ADVICE}"
        )
