"""Puts the training step beside HF Trainer and beside a bare PyTorch loop, in one interleaved run.

    python -m bench.step --recipe recipes/quickstart.yaml --out step.json
    python -m bench.step --recipe recipes/quickstart.yaml --geometry 1.7b      (on a GPU)

Same model, samples, precision, optimizer and clipping for all; one process. In each round:

* ``toolkit``: loader, DeepSpeed engine and step of ``launch/train.py``; decoding is on its bill.
* ``bare``: forward, backward, clipping and AdamW on the batches that the toolkit just made: the
  ceiling.
* ``hf``: HF Trainer with DeepSpeed on the same samples, decoded before and drawn at random, as many
  to a micro-batch as the toolkit's hold on average; padded to the longest text and most frames.

On a CPU all take ZeRO stage 1 unless told otherwise: one process has nothing to shard, and stage 2
would reduce gradients after every micro-batch all the same. On a GPU it is stage 2, which adds
gradients up in float32 as the bare loop does.

Real tokens only: what is padding is not credited. CPU time is that of the thread that trains, which
other work on the machine hardly changes; decoding is not in it. ``--geometry`` takes a model's
sizes with random weights and batches of one shape, leaves ``hf`` out and measures model FLOPs
utilisation.
"""

import argparse
import copy
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.clock import Clock
from bench.hf import samples_of, train_hf
from vlm import config, gpus
from vlm.arguments import add_recipe, positive
from vlm.batch import IGNORE_INDEX, Batch, build_batch
from vlm.config import Recipe
from vlm.config_model import ModelConfig
from vlm.data.plan.position import Position
from vlm.engine import ds_config, optim
from vlm.engine.cpu import on_cpu, prepare_cpu
from vlm.engine.setup import build_engine, start_process
from vlm.engine.step import read, train_step
from vlm.errors import command
from vlm.models import registry
from vlm.models.flops.counters import FoveatedCounter
from vlm.models.flops.shapes import shapes_of
from vlm.train import data

#: SmolLM2's width, layers, heads, key-value heads, inner width
LANGUAGE = {
    "135m": (576, 30, 9, 3, 1536),
    "1.7b": (2048, 24, 32, 32, 8192),
}
VOCAB, IMAGE, SIZE = 49_152, 3, 224
WARM_STEPS = 2
#: samples of a micro-batch of one shape, frames of each, text tokens of each
SHAPE = (8, 16, 240)


class Block(NamedTuple):
    """Some global steps of one contestant."""

    seconds: float
    #: of the thread that trains
    cpu_s: float
    num_tokens: int
    num_steps: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        return self.num_tokens / self.cpu_s

    @property
    def step_s(self) -> float:
        return self.seconds / self.num_steps


Blocks = dict[str, list[Block]]
Step = Sequence[Batch]


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
        "language": {"config": language},
        "vision": {"config": vision},
    }
    return recipe.model_copy(update={"model": ModelConfig.model_validate(changed)})


