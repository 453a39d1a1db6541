"""Whatever is a sum of adapters is one PEFT adapter, or one plain model, elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from strategy_runs import RANK, Runs
from transformers import AutoModelForCausalLM

from peso.errors import ExportError
from peso.model.export import export_merged, export_peft
from peso.model.generative import GenerativeModel

pytestmark = pytest.mark.slow

IDS = torch.tensor([[0, 70, 71, 260, 268, 261, 270, 259]])  # words and codes
SUMS: dict[str, tuple[Any, int]] = {  # strategy, rank of stage 3 in the rank of one adapter
    "single": ("single", 1),
    **{
        f"sum_lora {history} {inherit}": (
            {"name": "sum_lora", "history": history, "inherit": inherit},
            4 if history == "all" else 2,
        )
        for history in ("all", "latest")
        for inherit in (False, True)
    },
    "sd_lora": ("sd_lora", 4),
    "o_lora": ("o_lora", 4),
    "inf_lora": ({"name": "inf_lora", "threshold": 0.9, "examples": 20}, 4),
    "lsat arithmetic": ({"name": "lsat", "fusion": "arithmetic", "long_share": 0.3}, 2),
}


@torch.no_grad()
def own(model: GenerativeModel) -> torch.Tensor:
    hidden = model.hidden(IDS, None, torch.arange(IDS.shape[1])[None])[0]
    return torch.cat([model.word_logits(hidden), model.semantic_logits(hidden)], dim=-1)


@torch.no_grad()
def read(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", SUMS)
def test_both_forms_give_the_logits_of_the_stage(name: str, runs: Runs, tmp_path: Path) -> None:
    strategy, adapters = SUMS[name]
    model = runs(strategy).stage(3).model()
    export_merged(model, tmp_path / "merged")
    export_peft(model, tmp_path / "peft")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    extended = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "backbone")
    expected, plain = own(model), read(extended)
    assert (expected - plain).abs().max() > 1e-2  # the adapters do something
    torch.testing.assert_close(read(merged), expected, atol=1e-4, rtol=0)
    adapted = PeftModel.from_pretrained(extended, tmp_path / "peft" / "adapter")
    torch.testing.assert_close(read(adapted), expected, atol=1e-4, rtol=0)
    assert list(adapted.peft_config) == ["default"]
    config = json.loads((tmp_path / "peft" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == adapters * RANK


def test_a_backbone_that_was_fine_tuned_whole_is_exported_merged(runs: Runs, tmp_path: Path) -> None:
    model = runs("full").stage(3).model()
    export_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(read(merged), own(model), atol=1e-4, rtol=0)
    with pytest.raises(ExportError, match=r"its backbone was trained.*--format merged"):
        export_peft(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
