"""Section: what the words and figures mean."""

from __future__ import annotations

from peso.evaluation.comparison import Comparison
from peso.evaluation.sections.section import Section


def reading(comparison: Comparison) -> Section:
    """What the words and figures mean."""
    return Section(
        "reading",
        "How to read this",
        [
            "r is the place of the true semantic ID in the list; items that share an ID count as one. Hit@k "
            "is the share of cases with r ≤ k; NDCG@k the mean of 1/log₂(1 + r) where r ≤ k, else 0; MRR@k "
            "the mean of 1/r where r ≤ k, else 0. Log-probability is the mean "
            "natural logarithm of the probability given to the true semantic ID. It sees every case, not "
            "only the few hits, and so tells small differences apart sooner.",
            "An interval without bounds is the mean ± so many standard errors that it covers 95 %, the cases "
            "of one user taken together. With several seeds of training it covers other seeds, too: what "
            "differs between seeds is taken from Student's t. A difference between two systems is taken case "
            "by case, which is why two can differ clearly although their own intervals overlap. No interval "
            "is given where all cases have the same value, such as no hit at all.",
        ],
    )