def random_batch(seed: int) -> Batch:
    samples, frames, text = SHAPE
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (samples, text), generator=made).tolist()
    pixels = torch.randint(0, 256, (samples * frames, 3, SIZE, SIZE), generator=made)
    batch = build_batch(
        frames=pixels.to(torch.uint8),
        frame_counts=[frames] * samples,
        input_ids=[[IMAGE] * frames + row for row in ids],
        labels=[[IGNORE_INDEX] * frames + row for row in ids],
        image_token_id=IMAGE,
        tokens_per_frame=1,
        keys=[str(i) for i in range(samples)],
        kind="video",
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tokens_of(steps: Sequence[Step]) -> int:
    return sum(batch.input_ids.numel() for step in steps for batch in step)


class Bare:
    """The same arithmetic without a toolkit: on a GPU bfloat16 with float32 masters and sums."""

    def __init__(self, model: Any, recipe: Recipe, device: torch.device, clip: float) -> None:
        self.device, self.clip = device, clip
        masters = model.to(device).train()
        optim.freeze(masters, recipe.model)
        on_gpu = device.type == "cuda"
        self.optimizer, self.schedule = optim.optimizer(masters, recipe, fused=on_gpu)
        self.model = copy.deepcopy(masters).bfloat16() if on_gpu else masters
        self.masters = [p for p in masters.parameters() if p.requires_grad]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.copies = list(zip(trained, self.masters, strict=True)) if on_gpu else []

    def step(self, batches: Step) -> None:
        tokens = sum(batch.num_loss_tokens for batch in batches)
        for batch in batches:
            (self.model(batch).loss_sum / tokens).backward()
            for parameter, master in self.copies:
                grad = parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for parameter, master in self.copies:
                parameter.copy_(master)

    def run(self, steps: Sequence[Step]) -> Block:
        ready = [[batch.to(self.device) for batch in step] for step in steps]
        wait(self.device)
        started = Clock.now()
        for batches in ready:
            self.step(batches)
        wait(self.device)
        return Block(*started.since(), tokens_of(steps), len(steps))


def run_toolkit(engine: Any, source: Iterator[Step], num_steps: int) -> tuple[Block, list[Step]]:
    """Also the steps it ran."""
    seen = []
    started = Clock.now()
    for _ in range(num_steps):
        batches = next(source)
        pending = train_step(engine, batches)
        seen.append(batches)
    read(pending)
    wait(engine.device)
    return Block(*started.since(), tokens_of(seen), num_steps), seen


def loaded(recipe: Recipe, source: data.DataSource) -> Iterator[Step]:
    with closing(data.steps(source, recipe, 0, 1, Position())) as steps:
        for step in steps:
            yield step.batches


def measure(args: argparse.Namespace, recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    """All figures of a run."""
    cpu = on_cpu()
    machine = start_process(recipe.train.cpu_threads)
    opened = None
    if args.geometry:
        recipe, vocab = geometry(recipe, args.geometry), VOCAB
        made = [random_batch(i) for i in range(recipe.data.micro_batches)]
        source: Iterator[Step] = itertools.repeat(made)
    else:
        tokenizer = data.load_tokenizer(recipe)
        opened, vocab = data.open_source(recipe, tokenizer, training=True), len(tokenizer)
        source = loaded(recipe, opened)
    model = registry.build(recipe.model, vocab, recipe.seed)
    bare = Bare(copy.deepcopy(model), recipe, machine.device, settings["gradient_clipping"])
    plain = copy.deepcopy(model)
    engine = build_engine(model, recipe, settings, cpu)
    engine.train()
    bare.run(run_toolkit(engine, source, WARM_STEPS)[1])
    blocks: Blocks = {"toolkit": [], "bare": [], "hf": []}
    for _ in range(args.rounds):
        block, steps = run_toolkit(engine, source, args.steps)
        blocks["toolkit"].append(block)
        blocks["bare"].append(bare.run(steps))
        if opened is not None:
            samples = [one for step in steps for batch in step for one in samples_of(batch)]
            found = train_hf(copy.deepcopy(plain), samples, recipe, settings, opened.collator)
            blocks["hf"].append(Block(*found))
    figures = summary({name: found for name, found in blocks.items() if found})
    if args.geometry:
        counter = FoveatedCounter(bare.model)
        flops = sum(counter.micro_batch(shapes_of(batch)).model for batch in made)
        figures["mfu"] = utilisation(blocks, flops, machine.device)
    return figures


def summary(blocks: Blocks) -> dict[str, Any]:
    """Medians over rounds; ratios by rounds, because neighbours in time shared a machine's load."""
    toolkit, bare = blocks["toolkit"], blocks["bare"]
    others = {name: found for name, found in blocks.items() if name != "toolkit"}
    pairs = {name: list(zip(toolkit, found, strict=True)) for name, found in others.items()}
    ratios = {
        name: statistics.median(mine.tokens_per_s / other.tokens_per_s for mine, other in both)
        for name, both in pairs.items()
    }
    by_cpu = {
        name: statistics.median(
            mine.tokens_per_cpu_s / other.tokens_per_cpu_s for mine, other in both
        )
        for name, both in pairs.items()
    }
    overheads = [mine.step_s - other.step_s for mine, other in zip(toolkit, bare, strict=True)]
    return {
        "contestants": {name: _contestant(found) for name, found in blocks.items()},
        "toolkit_over": ratios,
        "toolkit_over_by_cpu": by_cpu,
        "overhead_s": statistics.median(overheads),
    }


def _contestant(blocks: list[Block]) -> dict[str, float]:
    rates = [block.tokens_per_s for block in blocks]
    return {
        "tokens_per_s": statistics.median(rates),
        "min_tokens_per_s": min(rates),
        "max_tokens_per_s": max(rates),
        "step_s": statistics.median(block.step_s for block in blocks),
        "step_cpu_s": statistics.median(block.cpu_s / block.num_steps for block in blocks),
    }


def utilisation(blocks: Blocks, flops: float, device: torch.device) -> dict[str, Any]:
    """Model FLOP/s by contestant, and their share of what the GPU could do."""
    name, gpu = "CPU", None
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name, gpu = about.name, gpus.of_device(about.name, about.total_memory / 2**30)
    found: dict[str, Any] = {"device": name}
    for contestant in ("toolkit", "bare"):
        rate = flops / statistics.median(block.step_s for block in blocks[contestant])
        mfu = None if gpu is None else rate / gpu.peak_flops
        found[contestant] = {"flops_per_s": rate, "mfu_frac": mfu}
    return found


def table(figures: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| contestant | real tokens/s (median) | min | max | ms a step | toolkit is "
        "| CPU ms a step | toolkit is, by CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in figures["contestants"].items():
        rates = [f"{found[f'{which}tokens_per_s']:.0f}" for which in ("", "min_", "max_")]
        cells = [name, *rates]
        for time, over in (("step_s", "toolkit_over"), ("step_cpu_s", "toolkit_over_by_cpu")):
            ratio = figures[over].get(name)
            cells += [f"{1000 * found[time]:.1f}", "" if ratio is None else f"{ratio:.3f} x"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"A step's overhead (loop minus model): {1000 * figures['overhead_s']:.1f} ms."]
    if mfu := figures.get("mfu"):
        for name in ("toolkit", "bare"):
            share, rate = mfu[name]["mfu_frac"], mfu[name]["flops_per_s"] / 1e12
            of_peak = "" if share is None else f", MFU {share:.1%}"
            lines.append(f"{name} on {mfu['device']}: {rate:.1f} TFLOP/s{of_peak}.")
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_recipe(parser)
    parser.add_argument("--ds_config", type=Path)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=20, help="global steps of a round")
    parser.add_argument("--geometry", choices=LANGUAGE)
    parser.add_argument("--out", type=Path, help="JSON with all figures and what they are of")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if on_cpu():
        prepare_cpu()
    recipe = config.load(args.recipe, args.overrides)
    path = args.ds_config or Path(f"ds_configs/zero{1 if on_cpu() else 2}.json")
    settings = ds_config.resolve(
        ds_config.load(path),
        path=path,
        recipe_path=args.recipe,
        micro_batches=recipe.data.micro_batches,
        world_size=1,
        cpu=on_cpu(),
    )
    figures = measure(args, recipe, settings)
    sys.stdout.write(table(figures))
    if args.out is not None:
        about = {
            "command": f"python -m bench.step {shlex.join(argv)}",
            "cpus": os.cpu_count(),
            "processor": platform.machine(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        }
        args.out.write_text(json.dumps(about | figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    command(main)()
