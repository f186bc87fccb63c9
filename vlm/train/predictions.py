"""What a model answers while it trains: some held-out samples, the answer expected beside its own.

For eyes, not for figures: a loss can fall while every answer becomes the same. Not here: judging
answers (``vlm.evaluate``).
"""

import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from vlm.batch import Batch
from vlm.config import Order
from vlm.data.format.schema import Turn
from vlm.data.load.collate import Collator, frame_size
from vlm.data.load.reader import LoadedSample
from vlm.data.plan.catalog import Catalog
from vlm.data.text import chat
from vlm.models.generate import generate
from vlm.train import held_out
from vlm.train.run import Run

log = logging.getLogger(__name__)

FILE = "predictions.jsonl"
#: more of an answer is not waited for
MAX_NEW_TOKENS = 256
#: tokens that an answer may be longer than the expected one, to be seen to ramble
ROOM = 8


class Asked(NamedTuple):
    """A held-out sample up to its last answer."""

    key: str
    turns: tuple[Turn, ...]
    expected: str
    sample: LoadedSample


def write(run: Run, step: int) -> None:
    """Appends a line for each of ``train.eval_predictions`` samples, always the same ones."""
    source, recipe = run.eval, run.recipe
    asked = ask(source.catalog, recipe.train.eval_predictions, recipe.data.max_text_tokens)
    if not asked:
        log.warning("no held-out sample has an answer to predict")
        return
    run.engine.eval()
    given = answer(
        run.engine.module,
        source.collator,
        asked,
        recipe.data.orders[0],
        frame_size(source.catalog),
    )
    run.engine.train()
    with (recipe.output_dir / FILE).open("a", encoding="utf-8") as file:
        for one, text in zip(asked, given, strict=True):
            row = {"step": step, "key": one.key, "asked": one.turns[-1].content}
            file.write(json.dumps({**row, "expected": one.expected, "given": text}) + "\n")
            log.info("%r: expected %r, got %r", one.key, one.expected, text)


def ask(catalog: Catalog, count: int, max_text_tokens: int | None) -> list[Asked]:
    """Up to ``count`` samples that end with an answer, evenly spaced among those of a catalog."""
    usable = catalog.num_answer_tokens > 0
    if max_text_tokens is not None:
        usable &= catalog.num_tokens <= max_text_tokens
    found = []
    for key, loaded in held_out.read(catalog, held_out.choose(usable, count)):
        if loaded is None or loaded.sample.form not in ("turns", "caption"):
            continue
        *turns, last = loaded.sample.conversation()
        if last.role == "assistant" and turns and turns[-1].role == "user":
            found.append(Asked(key, tuple(turns), last.content, loaded))
    return found


def answer(
    model: Any, collator: Collator, asked: Sequence[Asked], order: Order, blank: tuple[int, int]
) -> list[str]:
    """The model's greedy answer to each, all in one batch.

    Args:
        blank: (H, W) of the frame that a batch of text alone carries.
    """
    frames, keys = [one.sample.frames for one in asked], [one.key for one in asked]
    encoded = [
        collator.encode_prompt(
            one.turns, one.sample.sample.kind, len(one.sample.frames), order == "question_first"
        )
        for one in asked
    ]
    batch = collator.batch(frames, encoded, keys, "video", blank)
    room = longest(collator, [one.expected for one in asked]) + ROOM
    return reply(model, collator, batch, min(MAX_NEW_TOKENS, room))


def longest(collator: Collator, texts: Sequence[str]) -> int:
    """Tokens of the longest text."""
    return max(map(len, collator.tokenizer(list(texts), add_special_tokens=False)["input_ids"]))


def reply(
    model: Any, collator: Collator, batch: Batch, max_new_tokens: int, mode: str | None = None
) -> list[str]:
    """The model's greedy answer to each prompt of a batch; ``mode`` None: in its own mode."""
    ids = generate(
        model,
        batch.to(model.device),
        eos_token_id=chat.stop_ids(collator.tokenizer, collator.image_token),
        max_new_tokens=max_new_tokens,
        mode=mode,
    )
    return collator.tokenizer.batch_decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
