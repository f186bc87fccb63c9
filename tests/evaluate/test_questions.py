import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluate.world import (
    COLOURS,
    IMAGE_TOKEN,
    QUESTION,
    ask,
    make_model,
    make_sample,
    make_samples,
)
from vlm.batch import Batch
from vlm.data.format.schema import Turn
from vlm.data.load.collate import Collator
from vlm.data.load.reader import LoadedSample
from vlm.evaluate import questions as module
from vlm.evaluate.questions import (
    CONTROLS,
    Question,
    accuracy,
    answer,
    cut,
    find_questions,
    judge_answers,
    prior,
    prompt_batch,
    shown_frames,
)
from vlm.models.foveated import FoveatedModel

# --- what is asked ----------------------------------------------------------------------------


def test_every_answer_with_a_task_is_a_question() -> None:
    turns = ask((QUESTION, "red", "colour"), ("Thanks?", "yes", None), ("Is it red?", "yes", "yn"))
    found = find_questions([make_sample(0, "red", 2), make_sample(1, "blue", 1, turns)])
    assert [(q.sample, q.text, q.expected, q.task) for q in found] == [
        (0, QUESTION, "red", "colour"),
        (1, QUESTION, "red", "colour"),
        (1, "Is it red?", "yes", "yn"),
    ]


