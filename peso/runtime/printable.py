"""Text of data as it may be shown: what would steer a terminal or break a page is written out."""

from __future__ import annotations

import re

# C0 and C1 controls, line separators, overrides of the writing direction, halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile("[\t\n]")


def printable(text: str, *, one_line: bool = False) -> str:
    r"""The text with control characters as ``\u001b``, which JSON reads back as the same character.

    Args:
        one_line: write tabs and line ends out, too.

    >>> printable("red \x1b[31m\n"), printable("a\nb", one_line=True)
    ('red \\u001b[31m\n', 'a\\u000ab')
    """
    text = _UNSAFE.sub(_written_out, text)
    return _BREAKS.sub(_written_out, text) if one_line else text


def _written_out(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
