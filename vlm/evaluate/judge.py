"""Judges a trained run on held-out samples: losses, answers, controls; then the report.

1. The newest checkpoint's exported model is loaded, without DeepSpeed.
2. Loss in all modes of the model, their ratio and gap, over whole conversations.
3. Every question by itself, about true, blank and another sample's frames.
4. ``eval.json`` and ``report.html`` in the run's folder.
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
from typing import Any

import numpy as np
import torch

from vlm import config
from vlm.batch import Batch
from vlm.ckpt import load as checkpoints
from vlm.ckpt.save import MODEL, TRAINER, replace_text
from vlm.config import Recipe
from vlm.data.load.collate import Collator, frame_size
from vlm.data.load.reader import LoadedSample, Reader
from vlm.data.plan import stream
from vlm.errors import CheckpointError, DataError
from vlm.evaluate.attention import fine_attention
from vlm.evaluate.losses import compare, mode_losses
from vlm.evaluate.questions import Question, cut, judge_answers, prior, prompt_batch
from vlm.evaluate.report import Answered, Clip, ReportData, write_report
from vlm.models import registry
from vlm.train import data
from vlm.train.metrics import read_rows
from vlm.train.model import limit_logits

log = logging.getLogger(__name__)

SAMPLES_PER_BATCH = 64
NUM_CLIPS = 12


def judge(run_dir: Path, max_samples: int) -> Path:
    """Judges the newest complete checkpoint of a run; returns the report's path.

    Raises:
        CheckpointError: no such run, no complete checkpoint in it, or one that has diverged.
        DataError: fewer than two held-out samples with frames.
    """
    started = time.perf_counter()
    if not (run_dir / "recipe.yaml").is_file():
        raise CheckpointError(f"run {run_dir}: no recipe.yaml there; expected a trained run")
    recipe = config.load(run_dir / "recipe.yaml")
    checkpoint = checkpoints.newest(run_dir / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"run {run_dir}: no complete checkpoint; train it first")
    metrics = read_rows(run_dir / "metrics.jsonl")
    collator, samples, keys = held_out(recipe, checkpoint / MODEL, max_samples)
    model = registry.load(checkpoint / MODEL).eval()
    limit_logits(model, recipe)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    log.info("loss of %d samples in every mode", len(samples))
    losses = mode_losses(model, _batches(collator, samples, keys))
    if not all(map(math.isfinite, losses.values())):
        raise CheckpointError(
            f"checkpoint {checkpoint}: its held-out loss is {losses}, so the model has diverged; "
            "expected a finite one, judge an earlier checkpoint"
        )
    log.info("answers about true, blank and shuffled frames")
    scores, questions, given = judge_answers(model, collator, samples)
    evaluation = {
        "checkpoint": str(checkpoint),
        "step": json.loads((checkpoint / TRAINER).read_text())["state"]["step"],
        "loss": losses,
        **compare(losses),
        "accuracy": scores,
        "prior": prior(questions),
        "num_samples": len(samples),
        "num_answers": dict(sorted(Counter(g for q in questions for g in q.groups).items())),
        "wall_s": time.perf_counter() - started,
    }
    replace_text(run_dir / "eval.json", json.dumps(evaluation, indent=1))
    clips = _clips(model, collator, samples, keys, questions, given)
    report = run_dir / "report.html"
    write_report(report, _report(metrics, recipe, model, evaluation, clips))
    return report


def held_out(
    recipe: Recipe, tokenizer: Path, max_samples: int
) -> tuple[Collator, list[LoadedSample], list[str]]:
    """Held-out samples with frames, drawn at random: always the same of a manifest and a seed."""
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"tokenizer": str(tokenizer)})}
    )
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
        samples = list(pool.map(reader.read, chosen))
    reader.close()
    return source.collator, samples, source.catalog.keys(chosen)


def _batches(
    collator: Collator, samples: Sequence[LoadedSample], keys: Sequence[str]
) -> Iterator[Batch]:
    """All samples, clips of like length together."""
    for part in cut([loaded.frames for loaded in samples], SAMPLES_PER_BATCH):
        yield collator.batch(
            [samples[i].frames for i in part],
            [collator.encode(samples[i]) for i in part],
            [keys[i] for i in part],
            "video",
            samples[part[0]].frames.shape[1:3],
        )


def _clips(
    model: Any,
    collator: Collator,
    samples: Sequence[LoadedSample],
    keys: Sequence[str],
    questions: Sequence[Question],
    given: Sequence[str],
) -> list[Clip]:
    """About a dozen samples from the whole range, with what was asked and answered."""
    asked: dict[int, list[tuple[Question, str]]] = {}
    for question, text in zip(questions, given, strict=True):
        asked.setdefault(question.sample, []).append((question, text))
    chosen = list(asked)[:: max(1, len(asked) // NUM_CLIPS)][:NUM_CLIPS]
    clips = []
    for index in chosen:
        frames = samples[index].frames
        batch = prompt_batch(collator, [asked[index][0][0]], [frames])
        clips.append(
            Clip(
                key=keys[index],
                frames=list(frames),
                attention=_attention(model, batch.to(model.device)),
                questions=[
                    Answered(q.text, q.expected, text.strip(), q.task) for q, text in asked[index]
                ],
            )
        )
    return clips


def _attention(model: Any, batch: Batch) -> list[np.ndarray]:
    """A map for each frame, where a family looks."""
    return list(fine_attention(model, batch)) if "coarse_fine" in model.modes else []


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
