"""Judges a trained run on held-out samples: python launch/evaluate.py --run runs/quickstart

Writes eval.json, report.html and attention/ (pictures) into the run's folder.
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
from vlm.arguments import positive
from vlm.errors import command, one_line
from vlm.evaluate.judge import judge

#: what an evaluation may say about losses beside them
COMPARED = {"loss_ratio": "coarse / fine", "autoregressive_gap_frac": "autoregressive gap"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument(
        "--max-samples", type=positive, default=1000, help="held-out samples to judge"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    log.setup()
    report = judge(args.run, args.max_samples)
    evaluation = json.loads((args.run / "eval.json").read_text(encoding="utf-8"))
    console = Console(file=sys.stdout, highlight=False)
    orders = {evaluation["order"]: evaluation, **evaluation["other_orders"]}
    for order, judged in orders.items():
        console.print(_table(order, evaluation, judged))
        losses = ", ".join(f"{mode} {loss:.4f}" for mode, loss in judged["loss"].items())
        known = [name for name in COMPARED if name in judged]
        compared = "".join(f"; {COMPARED[name]} {judged[name]:.4f}" for name in known)
        console.print(f"loss: {losses}{compared}")
    console.print(f"report: {report.resolve()}", soft_wrap=True, markup=False)
    return 0


def _table(order: str, evaluation: dict, judged: dict) -> Table:
    accuracy = judged["accuracy"]
    own, *others = judged["accuracy_by_mode"]
    columns = (*accuracy, "prior", *others)
    table = Table("answers", *columns, "questions", title=f"{own}, {order}".replace("_", " "))
    for group in accuracy["true"]:
        shown = [
            *accuracy.values(),
            evaluation["prior"],
            *map(judged["accuracy_by_mode"].get, others),
        ]
        # a name from a shard: it may hold markup or control characters
        name = Text(one_line(group))
        cells = [f"{values[group]:.3f}" for values in shown]
        table.add_row(name, *cells, str(evaluation["num_answers"][group]))
    return table


if __name__ == "__main__":
    command(main)()
