"""Where the videos of a data set are: loose files, members of zips and tars, by their names.

Published metadata name a video by a path that depends on how somebody unpacked the archives. Here
each is found whether it is still in its archive or not, and wherever it was unpacked to. Not here:
opening it (`vlm.data.make.media`).
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from vlm.data.make.adapters.base import failure
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.data.make.archives import open_archive
from vlm.errors import DataError, SampleError

EXTENSIONS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif")
ARCHIVES = (".zip", ".tar")
NO_VIDEO = "no such video"


class Clips:
    """Refs of the videos below a root, by file name without extension."""

    def __init__(self, root: Path) -> None:
        """Looks through all folders and archives.

        Raises:
            DataError: there is no video, or an archive is damaged.
        """
        self.root = root
        self.refs: defaultdict[str, list[str]] = defaultdict(list)
        for ref in _refs(root):
            self.refs[_stem(ref)].append(ref)
        if not self.refs:
            raise DataError(
                f"{root}: holds no video, loose or in a {' or '.join(ARCHIVES)}; compressed tars "
                "must be unpacked"
            )

    def find(self, path: str) -> str | None:
        """The ref of the video that metadata call ``path``; None if it is not there.

        Of several with its name it is the one whose folders agree the longest, from the name up.
        The extension may be missing or another.
        """
        wanted = _folders(path)
        found = self.refs.get(_stem(path), ())
        return max(found, key=lambda ref: _agreement(ref, wanted), default=None)

    def annotate(self, record: Record, path: str, **fields: Any) -> Annotation | Failure:
        """An annotation of these fields about that video, or a failure if it is not there."""
        ref = self.find(path)
        if ref is None:
            return failure(record, f"{path[:200]!r} is not below the root", reason=NO_VIDEO)
        return Annotation(video=ref, **fields)


def _refs(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*")):
        suffix = path.suffix.lower()
        name = path.relative_to(root).as_posix()
        if suffix in EXTENSIONS and path.is_file():
            yield name
        elif suffix in ARCHIVES and path.is_file():
            try:
                archive = open_archive(path)
            except (SampleError, OSError) as error:
                raise DataError(f"{path}: {error}; download it again or take it away") from None
            for member in archive.names():
                if member.lower().endswith(EXTENSIONS):
                    yield f"{name}!{member}"
            archive.close()


def _folders(path: str) -> list[str]:
    """From the innermost up."""
    return [part for part in path.split("/")[-2::-1] if part not in ("", ".")]


def _stem(path: str) -> str:
    name = path.replace("!", "/").rpartition("/")[2]
    # names may hold dots: only what is an extension is taken off
    return name.rpartition(".")[0] if name.lower().endswith(EXTENSIONS) else name


def _agreement(ref: str, wanted: list[str]) -> int:
    """How many folders agree; an archive may have been unpacked to a folder of its name, or not."""
    path, _, member = ref.partition("!")
    inner, outer = _folders(member), _folders(path)
    archive = path.rpartition("/")[2].rpartition(".")[0]
    return max(_common(inner + outer, wanted), _common([*inner, archive, *outer], wanted))


def _common(a: list[str], b: list[str]) -> int:
    """The length of their common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
