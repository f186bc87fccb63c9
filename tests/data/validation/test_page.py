import re
from pathlib import Path

from tests.data import helpers
from vlm.data.validation import page
from vlm.data.validation.report import Fault, Report, Tally
from vlm.data.validation.validate import validate

SCRIPT = "<script>alert(1)</script>"


def make_report(tmp_path: Path, faults: list[Fault] | None = None) -> Report:
    """Of good and bad samples, or with the given faults."""
    helpers.write_shards(tmp_path, [1, 2, 0, 64])
    members = [("x.json", b"{}"), ("<b>y.json", b"{}"), ("00000000.txt", b"late")]
    helpers.write_tar(tmp_path / "bad.tar", members)
    found = validate(sorted(tmp_path.glob("*.tar")))
    if faults is None:
        return found
    return Report(**{**vars(found), "faults": faults})


def write(tmp_path: Path, report: Report) -> str:
    page.write_page(tmp_path / "page.html", report)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_shows_verdict_statistics_and_every_fault(tmp_path: Path) -> None:
    report = make_report(tmp_path)
    text = write(tmp_path, report)
    assert f"{len(report.faults)} faults in {report.num_faulty} of 7 samples" in text
    assert text.count('class="fault"') == len(report.faults)
    assert "By frames" in text and "33-64" in text and "By frame size" in text
    assert "By text tokens" not in text, "nothing counted them"
    assert "&lt;b&gt;y.json" in text and "<b>" not in text


def test_names_from_shards_are_escaped_and_bounded(tmp_path: Path) -> None:
    fault = Fault(SCRIPT, SCRIPT, 'x" onload="alert(1)', "member", SCRIPT + "\0\x1b" + "x" * 10**6)
    report = make_report(tmp_path, [fault])
    report.sources[SCRIPT] = Tally(num_samples=1)
    text = write(tmp_path, report)
    assert text.count("<script>") == 1 and SCRIPT not in text
    assert 'onload="' not in text
    assert not set("\0\x1b") & set(text)
    assert len(text) < 30_000


def test_a_page_has_no_address_and_a_policy(tmp_path: Path) -> None:
    text = write(tmp_path, make_report(tmp_path))
    assert re.search(r"default-src 'none';.*script-src 'sha256-[A-Za-z0-9+/=]{44}'", text)
    assert not re.search(r"https?://|src=|url\(", text.partition("<style>")[2])


def test_a_million_faults_make_no_endless_page(tmp_path: Path) -> None:
    faults = [Fault("s.tar", str(i), "", "decode", "bad") for i in range(page.MAX_SHOWN + 500)]
    text = write(tmp_path, make_report(tmp_path, faults))
    assert text.count('class="fault"') == page.MAX_SHOWN
    assert "The first 2,000 of 2,500" in text


def test_a_clean_set_says_so(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [1])
    text = write(tmp_path, validate([path]))
    assert "Clean: no fault in 1 samples" in text and "Every fault" not in text
