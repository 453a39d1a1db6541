"""What is exported is the model: read by Transformers and PEFT in a process that knows nothing of peso."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_families import GPT, HEAD, SERVES
from backbone_families import build as build_family
from catalogs import random_semantic_ids
from safetensors.torch import load_file
from scipy.sparse import csr_array
from transformers import AutoModelForCausalLM

from peso.adapters.lora import adapter_parameters
from peso.config import AdapterConfig, BackboneConfig, HeadConfig, PromptConfig
from peso.errors import AssetError, ExportError
from peso.items.catalog_files import write_catalog
from peso.model.build import build_model, round_frozen
from peso.model.export import PromptText, export_merged, export_peft
from peso.model.generative import GenerativeModel
from peso.model.transitions import Transitions
from peso.runtime import assets

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = random_semantic_ids(30, (5, 6, 7))
# name → (family, what its configuration needs beside the common part, layout)
BACKBONES = {
    "tied": ("llama", {"tie_word_embeddings": True}, "stream"),
    "untied": ("llama", {"tie_word_embeddings": False}, "instruct"),
    "unpadded": ("llama", {"vocab_size": 258}, "instruct"),
    "scaled embedding": ("gemma", HEAD, "stream"),
    "capped logits": ("gemma2", SERVES["gemma2"] | {"sliding_window": 512}, "instruct"),
    "scaled logits": ("cohere", SERVES["cohere"], "stream"),
    "divided logits": ("granite", SERVES["granite"], "stream"),
    "transposed layers": ("gpt2", GPT, "stream"),
    "biased head": ("phi", {}, "instruct"),
}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "phi": ["q_proj", "fc1"]}

# Everything a user of Transformers or PEFT writes, and nothing of ours.
READER = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
logits = {}
result = {}
for task in json.load(open(sys.argv[1])):
    folder = task["folder"]
    if task["form"] == "merged":
        place, model = folder, AutoModelForCausalLM.from_pretrained(folder)
    else:
        place = folder + "/backbone"
        base = AutoModelForCausalLM.from_pretrained(place)
        model = PeftModel.from_pretrained(base, folder + "/adapter")
    tokenizer = AutoTokenizer.from_pretrained(place)
    with torch.no_grad():
        logits[folder] = model.eval()(input_ids=torch.tensor([task["ids"]])).logits[0]
    result[folder] = {
        "ids": tokenizer(task["text"])["input_ids"],
        "written": tokenizer.decode(task["ids"]),
        "tied": model.config.tie_word_embeddings,
        "rows": len(model.get_output_embeddings().weight),
    }
assert not [name for name in sys.modules if name.split(".")[0] == "peso"]
json.dump(result, open(sys.argv[2], "w"))
save_file(logits, sys.argv[3])
"""


def trained(
    backbone: BackboneConfig, layout: str, targets: list[str] | None = None, head: HeadConfig | None = None
) -> GenerativeModel:
    """A model whose adapter and rows are far from fresh."""
    adapter = AdapterConfig(rank=2, alpha=4, **({"targets": targets} if targets else {}))
    model = build_model(
        backbone, PromptConfig(layout=layout), adapter, "full", CATALOGUE, seed=0, head=head
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*adapter_parameters(model).values(), *model.vocabulary.parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def prompt_of(model: GenerativeModel, rows: list[int]) -> tuple[list[int], str]:
    text = PromptText.of(model)
    items = ["".join(CATALOGUE.semantic_id(CATALOGUE.item_ids[row])) for row in rows]
    return model.layout.prompt(model.item_token_ids(np.array(rows))).tolist(), text.prompt(items)


@torch.no_grad()
def own_logits(model: GenerativeModel, ids: list[int]) -> torch.Tensor:
    hidden = model.hidden(torch.tensor([ids]), None, torch.arange(len(ids))[None])[0]
    return torch.cat([model.word_logits(hidden), model.semantic_logits(hidden)], dim=-1)


def read_elsewhere(tasks: list[dict], folder: Path) -> dict:
    (folder / "tasks.json").write_text(json.dumps(tasks))
    files = [str(folder / name) for name in ("tasks.json", "result.json", "logits.safetensors")]
    done = subprocess.run([sys.executable, "-c", READER, *files], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    logits = load_file(files[2])
    read = json.loads((folder / "result.json").read_text())
    return {place: result | {"logits": logits[place]} for place, result in read.items()}


def agrees(model: GenerativeModel, task: dict, read: dict) -> None:
    ours, theirs = own_logits(model, task["ids"]), read["logits"].float()
    assert theirs.shape == ours.shape  # a padded vocabulary is cut to the words and the semantic tokens
    assert (theirs - ours).abs().max() < 1e-4 * max(1.0, ours.abs().max().item())
    assert read["ids"] == task["ids"]
    assert read["tied"] is False
    assert read["rows"] == model.vocabulary.first_id + len(model.vocabulary)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict:
    """(backbone, form) → (model, task, what the other process read)."""
    folder = tmp_path_factory.mktemp("exports")
    models, tasks = {}, {}
    for name, (family, extra, layout) in BACKBONES.items():
        place = build_family(family, extra, folder / f"{name} backbone")
        model = trained(BackboneConfig(name=place), layout, TARGETS.get(family))
        ids, text = prompt_of(model, [3, 17, 4])
        for form, export in (("merged", export_merged), ("peft", export_peft)):
            target = folder / f"{name} {form}"
            export(model, target)
            models[name, form] = model
            tasks[name, form] = {"folder": str(target), "form": form, "ids": ids, "text": text}
    whole = build_model(BackboneConfig(name="tiny"), PromptConfig(), None, "full", CATALOGUE, seed=0).eval()
    export_merged(whole, folder / "whole")
    ids, text = prompt_of(whole, [1, 2])
    models["whole", "merged"] = whole
    tasks["whole", "merged"] = {"folder": str(folder / "whole"), "form": "merged", "ids": ids, "text": text}
    read = read_elsewhere(list(tasks.values()), folder)
    return {key: (models[key], task, read[task["folder"]]) for key, task in tasks.items()}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "peft"])
