"""How simulated users act: shares, probabilities and rates.

Knows numbers and what they mean; knows nothing of how a log is drawn from them.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("stable", "drifting", "dormant", "new")
STABLE, DRIFTING, DORMANT, NEW = range(4)

FAVOURITE_WEIGHTS = (0.5, 0.3, 0.2)  # how often a user turns to each of the three favourite categories


@dataclass(frozen=True)
class Behaviour:
    """Shares and probabilities are from 0 to 1.

    Args:
        kinds: shares of users, in the order of ``KINDS``.
        series: how often the next item is the next number of the last item's series,
        companion: … the last item's companion in the category that follows,
        favourite: … an item of one of the user's favourite categories,
        trend: … an item of a trending category; what is left to 1 is drawn from everything that is out, by
            what sells.
        novelty: how many times better an item sells in the stage it comes out in; half of the surplus is
            left one stage on.
        rewired: share of the categories that another category follows from a later stage on.
        drift: chance that a drifting user has a new first favourite at a later stage.
        trends_kept: chance that a trending category still trends one stage on.
        events_per_user: of the whole log, on average.
        events_per_visitor: in a later stage, on average over the users who come at all.

    Raises:
        ValueError: probabilities of the next item that sum to more than 1, or a negative share.
    """

    kinds: tuple[float, float, float, float] = (0.35, 0.25, 0.15, 0.25)
    series: float = 0.25
    companion: float = 0.2
    favourite: float = 0.3
    trend: float = 0.15
    novelty: float = 6.0
    rewired: float = 0.2
    drift: float = 0.5
    trends_kept: float = 0.4
    events_per_user: int = 40
    events_per_visitor: float = 7.0

    def __post_init__(self) -> None:
        reasons = (self.series, self.companion, self.favourite, self.trend)
        if min(reasons) < 0 or sum(reasons) > 1:
            raise ValueError(f"series, companion, favourite and trend {reasons} are not shares of one whole")
        if min(self.kinds) < 0 or not sum(self.kinds):
            raise ValueError(f"kinds {self.kinds} are not shares of the users")
