"""Predicts a tower's patches some frames on: python launch/predict_patches.py --run runs/quickstart

Prints the error on held-out clips beside that of copying, and writes patch_prediction.json into the
run's folder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm import log
from vlm.arguments import positive
from vlm.ckpt.files import replace_text
from vlm.errors import command
from vlm.evaluate import patch_prediction


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--gap", type=positive, default=1, help="frames between a pair")
    parser.add_argument("--steps", type=positive, default=500, help="that the predictor learns for")
    parser.add_argument("--max-clips", type=positive, default=500, help="of each split")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    log.setup()
    found = patch_prediction.predict_patches(
        args.run, gap=args.gap, steps=args.steps, max_clips=args.max_clips
    )
    text = json.dumps(patch_prediction.summary(found), indent=1)
    replace_text(args.run / "patch_prediction.json", text)
    sys.stdout.write(
        f"{found.gap} frames on, {found.num_eval} held-out pairs: error {found.error:.4g}, of "
        f"copying {found.error_of_copying:.4g}, {100 * found.gain_frac:.1f} % less\n"
    )
    return 0


if __name__ == "__main__":
    command(main)()
