from itertools import groupby
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import IMAGE_TOKEN
from vlm.data.format.schema import Turn
from vlm.data.text import chat
from vlm.data.text.chat import Encoded
from vlm.errors import ConfigError, SampleError

LLAMA_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)
REWRITING_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% if loop.last %}[last]{% endif %}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def turns(*contents: str) -> list[Turn]:
    roles = ["user", "assistant"] * len(contents)
    return [
        Turn(role=role, content=content)  # type: ignore[arg-type]
        for role, content in zip(roles, contents, strict=False)
    ]


def learned(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    """The text of each run of learned tokens."""
    runs = groupby(encoded.labels, key=lambda label: label != -100)
    return [tokenizer.decode(list(run)) for is_learned, run in runs if is_learned]


def test_answers_and_their_end_of_turn_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = chat.encode(tokenizer, turns("What?", "red", "And now?", "green "), IMAGE_TOKEN)
    assert learned(tokenizer, encoded) == ["red<|end|>", "green <|end|>"]
    assert tokenizer.decode(encoded.input_ids) == (
        "<|user|>What?<|end|><|assistant|>red<|end|>"
        "<|user|>And now?<|end|><|assistant|>green <|end|>"
    )
    assert all(x in (-100, i) for i, x in zip(encoded.input_ids, encoded.labels, strict=True))


@pytest.mark.parametrize("answer", ["\n\nred", "r\u00e4d \U0001f534", " ", "red"])
def test_no_character_of_an_answer_escapes_learning(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    encoded = chat.encode(tokenizer, [*turns("What?"), _answer(answer)], IMAGE_TOKEN)
    (text,) = learned(tokenizer, encoded)
    assert text.lstrip("\n") == f"{answer}<|end|>".lstrip("\n")


def _answer(content: str) -> Turn:
    return Turn.model_construct(role="assistant", content=content, task=None)


def test_a_template_that_trims_and_leaves_a_space(tokenizer_path: Path) -> None:
    other = chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN)
    other.chat_template = LLAMA_TEMPLATE
    encoded = chat.encode(other, turns("What?", " red ", "Now?", "green"), IMAGE_TOKEN)
    assert [text.strip() for text in learned(other, encoded)] == [
        "red<|end|>",
        "green<|end|>",
    ]


def test_all_learns_every_text_token_but_no_placeholder(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoded = chat.encode(tokenizer, turns("<video> What?", "red"), IMAGE_TOKEN, loss_on="all")
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert encoded.labels == [-100 if i == image_id else i for i in encoded.input_ids]
    assert encoded.input_ids.count(image_id) == 1


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer_path: Path) -> None:
    other = chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN)
    other.chat_template = REWRITING_TEMPLATE
    with pytest.raises(ConfigError, match=f"{tokenizer_path}.*rewrites earlier turns"):
        chat.encode(other, turns("a", "b", "c", "d"), IMAGE_TOKEN)


@pytest.mark.parametrize("token", ["<|end|>", "<|user|>", "<|pad|>", IMAGE_TOKEN])
@pytest.mark.parametrize("position", [0, 1])
def test_special_tokens_in_content_are_refused(
    tokenizer: PreTrainedTokenizerFast, token: str, position: int
) -> None:
    contents = ["question", "answer"]
    contents[position] = f"red{token}\n"
    with pytest.raises(SampleError, match="special token"):
        chat.encode(tokenizer, turns(*contents), IMAGE_TOKEN)


