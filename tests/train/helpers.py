"""A data set and a recipe small enough to train in a second, made once per session on the fly."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import yaml

from tests.models import tiny
from vlm import config
from vlm.config import Recipe
from vlm.data.format.schema import Preference, Sample, Turn
from vlm.data.format.shards import ShardWriter
from vlm.data.manifest import manifest
from vlm.data.text.tokenizer import train_tokenizer
from vlm.engine import ds_config

ROOT = Path(__file__).parents[2]
IMAGE_TOKEN = "<|image|>"
#: frames of every training sample; 0 is text only
TRAIN = [1, 3, 0, 2, 1, 4, 1, 0, 7, 2] * 6
EVAL = [1, 2, 5, 1, 3, 1, 2, 6]
TEXT_FRAC = 0.2
MICRO_BATCHES = 4
STEPS = 6
#: steps after which the trained parts are saved
EVERY = 3


@functools.cache
def world() -> Path:
    """Folder with shards, manifests, tokenizer and ``recipe.yaml``."""
    folder = Path(tempfile.mkdtemp(prefix="world-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    samples = [_sample(i, count) for i, count in enumerate(TRAIN + EVAL)]
    texts = [turn.content for sample in samples for turn in sample.turns or ()]
    train_tokenizer(texts, folder / "tokenizer", 300, IMAGE_TOKEN)
    write_split(folder, "train", samples[: len(TRAIN)])
    write_split(folder, "eval", samples[len(TRAIN) :])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(_recipe(folder)))
    return folder


@functools.cache
def pairs() -> Path:
    """Folder with ``train.parquet`` and ``eval.parquet`` of pairs: "red" is always better."""
    folder = world() / "pairs"
    samples = []
    for index in range(40):
        worse = ("blue", "green")[index % 2]
        num_frames = 1 + index % 3
        samples.append(
            Sample(
                version=1,
                kind="image" if num_frames == 1 else "video",
                source="pairs",
                frame_count=num_frames,
                preference=Preference(
                    prompt=(Turn(role="user", content="What colour is the circle?"),),
                    chosen="It is red.",
                    rejected=f"It is {worse}.",
                ),
            )
        )
    write_split(folder, "train", samples[:32])
    write_split(folder, "eval", samples[32:])
    return folder


def write_split(folder: Path, split: str, samples: list[Sample]) -> None:
    with ShardWriter(folder / "shards", split, samples_per_shard=15) as writer:
        for index, sample in enumerate(samples):
            rng = np.random.default_rng(index)
            size = (sample.frame_count, tiny.SIZE, tiny.SIZE, 3)
            writer.write(index, sample, list(rng.integers(0, 256, size, np.uint8)))
    shards = sorted((folder / "shards").glob(f"{split}-*.tar"))
    tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else world() / "tokenizer"
    manifest.build(shards, str(tokenizer), IMAGE_TOKEN, folder / f"{split}.parquet")


def _sample(index: int, num_frames: int) -> Sample:
    answers = [f"It is {colour}." for colour in ("red", "green", "blue")][: 1 + index % 3]
    turns = []
    for answer in answers:
        turns.append(Turn(role="user", content="What colour is the circle?"))
        turns.append(Turn(role="assistant", content=answer, task="colour"))
    return Sample(
        version=1,
        kind="text" if num_frames == 0 else "image" if num_frames == 1 else "video",
        source="tiny",
        frame_count=num_frames,
        turns=tuple(turns),
    )


def _recipe(folder: Path) -> dict:
    language = {k: v for k, v in tiny.LANGUAGE.items() if k != "vocab_size"}
    return {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "seed": 1,
        "model": {
            "family": "foveated",
            "tokenizer": str(folder / "tokenizer"),
            # random numbers in training, so that a resumed run needs the right ones
            "vision": {"config": {**tiny.VISION, "drop_path_rate": 0.2}},
            "language": {"config": {**language, "attention_dropout": 0.1}},
            "connector": {"query_dim": 20, "coarse_weight": 0.5},
        },
        "data": {
            "train": str(folder / "train.parquet"),
            "eval": str(folder / "eval.parquet"),
            "micro_batches": MICRO_BATCHES,
            "budget": 300,
            "frame_cost": 5,
            "text_frac": TEXT_FRAC,
            "augment": {"shift_px": 1, "contrast": 0.1},
        },
        "optim": {
            "lr": {"vision": 1e-3, "connector": 2e-3, "language": 3e-3},
            "schedule": {"warmup_frac": 0.3},
        },
        "train": {
            "steps": STEPS,
            "log_every": 1,
            "eval_every": EVERY,
            "eval_steps": 1,
            "checkpoint_every": EVERY,
            "cpu_threads": 1,
        },
        "log": {"wandb": "disabled"},
    }


def recipe(output_dir: Path, *overrides: str) -> Recipe:
    return config.load(world() / "recipe.yaml", [f"output_dir={output_dir}", *overrides])


def ds_file(stage: int | str) -> Path:
    return ROOT / "ds_configs" / f"zero{stage}.json"


def resolved(stage: int | str, world_size: int, micro_batches: int = MICRO_BATCHES) -> dict:
    """A file of ds_configs/ as the engine gets it on a CPU."""
    return ds_config.resolve(
        ds_config.load(ds_file(stage)),
        path=ds_file(stage),
        recipe_path=Path("recipe.yaml"),
        micro_batches=micro_batches,
        world_size=world_size,
        cpu=True,
    )
