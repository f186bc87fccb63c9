"""Judges a trained run on held-out samples: losses, answers, controls; then the report.

1. The newest checkpoint's exported model is loaded, without DeepSpeed.
2. Loss in all modes of the model, their ratio and gap, over whole conversations.
3. Every question by itself, about true, blank and another sample's frames, and in other modes.
4. 2 and 3 again with the question before the frames, or behind them, if the run wants both.
5. ``eval.json``, ``report.html`` and pictures of ``attention/`` in the run's folder.
"""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vlm import config
from vlm.batch import Batch
from vlm.ckpt import load as checkpoints
from vlm.ckpt.save import MODEL, TRAINER, replace_text
from vlm.config import Order, Recipe
from vlm.data.load.collate import Collator, frame_size
from vlm.data.load.reader import LoadedSample, Reader
from vlm.data.plan import stream
from vlm.engine.modes import only_mode
from vlm.errors import CheckpointError, DataError
from vlm.evaluate.losses import compare, mode_losses
from vlm.evaluate.questions import (
    Question,
    cut,
    find_questions,
    judge_answers,
    prior,
)
from vlm.evaluate.report import Answered, Clip, ReportData, write_report
from vlm.models import registry
from vlm.train import data, held_out_looks
from vlm.train.look_pictures import Seen, write_pictures
from vlm.train.metrics import read_rows
from vlm.train.model import limit_logits

log = logging.getLogger(__name__)

SAMPLES_PER_BATCH = 64
NUM_CLIPS = 12


class HeldOut(NamedTuple):
    """What is judged by, and how it becomes a batch."""

    collator: Collator
    samples: list[LoadedSample]
    keys: list[str]


def judge(run_dir: Path, max_samples: int) -> Path:
    """Judges the newest complete checkpoint of a run; returns the report's path.

    Raises:
        CheckpointError: no such run, no complete checkpoint in it, or one that has diverged.
        DataError: fewer than two held-out samples with frames.
    """
    started = time.perf_counter()
    recipe, checkpoint, model = open_run(run_dir)
    metrics = read_rows(run_dir / "metrics.jsonl")
    held = held_out(recipe, max_samples)
    questions = find_questions(held.samples)
    first, *others = recipe.data.orders
    mode = only_mode(recipe)
    judged, given = _judge(model, held, questions, first, mode, checkpoint)
    other_orders = {o: _judge(model, held, questions, o, mode, checkpoint)[0] for o in others}
    evaluation = {
        "checkpoint": str(checkpoint),
        "step": json.loads((checkpoint / TRAINER).read_text())["state"]["step"],
        "order": first,
        **judged,
        "other_orders": other_orders,
        "prior": prior(questions),
        "num_samples": len(held.samples),
        "num_answers": dict(sorted(Counter(g for q in questions for g in q.groups).items())),
        "wall_s": time.perf_counter() - started,
    }
    replace_text(run_dir / "eval.json", json.dumps(evaluation, indent=1))
    clips, seen = _clips(model, held, questions, given, first, mode)
    write_pictures(run_dir / held_out_looks.ATTENTION, seen)
    report = run_dir / "report.html"
    write_report(report, _report(metrics, recipe, model, evaluation, clips))
    return report