def test_a_question_sees_no_other_turn_of_its_conversation(collator: Collator) -> None:
    system = Turn(role="system", content="Say one word.")
    turns = [system, *ask(("Is it red?", "yes", "yn"), (QUESTION, "red", "colour"))]
    samples = [make_sample(0, "red", 2, turns)]
    batch = prompt_batch(collator, find_questions(samples), [samples[0].frames] * 2)
    texts = [
        collator.tokenizer.decode(batch.input_ids[a:b])
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
    ]
    assert texts == [
        IMAGE_TOKEN * 2
        + collator.tokenizer.apply_chat_template(
            [
                {"role": "system", "content": "Say one word."},
                {"role": "user", "content": question},
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        for question in ("Is it red?", QUESTION)
    ]
    assert (batch.labels == -100).all() and batch.num_loss_tokens == 0


@pytest.mark.parametrize("kind", ["video", "image"])
def test_frames_may_stand_behind_the_question(collator: Collator, kind: str) -> None:
    loaded = make_sample(0, "red", 2)
    marked = ask(("<image>Is it <image> red?", "yes", "yn"))
    questions = find_questions(
        [LoadedSample(0, loaded.sample.model_copy(update={"kind": kind}), loaded.frames)]
    )
    batch = prompt_batch(collator, questions, [loaded.frames], "question_first")
    text = collator.tokenizer.decode(batch.input_ids)
    assert text == f"<|user|>{QUESTION}{IMAGE_TOKEN * 2}<|end|><|assistant|>"
    own = find_questions([make_sample(0, "red", 2, marked)])
    one, other = (
        prompt_batch(collator, own, [loaded.frames], order)
        for order in ("frames_first", "question_first")
    )
    assert torch.equal(one.input_ids, other.input_ids), "a text that says where keeps it"


def test_a_sample_s_group_counts_beside_the_task() -> None:
    def groups(meta: dict) -> tuple[str, ...]:
        return find_questions([make_sample(0, "red", 1, meta=meta)])[0].groups

    assert groups({}) == ("colour",)
    assert groups({"group": "one shape"}) == ("colour", "one shape")
    assert groups({"group": "colour"}) == ("colour",), "nothing counts twice"
    for odd in (3, ["a"], "", "x" * 101, None):
        assert groups({"group": odd}) == ("colour",)


def test_a_question_about_one_of_several_images_is_left_out(
    collator: Collator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, its mark would not fit the frames; asked about all of them, it is another one."""
    monkeypatch.setattr(logging.getLogger("vlm"), "propagate", True)
    several = ask(("<image> Which?", "red", "colour"), ("<image> And now?", "blue", "colour"))
    both = ask(("<image> or <image>?", "red", "colour"), ("Sure?", "yes", "yn"))
    samples = [make_sample(0, "red", 2, several), make_sample(1, "red", 2, both)]
    found = find_questions(samples)
    assert [q.text for q in found] == ["<image> or <image>?", "Sure?"]
    assert "2 questions left out" in caplog.text
    for control in CONTROLS:
        prompt_batch(collator, found, [shown_frames(samples, q.sample, control) for q in found])


def test_special_tokens_in_an_answer_break_nothing(
    tokenizer_path: Path, collator: Collator
) -> None:
    turns = ask((QUESTION, "a <|end|> of <|image|>", "caption"))
    samples = [make_sample(0, "red", 2, turns), make_sample(1, "blue", 1)]
    model = make_model(tokenizer_path)
    found = judge_answers(model, collator, samples, find_questions(samples))
    assert len(found.answers) == 2 and set(found.accuracy["true"]) == {"caption", "colour"}


# --- what is shown ----------------------------------------------------------------------------


def test_controls_keep_the_number_of_frames_and_nothing_else_of_them() -> None:
    rng = np.random.default_rng(0)
    counts = [1, 4, 2, 7]
    samples = [
        LoadedSample(
            i, make_sample(i, "red", n).sample, rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
        )
        for i, n in enumerate(counts)
    ]
    for index in range(len(counts)):
        own = samples[index].frames
        assert shown_frames(samples, index, "true") is own
        blank = shown_frames(samples, index, "blank")
        assert blank.shape == own.shape and blank.dtype == np.uint8
        assert len(np.unique(blank)) == 1
        other = shown_frames(samples, index, "shuffled")
        assert other.shape == own.shape
        theirs = {f.tobytes() for s in samples if s.row != index for f in s.frames}
        assert all(frame.tobytes() in theirs for frame in other)
        assert not {f.tobytes() for f in own} & {f.tobytes() for f in other}
    longest = shown_frames(samples, 2, "shuffled")
    assert np.array_equal(longest[0], samples[3].frames[0])
    assert np.array_equal(longest[1], samples[3].frames[3]), "from its whole length"


def test_one_sample_alone_cannot_be_shuffled() -> None:
    with pytest.raises(AssertionError, match="no other sample"):
        shown_frames([make_sample(0, "red", 1)], 0, "shuffled")


def test_batches_are_bounded_in_number_and_in_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIXELS_PER_BATCH", 10 * 16 * 16)
    counts = [3, 1, 11, 2, 5, 5, 1, 1, 4]
    frames = [make_sample(i, "red", count).frames for i, count in enumerate(counts)]
    parts = list(cut(frames, 4))
    assert sorted(i for part in parts for i in part) == list(range(9))
    sizes = [[counts[i] for i in part] for part in parts]
    assert sizes == [[1, 1, 1, 2], [3, 4], [5, 5], [11]], "one that is too large goes alone"


# --- marks ------------------------------------------------------------------------------------

MARKED = [
    Question(0, (), "red", "colour", ("colour", "short"), "video"),
    Question(1, (), "red", "colour", ("colour",), "video"),
    Question(2, (), "blue", "colour", ("colour", "short"), "video"),
    Question(3, (), "up", "direction", ("direction", "short"), "video"),
]


def test_accuracy_by_hand() -> None:
    given = ["red", " red\n", "green", "upwards"]
    assert accuracy(MARKED, given) == {"colour": 2 / 3, "direction": 0.0, "short": 1 / 3}
    assert accuracy([], []) == {}
    with pytest.raises(ValueError, match="shorter"):
        accuracy(MARKED, given[:3])


def test_prior_is_the_most_frequent_answer_of_each_task() -> None:
    assert prior(MARKED) == {"colour": 2 / 3, "direction": 1.0, "short": 2 / 3}
    assert prior([]) == {}


# --- answers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tokenizer_path: Path, collator: Collator) -> tuple[FoveatedModel, list[LoadedSample]]:
    """A model that has learned a few clips by heart: the question is always the same."""
    model, samples = make_model(tokenizer_path), make_samples(7)
    batch = whole_batch(collator, samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(batch).loss_sum / batch.num_loss_tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return model, samples


def whole_batch(collator: Collator, samples: list[LoadedSample]):  # noqa: ANN201
    return collator.batch(
        [loaded.frames for loaded in samples],
        [collator.encode(loaded) for loaded in samples],
        [str(loaded.row) for loaded in samples],
        "video",
        (16, 16),
    )


def test_greedy_answers_are_what_teacher_forcing_predicts(
    learned: tuple[FoveatedModel, list[LoadedSample]], collator: Collator
) -> None:
    model, samples = learned
    batch = whole_batch(collator, samples)
    scored = []
    score = model.language.token_losses

    def watched(hidden: torch.Tensor, asked: Batch) -> torch.Tensor:
        scored.append(model.language.logits(hidden[asked.target_index]))
        return score(hidden, asked)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.language, "token_losses", watched)
        model(batch)
    assert torch.equal(scored[0].argmax(-1), batch.targets)
    expected = [loaded.sample.conversation()[1].content for loaded in samples]
    assert answer(model, collator, find_questions(samples), samples) == expected


def test_answers_come_in_the_order_of_the_questions(
    learned: tuple[FoveatedModel, list[LoadedSample]],
    collator: Collator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However they are batched; samples are asked by length, and several to a batch."""
    model, samples = learned
    questions = find_questions(samples)
    together = answer(model, collator, questions, samples)
    assert len(set(together)) == 3
    backwards = answer(model, collator, questions[::-1], samples)
    assert backwards == together[::-1]
    monkeypatch.setattr(module, "QUESTIONS_PER_BATCH", 2)
    assert answer(model, collator, questions, samples) == together
    assert answer(model, collator, [], samples) == []


def test_a_model_that_looks_fails_without_its_frames(
    learned: tuple[FoveatedModel, list[LoadedSample]], collator: Collator
) -> None:
    model, samples = learned
    questions = find_questions(samples)
    found = judge_answers(model, collator, samples, questions)
    scores = found.accuracy
    assert scores["true"] == {"colour": 1.0}
    assert found.answers == [q.expected for q in questions]
    assert list(found.accuracy_by_mode) == ["coarse_fine", "coarse_only", "autoregressive"]
    for mode, by_group in found.accuracy_by_mode.items():
        given = answer(model, collator, questions, samples, mode=mode)
        assert by_group == accuracy(questions, given)
    # one answer for all grey clips of a length, and the neighbour's colour
    assert scores["blank"]["colour"] < 1 and scores["shuffled"]["colour"] < 0.5
    others = answer(model, collator, questions, samples, "shuffled")
    assert set(others) <= set(COLOURS)
