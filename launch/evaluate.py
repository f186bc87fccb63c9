"""Judges a trained run on held-out samples: python launch/evaluate.py --run runs/quickstart

Writes eval.json and report.html into the run's folder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm import log
from vlm.errors import DataError, command, one_line
from vlm.evaluate.judge import judge

#: what an evaluation may say about losses beside them
COMPARED = {"loss_ratio": "coarse / fine", "autoregressive_gap_frac": "autoregressive gap"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--max-samples", type=int, default=1000, help="held-out samples to judge")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    log.setup()
    report = judge(args.run, args.max_samples)
    evaluation = json.loads((args.run / "eval.json").read_text(encoding="utf-8"))
    console = Console(file=sys.stdout, highlight=False)
    console.print(_table(evaluation))
    losses = ", ".join(f"{mode} {loss:.4f}" for mode, loss in evaluation["loss"].items())
    known = [name for name in COMPARED if name in evaluation]
    compared = "".join(f"; {COMPARED[name]} {evaluation[name]:.4f}" for name in known)
    console.print(f"loss: {losses}{compared}")
    console.print(f"report: {report.resolve()}", soft_wrap=True)
    return 0


def _table(evaluation: dict) -> Table:
    table = Table("answers", "true frames", "blank", "shuffled", "prior", "questions")
    accuracy = evaluation["accuracy"]
    for group, true in accuracy["true"].items():
        others = [accuracy["blank"][group], accuracy["shuffled"][group], evaluation["prior"][group]]
        cells = [f"{value:.3f}" for value in (true, *others)]
        # a name from a shard: it may hold markup or control characters
        name = Text(one_line(DataError(group)))
        table.add_row(name, *cells, str(evaluation["num_answers"][group]))
    return table


if __name__ == "__main__":
    command(main)()
