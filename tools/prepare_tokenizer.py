"""Makes a pretrained tokenizer fit for training on frames: an image token, a padding token, and a
chat template where it has none.

    python tools/prepare_tokenizer.py HuggingFaceTB/SmolLM2-135M-Instruct \\
        --output data/fvlm/tokenizer --image-token "<file_sep>" --pad-token "<|endoftext|>"
    python tools/prepare_tokenizer.py HuggingFaceTB/SmolLM-135M --output data/tokenizer \\
        --template caption

Exit codes: 0 written, 2 a mistake.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm import errors
from vlm.data.text import templates


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    found = templates.prepare(
        args.source,
        args.output,
        image_token=args.image_token,
        pad_token=args.pad_token,
        template=args.template,
        system=args.system,
        prompt=args.prompt,
    )
    sys.stdout.write(
        f"{args.output}: {found.num_added} tokens added\n"
        f"image token {found.image_token} ({found.image_token_id}), padding token "
        f"{found.pad_token} ({found.pad_token_id}), answers end with {found.end_token}\n"
    )
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Name a tokenizer's image and padding tokens.")
    parser.add_argument("source", help="folder or Hugging Face id")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--image-token", help="stands where a frame does (default: one it keeps)")
    parser.add_argument("--pad-token", help="other than the end of a turn (default: its own)")
    parser.add_argument(
        "--template", choices=templates.TEMPLATES, help="in place of the tokenizer's own"
    )
    parser.add_argument("--system", metavar="TEXT", help="said where the data have no system turn")
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="before captions, of --template caption"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.command(main)()