@pytest.mark.parametrize("name", BACKBONES)
def test_elsewhere_it_gives_our_logits_and_reads_our_prompts(name: str, form: str, exported: dict) -> None:
    agrees(*exported[name, form])


@pytest.mark.slow
def test_semantic_tokens_are_content(exported: dict) -> None:
    _, task, read = exported["untied", "merged"]
    assert read["written"] == task["text"]


@pytest.mark.slow
def test_the_adapter_holds_the_rows_where_peft_can_apply_them(exported: dict) -> None:
    for name, rows in (("tied", 2), ("biased head", 1)):
        folder = Path(exported[name, "peft"][1]["folder"])
        state = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert len([key for key in state if "trainable_tokens" in key]) == rows


@pytest.mark.slow
def test_without_its_adapter_the_extended_backbone_knows_nothing_of_us(exported: dict) -> None:
    model, task, _ = exported["tied", "peft"]
    weights = load_file(Path(task["folder"]) / "backbone" / "model.safetensors")
    first = model.vocabulary.first_id
    rows = weights["model.embed_tokens.weight"][first:]
    assert torch.equal(rows, rows[:1].expand_as(rows))
    assert torch.equal(
        weights["model.layers.0.self_attn.q_proj.weight"],
        model.causal_lm.model.layers[0].self_attn.q_proj.base_layer.weight,
    )


def test_the_model_in_memory_is_left_as_it_was(tmp_path: Path) -> None:
    model = trained(BackboneConfig(name="tiny"), "stream")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = model.causal_lm.config.to_dict()
    tokens = len(model.tokenizer)
    export_merged(model, tmp_path / "merged")
    export_peft(model, tmp_path / "peft")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.causal_lm.config.to_dict() == settings
    assert len(model.tokenizer) == tokens
    assert model.causal_lm.lm_head.weight is model.causal_lm.get_input_embeddings().weight


