"""What one sample of a shard says: its conversation, where it comes from, how many frames it owns.

The JSON member of a sample is parsed here and nowhere else. It may come from anybody, so its size
and shape are bounded. Not here: the frames (`vlm.data.shards`), tokens (`vlm.data.chat`).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlm.errors import SampleError

MAX_JSON_BYTES = 4 << 20
MAX_FRAMES = 64
#: a sample's kind is stored in the manifest as its position here
KINDS = ("text", "image", "video")
CAPTION_PROMPT = "Describe this."


class Turn(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: Literal["system", "user", "assistant"]
    content: str
    #: the kind of question an answer belongs to; evaluation groups by it
    task: str | None = Field(None, min_length=1, max_length=100)

    @field_validator("content")
    @classmethod
    def _not_blank(cls, content: str) -> str:
        if not content.strip():
            raise ValueError("the content is empty")
        return content


class Sample(BaseModel):
    """The JSON member of a sample, version 1. Exactly one of ``turns`` and ``caption`` is set."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1]
    kind: Literal["text", "image", "video"]
    source: str = Field(min_length=1, max_length=100)
    frame_count: int = Field(ge=0, le=MAX_FRAMES)
    turns: tuple[Turn, ...] | None = None
    caption: str | None = None
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Sample":
        if (self.kind == "text") != (self.frame_count == 0):
            expected = "0 frames" if self.kind == "text" else f"1 to {MAX_FRAMES} frames"
            raise ValueError(f"kind {self.kind} needs {expected}, found {self.frame_count}")
        check_conversation(self.turns, self.caption)
        return self

    def conversation(self) -> list[Turn]:
        """The turns; a caption is the answer to one fixed question."""
        if self.turns is not None:
            return list(self.turns)
        assert self.caption is not None, "the validator lets exactly one of the two through"
        return [
            Turn(role="user", content=CAPTION_PROMPT),
            Turn(role="assistant", content=self.caption, task="caption"),
        ]

    def to_json(self) -> bytes:
        """What ``parse_sample`` reads back to an equal sample."""
        return self.model_dump_json(exclude_unset=True).encode()


def check_conversation(turns: tuple[Turn, ...] | None, caption: str | None) -> None:
    """Raises ValueError unless there is one caption, or turns that end with an answer."""
    if (turns is None) == (caption is None):
        raise ValueError("expected exactly one of `turns` and `caption`")
    if turns is None:
        if caption is not None and not caption.strip():
            raise ValueError("the caption is empty")
        return
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(
            "turns must alternate user, assistant, after at most one system turn, and end with "
            f"assistant; found {', '.join(roles[:8]) or 'none'}{', ...' if roles[8:] else ''}"
        )


def parse_sample(raw: bytes | memoryview, where: str) -> Sample:
    """Parses the JSON member of a sample.

    Args:
        raw: The member's bytes, trusted in no way.
        where: Shard, key and member, for the error.

    Raises:
        SampleError: not JSON, too large, or not version 1 of the schema.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise SampleError(f"{where}: {len(raw)} bytes of JSON, at most {MAX_JSON_BYTES} are read")
    try:
        return Sample.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise SampleError(f"{where}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """The first fault of a validation, with its dotted path."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    dotted = ".".join(str(part) for part in first["loc"])[:200]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{dotted}: {first['msg']}{more}" if dotted else f"{first['msg']}{more}"
