"""Shows samples as the model will see them: rendered text, which tokens are learned, frames.

    python tools/show_samples.py data/shards --tokenizer data/tokenizer --num 3
    python tools/show_samples.py data/shards --recipe recipes/quickstart.yaml --seed 0 --html s.html

What is drawn anew in each epoch (augmentation, the question before the video) is not shown. Exit
codes: 0 shown, 2 a mistake.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vlm import config, errors
from vlm.arguments import add_shards, count, positive
from vlm.data.format import shards
from vlm.data.inspect import sample_view, samples_page
from vlm.data.inspect.sample_view import Branch, Model, SampleView
from vlm.data.text import chat
from vlm.page import printable

OPEN, CLOSE = (
    "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}",
    "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}",
)


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    model = _model(args)
    found = sample_view.find_samples(
        shards.find_shards(args.paths), model, keys=args.key, source=args.source, seed=args.seed
    )
    default = samples_page.MAX_SAMPLES if args.key else 24 if args.html else 3
    views = list(itertools.islice(found, args.num or default))
    if not views:
        raise errors.DataError("no sample is left of --key and --source; take one away")
    if args.html is not None:
        title = f"{len(views)} samples of {', '.join(str(path) for path in args.paths)}"
        samples_page.write_page(args.html, views, title)
        sys.stdout.write(f"{args.html}: {len(views)} samples\n")
        return 0
    console = Console(highlight=False, soft_wrap=True)
    for view in views:
        _show(console, view)
    console.print(f"{OPEN}learned{CLOSE}: the loss counts these tokens", style="dim")
    return 0


def _model(args: argparse.Namespace) -> Model:
    if args.recipe is None:
        tokenizer = chat.load_tokenizer(args.tokenizer, args.image_token)
        return Model(tokenizer=tokenizer, image_token=args.image_token, size=args.size)
    recipe = config.load(args.recipe)
    return Model(
        tokenizer=chat.load_tokenizer(recipe.model.tokenizer, recipe.model.image_token),
        image_token=recipe.model.image_token,
        tokens_per_frame=recipe.model.connector.tokens_per_frame,
        loss_on="all" if recipe.data.loss_on == "all" else "answers",
        max_text_tokens=recipe.data.max_text_tokens,
        size=args.size,
    )


def _show(console: Console, view: SampleView) -> None:
    console.print(
        Text(f"{_line(view.key)}  {_line(str(view.shard))} at byte {view.offset}", "bold")
    )
    if view.fault:
        console.print(Text(f"cannot be used: {_line(view.fault)}\n", "red"))
        return
    count, height, width, _ = view.frames.shape
    size = f" of {height}x{width}" if count else ""
    console.print(
        Text(f"{_line(view.source)}, {view.kind}, {view.form}, {count} frames{size}", "dim")
    )
    for branch in view.branches:
        console.print(_render(branch))
        learned, context = branch.num_tokens("learned"), branch.num_tokens("context")
        counts = f"{learned + context} text tokens, {learned} learned; "
        counts += f"{branch.num_tokens('frames')} frame tokens\n"
        console.print(Text(f"{branch.name}: {counts}" if branch.name else counts, "dim"))


def _render(branch: Branch) -> Text:
    text = Text()
    for span in branch.spans:
        shown = printable(span.text, keep="\n\t")
        if span.kind == "frames":
            text.append(f"[{len(span.ids)} frame tokens]", "italic magenta")
        elif span.kind == "learned":
            # brackets too: colours do not reach every terminal, file and eye
            text.append(f"{OPEN}{shown}{CLOSE}", "bold green")
        else:
            text.append(shown)
    return text


def _line(text: str) -> str:
    """Text of a shard as one harmless line."""
    return errors.one_line(text)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Show samples as the model will see them.")
    add_shards(parser)
    seen_by = parser.add_mutually_exclusive_group(required=True)
    seen_by.add_argument("--recipe", type=Path, help="its tokenizer, model family and loss")
    seen_by.add_argument("--tokenizer", help="folder or Hugging Face id")
    parser.add_argument("--image-token", default="<|image|>", help="of --tokenizer")
    parser.add_argument("--size", type=positive, help="as of build_manifest")
    parser.add_argument("--num", type=positive, metavar="N", help="at most so many samples")
    parser.add_argument("--key", action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--source", metavar="NAME", help="only samples of it")
    parser.add_argument("--seed", type=count, help="in a random order (default: as they lie)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page to browse instead")
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.command(main)()
