"""The JSON and texts of shards that other tools made, as samples of our schema.

    img2dataset, video2dataset    KEY.txt holds the caption, KEY.json what is known of the page
    foveated-vlm and the like     token_ids + loss_mask; user + assistant; caption; pairs for DPO

What is found first counts: pairs, tokens, question and answer, caption. Everything else in such a
JSON is ignored but for `source`, the licence and what names the sample. Not here: our own schema,
which is recognised by its `version` or `kind` (`vlm.data.format.schema`), and the frames.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm.data.format.schema import Kind, Preference, Sample, TokenPreference, Tokens, Turn, explain
from vlm.errors import SampleError

#: where no JSON names a source
DEFAULT_SOURCE = "foreign"
#: what may identify a sample, or say whether it may be used
META_KEYS = ("id", "uid", "key", "url", "video_id", "yt_id", "eval_source", "license", "licence")
MAX_META_CHARS = 2000


class _Json(BaseModel):
    """What is read of a foreign JSON. Numbers may be 1, 1.0 or true: writers differ."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    source: str | None = None
    frame_count: int | None = Field(None, ge=0)
    caption: str | None = None
    user: str | None = None
    assistant: str | None = None
    token_ids: tuple[int, ...] | None = None
    loss_mask: tuple[int, ...] | None = None
    chosen_assistant: str | None = None
    rejected_assistant: str | None = None
    chosen_token_ids: tuple[int, ...] | None = None
    chosen_loss_mask: tuple[int, ...] | None = None
    rejected_token_ids: tuple[int, ...] | None = None
    rejected_loss_mask: tuple[int, ...] | None = None


def parse_foreign(
    tree: dict[str, Any],
    text: str | None,
    kind: Kind,
    num_images: int | None,
    where: str,
) -> Sample:
    """A sample of our schema.

    Args:
        tree: The parsed JSON member; empty where there is none.
        text: The `KEY.txt` member.
        kind: What its other members are.
        num_images: So many of them; None for a video file.
        where: Shard, key and member, for the error.

    Raises:
        SampleError: nothing to learn from, or fields that contradict each other or the frames.
    """
    try:
        found = _Json.model_validate(tree)
        if found.frame_count is not None and num_images not in (None, found.frame_count):
            raise SampleError(
                f"{where}: frame_count is {found.frame_count} but there are {num_images} images"
            )
        words = _words(found, text, kind)
        if not words:
            raise SampleError(
                f"{where}: nothing to learn; expected token_ids and loss_mask, user and "
                "assistant, chosen and rejected, a caption, or a member .txt"
            )
        if kind == "text" and "caption" in words:
            raise SampleError(f"{where}: a caption without an image or a video")
        return Sample(
            version=1,
            kind=kind,
            source=(found.source or DEFAULT_SOURCE)[:100],
            frame_count=num_images,
            meta=_meta(tree),
            **words,
        )
    except ValidationError as error:
        raise SampleError(f"{where}: {explain(error)}") from None


def _words(found: _Json, text: str | None, kind: Kind) -> dict[str, Any]:
    """The one form of the sample that the JSON or the text gives; empty for none."""
    if found.chosen_token_ids is not None or found.rejected_token_ids is not None:
        return {
            "preference": TokenPreference(
                chosen=_tokens(found.chosen_token_ids, found.chosen_loss_mask),
                rejected=_tokens(found.rejected_token_ids, found.rejected_loss_mask),
            )
        }
    if found.chosen_assistant is not None or found.rejected_assistant is not None:
        return {
            "preference": Preference(
                prompt=(_question(found.user, kind),),
                chosen=found.chosen_assistant or "",
                rejected=found.rejected_assistant or "",
            )
        }
    if found.token_ids is not None:
        return {"tokens": _tokens(found.token_ids, found.loss_mask)}
    if found.user is not None or found.assistant is not None:
        return {
            "turns": (
                _question(found.user, kind),
                Turn(role="assistant", content=found.assistant or ""),
            )
        }
    # the member and not the JSON: img2dataset's JSON may hold a caption that was not used
    caption = text if text is not None else found.caption
    return {} if caption is None else {"caption": caption.strip()}


def _question(user: str | None, kind: Kind) -> Turn:
    text = user or ""
    if kind == "video" and text.count("<image>") == 1:
        # LLaVA's data sets write <image> for a whole video too
        text = text.replace("<image>", "<video>")
    return Turn(role="user", content=text)


def _tokens(ids: tuple[int, ...] | None, mask: tuple[int, ...] | None) -> Tokens:
    return Tokens(token_ids=ids or (), loss_mask=mask or ())


def _meta(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tree[name]
        for name in META_KEYS
        if isinstance(tree.get(name), str | int) and len(str(tree[name])) <= MAX_META_CHARS
    }
