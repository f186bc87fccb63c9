"""A mixed-length set for bench/step.py: lengths and shares as bench/plan.py draws them.

    python -m bench.step_data --output data/step
    python -m bench.step --recipe recipes/quickstart.yaml data.train=data/step/train.parquet \\
        data.eval=data/step/train.parquet model.tokenizer=data/step/tokenizer data.budget=4000 \\
        data.text_frac=0.1

Frames are noise of 32 px, log-uniform from 1 to 64; a text has about 60 tokens, of which the answer
is half; one sample in ten is text alone. The same command makes the same bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.plan import synthetic_rows
from vlm.data.format.schema import Sample, Turn
from vlm.data.format.shards import ShardWriter
from vlm.data.manifest import manifest
from vlm.data.text.tokenizer import train_tokenizer
from vlm.errors import command

SIZE, SAMPLES_PER_SHARD = 32, 500
IMAGE_TOKEN = "<|image|>"
#: each is one token, first of a text or not
WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in "lmnrst"]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=4000)
    args = parser.parse_args(argv)
    rows, rng = synthetic_rows(args.samples, seed=0), np.random.default_rng(0)
    with ShardWriter(args.output / "shards", "step", SAMPLES_PER_SHARD) as writer:
        for index in range(args.samples):
            frames = rng.integers(0, 256, (rows.num_frames[index], SIZE, SIZE, 3), dtype=np.uint8)
            words = rng.choice(WORDS, rows.num_tokens[index])
            asked, answered = words[: len(words) // 2], words[len(words) // 2 :]
            writer.write(index, _sample(" ".join(asked), " ".join(answered), len(frames)), frames)
    tokenizer, output = args.output / "tokenizer", args.output / "train.parquet"
    texts = [f"{before}{word}" for before in ("", " ") for word in WORDS]
    train_tokenizer(texts, tokenizer, vocab_size=2000, image_token=IMAGE_TOKEN)
    shards = sorted((args.output / "shards").glob("*.tar"))
    built = manifest.build(shards, str(tokenizer), IMAGE_TOKEN, output)
    sys.stdout.write(f"{output}: {built.num_samples} samples, {built.num_frames} frames\n")
    return 0


def _sample(asked: str, answered: str, num_frames: int) -> Sample:
    return Sample(
        version=1,
        kind="video" if num_frames else "text",
        source="bench",
        frame_count=num_frames,
        turns=(Turn(role="user", content=asked), Turn(role="assistant", content=answered)),
    )


if __name__ == "__main__":
    command(main)()
