"""Draws what a run expects of next frames: python launch/predict_frames.py --run runs/latent

Writes next_frames/NNN.png (frames, what the autoencoder keeps of them, what was expected) and
next_frames.json (errors beside those of copying) into the run's folder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm import log
from vlm.arguments import positive
from vlm.errors import command
from vlm.evaluate import next_frames
from vlm.models.latent import TASKS


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--max-samples", type=positive, default=16, help="held-out samples")
    parser.add_argument("--decoder", help="AutoencoderKL, where the run used stored latents")
    parser.add_argument("--mode", choices=list(TASKS), default="unconditioned")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    log.setup()
    folder = next_frames.draw(args.run, args.max_samples, args.decoder, args.mode)
    found = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))["samples"]
    own = [error for sample in found for error in sample["error"]]
    copied = [error for sample in found for error in sample["error_of_copying"]]
    sys.stdout.write(f"{folder}: {len(found)} samples; mean error {sum(own) / len(own):.4g}")
    if copied:
        sys.stdout.write(f", of copying the frame before {sum(copied) / len(copied):.4g}")
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    command(main)()