def test_prompt_ends_where_the_answer_starts(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = chat.encode_prompt(tokenizer, turns("What?", "red", "And?"), IMAGE_TOKEN)
    whole = chat.encode(tokenizer, turns("What?", "red", "And?", "green"), IMAGE_TOKEN)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    start = len(prompt.input_ids)
    assert learned(tokenizer, Encoded([], whole.labels[start:])) == ["green<|end|>"]
    assert set(prompt.labels) == {-100}


def test_frames_stand_before_the_text_without_a_mark(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = chat.encode(tokenizer, turns("What?", "red"), IMAGE_TOKEN)
    expanded = chat.expand_frames(encoded, 3, 2, 9)
    assert expanded.input_ids == [9] * 6 + encoded.input_ids
    assert expanded.labels == [-100] * 6 + encoded.labels
    assert chat.expand_frames(encoded, 0, 2, 9).input_ids == encoded.input_ids


def test_a_video_mark_takes_all_frames(tokenizer: PreTrainedTokenizerFast) -> None:
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    encoded = chat.encode(tokenizer, turns("See <video>. What?", "red"), IMAGE_TOKEN)
    expanded = chat.expand_frames(encoded, 3, 2, image_id)
    assert "See " + IMAGE_TOKEN * 6 + ". What?" in tokenizer.decode(expanded.input_ids)
    assert learned(tokenizer, expanded) == ["red<|end|>"]


def test_image_marks_take_one_frame_each(tokenizer: PreTrainedTokenizerFast) -> None:
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    encoded = chat.encode(tokenizer, turns("<image>", "red", "and <image>?", "green"), IMAGE_TOKEN)
    expanded = chat.expand_frames(encoded, 2, 3, image_id)
    text = tokenizer.decode(expanded.input_ids)
    assert f"<|user|>{IMAGE_TOKEN * 3}<|end|>" in text
    assert f"and {IMAGE_TOKEN * 3}?" in text
    assert len(expanded.labels) == len(expanded.input_ids) == len(encoded.input_ids) + 4


@pytest.mark.parametrize(
    ("question", "num_frames"), [("<image>", 2), ("<image><image>", 1), ("<video>", 0)]
)
def test_marks_must_fit_the_frames(
    tokenizer: PreTrainedTokenizerFast, question: str, num_frames: int
) -> None:
    encoded = chat.encode(tokenizer, turns(question, "red"), IMAGE_TOKEN)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    with pytest.raises(SampleError, match="mark"):
        chat.expand_frames(encoded, num_frames, 1, image_id)


@pytest.mark.parametrize("question", ["<video><video>", "<video><image>"])
def test_contradictory_marks_are_refused(tokenizer: PreTrainedTokenizerFast, question: str) -> None:
    with pytest.raises(SampleError, match="marks"):
        chat.encode(tokenizer, turns(question, "red"), IMAGE_TOKEN)


def test_marks_in_an_answer_are_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = chat.encode(tokenizer, turns("Which tag?", "<video>"), IMAGE_TOKEN)
    assert learned(tokenizer, encoded) == ["<video><|end|>"]
    assert encoded.mark is None


def test_fingerprint_follows_what_makes_tokens(tokenizer_path: Path, tmp_path: Path) -> None:
    first = chat.tokenizer_fingerprint(tokenizer_path)
    tokenizer = chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN)
    tokenizer(["a", "bb"], padding=True)
    tokenizer.save_pretrained(tmp_path / "copy")
    assert chat.tokenizer_fingerprint(tmp_path / "copy") == first
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(tmp_path / "other")
    assert chat.tokenizer_fingerprint(tmp_path / "other") != first


def test_nothing_is_cut_or_padded(tokenizer_path: Path, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=512)
    tokenizer.save_pretrained(tmp_path)
    text = turns("What? " * 20, "red")
    saved = chat.load_tokenizer(tmp_path, IMAGE_TOKEN)
    original = chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN)
    encoded = chat.encode(saved, text, IMAGE_TOKEN)
    assert encoded == chat.encode(original, text, IMAGE_TOKEN)
    assert len(encoded.input_ids) > 20


def test_unusable_tokenizers_are_named(tokenizer_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; .* tools/prepare_tokenizer.py"):
        chat.load_tokenizer(tmp_path / "none", IMAGE_TOKEN)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        chat.load_tokenizer(tmp_path, IMAGE_TOKEN)
    with pytest.raises(ConfigError, match="not one of its special tokens"):
        chat.load_tokenizer(tokenizer_path, "<image_soft_token>")
    tokenizer = chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "pad")
    with pytest.raises(ConfigError, match="pad_token is"):
        chat.load_tokenizer(tmp_path / "pad", IMAGE_TOKEN)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "template")
    with pytest.raises(ConfigError, match="no chat template"):
        chat.load_tokenizer(tmp_path / "template", IMAGE_TOKEN)


def test_a_long_answer_is_cut_and_still_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = chat.encode(tokenizer, turns("<image> What?", "red green blue red"), IMAGE_TOKEN)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    size = len(whole.input_ids) - 1  # without the image
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for most in range(size, size + 3):
        assert chat.truncate(tokenizer, whole, most, IMAGE_TOKEN) == whole
    assert chat.truncate(tokenizer, whole, None, IMAGE_TOKEN) == whole
    first = next(i for i, label in enumerate(whole.labels) if label != -100)
    for most in range(first + 1, size):  # one token of the answer, its end, the image apart
        cut = chat.truncate(tokenizer, whole, most, IMAGE_TOKEN)
        assert len(cut.input_ids) - cut.input_ids.count(image) == most
        assert cut.input_ids[:most] == whole.input_ids[:most]
        assert cut.input_ids[-1] == cut.labels[-1] == end and cut.labels.count(end) == 1
        assert cut.labels[first:-1] == whole.labels[first:most] and cut.mark == "image"


def test_a_cut_never_takes_an_image_or_the_whole_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    late = turns("What?", "red", "<image> And this?", "green")
    encoded = chat.encode(tokenizer, late, IMAGE_TOKEN)
    with pytest.raises(SampleError, match="an image stands behind the first 6 text tokens"):
        chat.truncate(tokenizer, encoded, 6, IMAGE_TOKEN)
    encoded = chat.encode(tokenizer, turns("What colour is it?", "red"), IMAGE_TOKEN)
    first = next(i for i, label in enumerate(encoded.labels) if label != -100)
    for most in (2, first, first + 1):
        with pytest.raises(SampleError, match=f"no answer begins in the first {most} text tokens"):
            chat.truncate(tokenizer, encoded, most, IMAGE_TOKEN)


def test_a_cut_between_turns_keeps_what_was_answered(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = chat.encode(tokenizer, turns("What?", "red", "And now?", "green"), IMAGE_TOKEN)
    alone = chat.encode(tokenizer, turns("What?", "red"), IMAGE_TOKEN)
    cut = chat.truncate(tokenizer, encoded, len(alone.input_ids) + 1, IMAGE_TOKEN)
    assert learned(tokenizer, cut) == ["red<|end|>"]


def test_an_answer_stops_at_its_turn_and_at_the_end_of_text(tokenizer_path: Path) -> None:
    tokenizer = chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert chat.stop_ids(tokenizer, IMAGE_TOKEN) == (end,)
    other = chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN)
    other.eos_token = "<|system|>"
    assert chat.stop_ids(other, IMAGE_TOKEN) == (end, other.eos_token_id)
