"""Checks every sample of a set of shards and names every fault.

`vlm.data.manifest` stops at the first fault of a shard; this goes on, so that one run shows all
there is to mend. Only a damaged tar header ends a shard early: what follows cannot be located.
Not here: whether a tokenizer can encode the conversations.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import simplejpeg

from vlm.data import manifest, shards, tar
from vlm.data.pool import ordered_map
from vlm.data.schema import parse_sample
from vlm.errors import DataError, SampleError

#: last frame count of each row of the statistics
FRAME_BUCKETS = (0, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Fault:
    """Key and member are empty where a fault is the whole shard's."""

    shard: str
    key: str
    member: str
    fault: str


@dataclass
class ShardReport:
    """What one shard holds."""

    path: Path
    num_bytes: int = 0
    #: empty unless a manifest asks for it
    sha256: str = ""
    keys: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    #: number of samples by their number of frames
    frame_counts: Counter[int] = field(default_factory=Counter)
    #: keys by (height, width), of the samples whose frames were decoded
    sizes: dict[tuple[int, int], list[str]] = field(default_factory=lambda: defaultdict(list))
    faults: list[Fault] = field(default_factory=list)

    def fault(self, key: str, member: str, text: str) -> None:
        self.faults.append(Fault(str(self.path), key, member, text))


@dataclass(frozen=True)
class Report:
    num_shards: int
    num_samples: int
    num_bytes: int
    kinds: dict[str, int]
    num_frames: int
    #: number of samples by frame count, as "1-4"
    frame_buckets: dict[str, int]
    #: number of samples by frame size, as "64x64"
    sizes: dict[str, int]
    faults: list[Fault]


@dataclass(frozen=True)
class _Task:
    path: Path
    #: samples whose frames are decoded; None for all
    decode: int | None
    hash: bool


