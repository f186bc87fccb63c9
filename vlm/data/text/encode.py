"""Samples of every form to token ids and labels: conversations, token ids, DPO pairs.

Text goes through `vlm.data.text.chat`; token ids are checked against the tokenizer and stay as they
are; both branches of a pair are encoded alike and learn only the answer that differs. What comes
out still has one image token for each mark, see ``chat.expand_frames``. Errors here do not know the
sample's name; who calls adds shard and key.
"""

from typing import Literal

from transformers import PreTrainedTokenizerFast

from vlm.batch import IGNORE_INDEX
from vlm.data.format.schema import Preference, Sample, TokenPreference, Tokens
from vlm.data.text import chat
from vlm.errors import SampleError


def encode_sample(
    tokenizer: PreTrainedTokenizerFast,
    sample: Sample,
    image_token: str,
    loss_on: Literal["answers", "all"] = "answers",
) -> chat.Encoded:
    """Token ids and labels of a sample that is no pair.

    Raises:
        SampleError: it is a pair, or what ``chat.encode`` and ``encode_branches`` refuse.
    """
    if sample.form == "preference":
        raise SampleError(
            "a preference pair, expected one conversation; set data.loss_on to preference"
        )
    (encoded,) = encode_branches(tokenizer, sample, image_token, loss_on)
    return encoded


def encode_branches(
    tokenizer: PreTrainedTokenizerFast,
    sample: Sample,
    image_token: str,
    loss_on: Literal["answers", "all"] = "answers",
) -> list[chat.Encoded]:
    """Token ids and labels of any sample: one conversation, or a pair's chosen and rejected.

    A pair learns only its last answer, whatever ``loss_on``. Tokens learn what their mask says, or
    all that are no image token.

    Raises:
        SampleError: tokens of another tokenizer or outside its vocabulary, or what
            ``chat.encode`` refuses.
    """
    pair = sample.preference
    if isinstance(pair, Preference):
        branches = [pair.branch(answer) for answer in (pair.chosen, pair.rejected)]
        return [chat.encode(tokenizer, turns, image_token, "last") for turns in branches]
    if isinstance(pair, TokenPreference):
        both = (pair.chosen, pair.rejected)
        return [_encode_tokens(tokenizer, tokens, sample, image_token) for tokens in both]
    if sample.tokens is not None:
        return [_encode_tokens(tokenizer, sample.tokens, sample, image_token, loss_on)]
    return [chat.encode(tokenizer, sample.conversation(), image_token, loss_on)]


def _encode_tokens(
    tokenizer: PreTrainedTokenizerFast,
    tokens: Tokens,
    sample: Sample,
    image_token: str,
    loss_on: Literal["answers", "all"] = "answers",
) -> chat.Encoded:
    """Ids as they are, once they are known to be this tokenizer's."""
    ids, image_id = list(tokens.token_ids), tokenizer.convert_tokens_to_ids(image_token)
    if tokens.tokenizer_sha256 not in (None, chat.fingerprint(tokenizer)):
        raise SampleError(
            f"tokens of another tokenizer ({tokens.tokenizer_sha256[:16]}...) than "
            f"{tokenizer.name_or_path}; make the shard again with that one"
        )
    if max(ids) >= len(tokenizer):
        raise SampleError(
            f"token {max(ids)}, but tokenizer {tokenizer.name_or_path} has {len(tokenizer)} "
            "entries; the shard was made with another one"
        )
    num_marks = ids.count(image_id)
    if num_marks and not (
        num_marks == sample.frame_count or (num_marks == 1 and sample.kind == "video")
    ):
        raise SampleError(
            f"{num_marks} image tokens in the token ids of kind {sample.kind} with frame_count "
            f"{sample.frame_count}; expected one for a video, one for each image, or none"
        )
    mask = tokens.loss_mask if loss_on == "answers" else (1,) * len(ids)
    labels = [
        token if learned and token != image_id else IGNORE_INDEX
        for token, learned in zip(ids, mask, strict=True)
    ]
    mark: Literal["video", "image"] = "image" if num_marks == sample.frame_count else "video"
    return chat.Encoded(ids, labels, mark if num_marks else None)
