"""Makes the quickstart's data: mp4 clips of moving shapes, conversations, a tokenizer.

    python tools/make_quickstart_data.py --output data/quickstart
    python tools/make_quickstart_data.py --scene board --output data/toy

Writes clips/*.mp4 (H.264), train.jsonl, eval.jsonl and tokenizer/. The same seed gives the same
clips; the held-out ones come from seeds that training never sees.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.progress import track

from vlm.arguments import count, positive
from vlm.data.make import board, shapes
from vlm.data.text.tokenizer import train_tokenizer
from vlm.errors import command

#: the second word of a clip's seed: no clip can be in both splits
SPLITS = {"train": 0, "eval": 1}
TEXT = 2
SCENES = {"moving": shapes, "board": board}
VOCAB_SIZE = 512
#: share of text-only samples among all, as in recipes/quickstart.yaml
TEXT_FRAC = 0.14


def make_sample(index: int, *, seed: int, split: str, output: Path, scene: str) -> dict[str, Any]:
    """Writes one clip and returns its annotation."""
    rng = np.random.default_rng([seed, SPLITS[split], index])
    world = SCENES[scene]
    clip = world.make_clip(rng)
    name = f"clips/{split}-{index:06d}.mp4"
    write_video(output / name, clip.size, shapes.render(clip, rng))
    return {
        "id": f"{split}-{index:06d}",
        "video": name,
        "turns": world.conversation(clip, rng),
        "source": "shapes",
        "meta": {
            "duration_s": clip.duration_s,
            "group": world.group(clip),
        },
    }


def write_video(path: Path, size: tuple[int, int], frames: Iterator[np.ndarray]) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=shapes.FPS)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"preset": "ultrafast", "crf": "16"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def text_sample(index: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, TEXT, index])
    turns = shapes.text_conversation(rng)
    return {"id": f"text-{index:06d}", "turns": turns, "source": "text"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--scene",
        choices=list(SCENES),
        default="moving",
        help="moving shapes, or a still board of them",
    )
    parser.add_argument("--clips", type=positive, default=10_000, help="training clips")
    parser.add_argument("--eval-clips", type=positive, default=400, help="held-out clips")
    parser.add_argument("--seed", type=count, default=0)
    parser.add_argument("--workers", type=positive, default=2)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    (args.output / "clips").mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    with ProcessPoolExecutor(args.workers) as pool:
        for split, count in (("train", args.clips), ("eval", args.eval_clips)):
            make = partial(
                make_sample, seed=args.seed, split=split, output=args.output, scene=args.scene
            )
            jobs = pool.map(make, range(count), chunksize=50)
            samples = list(track(jobs, f"clips, {split}", count))
            if split == "train":
                num_text = round(count * TEXT_FRAC / (1 - TEXT_FRAC))
                samples += [text_sample(i, args.seed) for i in range(num_text)]
                texts = [turn["content"] for sample in samples for turn in sample["turns"]]
            lines = (json.dumps(sample) + "\n" for sample in samples)
            (args.output / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(texts, args.output / "tokenizer", VOCAB_SIZE, "<|image|>")
    return 0


if __name__ == "__main__":
    command(main)()
