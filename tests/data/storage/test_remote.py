"""URLs in messages, listings, errors. Reading is in test_storage.py."""

from pathlib import Path

import pytest

from tests.data.servers import object_store
from vlm.data.storage import remote
from vlm.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("/data/a b?.tar", "/data/a b?.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("https://user:pass@host:81/a.tar?X-Amz-Signature=1#x", "https://host:81/a.tar"),
        ("https://a:b@c@host/a.tar", "https://host/a.tar"),
        ("hf://datasets/org/name/a.tar", "hf://datasets/org/name/a.tar"),
    ],
)
def test_locations_are_shown_without_credentials(location: str, shown: str) -> None:
    assert remote.display(location) == shown
    assert remote.is_remote(location) == ("://" in location)


def test_reasons_hold_no_credentials() -> None:
    error = ValueError("400, url='https://u:secret@host/a?sig=secret', s3://b/c?t=secret\nmore")
    assert remote.reason(error) == "ValueError: 400, url='https://host/a', s3://b/c"
    assert remote.reason(OSError(5, "Input/output error", "https://u:secret@host/a")) == (
        "OSError: Input/output error"
    )
    assert len(remote.reason(ValueError("x" * 5000))) < 250


def test_denied_access() -> None:
    for error in (PermissionError("no"), _with_status(401), _with_status(403)):
        with pytest.raises(DataError, match="shard s3://b/c: access denied"):
            remote.check_allowed("s3://b/c", error)
    remote.check_allowed("s3://b/c", _with_status(503))
    remote.check_allowed("/data/a.tar", PermissionError("a mount that is not back yet"))


def _with_status(status: int) -> Exception:
    error = OSError("refused")
    vars(error)["status"] = status
    return error


def test_tars_of_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store(monkeypatch) as bucket:
        import s3fs  # an optional dependency: object_store skips without it

        for name in ("b.tar", "a.tar", "c.json", "deeper/d.tar"):
            s3fs.S3FileSystem().pipe(f"{bucket}/x/{name}", b"1")
        assert remote.list_tars(f"{bucket}/x", 5) == [f"{bucket}/x/a.tar", f"{bucket}/x/b.tar"]
        assert remote.list_tars(f"{bucket}/x/c.tar", 5) == [f"{bucket}/x/c.tar"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package s3fs; pip install 'saccade\[s3\]'"):
        remote.open_file("s3://bucket/a.tar", 1.0)
