"""What the network is worth, from SASRec to a Llama that reads codes, step by step.

    python benchmarks/networks.py W [--networks NAME …] [--seeds N …] [--width N] [--quick] [--json]

W is a workspace with a trained model that counts transitions; its stream, its semantic IDs and its counts are
used, not its network. Each network below is trained by the procedure of the baseline `sasrec` (all weights,
the same loss over items, the same setting: `learning_rate: 1e-3`, `dropout: 0.5`, `weight_decay: 0.3`) on all
stages in succession, and each differs from the one before it in one respect:

    sasrec      the baseline
    llama       the layers of a Llama, with rotary instead of learned positions
    undropped   without dropout of the attention weights, which `backbone.dropout` has not either
    unscaled    item vectors are not multiplied by √width where they are read
    summed      an item is read as the mean of the vectors of its codes, not as a vector of its own
    codes       an item is read as its codes, one position each
    both        its vector is added to the last of these codes, as a model of `peso` reads it

`model` is the workspace's own model, as it was trained, by codes and item head. It has one seed, that of the
workspace.

All networks score items by the vectors of a table with a row for each item. Printed are NDCG@10 and the
log-probability of the targets, on the validation and test cases of stage 0 and of the later stages: of the
network, and of its product with the counts, p(network and counts, prior 30)^0.5 · p(network)^0.5. Items that
users have had are left out if the baseline leaves them out, and the temperature of a network is fitted as
that of `sasrec`. Nothing else is tuned. `--quick` trains two epochs: to see that it works.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pool_forms import PRIORS, counted, figures, of_codes, of_items, seen_ids, share_of
from torch import Tensor, nn

from peso.baselines.baseline import BaselineAnswers, Setting, repeats_occur
from peso.baselines.networks import CausalItems, seeded
from peso.baselines.sasrec import SasRec
from peso.decoding.pool import Evidence
from peso.events.histories import Cases
from peso.model.backbone import add_dropout, small_llama
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

NETWORKS = "sasrec", "llama", "undropped", "unscaled", "summed", "codes", "both"
MODEL = "model"
SETTING = {"learning_rate": 1e-3, "dropout": 0.5, "weight_decay": 0.3}


class LlamaItems(CausalItems):
    """A small Llama in place of SASRec's layers.

    Args:
        codes: int64 (items, levels), or None if items are not read by their codes.
        positions: whether each code has a position of its own.
        own: whether items are read by vectors of their own.
        dropped: whether attention weights are dropped in training.
        scaled: whether what is read is multiplied by √width.
    """

    def __init__(
        self,
        items: int,
        sasrec: SasRec.Options,
        codes: Tensor | None,
        *,
        positions: bool,
        own: bool,
        dropped: bool,
        scaled: bool,
    ) -> None:
        nn.Module.__init__(self)
        width = sasrec.width
        self.item = nn.Embedding(items + 1, width, padding_idx=items)
        self.bias = nn.Parameter(torch.zeros(items))
        nn.init.normal_(self.item.weight, std=width**-0.5)
        with torch.no_grad():
            self.item.weight[items] = 0
        self.positions, self.own, self.scale = positions, own, width**0.5 if scaled else 1.0
        self.read = None
        if codes is not None:
            levels, size = codes.shape[1], int(codes.max()) + 1
            rows = codes + size * torch.arange(levels)
            padding = torch.full((1, levels), size * levels)
            self.register_buffer("rows", torch.cat([rows, padding]), persistent=False)
            self.read = nn.Embedding(size * levels + 1, width, padding_idx=size * levels)
            nn.init.normal_(self.read.weight, std=width**-0.5)
            with torch.no_grad():
                self.read.weight[-1] = 0
        llama = small_llama(
            width, sasrec.layers, int(torch.randint(2**31, ())), initializer_range=width**-0.5
        )
        llama.set_attn_implementation("sdpa")
        dropout = cast(float, sasrec.dropout)
        for layer in llama.model.layers:
            layer.self_attn.attention_dropout = dropout if dropped else 0.0
        add_dropout(llama, dropout)
        del llama.model.embed_tokens
        self.llama = llama.model

    def forward(self, items: Tensor) -> Tensor:
        if self.read is None:
            return self._states(self.item(items))
        codes = self.read(cast(Tensor, self.rows)[items])  # (n, length, levels, width)
        if not self.positions:
            return self._states(codes.mean(2))
        if self.own:
            codes = torch.cat([codes[:, :, :-1], codes[:, :, -1:] + self.item(items).unsqueeze(2)], 2)
        return self._states(codes.flatten(1, 2))[:, codes.shape[2] - 1 :: codes.shape[2]]

    def _states(self, embedded: Tensor) -> Tensor:
        states: Tensor = self.llama(inputs_embeds=self.scale * embedded, use_cache=False).last_hidden_state
        return states


class Trained(SasRec):
    """SASRec's training of one of the networks. Attributes are set before anything is learned."""

    kind = "sasrec"
    codes: Tensor

    def initialized(self) -> CausalItems:
        if self.kind == "sasrec":
            return super().initialized()
        step = NETWORKS.index(self.kind)

        def make() -> LlamaItems:
            return LlamaItems(
                self.items,
                self.used,
                self.codes if self.kind in ("summed", "codes", "both") else None,
                positions=self.kind in ("codes", "both"),
                own=self.kind not in ("summed", "codes"),
                dropped=step < NETWORKS.index("undropped"),
                scaled=step < NETWORKS.index("unscaled"),
            )

        return cast(CausalItems, seeded([self.seed, self.items, 3], make)).to(self.device).eval()


