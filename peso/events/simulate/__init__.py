"""The drift simulator: shoppers who are stable, drifting, dormant or new.

The next item of a user depends on the item before it (the next number of its series, or its companion in the
category that follows), on the user's favorite categories, on trends, and on chance. In later stages new items
are released and sell best, trends change, some categories are followed by different ones than before, and
drifting users change their favorites. So a sequence model beats popularity, and an updated model beats one
that is not updated, while dormant users return with the taste they had in stage 0.
"""

from peso.events.simulate.market import KINDS, Behaviour
from peso.events.simulate.simulation import EVENTS_FILE, Simulation, simulate, write_simulation

__all__ = ["EVENTS_FILE", "KINDS", "Behaviour", "Simulation", "simulate", "write_simulation"]
