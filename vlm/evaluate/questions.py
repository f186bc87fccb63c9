"""Asks a model every question of held-out samples, each by itself, and marks the answers.

A question never sees the other turns of its conversation: they would give answers away. The same
questions are asked about blank frames and about another sample's frames; a model that does as well
there does not look.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vlm.batch import Batch
from vlm.data import chat
from vlm.data.loader import Collator
from vlm.data.reader import LoadedSample
from vlm.data.schema import Turn
from vlm.models.foveated import FoveatedModel, Mode
from vlm.models.generate import generate

Control = Literal["true", "blank", "shuffled"]
CONTROLS: tuple[Control, ...] = ("true", "blank", "shuffled")
QUESTIONS_PER_BATCH = 128


@dataclass(frozen=True)
class Question:
    #: index of its sample among those judged
    sample: int
    text: str
    expected: str
    task: str
    #: what its accuracy counts for: its task, and the sample's `meta.group` if it names one
    groups: tuple[str, ...]


def find_questions(samples: Sequence[LoadedSample]) -> list[Question]:
    """Every answer that has a task, as a question of its own."""
    questions = []
    for index, loaded in enumerate(samples):
        turns = loaded.sample.conversation()
        group = loaded.sample.meta.get("group")
        extra = (group,) if isinstance(group, str) else ()
        for asked, answer in zip(turns, turns[1:], strict=False):
            if asked.role == "user" and answer.role == "assistant" and answer.task is not None:
                groups = (answer.task, *extra)
                questions.append(
                    Question(index, asked.content, answer.content, answer.task, groups)
                )
    return questions


def control_frames(samples: Sequence[LoadedSample], control: Control) -> list[np.ndarray]:
    """What each sample shows: its own frames, grey ones, or those of the next sample.

    The samples come in the plan's random order, so the next one is anybody else's.
    """
    frames = [loaded.frames for loaded in samples]
    if control == "blank":
        return [np.full_like(f, 128) for f in frames]
    if control == "shuffled":
        return frames[1:] + frames[:1]
    return frames


def answer(
    model: FoveatedModel,
    collator: Collator,
    questions: Sequence[Question],
    frames: Sequence[np.ndarray],
    mode: Mode = "coarse_fine",
) -> Iterator[str]:
    """The model's greedy answer to each question, in order.

    Args:
        frames: (T, H, W, 3) uint8 of each sample.
    """
    longest = max(len(answer_ids(collator, q.expected)) for q in questions)
    eos = collator.tokenizer.eos_token_id
    by_length = sorted(range(len(questions)), key=lambda i: len(frames[questions[i].sample]))
    answers: dict[int, str] = {}
    for start in range(0, len(by_length), QUESTIONS_PER_BATCH):
        part = by_length[start : start + QUESTIONS_PER_BATCH]
        batch = prompt_batch(collator, [questions[i] for i in part], frames)
        ids = generate(
            model,
            batch.to(model.device),
            eos_token_id=eos,
            max_new_tokens=longest + 4,  # room to be seen to ramble
            mode=mode,
        )
        texts = collator.tokenizer.batch_decode(ids, skip_special_tokens=False)
        answers.update(zip(part, texts, strict=True))
    return (answers[i] for i in range(len(questions)))


def answer_ids(collator: Collator, text: str) -> list[int]:
    return collator.tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_batch(
    collator: Collator, questions: Sequence[Question], frames: Sequence[np.ndarray]
) -> Batch:
    """One row for each question, with the frames of its sample."""
    own = [frames[q.sample] for q in questions]
    encoded = []
    for question, shown in zip(questions, own, strict=True):
        turns = [Turn(role="user", content=question.text)]
        prompt = chat.encode_prompt(collator.tokenizer, turns, collator.image_token)
        encoded.append(
            chat.expand_frames(
                prompt, len(shown), collator.tokens_per_frame, collator.image_token_id
            )
        )
    keys = [str(question.sample) for question in questions]
    return collator.batch(own, encoded, keys, "video", own[0].shape[1:3])


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


@torch.no_grad()
def judge_answers(
    model: FoveatedModel, collator: Collator, samples: Sequence[LoadedSample]
) -> tuple[dict[str, dict[str, float]], list[Question], list[str]]:
    """Accuracy by control and group, the questions, and the answers given to the true frames."""
    questions = find_questions(samples)
    scores, given = {}, []
    for control in CONTROLS:
        answers = list(answer(model, collator, questions, control_frames(samples, control)))
        scores[control] = accuracy(questions, answers)
        if control == "true":
            given = answers
    return scores, questions, given
