"""Small video data sets in the layouts that the real ones are published in."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm.data.make.adapters.base import NoOptions
from vlm.data.make.annotations import Annotation, Failure

NO_OPTIONS = NoOptions()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_json_lines(path: Path, *records: Any) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, body in members.items():
            file.writestr(name, body)
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            file.addfile(info, io.BytesIO(body))
    return path


def collect(
    adapter: Callable[[Path, Any], Iterator[Annotation | Failure]],
    root: Path,
    options: Any = NO_OPTIONS,
) -> tuple[list[Annotation], list[Failure]]:
    """What an adapter yields, told apart; the same twice."""
    found = list(adapter(root, options))
    assert found == list(adapter(root, options))
    annotations = [item for item in found if isinstance(item, Annotation)]
    return annotations, [item for item in found if isinstance(item, Failure)]
