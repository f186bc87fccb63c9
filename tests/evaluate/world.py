"""A world small enough to judge in a second: clips of one colour, and who is asked about them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.ckpt.folders import seal
from tests.models.tiny import LANGUAGE, VISION
from vlm.ckpt import save
from vlm.ckpt.files import write_json
from vlm.config import AugmentConfig
from vlm.config_model import ModelConfig
from vlm.data.format.schema import Sample, Turn
from vlm.data.format.shards import ShardWriter
from vlm.data.load.collate import Collator
from vlm.data.load.reader import LoadedSample
from vlm.data.manifest import manifest
from vlm.data.text import chat
from vlm.data.text.tokenizer import train_tokenizer
from vlm.models import registry
from vlm.models.foveated import FoveatedModel

IMAGE_TOKEN = "<|image|>"
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230)}
QUESTION = "What colour is it?"


def make_tokenizer(folder: Path) -> Path:
    train_tokenizer([QUESTION, *COLOURS, "yes", "no"] * 20, folder, 300, IMAGE_TOKEN)
    return folder


def make_collator(tokenizer_path: Path, **changes: Any) -> Collator:
    values: dict[str, Any] = {
        "tokenizer": chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN),
        "image_token": IMAGE_TOKEN,
        "tokens_per_frame": 1,
        "loss_on": "answers",
        "augment": AugmentConfig(),
        "seed": 0,
    }
    return Collator(**(values | changes))


def model_config(tokenizer_path: Path) -> dict[str, Any]:
    return {
        "family": "foveated",
        "vision": {"config": VISION},
        "language": {"config": LANGUAGE},
        "connector": {"query_dim": 20, "coarse_weight": 0.5},
        "tokenizer": str(tokenizer_path),
    }


def make_model(tokenizer_path: Path, seed: int = 0) -> FoveatedModel:
    config = ModelConfig.model_validate(model_config(tokenizer_path))
    vocab_size = len(chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN))
    return registry.build(config, vocab_size, seed).eval()


def ask(*pairs: tuple[str, str, str | None]) -> list[Turn]:
    """Turns of (question, answer, task)."""
    turns = []
    for question, answer, task in pairs:
        turns.append(Turn(role="user", content=question))
        turns.append(Turn(role="assistant", content=answer, task=task))
    return turns


def make_sample(
    row: int,
    colour: str,
    num_frames: int,
    turns: Sequence[Turn] | None = None,
    meta: dict[str, Any] | None = None,
) -> LoadedSample:
    turns = ask((QUESTION, colour, "colour")) if turns is None else turns
    sample = Sample(
        version=1,
        kind="video",
        source="world",
        frame_count=num_frames,
        turns=tuple(turns),
        meta=meta or {},
    )
    frames = np.empty((num_frames, 16, 16, 3), np.uint8)
    frames[:] = COLOURS[colour]
    return LoadedSample(row, sample, frames)


def make_samples(count: int) -> list[LoadedSample]:
    """Of every colour and of one to four frames."""
    names = list(COLOURS)
    return [make_sample(i, names[i % 3], 1 + i % 4) for i in range(count)]


def make_run(folder: Path, samples: Sequence[LoadedSample], step: int = 3) -> Path:
    """What training leaves behind: recipe, metrics, and one complete checkpoint."""
    tokenizer_path = make_tokenizer(folder / "tokenizer")
    with ShardWriter(folder / "shards", "eval", 1000) as writer:
        for loaded in samples:
            writer.write(loaded.row, loaded.sample, list(loaded.frames))
    paths = sorted((folder / "shards").glob("*.tar"))
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, folder / "eval.parquet")
    run = folder / "run"
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    make_model(tokenizer_path).save_pretrained(checkpoint / save.MODEL)
    make_collator(tokenizer_path).tokenizer.save_pretrained(checkpoint / save.MODEL)
    write_json(checkpoint / save.TRAINER, {"state": {"step": step}, "identity": {}})
    seal(checkpoint)
    recipe = {
        "name": "world",
        "output_dir": str(run),
        "model": model_config(folder / "gone"),  # the checkpoint brings its own
        "data": {
            "train": "unused.parquet",
            "eval": str(folder / "eval.parquet"),
            "micro_batches": 1,
            "budget": 1000,
        },
        "train": {"steps": step},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    row = {"event": "train", "step": step, "loss": 1.5, "samples_seen": 1234, "wall_s": 5.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return run
