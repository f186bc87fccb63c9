import sys
from collections.abc import Sequence

import pytest

from vlm import errors
from vlm.errors import ConfigError, DataError, SampleError, TransientError, UserError, one_line


def run(
    monkeypatch: pytest.MonkeyPatch, outcome: BaseException | int | None, *argv: str
) -> tuple[int, list[str]]:
    """Exit code of an entry point whose ``main`` raises or returns ``outcome``, and its argv."""
    seen: list[str] = []

    def main(argv: Sequence[str]) -> int | None:
        seen.extend(argv)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as caught:
        errors.command(main)()
    assert isinstance(caught.value.code, int)
    return caught.value.code, seen


@pytest.mark.parametrize("kind", [UserError, ConfigError, SampleError])
def test_a_mistake_of_the_user_is_one_line_and_code_2(
    kind: type[UserError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(monkeypatch, kind("found a,\nexpected b"))
    assert code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: found a, expected b\n"
    assert captured.out == ""


def test_another_rank_speaks_only_if_nobody_has_ended_it_by_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    assert run(monkeypatch, UserError("found a"))[0] == 2
    assert waited == [errors.PATIENCE_S]
    assert capsys.readouterr().err == "error: rank 3: found a\n"

    def ended(seconds: float) -> None:
        sys.exit(128 + 15)  # as the launcher's SIGTERM does

    monkeypatch.setattr(errors.time, "sleep", ended)
    assert run(monkeypatch, UserError("found a"))[0] == 143
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [KeyError("ours"), AssertionError(), TransientError("peer")])
def test_other_errors_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(argv: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(type(error)):
        errors.command(main)()


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_what_main_returns_is_the_exit_code(
    returned: int | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, returned) == (code, [])


def test_main_gets_the_arguments_without_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, None, "a.b=1", "--c") == (0, ["a.b=1", "--c"])


def test_interrupts_end_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, KeyboardInterrupt())[0] == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_entry_point_keeps_the_name_of_main() -> None:
    def main(argv: Sequence[str]) -> None:
        """Trains."""

    assert errors.command(main).__name__ == "main"
    assert errors.command(main).__doc__ == "Trains."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("two\nlines\tand  spaces", "two lines and spaces"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("bell\x07 and \x00", "bell\\x07 and \\x00"),
        ("right\u202eto left", "right\\u202eto left"),
        ("lone \ud800", "lone \\ud800"),
        ("caf\u00e9 \u4e2d", "caf\u00e9 \u4e2d"),
    ],
)
def test_one_line_is_printable_and_readable(text: str, expected: str) -> None:
    line = one_line(text)
    assert one_line(DataError(text)) == line
    assert line.isprintable()
    assert line == expected
