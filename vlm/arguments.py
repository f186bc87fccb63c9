"""Arguments and progress bars that scripts share. Not here: what one script alone asks for."""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

#: called with (done, in all)
Advance = Callable[[int, int], None]


def positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    if not (text.isascii() and text.isdecimal()) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number above 0")
    return int(text)


def count(text: str) -> int:
    """An argument that is a whole number, 0 or more."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 0 or more")
    return int(text)


def amount(text: str) -> float:
    """An argument that is a number, 0 or more."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number, 0 or more")
    return found


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """--recipe R.yaml a.b=value ..., for ``config.load``; parse it with parse_intermixed_args."""
    parser.add_argument("--recipe", type=Path, required=True, help="a file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change recipe keys")


def add_shards(parser: argparse.ArgumentParser) -> None:
    """PATH ..., for ``shards.find_shards``."""
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a tar or a folder")


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, help="processes (default: cores)"
    )


def add_tokenizer(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument("--tokenizer", required=required, help="folder or Hugging Face id")
    parser.add_argument("--image-token", default="<|image|>")


def add_rename(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rename", action="store_true", help="number the samples anew instead of refusing doubles"
    )


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """A bar on stderr while the ``with`` block runs."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
