"""An exported model, loaded by plain Transformers, generates our recommendations."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peso.adapters.lora import adapter_parameters, add_adapter
from peso.decoding import beam_search
from peso.model.export import export_merged


def children_of(tokenizer, semantic_ids) -> dict[tuple[int, ...], list[int]]:
    """The catalogue as token ids of the exported tokenizer: prefix → what may follow."""
    children: dict[tuple[int, ...], set[int]] = {}
    for item in semantic_ids.item_ids:
        ids = tokenizer.encode("".join(semantic_ids.semantic_id(item)), add_special_tokens=False)
        for level, token in enumerate(ids):
            children.setdefault(tuple(ids[:level]), set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in children.items()}


@pytest.mark.parametrize("layout", ["stream", "instruct"])
@pytest.mark.parametrize("tied", [True, False])
def test_generate_under_a_trie_gives_our_top_ten(make_model, tmp_path, layout, tied):
    model = make_model(layout=layout, loss_vocabulary="full", items=40, sizes=(5, 6, 7), tied=tied)
    model.backbone = add_adapter(model.backbone, 4, 8, 0.0, ["q_proj", "up_proj"], seed=1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    history = ["item3", "item17", "item29"]
    ours = beam_search(model, [history], k=10)[0]

    export_merged(model, tmp_path / "merged")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = model.semantic_ids
    prompt = torch.from_numpy(model.layout.prompt(model.item_token_ids(ids.rows(history))))[None]
    children = children_of(tokenizer, ids)
    levels = ids.levels
    found = exported.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=10,
        num_return_sequences=10,
        max_new_tokens=levels,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda _, text: children[tuple(text[prompt.shape[1] :].tolist())],
        return_dict_in_generate=True,
        output_scores=True,
    )
    theirs = [tokenizer.convert_ids_to_tokens(row[-levels:]) for row in found.sequences]
    scores = found.sequences_scores.numpy()
    # items of one ID share its place and score; generate ranks IDs
    ranked = list(dict.fromkeys((tuple(ids.semantic_id(item)), score) for item, score in ours))
    assert all(a > b + 1e-5 for a, b in pairwise(scores)), "ties: choose another seed"
    assert [list(name) for name, _ in ranked] == theirs[: len(ranked)]
    np.testing.assert_allclose([score for _, score in ranked], scores[: len(ranked)], atol=1e-4)
