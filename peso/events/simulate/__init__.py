"""The drift simulator: shoppers whose taste is stable, drifts, sleeps and wakes, or is new.

What a user takes next depends on the item before it (the next number of its series, or the companion in
the category that follows), on the user's own favourite categories, on what is trending, and on chance. In
later stages new items come out and sell best, trends move on, some categories are followed by others than
before, and drifting users change favourites. So a sequence model beats popularity, and one that is updated
beats one that is not, while dormant users come back with the taste they had in stage 0.
"""

from peso.events.simulate.market import KINDS, Behaviour
from peso.events.simulate.simulation import (
    EVENTS_FILE,
    TRUTH_FILE,
    TRUTH_SUMMARY_FILE,
    Simulation,
    simulate,
    write_simulation,
)

__all__ = [
    "EVENTS_FILE",
    "KINDS",
    "TRUTH_FILE",
    "TRUTH_SUMMARY_FILE",
    "Behaviour",
    "Simulation",
    "simulate",
    "write_simulation",
]
