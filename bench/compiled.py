"""Whether torch.compile of a part makes a training step faster: on and off, part by part.

    python -m bench.compiled --layers 4

Forward and backward of a foveated model with the widths of DINOv2-small and SmolLM2-135M and few
layers, on micro-batches whose shapes differ, as they do in training. Ways take turns, and each time
is a median; compiling is told apart.
"""

import argparse
import statistics
import sys
import time
from unittest import mock

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vlm.batch import Batch, build_batch
from vlm.config_model import FoveationConfig
from vlm.models import vision
from vlm.models.foveated import FoveatedConfig, FoveatedModel

IMAGE, VOCABULARY, SIDE = 0, 8192, 112
#: (frames, text tokens) of the samples of each micro-batch
SHAPES = ([(4, 60), (4, 50)], [(8, 90)], [(2, 40), (3, 30), (1, 50)], [(6, 120)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    batches = [_batch(samples) for samples in SHAPES]
    compiled = torch.compile(vision._patch_block, dynamic=True)
    #: whether the language model's layers are compiled, and what computes a block of the tower
    ways = {
        "nothing": (False, vision._patch_block),
        "language layers": (True, vision._patch_block),
        "vision blocks": (False, compiled),
        "both": (True, compiled),
    }
    models = {name: _model(args.layers, language) for name, (language, _) in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for _ in range(1 + args.rounds):
        for name, (_, block) in ways.items():
            started = time.perf_counter()
            with mock.patch.object(vision, "_patch_block", block):
                losses[name] = sum(_step(models[name], batch) for batch in batches)
            seconds[name].append(time.perf_counter() - started)
    plain = statistics.median(seconds["nothing"][1:])
    sys.stdout.write("| compiled | first round s | a round s | speed | loss |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for name, (first, *later) in seconds.items():
        own = statistics.median(later)
        row = f"{first:.1f} | {own:.2f} | {plain / own:.2f} x | {losses[name]:.4f}"
        sys.stdout.write(f"| {name} | {row} |\n")


def _model(num_layers: int, compiled: bool) -> FoveatedModel:
    torch.manual_seed(0)
    tower = AutoConfig.for_model(
        "dinov2",
        hidden_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        image_size=SIDE,
    )
    lm = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=576,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
    )
    config = FoveatedConfig(
        vision_config=tower.to_dict(),
        language_config=lm.to_dict(),
        connector=FoveationConfig().model_dump(exclude={"gradient_checkpointing"}),
    )
    parts = AutoModel.from_config(tower), AutoModelForCausalLM.from_config(lm)
    model = FoveatedModel(config, *parts).train()
    if compiled:
        for layer in model.language.lm.model.layers:
            layer.compile(dynamic=True)
    return model


def _batch(samples: list[tuple[int, int]]) -> Batch:
    generator = torch.Generator().manual_seed(sum(map(sum, samples)))
    texts = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for _, n in samples]
    counts = [count for count, _ in samples]
    size = (sum(counts), 3, SIDE, SIDE)
    return build_batch(
        frames=torch.randint(0, 256, size, generator=generator).byte(),
        frame_counts=counts,
        input_ids=[[IMAGE] * n + text for n, text in zip(counts, texts, strict=True)],
        labels=[[-100] * n + text for n, text in zip(counts, texts, strict=True)],
        image_token_id=IMAGE,
        tokens_per_frame=1,
        keys=[str(i) for i in range(len(samples))],
        kind="video",
    )


def _step(model: FoveatedModel, batch: Batch) -> float:
    loss = model(batch).loss_sum / batch.num_losses
    loss.backward()
    model.zero_grad()
    return loss.item()


if __name__ == "__main__":
    main()
