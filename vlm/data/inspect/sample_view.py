"""A sample as the model will see it: its rendered tokens, which of them are learned, its frames.

Everything comes from the functions that training uses; nothing is rendered a second way. Not here:
showing it (`vlm.data.inspect.samples_page`, tools/show_samples.py).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from vlm.batch import IGNORE_INDEX
from vlm.data.format import shards
from vlm.data.format.decode import Sampling, decode_frames, measure
from vlm.data.format.layout import Content, read_content
from vlm.data.format.shard_index import VIDEO_SIZE, build_index
from vlm.data.text import chat
from vlm.data.text.encode import encode_branches
from vlm.errors import SampleError


@dataclass(frozen=True, kw_only=True)
class Model:
    """What decides how a sample is seen."""

    tokenizer: PreTrainedTokenizerFast
    image_token: str
    tokens_per_frame: int = 1
    loss_on: Literal["answers", "all"] = "answers"
    #: side of the square that frames are brought to; None leaves images as they are
    size: int | None = None
    max_text_tokens: int | None = None


class Span(NamedTuple):
    """Neighbouring tokens of one kind."""

    kind: Literal["frames", "learned", "context"]
    text: str
    ids: list[int]
    #: the text of each token; a character may be spread over several
    pieces: list[str]


@dataclass(frozen=True)
class Branch:
    """One sequence of tokens; a preference pair has two."""

    name: str
    spans: list[Span]

    def num_tokens(self, kind: str) -> int:
        return sum(len(span.ids) for span in self.spans if span.kind == kind)


@dataclass(frozen=True, kw_only=True)
class SampleView:
    shard: Path
    offset: int
    key: str
    #: why it cannot be trained on; what follows is then empty
    fault: str = ""
    source: str = ""
    kind: str = ""
    form: str = ""
    meta: dict[str, object] = field(default_factory=dict)
    branches: list[Branch] = field(default_factory=list)
    #: (T, H, W, 3) uint8
    frames: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))


class _Place(NamedTuple):
    path: Path
    offset: int
    length: int
    key: str


def find_samples(
    paths: Sequence[Path],
    model: Model,
    *,
    keys: Sequence[str] = (),
    source: str | None = None,
    seed: int | None = None,
) -> Iterator[SampleView]:
    """The samples of shards as they are seen, one at a time.

    Args:
        keys: Only these; empty for all.
        source: Only samples of it.
        seed: Takes them in a random order; None in that of the shards.

    Raises:
        DataError: a damaged shard. A sample that cannot be used is no error, see `SampleView`.
    """
    for place in _shuffled(paths, seed) if seed is not None else _in_order(paths):
        if keys and place.key not in keys:
            continue
        view = _view(place, model)
        if source is None or view.source == source:
            yield view


def _in_order(paths: Sequence[Path]) -> Iterator[_Place]:
    for path in paths:
        for found in shards.scan(path):
            yield _Place(path, found.offset, found.length, found.key)


def _shuffled(paths: Sequence[Path], seed: int) -> Iterator[_Place]:
    index = build_index(paths, content=False)
    for row in np.random.Generator(np.random.Philox(seed)).permutation(index.num_samples).tolist():
        path = index.paths[index.shard[row]]
        yield _Place(path, int(index.offset[row]), int(index.length[row]), index.keys[row].as_py())


def _view(place: _Place, model: Model) -> SampleView:
    where = "here"
    with shards.open_shard(place.path) as shard:
        buffer = shards.read_range(shard.read, place.offset, place.length, where)
    try:
        content = read_content(shards.read_members(buffer, where), where)
        frames = _decode(content, model.size, where)
        branches = _encode(content, len(frames), model)
    except SampleError as error:
        fault = str(error).removeprefix(where).lstrip(":, ")
        return SampleView(shard=place.path, offset=place.offset, key=place.key, fault=fault)
    sample = content.sample
    return SampleView(
        shard=place.path,
        offset=place.offset,
        key=place.key,
        source=sample.source,
        kind=sample.kind,
        form=sample.form,
        meta=sample.meta,
        branches=branches,
        frames=frames,
    )


def _decode(content: Content, size: int | None, where: str) -> np.ndarray:
    if content.video and size is None:
        size = VIDEO_SIZE
    shape = measure(content, size, Sampling(), where)
    frames = np.empty((*shape, 3), np.uint8)
    decode_frames(content, frames, Sampling(), where)
    return frames


def _encode(content: Content, num_frames: int, model: Model) -> list[Branch]:
    tokenizer = model.tokenizer
    image_id = tokenizer.convert_tokens_to_ids(model.image_token)
    found = [
        chat.truncate(tokenizer, encoded, model.max_text_tokens, model.image_token)
        for encoded in encode_branches(tokenizer, content.sample, model.image_token, model.loss_on)
    ]
    names = ("chosen", "rejected") if len(found) == 2 else ("",)
    return [
        Branch(name, _spans(tokenizer, expanded, image_id))
        for name, expanded in zip(
            names,
            (chat.expand_frames(e, num_frames, model.tokens_per_frame, image_id) for e in found),
            strict=True,
        )
    ]


def _spans(tokenizer: PreTrainedTokenizerFast, encoded: chat.Encoded, image_id: int) -> list[Span]:
    def kind(pair: tuple[int, int]) -> Literal["frames", "learned", "context"]:
        token, label = pair
        return "frames" if token == image_id else "context" if label == IGNORE_INDEX else "learned"

    spans = []
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    for found, group in itertools.groupby(pairs, kind):
        ids = [token for token, _ in group]
        pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
        spans.append(Span(found, tokenizer.decode(ids, skip_special_tokens=False), ids, pieces))
    return spans
