"""The command line of a training run, for the rank that trains and the launcher that starts it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm.arguments import add_recipe


def parse(argv: Sequence[str], about: str) -> argparse.Namespace:
    """
    Args:
        about: what the program says of itself.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--ds_config", type=Path, required=True, help="a file of ds_configs/")
    add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would run, then stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    return parser.parse_intermixed_args(argv)
