"""``per_rank_kl``: softmax-KL with one group per rank."""

from __future__ import annotations

from typing import Any

from peso.adapters.proximal.softmax_kl import SoftmaxKL


class PerRankKL(SoftmaxKL):
    """:class:`SoftmaxKL` with ``groups="rank"``: row i of A and column i of B are a group.

    This is the ablation of the paper (arXiv 2510.25093) on whether mass may move between ranks. The other
    arguments are those of :class:`SoftmaxKL`.
    """

    name = "per_rank_kl"
    options = ("temperature",)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, groups="rank", **options)
