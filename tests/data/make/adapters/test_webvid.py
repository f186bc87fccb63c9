from pathlib import Path

import pytest

from tests.data.make.adapters.clip_sets import collect, write
from vlm.data.make.adapters import webvid
from vlm.errors import DataError

HEADER = "videoid,contentUrl,duration,page_dir,name\n"
ROWS = [
    "101,https://x.test/101.mp4,PT00H00M10S,000001_000050,Sea at dusk\n",
    '102,https://x.test/102.mp4,PT00H00M10S,000051_000100,"Rain, slow"\n',
    "103,,PT00H00M10S,000051_000100,Gone\n",
]


@pytest.mark.parametrize("table", ["data/train/partitions/0000.csv", "results_2M_train.csv"])
def test_footage_and_titles(tmp_path: Path, table: str) -> None:
    write(tmp_path / table, HEADER + "".join(ROWS))
    write(tmp_path / "videos" / "000001_000050" / "101.mp4", "")
    write(tmp_path / "elsewhere" / "102.mp4", "")
    found, failures = collect(webvid.annotations, tmp_path)
    assert [(a.id, a.video, a.caption) for a in found] == [
        ("101", "videos/000001_000050/101.mp4", "Sea at dusk"),
        ("102", "elsewhere/102.mp4", "Rain, slow"),
    ]
    assert [f.reason for f in failures] == ["no such video"]


def test_what_to_download(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train" / "partitions" / "0000.csv", HEADER + "".join(ROWS[::2]))
    write(tmp_path / "data" / "train" / "partitions" / "0001.csv", HEADER + ROWS[1])
    assert list(webvid.urls(tmp_path)) == [
        ("https://x.test/101.mp4", "videos/000001_000050/101.mp4"),
        ("https://x.test/102.mp4", "videos/000051_000100/102.mp4"),
    ]


def test_the_data_set_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="partitions"):
        list(webvid.urls(tmp_path))
