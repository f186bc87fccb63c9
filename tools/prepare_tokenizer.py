"""Makes a pretrained tokenizer fit for training on frames: an image token, a padding token.

    python tools/prepare_tokenizer.py HuggingFaceTB/SmolLM2-135M-Instruct \\
        --output data/fvlm/tokenizer --image-token "<file_sep>" --pad-token "<|endoftext|>"

Exit codes: 0 written, 2 a mistake.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm import errors
from vlm.data.text.tokenizer import prepare_tokenizer


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    num_added = prepare_tokenizer(args.source, args.output, args.image_token, args.pad_token)
    sys.stdout.write(f"{args.output}: {num_added} tokens added\n")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Name a tokenizer's image and padding tokens.")
    parser.add_argument("source", help="folder or Hugging Face id")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--image-token", default="<|image|>", help="stands where a frame does")
    parser.add_argument("--pad-token", default="<|pad|>", help="other than the end of a turn")
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.command(main)()