def trained(kind: str, codes: Tensor, setting: Setting, options: dict[str, Any]) -> Trained:
    """A new network of this kind."""
    baseline = type(kind, (Trained,), {"kind": kind, "codes": codes})(setting, **options)
    return cast(Trained, baseline)


def of_answers(answers: BaselineAnswers, cases: Cases) -> np.ndarray:
    """The probabilities of all semantic IDs by a network: float64 (cases, leaves)."""
    return np.exp(answers.log_probabilities(cases))


def codes_and_head(stage: RunStage, cases: Cases) -> np.ndarray:
    """The same by the model of a stage, without its counts."""
    model = stage.answering_model()
    share = share_of(model, cases)
    return share * of_items(model, cases) + (1 - share) * of_codes(stage, model, cases)


def measure(workspace: Workspace, kind: str, seed: int, options: dict[str, Any], most: int) -> dict[str, Any]:
    """The figures of one network on stage 0 and over the later stages of a workspace."""
    stream, ids, window = workspace.stream, workspace.semantic_ids, workspace.config.prompt.window
    trie, codes = ids.trie, torch.from_numpy(np.asarray(ids.codes).astype(np.int64))
    depth = workspace.config.decoding.beams
    network = None
    if kind != MODEL:
        network = trained(kind, codes, Setting(trie, window, seed, depth=depth), options)
    learned, found = [], dict[str, list[dict[str, np.ndarray]]]()
    for number in range(stream.stages):
        stages = [stream.stage(each) for each in range(number + 1)]
        validation = stages[-1].validation_cases(window)
        probabilities: Callable[[Cases], np.ndarray]
        if network is None:
            learned.append(workspace.stage(number).metrics["training"])
            probabilities = partial(codes_and_head, workspace.stage(number))
        else:
            learned.append(network.learn(stages, Silent()))
            answers = BaselineAnswers.fitted(network, trie, validation, repeats=repeats_occur(stages))
            probabilities = partial(of_answers, answers)
        transitions = workspace.stage(number).answering_model().transitions
        if transitions is None:
            raise SystemExit(f"{workspace.root}: the model has no counts of transitions")
        for name, cases in (
            ("validation", validation.spread(most)),
            ("test", stages[-1].test_cases(window).spread(most)),
        ):
            targets, seen = trie.leaf_of[cases.targets], seen_ids(cases, trie.leaf_of, trie.leaves)
            alone = probabilities(cases)
            evidence = Evidence.of(transitions, trie, cases.histories, torch.device("cpu"))
            product = np.sqrt(alone * counted(alone, evidence, PRIORS[0]))
            product /= product.sum(1, keepdims=True)
            name = name if number else f"stage 0, {name}"
            found.setdefault(name, []).append(figures(alone, targets, seen))
            found.setdefault(f"{name}, with counts", []).append(figures(product, targets, seen))
    result: dict[str, Any] = {
        "network": kind,
        "seed": workspace.config.seed if kind == MODEL else seed,
        "best_epochs": [each["best_epoch"] for each in learned],
        "seconds": [each["seconds"] for each in learned],
    }
    for name, stages_found in found.items():
        for key, short in (("ndcg", "NDCG@10"), ("log", "log-probability")):
            result[f"{name}: {short}"] = float(np.concatenate([one[key] for one in stages_found]).mean())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspace", type=Path, help="a workspace with a trained model")
    parser.add_argument("--networks", nargs="+", choices=(*NETWORKS, MODEL), default=NETWORKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="two epochs, one seed, 64 cases of each stage")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each network and seed")
    arguments = parser.parse_args()
    workspace = Workspace.open(arguments.workspace)
    options = {**SETTING, "width": arguments.width, **({"epochs": 2} if arguments.quick else {})}
    for seed in arguments.seeds[: 1 if arguments.quick else None]:
        for kind in arguments.networks:
            if kind == MODEL and seed != arguments.seeds[0]:
                continue
            result = measure(workspace, kind, seed, options, 64 if arguments.quick else 1_000_000)
            if arguments.json:
                print(json.dumps(result), flush=True)
                continue
            print(f"{kind}, seed {result['seed']}, best epochs {result['best_epochs']}", flush=True)
            for name, value in result.items():
                if ":" in name:
                    print(f"    {name} {value:.4f}", flush=True)


if __name__ == "__main__":
    main()