def validate(
    paths: Sequence[Path],
    manifest_path: Path | None = None,
    decode: int | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Checks shards one by one, then against each other and against their manifest.

    Args:
        decode: Decode the frames of so many samples of each shard, evenly spread; None for all.
        progress: Called with (shards done, shards in all).

    Raises:
        DataError: the manifest cannot be read.
    """
    listed = manifest.load(manifest_path).shards if manifest_path is not None else None
    tasks = [_Task(path, decode, hash=listed is not None) for path in paths]
    reports = []
    for report in ordered_map(_check_shard, tasks, workers):
        reports.append(report)
        if progress is not None:
            progress(len(reports), len(tasks))
    faults = [fault for report in reports for fault in report.faults]
    faults += _duplicate_keys(reports) + _odd_sizes(reports)
    if listed is not None:
        faults += _against_manifest(reports, listed)
    frame_counts = sum((report.frame_counts for report in reports), Counter[int]())
    sizes = Counter(
        {
            size: sum(len(r.sizes.get(size, ())) for r in reports)
            for r in reports
            for size in r.sizes
        }
    )
    return Report(
        num_shards=len(reports),
        num_samples=sum(len(report.keys) for report in reports),
        num_bytes=sum(report.num_bytes for report in reports),
        kinds=dict(sorted(sum((report.kinds for report in reports), Counter[str]()).items())),
        num_frames=sum(frames * count for frames, count in frame_counts.items()),
        frame_buckets=_buckets(frame_counts),
        sizes={f"{h}x{w}": count for (h, w), count in sizes.most_common()},
        faults=faults,
    )


def _check_shard(task: _Task) -> ShardReport:
    report = ShardReport(task.path)
    samples = _walk(task.path, report)
    report.keys = list(samples)
    if not samples and not report.faults:
        report.fault("", "", "holds no sample")
    if task.decode is None:
        chosen = set(samples)
    else:
        stride = max(1, -(-len(samples) // task.decode))
        chosen = set(list(samples)[::stride])
    with task.path.open("rb") as file:
        report.num_bytes = os.fstat(file.fileno()).st_size
        for key, members in samples.items():
            _check_sample(file.fileno(), key, members, report, key in chosen)
        if task.hash:
            file.seek(0)
            report.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return report


def _walk(path: Path, report: ShardReport) -> dict[str, dict[str, tar.Member]]:
    """The allowed members of each key; what else is there becomes faults."""
    samples: dict[str, dict[str, tar.Member]] = {}
    current = ""
    try:
        for member in shards.walk_file(path):
            key, _ = shards.split_name(member.name)
            if fault := shards.member_fault(member):
                report.fault(key, member.name, fault)
                continue
            if key != current and key in samples:
                report.fault(key, member.name, "the members of its key are not adjacent")
            current = key
            if member.name in samples.setdefault(key, {}):
                report.fault(key, member.name, "a second member of this name")
            samples[key][member.name] = member
    except DataError as error:
        report.fault(current, "", str(error))
    return samples


def _check_sample(
    fd: int, key: str, members: dict[str, tar.Member], report: ShardReport, decode: bool
) -> None:
    if (total := sum(member.size for member in members.values())) > shards.MAX_SAMPLE_BYTES:
        report.fault(key, "", f"{total} bytes, at most {shards.MAX_SAMPLE_BYTES} are read")
        return
    images = [name for name in members if name.endswith(shards.IMAGE_EXTENSIONS)]
    name = f"{key}.json"
    if name in members:
        try:
            sample = parse_sample(_body(fd, members[name]), "not our schema")
        except SampleError as error:
            report.fault(key, name, str(error))
        else:
            report.kinds[sample.kind] += 1
            report.frame_counts[sample.frame_count] += 1
            expected = shards.frame_names(key, sample.frame_count)
            for frame in sorted(set(expected) ^ set(images)):
                state = "missing" if frame in expected else "unexpected"
                report.fault(key, frame, f"{state}; frame_count is {sample.frame_count}")
    else:
        report.fault(key, name, "missing")
    if decode:
        _check_frames(fd, key, [members[image] for image in images], report)


def _check_frames(fd: int, key: str, frames: list[tar.Member], report: ShardReport) -> None:
    sizes: dict[tuple[int, int], str] = {}
    for frame in frames:
        body = _body(fd, frame)
        try:
            size = shards.frame_shape(memoryview(body), "header")
            simplejpeg.decode_jpeg(body, "RGB", strict=True)
        except (SampleError, ValueError) as error:
            report.fault(key, frame.name, f"does not decode: {error}")
            continue
        sizes.setdefault(size, frame.name)
    if len(sizes) > 1:
        found = ", ".join(f"{h}x{w} ({name})" for (h, w), name in sizes.items())
        report.fault(key, "", f"frames of several sizes: {found}")
    elif sizes:
        report.sizes[next(iter(sizes))].append(key)


def _body(fd: int, member: tar.Member) -> bytes:
    return os.pread(fd, member.size, member.offset)


def _duplicate_keys(reports: list[ShardReport]) -> list[Fault]:
    """Keys that two shards of one folder share; folders number their samples independently."""
    first: dict[tuple[Path, str], Path] = {}
    faults = []
    for report in reports:
        for key in report.keys:
            other = first.setdefault((report.path.parent, key), report.path)
            if other != report.path:
                faults.append(Fault(str(report.path), key, "", f"the key is also in {other}"))
    return faults


def _odd_sizes(reports: list[ShardReport]) -> list[Fault]:
    """Samples whose frames have not the size that most have: a model takes one."""
    counts: Counter[tuple[int, int]] = Counter()
    for report in reports:
        counts.update({size: len(keys) for size, keys in report.sizes.items()})
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    return [
        Fault(str(r.path), key, "", f"frames of {h}x{w}, most have {usual[0]}x{usual[1]}")
        for r in reports
        for (h, w), keys in r.sizes.items()
        for key in keys
        if (h, w) != usual
    ]


def _against_manifest(reports: list[ShardReport], listed: list[manifest.ShardInfo]) -> list[Fault]:
    infos = {info.path: info for info in listed}
    faults = []
    for report in reports:
        info = infos.pop(report.path, None)
        if info is None:
            text = "not in the manifest"
        elif report.num_bytes != info.bytes:
            text = f"has {report.num_bytes} bytes, {info.bytes} in the manifest"
        elif report.sha256 != info.sha256:
            text = f"its sha256 is {report.sha256}, {info.sha256} in the manifest"
        else:
            continue
        faults.append(Fault(str(report.path), "", "", text))
    for path in infos:
        text = "in the manifest, but not among the paths" if path.exists() else "missing"
        faults.append(Fault(str(path), "", "", text))
    return faults


def _buckets(frame_counts: Counter[int]) -> dict[str, int]:
    buckets = {}
    low = 0
    for high in FRAME_BUCKETS:
        name = f"{low}-{high}" if low < high else str(high)
        buckets[name] = sum(n for frames, n in frame_counts.items() if low <= frames <= high)
        low = high + 1
    return buckets
