"""Checks one shard: every member and every sample of it, whatever else is wrong.

Runs in a worker process; one sample at a time is in memory, and nothing of it is trusted. Not here:
what only several shards together show (`vlm.data.validation.compare`).
"""

import functools
import hashlib
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from vlm.batch import IGNORE_INDEX
from vlm.data.format import layout, shards, tar
from vlm.data.format.decode import decode_image, image_shape, is_plain
from vlm.data.format.digests import UNKNOWN, digest
from vlm.data.format.frames import count_frames, extract_frames
from vlm.data.format.latents import read_latents
from vlm.data.format.schema import Kind, Sample
from vlm.data.manifest.identity import MEDIA, said
from vlm.data.manifest.identity import identity as identity_of
from vlm.data.text import chat
from vlm.data.text.encode import encode_branches
from vlm.data.validation.report import ShardReport, Text, add_source
from vlm.data.validation.salvage import Damage, salvage
from vlm.errors import SampleError

#: no layout has nearly as many members in one sample, no writer in one shard
MAX_SAMPLE_MEMBERS = 1024
MAX_SHARD_MEMBERS = 2_000_000
#: what frames of a video file are brought to where no size is given
VIDEO_SIZE = 224
_CHUNK_BYTES = 1 << 20
#: a fault names shard, key and member itself
_WHERE = "here"

Members = dict[str, tar.Member]


@dataclass(frozen=True, kw_only=True)
class Checks:
    """How thorough a validation is."""

    #: share of the samples whose images and videos are decoded, evenly spread; headers always are
    decode_frac: float = 1.0
    #: side of the square that frames are brought to; None wants all frames of one size
    size: int | None = None
    #: counts tokens where there is one
    tokenizer: str | None = None
    image_token: str = "<|image|>"
    #: a longer text is a fault
    max_tokens: int | None = None
    #: kinds of faults, out of `ALLOWABLE`, that are counted and are none
    allowed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Task:
    path: Path
    checks: Checks
    #: the whole file's sha256 too
    hash: bool


def check_shard(task: Task) -> ShardReport:
    """Never raises for what is in the shard."""
    report = ShardReport(task.path, task.checks.allowed)
    with shards.open_shard(task.path) as shard:
        report.num_bytes = shard.num_bytes
        for index, (key, members) in enumerate(runs(shard, report)):
            # evenly spread: a sample is decoded whenever the shares add up to a whole number
            share = task.checks.decode_frac
            decode = int((index + 1) * share) > int(index * share)
            _SampleCheck(shard.read, key, members, report, task.checks, decode).run()
        if task.hash:
            report.sha256 = _sha256(shard)
    if not report.num_samples and not report.faults:
        report.fault("tar", "", "", "holds no sample")
    return report


def runs(shard: shards.ShardFile, report: ShardReport) -> Iterator[tuple[str, Members]]:
    """Adjacent allowed members that share a key; what else is there becomes faults."""
    found = _allowed_members(shard, report)
    split = layout.split_names([member.name for member in found])
    seen: set[str] = set()
    for key, group in itertools.groupby(found, lambda member: split[member.name][0]):
        members: Members = {}
        for member in group:
            if member.name in members:
                report.fault("member", key, member.name, "a second member of this name")
            elif len(members) == MAX_SAMPLE_MEMBERS:
                text = f"more than {MAX_SAMPLE_MEMBERS} members of a key"
                report.fault("member", key, member.name, text)
            else:
                members[member.name] = member
        if key in seen:
            name = next(iter(members))
            report.fault("member", key, name, "the members of its key are not adjacent")
        seen.add(key)
        yield key, members


def _allowed_members(shard: shards.ShardFile, report: ShardReport) -> list[tar.Member]:
    found: list[tar.Member] = []
    for event in salvage(shard.read, shard.num_bytes, "the tar"):
        if isinstance(event, Damage):
            report.fault("tar", "", "", event.text)
        elif fault := shards.member_fault(event):
            report.fault("member", event.name.partition(".")[0], event.name, fault)
        elif len(found) == MAX_SHARD_MEMBERS:
            text = f"more than {MAX_SHARD_MEMBERS} members; what follows is not checked"
            report.fault("tar", "", event.name, text)
            break
        else:
            found.append(event)
    return found