def test_merged_into_a_bfloat16_backbone_a_small_update_is_not_lost(tmp_path: Path) -> None:
    adapter = AdapterConfig(rank=2, alpha=4)
    model = build_model(
        BackboneConfig(name="tiny"),
        PromptConfig(),
        adapter,
        "full",
        CATALOGUE,
        seed=0,
    ).eval()
    round_frozen(model, torch.bfloat16)
    projection = model.causal_lm.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        projection.base_layer.weight.fill_(0.03)  # whose last digit is 1.2e-4
        for name, p in adapter_parameters(model).items():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
            p.mul_(0.002)
        model.vocabulary.output_rows.add_(1e-5)
    added = projection.get_delta_weight("default")
    assert 0 < added.abs().max() < 5e-5
    assert projection.base_layer.weight.dtype == torch.bfloat16
    export_merged(model, tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    weight = read.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(weight - projection.base_layer.weight.float(), added, atol=1e-8, rtol=1e-3)
    rows = read.get_output_embeddings().weight[model.vocabulary.first_id :]
    assert torch.equal(rows, model.vocabulary.output_rows)
    # products in bfloat16 of ours, rounding in every layer
    ids, _ = prompt_of(model, [3, 1])
    with torch.no_grad():
        theirs = read.eval()(input_ids=torch.tensor([ids])).logits[0]
    ours = own_logits(model, ids)
    assert (theirs - ours).abs().max() < 0.05 * ours.abs().max()


@pytest.mark.slow
def test_a_backbone_trained_whole_is_exported_merged_only(exported: dict, tmp_path: Path) -> None:
    model, task, read = exported["whole", "merged"]
    agrees(model, task, read)
    with pytest.raises(ExportError, match=r"no adapter.* --format merged"):
        export_peft(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("export", [export_merged, export_peft])
def test_a_taken_place_is_refused_and_an_empty_one_is_not(export, tmp_path: Path) -> None:
    model = trained(BackboneConfig(name="tiny", layers=1), "stream")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ExportError, match="is not empty"):
        export(model, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty")
    assert any((tmp_path / "empty").iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    model = trained(BackboneConfig(name="tiny", layers=1), "stream")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peso.model.export.write_json", full)
    with pytest.raises(Exception, match="no space left"):
        export_merged(model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_would_read_other_ids_is_refused(tmp_path: Path, monkeypatch) -> None:
    from transformers import AutoTokenizer

    model = trained(BackboneConfig(name="tiny", layers=1), "stream")
    load = AutoTokenizer.from_pretrained

    def without_tokens(directory):
        tokenizer = load(directory)
        tokenizer.add_tokens(["one more"])
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", without_tokens)
    with pytest.raises(ExportError, match="does not encode prompts as the model does"):
        export_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_prompt_text_lies_beside_the_model(tmp_path: Path) -> None:
    model = trained(BackboneConfig(name="tiny", layers=1), "stream")
    export_merged(model, tmp_path / "merged", leaves_out_seen=True)
    stored = json.loads((tmp_path / "merged" / "prompt.json").read_text())
    assert stored.pop("leaves_out_seen") is True
    assert stored.pop("layout") == "stream"
    assert stored.pop("loss_vocabulary") == model.loss_vocabulary
    assert stored.pop("codes") == list(model.semantic_ids.sizes)
    assert PromptText(**stored) == PromptText.of(model)
    assert stored["window"] == 20


def test_generation_is_greedy_and_ends_where_the_layout_ends(tmp_path: Path) -> None:
    model = trained(BackboneConfig(name="tiny", layers=1), "instruct")
    export_merged(model, tmp_path / "merged")
    stored = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert stored["eos_token_id"] == model.layout.end[0]
    assert not stored.get("do_sample", False)


@pytest.mark.slow
def test_smollm2_elsewhere_gives_our_logits_and_reads_our_prompts(tmp_path: Path) -> None:
    try:
        assets.pull("smollm2-135m")
    except AssetError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")
    models, tasks = [], []
    for layout, form, export in (("stream", "merged", export_merged), ("instruct", "peft", export_peft)):
        model = trained(BackboneConfig(name="smollm2-135m", layers=1), layout)
        ids, text = prompt_of(model, [3, 17, 4])
        export(model, tmp_path / form)
        models.append(model)
        tasks.append({"folder": str(tmp_path / form), "form": form, "ids": ids, "text": text})
    read = read_elsewhere(tasks, tmp_path)
    for model, task in zip(models, tasks, strict=True):
        agrees(model, task, read[task["folder"]])


RUNS = """
import contextlib, io, json, os, sys

written = []
for folder, snippet in json.load(sys.stdin):
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(snippet, {"__name__": "__main__"})
    written.append(out.getvalue())
assert "peso" not in sys.modules
print(json.dumps(written))
"""


@pytest.mark.slow
def test_the_snippets_of_the_documentation_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "how-to" / "export.md").read_text(encoding="utf-8")
    merged, peft, *of_head, catalog = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    snippets = (merged, peft, "\n".join(of_head), f"{catalog}print(token_ids.tolist())")
    model = trained(BackboneConfig(name="tiny", layers=1), "instruct", head=HeadConfig(name="items"))
    table = np.random.default_rng(0).random((len(CATALOGUE.item_ids),) * 2)
    model.transitions = Transitions(csr_array(table), recency=0.5, window=8, repeats=False, prior=30.0)
    tasks = []
    for number, (snippet, export) in enumerate(
        zip(snippets, (export_merged, export_peft, export_merged, export_merged), strict=True)
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        export(model, folder / "exported")
        write_catalog(model.semantic_ids, folder / "catalog")
        tasks.append((str(folder), snippet))
    done = subprocess.run(
        [sys.executable, "-c", RUNS], input=json.dumps(tasks), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout.splitlines()[-1])
    assert "<a_1><b_2><c_3>" in written[0]
    every = np.unique(model.item_token_ids(np.arange(len(CATALOGUE.item_ids))), axis=0)
    assert ast.literal_eval(written[3]) == every.tolist()
    tokens = torch.from_numpy(model.layout.prompt(model.item_token_ids(np.arange(2))))[None]
    with torch.no_grad():
        state = model.hidden(tokens, None, torch.arange(tokens.shape[1])[None])[:, -1]
        best = model.item_log_probabilities(state)[0].topk(10)
        of_items = model.item_log_probabilities(state)[0].numpy()
    of_head, of_both = (ast.literal_eval(line) for line in written[2].splitlines())
    assert [item for item, _ in of_head] == [CATALOGUE.item_ids[row] for row in best.indices]
    assert [score for _, score in of_head] == pytest.approx(best.values.tolist(), abs=1e-4)
    counts = model.transitions.evidence([np.arange(2)])[0]
    expected = np.log((counts + 30 * np.exp(of_items)) / (counts.sum() + 30))
    assert [item for item, _ in of_both] == [CATALOGUE.item_ids[row] for row in np.argsort(-expected)[:10]]
    assert [score for _, score in of_both] == pytest.approx(np.sort(expected)[:-11:-1].tolist(), abs=1e-4)
