"""Puts the training step beside HF Trainer and beside a bare PyTorch loop, in one interleaved run.

    python bench/step.py --recipe recipes/quickstart.yaml
    python bench/step.py --recipe recipes/quickstart.yaml --geometry 1.7b      (on a GPU)

Same model, samples, precision, optimizer and clipping for all; one process.

* ``toolkit``: loader, DeepSpeed engine and step of ``launch/train.py``; decoding is on its bill.
* ``bare``: forward, backward, clipping and AdamW on batches that were made before: the ceiling.
* ``hf``: HF Trainer with DeepSpeed. Samples decoded before, drawn at random, as many to a
  micro-batch as the toolkit's hold on average; padded to the longest text and most frames of it.

Real tokens only: neither padding nor its time is credited. ``--geometry`` takes a model's sizes
with random weights and batches of one shape, leaves ``hf`` out and measures model FLOPs
utilisation.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.hf import Sample, pad, samples_of, train_hf
from vlm import config
from vlm.batch import Batch, build_batch
from vlm.config import Recipe
from vlm.config_model import ModelConfig
from vlm.data.position import Position
from vlm.engine import ds_config, optim
from vlm.engine.cpu import on_cpu, prepare_cpu
from vlm.engine.setup import build_engine, start_process
from vlm.engine.step import read, train_step
from vlm.models import registry
from vlm.train import data

#: bf16 without sparsity
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}
LANGUAGE = {
    "135m": (576, 30, 9, 3, 1536),
    "1.7b": (2048, 24, 32, 32, 8192),
}
VOCAB, IMAGE, SIZE = 49_152, 3, 224
WARM_STEPS = 2


class Block(NamedTuple):
    """Some global steps of one contestant."""

    seconds: float
    num_tokens: int
    num_steps: int


def geometry(recipe: Recipe, name: str) -> Recipe:
    """The recipe with SmolLM2's and DINOv2-small's sizes at random."""
    hidden, layers, heads, kv_heads, inner = LANGUAGE[name]
    language = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "tie_word_embeddings": True,
    }
    vision = {"model_type": "dinov2", "image_size": SIZE, "patch_size": 14, "hidden_size": 384}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 6}
    changed = recipe.model.model_dump() | {
        "language": {"config": language, "gradient_checkpointing": True},
        "vision": {"config": vision, "gradient_checkpointing": True},
    }
    return recipe.model_copy(update={"model": ModelConfig.model_validate(changed)})


def random_batch(seed: int, samples: int, frames: int, text: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (samples, text), generator=made).tolist()
    pixels = torch.randint(0, 256, (samples * frames, 3, SIZE, SIZE), generator=made)
    return build_batch(
        frames=pixels.to(torch.uint8),
        frame_counts=[frames] * samples,
        input_ids=[[IMAGE] * frames + row for row in ids],
        labels=[[-100] * frames + row for row in ids],
        image_token_id=IMAGE,
        tokens_per_frame=1,
        keys=[str(i) for i in range(samples)],
        kind="video",
    )


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tokens_of(steps: Sequence[Sequence[Batch]]) -> int:
    return sum(batch.input_ids.numel() for step in steps for batch in step)


class Bare:
    """The same arithmetic without a toolkit."""

    def __init__(self, model: Any, recipe: Recipe, device: torch.device, clip: float) -> None:
        self.model, self.device, self.clip = model.to(device).train(), device, clip
        optim.freeze(self.model, recipe.model)
        self.optimizer, self.schedule = optim.optimizer(
            self.model, recipe, fused=device.type == "cuda"
        )

    def step(self, batches: Sequence[Batch]) -> None:
        tokens = sum(batch.num_loss_tokens for batch in batches)
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                output = self.model(batch)
            (output.loss_sum / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def run(self, steps: Sequence[Sequence[Batch]]) -> Block:
        ready = [[batch.to(self.device) for batch in step] for step in steps]
        wait(self.device)
        started = time.perf_counter()
        for batches in ready:
            self.step(batches)
        wait(self.device)
        return Block(time.perf_counter() - started, tokens_of(steps), len(steps))


def run_toolkit(engine: Any, source: Iterator[Sequence[Batch]], num_steps: int) -> Block:
    seen = []
    started = time.perf_counter()
    for _ in range(num_steps):
        batches = next(source)
        pending = train_step(engine, batches)
        seen.append(batches)
    read(pending)
    wait(engine.device)
    return Block(time.perf_counter() - started, tokens_of(seen), num_steps)


def loaded(recipe: Recipe, source: data.DataSource) -> Iterator[Sequence[Batch]]:
    with closing(data.steps(source, recipe, 0, 1, Position())) as steps:
        for step in steps:
            yield step.batches


def count_flops(bare: Bare, batches: Sequence[Batch]) -> float:
    """Of forward and backward of one global step, as the operators say."""
    with FlopCounterMode(display=False) as counter:
        bare.step([batch.to(bare.device) for batch in batches])
    return float(counter.get_total_flops())


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--ds_config", type=Path, default=Path("ds_configs/zero2.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="global steps of a round")
    parser.add_argument("--geometry", choices=LANGUAGE)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    cpu = on_cpu()
    if cpu:
        prepare_cpu()
    recipe = config.load(args.recipe, args.overrides)
    settings = ds_config.resolve(
        ds_config.load(args.ds_config),
        path=args.ds_config,
        recipe_path=args.recipe,
        micro_batches=recipe.data.micro_batches,
        world_size=1,
        cpu=cpu,
    )
    machine = start_process(recipe.train.cpu_threads)
    if args.geometry:
        recipe = geometry(recipe, args.geometry)
        made = [random_batch(i, 8, 16, 64) for i in range(recipe.data.micro_batches)]
        source, ceiling_steps = iter(lambda: made, None), iter(lambda: made, None)
        vocab = VOCAB
    else:
        tokenizer = data.load_tokenizer(recipe)
        opened = data.open_source(recipe, tokenizer, training=True)
        source, ceiling_steps = loaded(recipe, opened), loaded(recipe, opened)
        vocab = len(tokenizer)
    model = registry.build(recipe.model, vocab, recipe.seed)
    bare = Bare(copy.deepcopy(model), recipe, machine.device, settings["gradient_clipping"])
    plain = copy.deepcopy(model)
    engine = build_engine(model, recipe, settings, cpu)
    engine.train()
    run_toolkit(engine, source, WARM_STEPS)
    bare.run([next(ceiling_steps) for _ in range(WARM_STEPS)])
    blocks: dict[str, list[Block]] = {"toolkit": [], "bare": [], "hf": []}
    for _ in range(args.rounds):
        blocks["toolkit"].append(run_toolkit(engine, source, args.steps))
        steps = [next(ceiling_steps) for _ in range(args.steps)]
        blocks["bare"].append(bare.run(steps))
        if not args.geometry:
            samples = [one for step in steps for batch in step for one in samples_of(batch)]
            blocks["hf"].append(hf_block(plain, samples, recipe, settings, opened.collator))
    report(blocks)
    if args.geometry:
        report_mfu(blocks, count_flops(bare, made), args.steps, machine.device)
    return 0


def hf_block(
    model: Any, samples: list[Sample], recipe: Recipe, settings: dict[str, Any], collator: Any
) -> Block:
    def collate(chosen: list[Sample]) -> Batch:
        return pad(chosen, collator.image_token_id, collator.tokens_per_frame)

    return Block(*train_hf(copy.deepcopy(model), samples, recipe, settings, collate))


def report(blocks: dict[str, list[Block]]) -> None:
    rates = {
        name: [block.num_tokens / block.seconds for block in found]
        for name, found in blocks.items()
        if found
    }
    sys.stdout.write("contestant  real tokens/s (median)      min      max  ms a step\n")
    for name, found in rates.items():
        step_ms = statistics.median(1000 * b.seconds / b.num_steps for b in blocks[name])
        sys.stdout.write(
            f"{name:10} {statistics.median(found):23.0f} {min(found):8.0f} {max(found):8.0f} "
            f"{step_ms:10.1f}\n"
        )
    # by rounds: neighbours in time shared the machine's load
    for name in [name for name in rates if name != "toolkit"]:
        ratio = statistics.median(
            mine / other for mine, other in zip(rates["toolkit"], rates[name], strict=True)
        )
        sys.stdout.write(f"toolkit / {name}: {ratio:.3f}\n")
    overhead = statistics.median(
        1000 * (mine.seconds - ceiling.seconds) / mine.num_steps
        for mine, ceiling in zip(blocks["toolkit"], blocks["bare"], strict=True)
    )
    sys.stdout.write(f"overhead of a step (loop minus model): {overhead:.2f} ms\n")


def report_mfu(
    blocks: dict[str, list[Block]], flops: float, num_steps: int, device: torch.device
) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((tflops for gpu, tflops in PEAK_TFLOPS.items() if gpu in name), None)
    for contestant in ("toolkit", "bare"):
        seconds = statistics.median(block.seconds for block in blocks[contestant]) / num_steps
        reached = flops / seconds / 1e12
        share = f", {reached / peak:.1%} of {peak:.0f}" if peak else ""
        sys.stdout.write(f"{contestant} on {name}: {reached:.1f} TFLOP/s{share}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
