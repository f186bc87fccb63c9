"""Asks a model every question of held-out samples, each by itself, and marks the answers.

A question never sees the other turns of its conversation: they would give answers away. The same
questions are asked about blank frames and about another sample's frames; a model that does as well
there does not look. Frames stand before the question or behind it, as the run wants it.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from vlm.batch import Batch
from vlm.config import Order
from vlm.data.format.schema import MARK, Turn
from vlm.data.load.collate import Collator
from vlm.data.load.reader import LoadedSample
from vlm.train.predictions import longest, reply

log = logging.getLogger(__name__)

Control = Literal["true", "blank", "shuffled"]
CONTROLS: tuple[Control, ...] = ("true", "blank", "shuffled")
#: forward modes that read frames otherwise than a model's own does
OTHER_MODES = ("coarse_only", "autoregressive")
GREY = np.uint8(128)
QUESTIONS_PER_BATCH = 128
#: of all frames of a batch: 334 of 224 px, whose keys and values take about 3 GB in a small tower
PIXELS_PER_BATCH = 1 << 24
MAX_GROUP_CHARS = 100
#: tokens that an answer may be longer than the longest expected one, to be seen to ramble
ROOM = 4


@dataclass(frozen=True)
class Question:
    #: index of its sample among those judged
    sample: int
    #: the user turn, after the conversation's system turn if it has one
    turns: tuple[Turn, ...]
    expected: str
    task: str
    #: what its accuracy counts for: its task, and the sample's `meta.group` if it names one
    groups: tuple[str, ...]
    #: of its sample
    kind: str

    @property
    def text(self) -> str:
        return self.turns[-1].content


def find_questions(samples: Sequence[LoadedSample]) -> list[Question]:
    """Every answer that has a task, as a question of its own."""
    questions = []
    num_left_out = 0
    for index, loaded in enumerate(samples):
        turns = loaded.sample.conversation()
        system = tuple(turn for turn in turns if turn.role == "system")
        for asked, answer in zip(turns, turns[1:], strict=False):
            if answer.role != "assistant" or answer.task is None:
                continue
            if MARK.findall(asked.content).count("image") not in (0, len(loaded.frames)):
                num_left_out += 1  # it speaks of one image, others belong to other turns
                continue
            groups = tuple(dict.fromkeys((answer.task, *_group(loaded))))
            questions.append(
                Question(
                    sample=index,
                    turns=(*system, asked),
                    expected=answer.content,
                    task=answer.task,
                    groups=groups,
                    kind=loaded.sample.kind,
                )
            )
    if num_left_out:
        log.warning("%d questions left out: others own some of their <image>s", num_left_out)
    return questions


def _group(loaded: LoadedSample) -> tuple[str, ...]:
    group = loaded.sample.meta.get("group")
    return (group,) if isinstance(group, str) and 0 < len(group) <= MAX_GROUP_CHARS else ()


def shown_frames(samples: Sequence[LoadedSample], index: int, control: Control) -> np.ndarray:
    """What a sample shows: its own frames, as many grey ones, or as many of the next sample's.

    The samples come in random order, so the next one is anybody else's; there must be two. As
    many, so that the number of frames gives nothing away that blank frames do not.
    """
    own = samples[index].frames
    if control == "blank":
        return np.broadcast_to(GREY, own.shape)
    if control == "shuffled":
        assert len(samples) > 1, "there is no other sample"
        other = samples[(index + 1) % len(samples)].frames
        return other[np.arange(len(own)) * len(other) // len(own)]
    return own


def cut(frames: Sequence[np.ndarray], most: int) -> Iterator[list[int]]:
    """Indices of clips, the short ones first, in batches of at most ``most`` that fit memory."""
    part: list[int] = []
    pixels = 0
    for index in sorted(range(len(frames)), key=lambda i: len(frames[i])):
        size = frames[index].size // 3
        if part and (len(part) == most or pixels + size > PIXELS_PER_BATCH):
            yield part
            part, pixels = [], 0
        part.append(index)
        pixels += size
    if part:
        yield part


def answer(
    model: Any,
    collator: Collator,
    questions: Sequence[Question],
    samples: Sequence[LoadedSample],
    control: Control = "true",
    mode: str | None = None,
    order: Order = "frames_first",
) -> list[str]:
    """The model's greedy answer to each question, in order.

    Args:
        mode: Forward mode; None: the model's own.
    """
    own = [samples[question.sample].frames for question in questions]
    answers = [""] * len(questions)
    for part in cut(own, QUESTIONS_PER_BATCH):
        asked = [questions[i] for i in part]
        frames = [shown_frames(samples, question.sample, control) for question in asked]
        batch = prompt_batch(collator, asked, frames, order)
        room = longest(collator, [question.expected for question in asked]) + ROOM
        texts = reply(model, collator, batch, room, mode)
        for i, text in zip(part, texts, strict=True):
            answers[i] = text
    return answers


def prompt_batch(
    collator: Collator,
    questions: Sequence[Question],
    frames: Sequence[np.ndarray],
    order: Order = "frames_first",
) -> Batch:
    """One row for each question, with the frames that it is about."""
    first = order == "question_first"
    encoded = [
        collator.encode_prompt(question.turns, question.kind, len(shown), first)
        for question, shown in zip(questions, frames, strict=True)
    ]
    keys = [str(question.sample) for question in questions]
    return collator.batch(list(frames), encoded, keys, "video", frames[0].shape[1:3])


def accuracy(questions: Sequence[Question], answers: Iterable[str]) -> dict[str, float]:
    """Share of exact answers in each group."""
    right, asked = Counter[str](), Counter[str]()
    for question, given in zip(questions, answers, strict=True):
        for group in question.groups:
            asked[group] += 1
            right[group] += given.strip() == question.expected.strip()
    return {group: right[group] / asked[group] for group in sorted(asked)}


def prior(questions: Sequence[Question]) -> dict[str, float]:
    """Accuracy of always giving a task's most frequent answer, the best one can do blind."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.task][question.expected] += 1
    best = {task: counts.most_common(1)[0][0] for task, counts in answers.items()}
    return accuracy(questions, (best[question.task] for question in questions))


class Judged(NamedTuple):
    """Accuracies by group, and what was answered."""

    #: of the mode that is judged, by control
    accuracy: dict[str, dict[str, float]]
    #: about the true frames, by forward mode, the judged one first
    accuracy_by_mode: dict[str, dict[str, float]]
    #: to the true frames, in the mode that is judged
    answers: list[str]


def judge_answers(
    model: Any,
    collator: Collator,
    samples: Sequence[LoadedSample],
    questions: Sequence[Question],
    order: Order = "frames_first",
    mode: str | None = None,
) -> Judged:
    """Asks all questions in one mode with each control, and in each other mode.

    Args:
        mode: None: the model's own.
    """
    own = mode or model.modes[0]
    others = [other for other in OTHER_MODES if other in model.modes and other != own]
    answers: dict[str, list[str]] = {
        control: answer(model, collator, questions, samples, control, own, order)
        for control in CONTROLS
    }
    by_mode = {own: answers["true"]} | {
        other: answer(model, collator, questions, samples, "true", other, order) for other in others
    }
    return Judged(
        {control: accuracy(questions, given) for control, given in answers.items()},
        {mode: accuracy(questions, given) for mode, given in by_mode.items()},
        answers["true"],
    )
