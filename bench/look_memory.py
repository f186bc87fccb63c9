"""What deep queries keep of a vision tower: keys and values, or the layers' inputs.

    python bench/look_memory.py --frames 16

A DINOv2-small with random weights, looked at twice (coarse and fine), forward and backward on the
CPU. Bytes are what lives between the two, and at most, beside weights and their gradients.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel

from vlm.estimate.activations import Allocations
from vlm.models import vision
from vlm.models.vision import VisionEncoder

LOOKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=224)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "dinov2", hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518
    )
    encoder = VisionEncoder(AutoModel.from_config(config)).train()
    frames = torch.randint(0, 256, (args.frames, 3, args.side, args.side), dtype=torch.uint8)
    ways: dict[str, Callable[[], Tensor]] = {
        "keys and values, nothing recomputed": lambda: _look(encoder, frames, lean=False),
        "layer inputs, blocks recomputed": lambda: _look(encoder, frames, lean=True),
        "keys and values, blocks recomputed": lambda: _look_recomputed(encoder, frames),
    }
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sys.stdout.write("| kept | held MB | at most MB | forward and backward s | result |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for name, way in ways.items():
        held, peak, seconds, result = measure(way)
        row = f"{held / 1e6:.0f} | {peak / 1e6:.0f} | {seconds:.1f} | {result:.6f}"
        sys.stdout.write(f"| {name} | {row} |\n")


def measure(way: Callable[[], Tensor]) -> tuple[int, int, float, float]:
    """Bytes held for the backward pass, bytes at the worst moment, seconds, and what came out."""
    with Allocations(vocab_size=0) as watch:
        result = way()
        held = watch.live
        result.backward()
    started = time.perf_counter()
    way().backward()
    return held, watch.peak, time.perf_counter() - started, result.item()


def _look(encoder: VisionEncoder, frames: Tensor, lean: bool) -> Tensor:
    encoder.gradient_checkpointing = lean
    _, cache = encoder(frames)
    return _sum([encoder.look(query, cache) for query in _queries(encoder, frames)])


def _look_recomputed(encoder: VisionEncoder, frames: Tensor) -> Tensor:
    """Blocks are computed again, and their keys and values kept beside their inputs."""
    hidden, cache = encoder.tower.embeddings(encoder.normalise(frames)), []
    for layer in encoder.layers:
        hidden, kv = checkpoint(vision._patch_block, layer, hidden, None, use_reentrant=False)
        cache.append(kv)
    found = []
    for query in _queries(encoder, frames):
        for layer, kept in zip(encoder.layers, cache, strict=True):
            query = checkpoint(vision._query_block, layer, query, kept, False, use_reentrant=False)
        found.append(encoder.final_norm(query))
    return _sum(found)


def _queries(encoder: VisionEncoder, frames: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(frames), encoder.dim)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(LOOKS)]


def _sum(found: list[Tensor]) -> Tensor:
    return torch.stack([one[:, ::3].square().mean() for one in found]).sum()


if __name__ == "__main__":
    main()
