"""``per_rank_kl``: softmax-KL with a group for each rank."""

from __future__ import annotations

from typing import Any

from peso.adapters.proximal.softmax_kl import SoftmaxKL


class PerRankKL(SoftmaxKL):
    """:class:`SoftmaxKL` with ``groups="rank"``: row i of A with column i of B; the other arguments are its.

    The ablation of the paper (arXiv 2510.25093) that asks whether mass may move between ranks.
    """

    name = "per_rank_kl"
    options = ("temperature",)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, groups="rank", **options)
