"""Makes images of one shape each, with captions and questions: toy data of perceiver and prefix.

    python tools/make_scenes_data.py --output data/scenes

Writes images/*.png, captions and questions of each split as annotations, texts that describe scenes
in words and ask about them, and tokenizer/. From the texts a language model learns to answer by
what stands before the question, which is how it will use what it sees. The same seed gives the same
images; the held-out ones come from seeds that training never sees.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from vlm.arguments import count, positive
from vlm.data.format.schema import CAPTION_PROMPT
from vlm.data.make import shapes
from vlm.data.text.tokenizer import train_tokenizer
from vlm.errors import command

SPLITS = {"train": 0, "eval": 1}
TEXT = 2
VOCAB_SIZE = 400


def scene(index: int, seed: int, split: str) -> tuple[np.ndarray, str, list[dict[str, str]]]:
    """(32, 40, 3) pixels, a caption, and questions that only the image answers."""
    rng = np.random.default_rng([seed, SPLITS[split], index])
    clip = shapes.make_clip(rng, max_seconds=1, two_frac=0.0)
    (shape,) = clip.shapes
    where = shapes.place(shape, 1.0)
    turns = []
    for task, question, answer in (
        ("colour", f"What colour is the {shape.shape}?", shape.colour),
        ("shape", f"What is {shape.colour}?", f"a {shape.shape}"),
        ("place", "Where is it?", where),
    ):
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer, "task": task})
    caption = f"a {shape.colour} {shape.shape} at the {where}"
    # of the three only one is asked: they would give each other's answers away
    start = 2 * int(rng.integers(3))
    return next(shapes.render(clip, rng)), caption, turns[start : start + 2]


def text_record(index: int, seed: int) -> dict[str, Any]:
    """A scene in words, in any order, and one thing to say about it."""
    rng = np.random.default_rng([seed, TEXT, index])
    colour, shape = (str(rng.choice(list(words))) for words in (shapes.COLOURS, shapes.SHAPES))
    where = f"{rng.choice(['top', 'bottom'])} {rng.choice(['left', 'right'])}"
    said = " ".join(rng.permutation([colour, shape, where]))
    asked = [
        (CAPTION_PROMPT, f"a {colour} {shape} at the {where}"),
        (f"What colour is the {shape}?", colour),
        (f"What is {colour}?", f"a {shape}"),
        ("Where is it?", where),
    ]
    question, answer = asked[int(rng.integers(len(asked)))]
    turns = [
        {"role": "user", "content": f"{said} {question}"},
        {"role": "assistant", "content": answer},
    ]
    return {"id": f"text-{index:05d}", "turns": turns, "source": "texts"}


def annotate(output: Path, split: str, count: int, seed: int) -> Iterator[tuple[str, Any, Any]]:
    """Writes images; gives the text of each, and its two records."""
    for index in track(range(count), f"images, {split}"):
        pixels, caption, turns = scene(index, seed, split)
        name = f"images/{split}-{index:05d}.png"
        Image.fromarray(pixels).save(output / name)
        about = {"id": f"{split}-{index:05d}", "images": [name], "source": "scenes"}
        text = " ".join([caption, *(turn["content"] for turn in turns)])
        yield text, about | {"caption": caption}, about | {"turns": turns}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=positive, default=6_000, help="training images")
    parser.add_argument("--eval-images", type=positive, default=400, help="held-out images")
    parser.add_argument("--seed", type=count, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    for split, number in (("train", args.images), ("eval", args.eval_images)):
        found = list(annotate(args.output, split, number, args.seed))
        for kind, position in (("captions", 1), ("questions", 2)):
            lines = (json.dumps(one[position]) + "\n" for one in found)
            path = args.output / f"{kind}_{split}.jsonl"
            path.write_text("".join(lines), encoding="utf-8")
        texts = texts or [one[0] for one in found]
    words = [text_record(index, args.seed) for index in range(args.images)]
    lines = (json.dumps(one) + "\n" for one in words)
    (args.output / "texts_train.jsonl").write_text("".join(lines), encoding="utf-8")
    texts += [turn["content"] for one in words for turn in one["turns"]]
    train_tokenizer(texts, args.output / "tokenizer", VOCAB_SIZE, "<|image|>")
    return 0


if __name__ == "__main__":
    command(main)()