def open_run(run_dir: Path) -> tuple[Recipe, Path, Any]:
    """The recipe of a run, its newest complete checkpoint, and the model in it, on a GPU if any.

    The recipe names the checkpoint's own tokenizer.

    Raises:
        CheckpointError: no such run, or no complete checkpoint in it.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise CheckpointError(f"run {run_dir}: no recipe.yaml there; expected a trained run")
    recipe = config.load(run_dir / "recipe.yaml")
    checkpoint = checkpoints.newest(run_dir / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"run {run_dir}: no complete checkpoint; train it first")
    model = registry.load(checkpoint / MODEL).eval()
    limit_logits(model, recipe)
    named = recipe.model.model_copy(update={"tokenizer": str(checkpoint / MODEL)})
    recipe = recipe.model_copy(update={"model": named})
    return recipe, checkpoint, model.to("cuda" if torch.cuda.is_available() else "cpu")


def _judge(
    model: Any,
    held: HeldOut,
    questions: Sequence[Question],
    order: Order,
    mode: str | None,
    checkpoint: Path,
) -> tuple[dict[str, Any], list[str]]:
    """What is judged with the frames in one place of the text, and the answers."""
    log.info("%s: loss of %d samples in every mode", order, len(held.samples))
    losses = mode_losses(model, _batches(held, order))
    if not all(map(math.isfinite, losses.values())):
        raise CheckpointError(
            f"checkpoint {checkpoint}: its held-out loss is {losses}, so the model has diverged; "
            "expected a finite one, judge an earlier checkpoint"
        )
    log.info("%s: answers about true, blank and shuffled frames, and in other modes", order)
    found = judge_answers(model, held.collator, held.samples, questions, order, mode)
    judged = {
        "loss": losses,
        **compare(losses),
        "accuracy": found.accuracy,
        "accuracy_by_mode": found.accuracy_by_mode,
    }
    return judged, found.answers


def held_out(recipe: Recipe, max_samples: int) -> HeldOut:
    """Held-out samples with frames, drawn at random: always the same of a manifest and a seed."""
    source = data.open_source(recipe, data.load_tokenizer(recipe), training=False)
    frame_size(source.catalog)  # clips are batched, and shown in each other's place
    rows = np.flatnonzero(source.catalog.num_frames)
    bits = stream.philox(recipe.seed, stream.ORDER, 0, 0)
    chosen = rows[stream.permutation(bits, len(rows))][: max(0, max_samples)].tolist()
    if len(chosen) < 2:
        raise DataError(
            f"manifest {recipe.data.eval.manifest}: {len(chosen)} samples with frames to judge by "
            f"(it has {len(rows)}, --max-samples is {max_samples}); expected at least 2, because "
            "each is also asked about another one's frames"
        )
    reader = Reader(source.catalog)
    with ThreadPoolExecutor(recipe.data.decode_threads) as pool:
        shape = source.collator.latent_shape
        samples = list(pool.map(lambda row: reader.read(row, shape), chosen))
    reader.close()
    return HeldOut(source.collator, samples, source.catalog.keys(chosen))


def _batches(held: HeldOut, order: Order) -> Iterator[Batch]:
    """All samples, clips of like length together."""
    collator, samples, keys = held
    question_first = order == "question_first"
    for part in cut([loaded.frames for loaded in samples], SAMPLES_PER_BATCH):
        yield collator.batch(
            [samples[i].frames for i in part],
            [collator.encode(samples[i], question_first) for i in part],
            [keys[i] for i in part],
            "video",
            samples[part[0]].frames.shape[1:3],
            [samples[i].latents for i in part],
        )


def _clips(
    model: Any,
    held: HeldOut,
    questions: Sequence[Question],
    given: Sequence[str],
    order: Order,
    mode: str | None,
) -> tuple[list[Clip], list[Seen]]:
    """About a dozen samples from the whole range, with what was asked and answered.

    The second list is empty for a model that does not look.
    """
    collator, samples, keys = held
    asked: dict[int, list[Answered]] = {}
    for q, text in zip(questions, given, strict=True):
        answered = Answered(q.text, q.expected, text.strip(), q.task)
        asked.setdefault(q.sample, []).append(answered)
    chosen = list(asked)[:: max(1, len(asked) // NUM_CLIPS)][:NUM_CLIPS]
    clips, seen = [], []
    for index in chosen:
        loaded, key = samples[index], keys[index]
        batch = held_out_looks.whole(collator, key, loaded, order == "question_first")
        maps = held_out_looks.look(model, batch, mode)
        last = maps.get("fine", maps.get("coarse", ()))
        clips.append(Clip(key, list(loaded.frames), list(last), asked[index]))
        if maps:
            seen.append(Seen(loaded.frames, maps["coarse"], maps.get("fine")))
    return clips, seen


def _report(
    rows: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    model: Any,
    evaluation: dict[str, Any],
    clips: list[Clip],
) -> ReportData:
    last: Mapping[str, Any] = next((r for r in reversed(rows) if r.get("event") == "train"), {})
    facts = {
        "recipe": recipe.name,
        "model": f"{recipe.model.family}, {sum(p.numel() for p in model.parameters()):,} "
        "parameters",
        "steps": str(evaluation["step"]),
        "samples seen": f"{last.get('samples_seen') or 0:,}",
        "time in training": f"{last.get('wall_s') or 0:.0f} s",
        "held-out clips": str(evaluation["num_samples"]),
    }
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return ReportData(
        title=recipe.name,
        created=created,
        metrics=rows,
        evaluation=evaluation,
        facts=facts,
        clips=clips,
    )
