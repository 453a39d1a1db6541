"""Models that several threads load at once are whole, although Transformers replaces functions meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from peso.model.backbone import byte_tokenizer, load_backbone, small_llama


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    """The directory of a small Llama whose head is the embedding, so that its file has no weights for it."""
    small_llama(32, 1, seed=3).save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    return str(tmp_path / "backbone")


def test_threads_that_load_at_once_get_whole_models(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tie, within, most = PreTrainedModel.tie_weights, 0, 0
    load, init = AutoModelForCausalLM.from_pretrained, torch.nn.init.normal_

    def slowly(*arguments: Any, **options: Any) -> Any:
        nonlocal within, most
        within += 1
        most = max(most, within)
        time.sleep(0.05)  # in which an unguarded thread would come in
        try:
            return load(*arguments, **options)
        finally:
            within -= 1

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slowly)
    expected = small_llama(32, 1, seed=3).state_dict()
    with ThreadPoolExecutor(8) as threads:
        loaded = [threads.submit(load_backbone, backbone) for _ in range(4)]
        made = [threads.submit(small_llama, 32, 1, 3) for _ in range(4)]
    for model in [*(each.result()[0] for each in loaded), *(each.result() for each in made)]:
        for name, weights in model.state_dict().items():
            assert torch.equal(weights, expected[name]), name
    assert most == 1
    assert PreTrainedModel.tie_weights is tie
    assert torch.nn.init.normal_ is init