@dataclass
class _SampleCheck:
    """One sample; each step goes on whatever the others found."""

    read: tar.Read
    key: str
    members: Members
    report: ShardReport
    checks: Checks
    #: images and videos in full, not only their headers
    decode: bool
    #: some fault is
    named: bool = False

    def run(self) -> None:
        num_bytes = sum(member.size for member in self.members.values())
        sample: Sample | None = None
        size, num_frames = (0, 0), 0
        content = identity = UNKNOWN
        if num_bytes > shards.MAX_SAMPLE_BYTES:
            # before anything is read: a gigabyte of JSON is no reason to need a gigabyte
            text = f"{num_bytes} bytes, at most {shards.MAX_SAMPLE_BYTES} are read"
            self._fault("member", "", text)
        else:
            bodies = {n: bytes(self.read(m.offset, m.size)) for n, m in self.members.items()}
            media = {name: body for name, body in bodies.items() if name.endswith(MEDIA)}
            sample = self._check_sample(bodies)
            size, num_frames = self._check_media(media)
            self._check_latents(bodies, num_frames)
            if sample is not None:
                identity = identity_of(sample, bodies)
                content = digest(said(sample), *media.values())
        self.report.add(self.key, size, content, identity)
        self.report.num_decoded += self.decode
        if sample is not None:
            counted = self._check_text(sample)
            tally = add_source(self.report.sources, sample.source)
            tally.add(sample, num_frames, size, num_bytes, counted)

    def _check_sample(self, bodies: dict[str, bytes]) -> Sample | None:
        """What its words say, whatever is wrong with its frames."""
        views = {name: memoryview(body) for name, body in bodies.items()}
        try:
            return layout.read_content(views, _WHERE).sample
        except SampleError as error:
            found = self._find_faults(views)
            if not self.named:
                self._fault("schema", "", _without_where(error))
            return found

    def _find_faults(self, bodies: dict[str, memoryview]) -> Sample | None:
        """Names what is wrong with the words, and each frame that is wrong."""
        names = {suffix: name for name, (_, suffix) in layout.split_names(bodies).items()}
        has_media = any(name.endswith(MEDIA) for name in bodies)
        words = {s: bodies[names[s]] for s in layout.WORD_EXTENSIONS if s in names}
        sample: Sample | None = None
        member = next((names[suffix] for suffix in words), f"{self.key}.json")
        try:
            # as if for a video file: how many frames there should be is what they say
            kind: Kind = "video" if has_media else "text"
            if not words:
                raise SampleError("missing, and there is no .txt either")
            sample = layout.read_words(words, _WHERE, kind, None if has_media else 0)
        except SampleError as error:
            self._fault("schema", member, _without_where(error))
        frames = {int(s[:3]): s for s in names if _FRAME.fullmatch(s)}
        stated = None if sample is None else sample.frame_count
        count = max(frames, default=-1) + 1 if stated is None else stated
        for index in sorted(set(range(count)) ^ set(frames)):
            state = "missing" if index < count else "unexpected"
            name = names[frames[index]] if index in frames else f"{self.key}.{index:03d}.jpg"
            expected = "others follow" if stated is None else f"frame_count is {stated}"
            self._fault("frames", name, f"{state}; {expected}")
        return sample

    def _check_media(self, media: dict[str, bytes]) -> tuple[tuple[int, int], int]:
        """(height, width) of the frames if all agree, and how many there are."""
        sizes: dict[tuple[int, int], str] = {}
        num_frames = 0
        for name, body in media.items():
            try:
                if name.endswith(layout.VIDEO_EXTENSIONS):
                    num_frames += self._check_video(body)
                else:
                    num_frames += 1
                    sizes.setdefault(self._check_image(name, body), name)
            except SampleError as error:
                self._fault("decode", name, _without_where(error))
        if len(sizes) > 1 and self.checks.size is None:
            found = ", ".join(f"{h}x{w} ({name})" for (h, w), name in sizes.items())
            self._fault("frames", "", f"frames of several sizes: {found}")
        return next(iter(sizes)) if len(sizes) == 1 else (0, 0), num_frames

    def _check_latents(self, bodies: dict[str, bytes], num_frames: int) -> None:
        name = f"{self.key}.{layout.LATENTS}"
        if name not in bodies:
            return
        try:
            read_latents(bodies[name], num_frames, _WHERE)
        except SampleError as error:
            self._fault("decode", name, _without_where(error))

    def _check_image(self, name: str, body: bytes) -> tuple[int, int]:
        shape = image_shape(name, body, _WHERE)
        if self.decode:
            side = self.checks.size
            wanted = shape if side is None or is_plain(name, body, shape) else (side, side)
            decode_image(name, body, np.empty((*wanted, 3), np.uint8), _WHERE)
        return shape

    def _check_video(self, body: bytes) -> int:
        if not self.decode:
            return count_frames(io.BytesIO(body))
        return len(extract_frames(io.BytesIO(body), size=self.checks.size or VIDEO_SIZE))

    def _check_text(self, sample: Sample) -> Text | None:
        if self.checks.tokenizer is None:
            return None
        tokenizer = _cached_tokenizer(self.checks.tokenizer, self.checks.image_token)
        try:
            branches = encode_branches(tokenizer, sample, self.checks.image_token)
        except SampleError as error:
            self._fault("text", "", str(error))
            return None
        image_id = tokenizer.convert_tokens_to_ids(self.checks.image_token)
        texts = [
            Text(
                sum(token != image_id for token in branch.input_ids),
                sum(label != IGNORE_INDEX for label in branch.labels),
            )
            for branch in branches
        ]
        limit = self.checks.max_tokens
        for text in texts:
            if text.num_answer_tokens == 0:
                self._fault("text", "", f"none of its {text.num_tokens} tokens is learned")
            if limit is not None and text.num_tokens > limit:
                self._fault("text", "", f"{text.num_tokens} tokens, at most {limit}")
        return Text(*map(sum, zip(*texts, strict=True)))

    def _fault(self, check: str, member: str, text: str) -> None:
        self.named = True
        self.report.fault(check, self.key, member, text)


#: a numbered frame, by its suffix
_FRAME = re.compile(r"\d{3}\.[^.]+")


def _without_where(error: SampleError) -> str:
    return str(error).removeprefix(f"{_WHERE}: ").removeprefix(f"{_WHERE}, ")


@functools.cache
def _cached_tokenizer(path: str, image_token: str) -> PreTrainedTokenizerFast:
    """Loaded once in every worker process."""
    return chat.load_tokenizer(path, image_token)


def _sha256(shard: shards.ShardFile) -> str:
    found = hashlib.sha256()
    for offset in range(0, shard.num_bytes, _CHUNK_BYTES):
        found.update(shard.read(offset, _CHUNK_BYTES))
    return found.hexdigest()
