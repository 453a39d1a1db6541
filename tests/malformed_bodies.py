"""Bodies of requests that are broken in one of many ways."""

from __future__ import annotations

import json
import random

VALUES = [None, None, True, -1, 10**400, 1e308, "", "i1", "\ud800", "\0", [], {}, ["i1", None], "i" * 300]
KEYS = [
    *("user", "history", "k", "allow", "deny", "titles", "unknown", "item", "time", "key", "stage", "reason"),
    *("\ud800", "x"),
]


def malformed(seed: int) -> bytes:
    """A body that is broken in one of many ways, or happens to be right."""
    draw = random.Random(seed)
    if draw.random() < 0.3:
        return draw.randbytes(draw.randrange(60))
    body = {key: draw.choice(VALUES) for key in draw.sample(KEYS, draw.randrange(1, 5))}
    text = json.dumps([body] * draw.randrange(3) if draw.random() < 0.3 else body)
    text = text.replace("1e+308", draw.choice(["NaN", "Infinity", "1e999", "1e308"]))
    if draw.random() < 0.4:
        place = draw.randrange(len(text))
        inserted = draw.choice(['"', "[" * 5000, "}", "\\u", ""])
        text = text[:place] + inserted + text[place + draw.randrange(3) :]
    return text.encode("utf-8", "surrogatepass")
