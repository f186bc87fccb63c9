"""What one sample of a shard says: its words or tokens, where it comes from, its frames.

The JSON of our own shards is parsed here and nowhere else. It may come from anybody, so its size
and shape are bounded. Not here: the JSON of other tools (`vlm.data.format.foreign`), the frames
(`vlm.data.format.layout`), tokenizing (`vlm.data.text.chat`).
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from vlm.errors import SampleError

Kind = Literal["text", "image", "video"]
Form = Literal["turns", "caption", "tokens", "preference"]

MAX_JSON_BYTES = 4 << 20
MAX_FRAMES = 64
#: a sample's kind is stored in the manifest as its position here
KINDS: tuple[Kind, ...] = ("text", "image", "video")
FORMS: tuple[Form, ...] = ("turns", "caption", "tokens", "preference")
CAPTION_PROMPT = "Describe this."
#: faults of one JSON that an error names
MAX_EXPLAINED = 5
#: where frames stand in a user turn; in other turns it is plain text
MARK = re.compile("<(video|image)>")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Turn(_Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str
    #: the kind of question an answer belongs to; evaluation groups by it
    task: str | None = Field(None, min_length=1, max_length=100)

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: str) -> str:
        return _not_blank(content, "content")


class Tokens(_Strict):
    """Token ids of a whole conversation, made by the tokenizer that trains.

    Frames stand where the image token stands, once for a video or once for each image; without it
    they stand before the text.
    """

    token_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...]
    #: 1 where a token is learned; aligned with the tokens, not shifted
    loss_mask: tuple[Annotated[int, Field(ge=0, le=1)], ...]
    #: `chat.fingerprint` of the tokenizer; checked where it is given
    tokenizer_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _consistent(self) -> "Tokens":
        if len(self.token_ids) != len(self.loss_mask):
            raise ValueError(
                f"{len(self.token_ids)} token_ids but a loss_mask of {len(self.loss_mask)}; "
                "expected one entry for each token"
            )
        if not any(self.loss_mask):
            raise ValueError("loss_mask marks no token to learn")
        return self


class Preference(_Strict):
    """A DPO pair as text: two answers to one prompt."""

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str

    @field_validator("chosen", "rejected")
    @classmethod
    def _check_answer(cls, answer: str) -> str:
        return _not_blank(answer, "answer")

    @model_validator(mode="after")
    def _consistent(self) -> "Preference":
        for branch in (self.chosen, self.rejected):
            check_turns(self.branch(branch))
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same answer")
        return self

    def branch(self, answer: str) -> tuple[Turn, ...]:
        """The prompt and one of the two answers."""
        return (*self.prompt, Turn(role="assistant", content=answer))


class TokenPreference(_Strict):
    """A DPO pair as tokens: each branch is prompt and answer, and learns only the answer."""

    chosen: Tokens
    rejected: Tokens

    @model_validator(mode="after")
    def _consistent(self) -> "TokenPreference":
        if self.chosen.token_ids == self.rejected.token_ids:
            raise ValueError("chosen and rejected are the same tokens")
        return self


def _preference_form(preference: object) -> str:
    is_text = isinstance(preference, Preference) or (
        isinstance(preference, dict) and not isinstance(preference.get("chosen"), dict)
    )
    return "text" if is_text else "tokens"


class Sample(_Strict):
    """The JSON member of a sample, version 1. Exactly one of the four forms is set."""

    version: Literal[1]
    kind: Kind
    source: str = Field(min_length=1, max_length=100)
    #: images in the shard; None for a video file, whose frames are chosen when it is read
    frame_count: int | None = Field(None, ge=0, le=MAX_FRAMES)
    turns: tuple[Turn, ...] | None = None
    #: the answer to "Describe this."
    caption: str | None = None
    tokens: Tokens | None = None
    preference: (
        Annotated[
            Annotated[Preference, Tag("text")] | Annotated[TokenPreference, Tag("tokens")],
            Discriminator(_preference_form),
        ]
        | None
    ) = None
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Sample":
        if (self.kind == "text") != (self.frame_count == 0):
            expected = "0 frames" if self.kind == "text" else f"1 to {MAX_FRAMES} frames"
            raise ValueError(f"kind {self.kind} needs {expected}, found {self.frame_count}")
        if self.frame_count is None and self.kind != "video":
            raise ValueError(f"kind {self.kind} needs a frame_count; only a video file has none")
        found = [form for form in FORMS if self.__dict__[form] is not None]
        if len(found) != 1:
            raise ValueError(
                f"expected exactly one of {', '.join(FORMS)}; found {', '.join(found) or 'none'}"
            )
        if self.turns is not None:
            check_turns(self.turns)
        if self.caption is not None:
            _not_blank(self.caption, "caption")
        check_marks(self.conversation(), self.kind, self.frame_count)
        return self

    @property
    def form(self) -> Form:
        return next(form for form in FORMS if self.__dict__[form] is not None)

    def conversation(self) -> list[Turn]:
        """The turns that are known as text: a caption answers one fixed question, a pair is its
        chosen branch, tokens have none."""
        if self.turns is not None:
            return list(self.turns)
        if self.caption is not None:
            return [
                Turn(role="user", content=CAPTION_PROMPT),
                Turn(role="assistant", content=self.caption, task="caption"),
            ]
        if isinstance(self.preference, Preference):
            return list(self.preference.branch(self.preference.chosen))
        return []

    def to_json(self) -> bytes:
        """What ``parse_sample`` reads back to an equal sample."""
        return self.model_dump_json(exclude_unset=True).encode()


def check_turns(turns: tuple[Turn, ...]) -> None:
    """Raises ValueError unless user and assistant alternate and an answer ends it."""
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(
            "turns must alternate user, assistant, after at most one system turn, and end with "
            f"assistant; found {', '.join(roles[:8]) or 'none'}{', ...' if roles[8:] else ''}"
        )


def check_marks(turns: list[Turn], kind: str, frame_count: int | None) -> None:
    """Raises ValueError unless the places for frames in the text fit the frames."""
    marks = [mark for t in turns if t.role == "user" for mark in MARK.findall(t.content)]
    num_videos, num_images = marks.count("video"), marks.count("image")
    fits = (
        not marks
        or (kind == "video" and (num_videos, num_images) == (1, 0))
        or (num_videos, num_images) == (0, frame_count)
    )
    if not fits:
        raise ValueError(
            f"{num_videos} <video> and {num_images} <image> marks in the text of kind {kind} with "
            f"{frame_count if frame_count is not None else 'a video file and no'} frame(s); "
            "expected one <video> for all frames of a video, or one <image> for each frame, or "
            "no mark"
        )


def parse_sample(raw: bytes | memoryview, where: str) -> Sample:
    """Parses the JSON member of a sample.

    Args:
        raw: The member's bytes, trusted in no way.
        where: Shard, key and member, for the error.

    Raises:
        SampleError: not JSON, too large, or not version 1 of the schema.
    """
    check_json_size(raw, where)
    try:
        return Sample.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise SampleError(f"{where}: {explain(error)}") from None


def check_json_size(raw: bytes | memoryview, where: str) -> None:
    if len(raw) > MAX_JSON_BYTES:
        raise SampleError(f"{where}: {len(raw)} bytes of JSON, at most {MAX_JSON_BYTES} are read")


def explain(error: ValidationError) -> str:
    """The faults of a validation with their dotted paths, the first few of many."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    texts = []
    for fault in found[:MAX_EXPLAINED]:
        dotted = ".".join(str(part) for part in fault["loc"])[:200]
        texts.append(f"{dotted}: {fault['msg']}" if dotted else fault["msg"])
    more = f" (and {len(found) - len(texts)} more)" if len(found) > len(texts) else ""
    return "; ".join(texts) + more


def _not_blank(text: str, name: str) -> str:
    if not text.strip():
        raise ValueError(f"the {name} is empty")
    return text
