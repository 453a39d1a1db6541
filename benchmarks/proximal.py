"""The softmax-KL term: its cost in a training step, and its accuracy compared with the textbook form.

    python benchmarks/proximal.py [--quick] [--json] [--device cpu|cuda]

Cost: a model of SmolLM2-135M's shape (random weights) with LoRA r = 8 on the seven linear targets, batch 8 ×
128 tokens. A step consists of forward pass, backward pass and AdamW, with Transformers and PEFT only. The
time of the term includes its value, its backward pass and the addition to the existing gradients.
`step_share` is this time divided by that of a step, and `naive_share` the same for a loop over the modules
with the textbook form in autograd. The other shares are for the other terms: in the loss, decoupled
(`after_step`), and for `output_kl` the additional time of an observed step. On a small adapter (56 groups,
77,312 values, as for `scratch`), the number of operations determines the time: `small` is the best of many
runs, with the groups found once as in `peso`, together with the time of the search over the modules that
this saves.

Accuracy is the relative error of value and gradient (in norm) compared with float64, for groups of 16,384
values, an anchor of N(0, 0.02²) and steps of N(0, step²). The textbook form computes the softmax, adds 1e-8
and takes the logarithm of the ratio, in the parameters' dtype. A bfloat16 parameter can only take steps on
its grid, so the error is relative to the KL of the rounded values. Gradients from autograd are rounded to
the parameter's dtype (bfloat16: 3 digits).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import peft
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import peso
from peso.adapters.groups import Group, find_groups
from peso.adapters.proximal import Term
from peso.adapters.proximal.metrics import Prior, softmax_kl
from peso.model.backbone import small_llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, LENGTH = 8, 128
GROUP_SIZE, STEPS = 16_384, (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def textbook_kl(current: Tensor, anchor: Tensor) -> Tensor:
    """Σ s·log(s/p) as it is usually written, 1e-8 against the logarithm of zero."""
    s = torch.softmax(current.flatten(), -1) + 1e-8
    p = torch.softmax(anchor.flatten(), -1) + 1e-8
    return (s * (s / p).log()).sum()


def adapted_model(device: torch.device) -> peft.PeftModel:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # PEFT keeps the adapter in float32
    backbone = LlamaForCausalLM(config).to(device, dtype)
    adapter = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS)
    return peft.get_peft_model(backbone, adapter)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cost(device: torch.device, repetitions: int) -> dict[str, float]:
    """Medians over interleaved repetitions, so that whatever else the machine does weighs on all alike."""
    model = adapted_model(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(49152, (BATCH, LENGTH), device=device)
    term = peso.SoftmaxKL()
    term.anchor(model)
    before: list[Group] = [group.snapshot() for group in find_groups(model)]

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    def ours() -> None:
        term(model).backward()

    def naive() -> None:
        total = sum(textbook_kl(v.tensor, a.tensor) for v, a in zip(find_groups(model), before, strict=True))
        (2.0 / (len(before) // 2) * total).backward()

    def watched() -> None:
        optimizer.zero_grad()
        with output_kl.watch(model):
            loss = model(input_ids=ids, labels=ids).loss
        (loss + output_kl(model)).backward()
        optimizer.step()

    output_kl = peso.OutputKL(weight=1.0)
    output_kl.anchor(model)
    works = {"step": step, "term": ours, "naive": naive, "watched": watched, **family(model)}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(repetitions + 1):  # the first only warms up
        for name, work in works.items():
            second = seconds(work, device)
            if repetition:
                taken[name].append(second)
    median = {name: statistics.median(values) for name, values in taken.items()}
    median["output_kl"] = median.pop("watched") - median["step"]
    return {
        "step_share": median["term"] / median["step"],
        **{f"{name}_share": median[name] / median["step"] for name in median if name not in ("step", "term")},
        **{f"{name}_milliseconds": value * 1e3 for name, value in median.items()},
        "groups": len(before),
        "values": sum(group.tensor.numel() for group in before),
    }


def family(model: peft.PeftModel) -> dict[str, Callable[[], None]]:
    """A step of each of the other terms: value, backward and addition to the gradients; or `after_step`."""
    fisher = {group.name: torch.rand_like(group.tensor) for group in find_groups(model)}
    in_loss: dict[str, Term] = {
        "auto": peso.SoftmaxKL(temperature="auto"),
        "per_rank_kl": peso.PerRankKL(),
        "l2": peso.L2(weight=1.0),
        "fisher": peso.Fisher(weight=1.0),
        "orthogonal": peso.Orthogonal(),
    }
    decoupled: dict[str, Term] = {
        "decoupled_softmax_kl": peso.SoftmaxKL(strength=1e-3, coupling="decoupled"),
        "decoupled_l2": peso.L2(strength=1e-3, coupling="decoupled"),
    }
    for term in (*in_loss.values(), *decoupled.values()):
        term.anchor(model, **{"fisher": fisher} if term.needs_losses else {})
    return {
        **{name: partial(lambda each: each(model).backward(), term) for name, term in in_loss.items()},
        **{name: partial(term.after_step, model, 1e-3, 1.0) for name, term in decoupled.items()},
    }


def small(device: torch.device, repetitions: int) -> dict[str, float]:
    """Milliseconds of a step's calls on the adapter of a Llama of width 128 with 4 layers."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    model = peft.get_peft_model(small_llama(128, 4, 0), config).to(device)
    found = find_groups(model)
    parameters = [group.tensor for group in found]
    works: dict[str, Callable[[], object]] = {"walk": lambda: find_groups(model)}
    for name, kind in (("softmax_kl", peso.SoftmaxKL), ("l2", peso.L2)):
        term, pulled = kind(weight=1.0), kind(strength=1e-3, coupling="decoupled")
        term.anchor(found)
        pulled.anchor(found)
        works[name] = partial(lambda each: torch.autograd.grad(each(found), parameters), term)
        works[f"decoupled_{name}"] = partial(pulled.after_step, found, 1e-3, 1.0)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            taken[name].append(seconds(work, device))
    return {name: min(values) * 1e3 for name, values in taken.items()}


