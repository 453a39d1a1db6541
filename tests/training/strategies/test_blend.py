"""``blend`` trains as ``single`` and answers with the logits of two stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from strategy_runs import Runs, factors, rows
from torch import Tensor

from peso.errors import ExportError
from peso.model.export import export_merged

pytestmark = pytest.mark.slow


def logits(model: Any) -> Tensor:
    ids = torch.from_numpy(model.layout.prompt(model.item_token_ids(np.array([2, 5, 9])))).long()[None]
    with torch.no_grad():
        hidden = model.hidden(ids, None, torch.arange(ids.shape[1])[None])
        found: Tensor = model.semantic_logits(hidden)
    return found


def test_each_stage_answers_with_its_logits_and_those_of_single_before(runs: Runs) -> None:
    blend, single = runs({"name": "blend", "share": 0.3}), runs("single")
    for stage in (1, 2):
        for module, pair in factors(blend, stage).items():
            of_single = factors(single, stage)[module]
            assert all(torch.equal(one, other) for one, other in zip(pair, of_single, strict=True))
        assert all(
            torch.equal(values, rows(single, stage)[name]) for name, values in rows(blend, stage).items()
        )
        new, last = (logits(single.stage(number).model()) for number in (stage, stage - 1))
        assert (new - last).abs().max() > 1e-3
        expected = 0.3 * new + 0.7 * last
        torch.testing.assert_close(logits(blend.stage(stage).model()), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(blend.stage(0).model()), logits(single.stage(0).model()))


def test_two_models_are_not_exported_as_one(runs: Runs, tmp_path: Any) -> None:
    with pytest.raises(ExportError, match="averages the logits of two models"):
        export_merged(runs({"name": "blend", "share": 0.3}).stage(1).model(), tmp_path / "m")
