"""Section: recommendations for a few users of each kind, and what these users chose."""

from __future__ import annotations

from hashlib import sha256

from peso.evaluation.comparison import Comparison
from peso.evaluation.predictions import USER_SEGMENTS, Predictions
from peso.evaluation.report.sections.section import Answers, Section, section

USERS = 2  # of each kind
LENGTH = 5  # items to show of a list and of a history


@section(place=20)
def recommendations(comparison: Comparison) -> Section | None:
    """The lists of the newest model for a few users, next to those of the previous model."""
    system, stage, catalogue = comparison.subject, comparison.averaged[-1], comparison.catalogue
    if catalogue is None or catalogue.cases is None:
        return None
    run = next((run for run in system.runs if (stage - 1, stage) in run.across), system.first)
    new, old = run.stages[stage].predictions, run.across.get((stage - 1, stage))
    models = {f"After stage {stage - 1}": old, f"After stage {stage}": new} if old else {"Recommended": new}
    titles = dict(zip(catalogue.item_ids, catalogue.item_columns.get("title", ()), strict=False))
    cases = catalogue.cases(stage)
    histories = dict(zip(cases.users, cases.histories, strict=True))

    def title(item: str) -> str:
        return titles.get(item) or item

    def answers(row: int) -> Answers:
        history = [title(catalogue.item_ids[item]) for item in histories[new.users[row]][-LENGTH:]]
        earlier = int(new.history_length[row]) - len(history)
        return Answers(
            f"{new.user_segment[row].capitalize()} user {new.users[row]}",
            [f"{earlier:,} earlier", *history] if earlier else history,
            title(new.targets[row]),
            [(name, [title(item) for item in one.items[row][:LENGTH]]) for name, one in models.items()],
        )

    rows = [row for kind in reversed(USER_SEGMENTS) for row in _chosen(kind, list(models.values()), new)]
    return Section(
        "recommendations",
        "Recommendations",
        [
            f"The first {LENGTH} items that {system.label} recommends to some users of stage {stage}. For "
            "each kind of user, the first case is one where a list contains the item that came next (✓), if "
            "there is one; the other is picked at random."
        ],
        answers=[answers(row) for row in rows],
    )


def _chosen(kind: str, models: list[Predictions], new: Predictions) -> list[int]:
    """Cases of one kind of user, in the order of a hash of the user id, but with the first hit first."""
    rows = [row for row, segment in enumerate(new.user_segment) if segment == kind]
    rows.sort(key=lambda row: sha256(new.users[row].encode()).digest())
    hits = [row for row in rows if any(new.targets[row] in model.items[row][:LENGTH] for model in models)]
    return [*hits[:1], *(row for row in rows if row not in hits[:1])][:USERS]