def exact(current: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64, mean-centered so that nothing cancels at these distances."""
    a, d = anchor.double(), current.double() - anchor.double()
    p = torch.softmax(a, -1)
    d = d - (p * d).sum()
    z = (p * (torch.expm1(d) - d)).sum()
    kl = (p * d * torch.expm1(d)).sum() / (1 + z) - torch.log1p(z)
    return kl, p * torch.exp(d) / (1 + z) * (d - torch.log1p(z) - kl)


def accuracy(device: torch.device, dtype: torch.dtype, step: float) -> dict[str, float | str]:
    generator = torch.Generator().manual_seed(0)
    anchor = (torch.randn(GROUP_SIZE, generator=generator) * 0.02).to(dtype)
    current = (anchor.float() + torch.randn(GROUP_SIZE, generator=generator) * step).to(dtype)
    anchor, current = anchor.to(device), current.to(device)
    true_kl, true_gradient = exact(current.cpu(), anchor.cpu())

    displacement = current.float().unsqueeze(0) - anchor.float().unsqueeze(0)
    kl, gradient = softmax_kl(displacement, Prior.of(anchor.float().unsqueeze(0)))
    parameter = current.clone().requires_grad_()
    textbook = textbook_kl(parameter, anchor)
    (textbook_gradient,) = torch.autograd.grad(textbook, parameter)

    def errors(value: Tensor, slope: Tensor) -> tuple[float, float, float]:
        value, slope = value.detach().double().cpu(), slope.double().cpu().flatten()
        return (
            float((value - true_kl).abs() / true_kl),
            float((slope - true_gradient).norm() / true_gradient.norm()),
            float(torch.cosine_similarity(slope, true_gradient, dim=0)),
        )

    ours, theirs = errors(kl, gradient), errors(textbook, textbook_gradient)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "step": step,
        "kl": float(true_kl),
        "value_error": ours[0],
        "gradient_error": ours[1],
        "textbook_value_error": theirs[0],
        "textbook_gradient_error": theirs[1],
        "textbook_gradient_cosine": theirs[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 repetitions instead of 10")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    rows = [accuracy(device, dtype, step) for dtype in (torch.float32, torch.bfloat16) for step in STEPS]
    measured = cost(device, repetitions=3 if arguments.quick else 10)
    result = {
        **measured,
        "small": small(device, 300),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "accuracy": rows,
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"{measured['groups']} groups, {measured['values']:,} values, {device}, {result['threads']} threads"
    )
    print(f"{'one training step':>28} {measured['step_milliseconds']:9.1f} ms")
    for name in ("term", *(key.removesuffix("_share") for key in measured if key.endswith("_share"))):
        if name != "step":
            share = measured["step_share" if name == "term" else f"{name}_share"]
            print(f"{name:>28} {measured[f'{name}_milliseconds']:9.1f} ms {share:8.2%} of the step")
    told = ", ".join(f"{name} {value:.2f} ms" for name, value in result["small"].items())
    print(f"small adapter, groups found once: {told}")
    print(f"\nrelative error against float64, groups of {GROUP_SIZE:,} values")
    print("dtype         step         KL |   value  gradient | textbook: value  gradient  cosine")
    for row in rows:
        print(
            f"{row['dtype']:<10} {row['step']:7.0e} {row['kl']:10.1e} |"
            f" {row['value_error']:7.0e}  {row['gradient_error']:8.0e} |"
            f"       {row['textbook_value_error']:9.1e} {row['textbook_gradient_error']:9.1e}"
            f" {row['textbook_gradient_cosine']:7.2f}"
        )


if __name__ == "__main__":
    main()
