"""Folds an export's adapters into the language model they stand on: one model without PEFT.

    python tools/merge_adapter.py runs/NAME/checkpoints/step_00000500/model merged
    python tools/merge_adapter.py runs/NAME/checkpoints/step_00000500/model language --part language

What else was trained (connector, vision tower) goes along. The result loads with
``transformers.AutoModel`` and answers as the export does; 4-bit weights are written as the numbers
that they stood for. ``--part`` writes one part alone, as ``transformers`` knows it. It runs on a
CPU; the model must fit into memory once, in float32.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm import errors
from vlm.models import export, registry

#: what lies beside the model in an export
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*")


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    if args.output.exists():
        raise errors.CheckpointError(f"{args.output}: is there already; name a new folder")
    with registry.quiet_transformers():
        model = registry.load(args.export, packed=False)
        export.merge(model)
        written = export.part(model, args.part)
        written.save_pretrained(args.output)
    for pattern in TOKENIZER:
        for path in sorted(args.export.glob(pattern)):
            shutil.copy(path, args.output)
    count = sum(parameter.numel() for parameter in written.parameters())
    sys.stdout.write(f"{args.output}: {count:,} parameters, no adapters\n")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a whole model of an export with adapters.")
    parser.add_argument("export", type=Path, metavar="MODEL", help="model folder of a checkpoint")
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--part", choices=export.PARTS, help="write no more than this")
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.command(main)()
