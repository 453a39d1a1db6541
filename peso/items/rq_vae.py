"""RQ-VAE: an autoencoder whose latent is quantized with residual codebooks (TIGER, arXiv 2305.05065; LC-Rec).

The residual quantizer, whose codebooks start from k-means and are moving averages, is that of
vector-quantize-pytorch. The result of the training is stored as plain arrays.

    loss = ‖x − decoder(ẑ)‖² + β Σ_l ‖r_l − sg(e_l[c_l])‖²,   ẑ = Σ_l e_l[c_l], straight-through gradients
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from peso.config import RqVaeConfig
from peso.items.codebooks import Fitted, Layers, ResidualCodebooks
from peso.runtime.machine import threads
from peso.runtime.progress import Observer

DECAY = 0.99  # the decay of the moving averages
UNUSED = 0.5  # a code that fewer items of a batch choose on average is moved to one of the items
START_ITEMS = 65_536  # the largest number of vectors for the k-means start
SHOWN = 20  # the number of steps between two progress reports


def fit_rq_vae(
    vectors: np.ndarray, sizes: Sequence[int], config: RqVaeConfig, seed: int, observer: Observer
) -> Fitted:
    """Fit codebooks with these numbers of codes to vectors, float32 (n, width), by training an RQ-VAE.

    The result is the same for the same seed on the same machine.
    """
    from vector_quantize_pytorch import ResidualVQ

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
        widths = [data.shape[1], *config.hidden, config.latent]
        encoder, decoder = _network(widths), _network(widths[::-1])
        quantizer = ResidualVQ(
            dim=config.latent,
            codebook_size=tuple(sizes),
            kmeans_init=True,
            decay=DECAY,
            threshold_ema_dead_code=UNUSED,
            commitment_weight=config.commitment,
            rotation_trick=False,
        )
        with threads(nn.ModuleList([encoder, quantizer, decoder])):
            _train(encoder, quantizer, decoder, data, config, observer)
    codebooks = tuple(level.codebook.detach().numpy().astype(np.float32).copy() for level in quantizer.layers)
    fitted = ResidualCodebooks(codebooks, _arrays(encoder), _arrays(decoder))
    return Fitted(fitted, fitted.nearest(fitted.latent(vectors)))


def _train(
    encoder: nn.Module,
    quantizer: nn.Module,
    decoder: nn.Module,
    data: Tensor,
    config: RqVaeConfig,
    observer: Observer,
) -> None:
    observer.begin("RQ-VAE", config.steps, "steps")
    with torch.no_grad():  # k-means runs in the first forward pass, which should have many items
        quantizer(encoder(data[torch.randperm(len(data))[:START_ITEMS]])[None])
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *decoder.parameters()], lr=config.learning_rate, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for step, rows in enumerate(itertools.islice(_batches(len(data), config.batch_size), config.steps), 1):
        batch = data[rows]
        quantized, _, commitment = quantizer(encoder(batch)[None])
        error = functional.mse_loss(decoder(quantized[0]), batch, reduction="sum") / len(batch)
        loss = error + commitment.sum() * config.latent  # the library averages over the width
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % SHOWN == 0 or step == config.steps:
            observer.advance(step, error=float(error.detach()))


def _batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(items).split(size)


def _network(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, (width, following) in enumerate(itertools.pairwise(widths)):
        layers.extend(([nn.ReLU()] if number else []) + [nn.Linear(width, following)])
    return nn.Sequential(*layers)


def _arrays(network: nn.Sequential) -> Layers:
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    return tuple(
        (layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in linear
    )
