"""Linear layers packed by oneDNN, compared with PyTorch's own, on a CPU, in the shapes of SmolLM2-135M.

    python benchmarks/packed_layers.py [--quick] [--json] [--threads N]

`ratio` is the CPU time of the seven products of a layer with packed weights
(`peso.model.inference.PackedLinear`), divided by that with plain weights, by precision and number of rows: 4
rows are the new item of a returning user, 10 are the beams of a request, and 1,280 are the prompts of a
batch. The two take turns, and the figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peso.model.inference import PackedLinear

WIDTH, INNER, KEYS = 576, 1536, 192
SHAPES = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH)]
SHAPES += [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
ROWS = (1, 4, 10, 80, 320, 1280)
LAYERS = 8  # so that their weights are not all in a cache


def seconds(layers: Sequence[nn.Module], inputs: dict[int, Tensor]) -> float:
    started = time.process_time()
    for layer, (width, _) in zip(layers, SHAPES * LAYERS, strict=True):
        layer(inputs[width])
    return time.process_time() - started


@torch.no_grad()
def ratio(rows: int, dtype: torch.dtype, turns: int) -> float:
    plain = [nn.Linear(*shape, bias=False, dtype=dtype) for shape in SHAPES * LAYERS]
    packed = [PackedLinear(layer) for layer in plain]
    inputs = {width: torch.randn(rows, width, dtype=dtype) for width in (WIDTH, INNER)}
    seconds(plain, inputs), seconds(packed, inputs)  # warms up
    return statistics.median(seconds(packed, inputs) / seconds(plain, inputs) for _ in range(turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        str(dtype).removeprefix("torch."): {
            rows: ratio(rows, dtype, 3 if arguments.quick else 15) for rows in ROWS
        }
        for dtype in (torch.float32, torch.bfloat16)
    }
    if arguments.json:
        print(json.dumps({"ratio": result, "threads": arguments.threads}))
        return
    for precision, ratios in result.items():
        print(precision, ", ".join(f"{rows} rows: {value:.2f}" for rows, value in ratios.items()))


if __name__ == "__main__":
    main()
