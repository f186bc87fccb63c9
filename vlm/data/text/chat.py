"""Conversations to token ids and labels, with the tokenizer's own chat template.

What happens to a conversation:

1. ``<video>`` and ``<image>`` marks in user turns become one image token each; any special token
   in the content is refused, so that no caption can close its own turn.
2. ``encode`` renders the whole conversation once and tokenizes it once; which tokens are learned
   follows from character offsets, so the text is the same with and without labels.
3. ``expand_frames`` turns each mark into the placeholders of its frames. Without a mark all
   placeholders stand before the text: [visual][text].

Errors here do not know the sample's name; who calls adds shard and key.
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm.batch import IGNORE_INDEX
from vlm.data.format.schema import MARK, Turn
from vlm.errors import ConfigError, SampleError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation, and what is learned of them."""

    input_ids: list[int]
    #: the id itself where it is learned, else -100; not shifted
    labels: list[int]
    #: what the image tokens in ``input_ids`` stand for; None where there are none
    mark: Literal["video", "image"] | None = None


def load_tokenizer(path: str | Path, image_token: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer and checks that conversations can be encoded with it.

    Raises:
        ConfigError: it is missing or not fast, has no chat template, no padding token of its own,
            or ``image_token`` is not one special token.
    """
    tokenizer = read_tokenizer(path)
    if not tokenizer.chat_template:
        raise ConfigError(f"tokenizer {path}: no chat template; take an instruction-tuned one")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        raise ConfigError(
            f"tokenizer {path}: pad_token is {tokenizer.pad_token!r} and eos_token is "
            f"{tokenizer.eos_token!r}; set a padding token of its own, or the end of a turn is "
            "never learned"
        )
    ids, _ = _tokenize(tokenizer, f"a{image_token}b")
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    if image_token not in special_tokens(tokenizer) or ids.count(image_id) != 1:
        raise ConfigError(
            f"tokenizer {path}: {image_token!r} is not one of its special tokens; add it with "
            "tokenizer.add_special_tokens, or name another image token"
        )
    return tokenizer


def tokenizer_fingerprint(path: str | Path) -> str:
    """``fingerprint`` of a tokenizer that is not loaded yet."""
    return fingerprint(read_tokenizer(path))


@functools.lru_cache(maxsize=8)
def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 over vocabulary, merges and chat template: equal where tokens are equal."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):
        model.pop(state, None)
    parts = [model, tokenizer.chat_template, tokenizer.pad_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encode(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Turn],
    image_token: str,
    loss_on: Literal["answers", "all", "last"] = "answers",
) -> Encoded:
    """Token ids and labels of a conversation that ends with an answer.

    ``answers`` learns every assistant turn up to and including its end-of-turn token, ``last`` only
    the last one, ``all`` every text token. Marks are still one image token each, see
    ``expand_frames``.

    Raises:
        SampleError: a special token or contradictory marks in the content.
        ConfigError: the template rewrites earlier turns when later ones are added.
    """
    messages, mark = _messages(tokenizer, turns, image_token)
    text = _render(tokenizer, messages)
    ids, offsets = _tokenize(tokenizer, text)
    if loss_on == "all":
        image_id = tokenizer.convert_tokens_to_ids(image_token)
        return Encoded(ids, [IGNORE_INDEX if i == image_id else i for i in ids], mark)
    count, last = len(ids), 0
    labels = [IGNORE_INDEX] * count
    begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
    spans = _answer_spans(tokenizer, messages, text)
    for start, stop in spans[-1:] if loss_on == "last" else spans:
        # a token that straddles the start holds characters of the answer: it is learned
        first = next((i for i in range(last, count) if ends[i] > start), count)
        last = next((i for i in range(first, count) if begins[i] >= stop), count)
        labels[first:last] = ids[first:last]
    return Encoded(ids, labels, mark)


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], image_token: str
) -> Encoded:
    """Token ids that ask for the next answer; ``turns`` end with the user's. Nothing is learned."""
    assert turns and turns[-1].role == "user", "a prompt ends with a user turn"
    messages, mark = _messages(tokenizer, turns, image_token)
    text = _render(tokenizer, messages, add_generation_prompt=True)
    ids, _ = _tokenize(tokenizer, text)
    return Encoded(ids, [IGNORE_INDEX] * len(ids), mark)


@functools.lru_cache(maxsize=8)
def stop_ids(tokenizer: PreTrainedTokenizerFast, image_token: str) -> tuple[int, ...]:
    """What ends an answer: the template's end of turn, first, and the tokenizer's end of text."""
    turns = [Turn(role="user", content="a"), Turn(role="assistant", content="b")]
    labels = encode(tokenizer, turns, image_token).labels
    end = next(label for label in reversed(labels) if label != IGNORE_INDEX)
    others = () if tokenizer.eos_token_id in (None, end) else (tokenizer.eos_token_id,)
    return (end, *others)


def truncate(
    tokenizer: PreTrainedTokenizerFast, encoded: Encoded, max_tokens: int | None, image_token: str
) -> Encoded:
    """Cuts a text behind its first ``max_tokens`` tokens; image tokens do not count.

    An answer that is cut ends there, by its end of turn, so that the end is learned all the same.

    Raises:
        SampleError: an image would be cut away, or nothing would be left to learn.
    """
    if max_tokens is None:
        return encoded
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    text = [i for i, token in enumerate(encoded.input_ids) if token != image_id]
    if len(text) <= max_tokens:
        return encoded
    cut = text[max_tokens - 1] + 1
    if image_id in encoded.input_ids[cut:]:
        raise SampleError(
            f"an image stands behind the first {max_tokens} text tokens (data.max_text_tokens), "
            "where the text is cut; raise it, or move the image to the front"
        )
    ids, labels = encoded.input_ids[:cut], encoded.labels[:cut]
    if labels[-1] != IGNORE_INDEX:
        ids[-1] = labels[-1] = stop_ids(tokenizer, image_token)[0]
    if all(label == IGNORE_INDEX for label in labels[:-1]):
        raise SampleError(
            f"no answer begins in the first {max_tokens} text tokens (data.max_text_tokens), where "
            "the text is cut; raise it, or shorten the question"
        )
    return Encoded(ids, labels, encoded.mark)


def expand_frames(
    encoded: Encoded, num_frames: int, tokens_per_frame: int, image_token_id: int
) -> Encoded:
    """Gives every frame its ``tokens_per_frame`` placeholder ids; they are never learned.

    Raises:
        SampleError: the marks in the text do not fit the number of frames.
    """
    if encoded.mark is None:
        frames = [image_token_id] * (num_frames * tokens_per_frame)
        ignored = [IGNORE_INDEX] * len(frames)
        return Encoded(frames + encoded.input_ids, ignored + encoded.labels)
    num_marks = encoded.input_ids.count(image_token_id)
    if num_frames == 0 or (encoded.mark == "image" and num_marks != num_frames):
        raise SampleError(
            f"{num_marks} <{encoded.mark}> mark(s) in the text but {num_frames} frame(s); "
            "expected one <image> for each frame, or one <video> for all, or no mark"
        )
    length = tokens_per_frame * (num_frames if encoded.mark == "video" else 1)
    ids: list[int] = []
    labels: list[int] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        repeats = length if token == image_token_id else 1
        ids.extend([token] * repeats)
        labels.extend([label] * repeats)
    return Encoded(ids, labels)


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """One that is fast, whether conversations can be encoded with it or not.

    Raises:
        ConfigError: there is none.
    """
    if not Path(path).is_dir() and not _HUB_ID.fullmatch(str(path)):
        raise ConfigError(
            f"tokenizer {path}: no such folder; expected one with tokenizer.json, as "
            "tools/prepare_tokenizer.py makes it from a pretrained one"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers package raises bare Exception on a broken file
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"tokenizer {path}: cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer {path}: not a fast tokenizer; expected a tokenizer.json")
    # a tokenizer.json may hold a length to cut at, from whoever saved it
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _tokenize(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character offsets. Goes past ``tokenizer(...)``, which takes twice the time and
    changes the tokenizer while other threads use it."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _messages(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], image_token: str
) -> tuple[list[dict[str, str]], Literal["video", "image"] | None]:
    """The turns as a template takes them, and the one kind of mark they hold."""
    marks: list[str] = []
    messages = []
    for turn in turns:
        if found := _special_pattern(tokenizer).search(turn.content):
            raise SampleError(
                f"the {turn.role} turn contains the special token {found[0]!r}; "
                "take it out of the content"
            )
        content = turn.content
        # elsewhere the marks are plain text: an answer about HTML may well contain <video>
        if turn.role == "user":
            marks += MARK.findall(content)
            content = MARK.sub(lambda _: image_token, content)
        messages.append({"role": turn.role, "content": content})
    if marks.count("video") > 1 or len(set(marks)) > 1:
        raise SampleError(
            f"{marks.count('video')} <video> and {marks.count('image')} <image> marks; expected "
            "one <video>, or only <image> marks"
        )
    if not marks:
        return messages, None
    return messages, "video" if marks[0] == "video" else "image"


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """Those that no text may hold."""
    added = tokenizer.added_tokens_decoder.values()
    return {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)


@functools.lru_cache(maxsize=8)
def _special_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    # longest first, so that the error names the whole token
    tokens = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)))


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **kw: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kw)
    except jinja2.TemplateError as error:
        raise SampleError(
            f"the chat template of tokenizer {tokenizer.name_or_path} refuses it: {error}"
        ) from None


@functools.lru_cache(maxsize=1024)
def _render_before(
    tokenizer: PreTrainedTokenizerFast, messages: tuple[tuple[str, str], ...]
) -> str:
    """What stands before an answer. Kept, because data sets ask few questions of many clips."""
    turns = [{"role": role, "content": content} for role, content in messages]
    return _render(tokenizer, turns, add_generation_prompt=True)


def _answer_spans(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], text: str
) -> list[tuple[int, int]]:
    """(start, end) in characters of each assistant turn in ``text``, its end-of-turn included."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render_before(tokenizer, tuple((m["role"], m["content"]) for m in messages[:i]))
        last = i + 1 == len(messages)
        through = (text if last else _render(tokenizer, messages[: i + 1])).rstrip()
        if not text.startswith(before) or not text.startswith(through):
            raise ConfigError(
                f"tokenizer {tokenizer.name_or_path}: its chat template rewrites earlier turns "
                "when later ones are added, so answers cannot be located; use another template"
            )
        spans.append((len(before), len(through)))
    return spans
