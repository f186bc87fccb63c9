import argparse

import pytest

from vlm import arguments


def test_numbers_are_whole_and_above_0() -> None:
    assert arguments.positive("12") == 12
    for text in ("0", "-1", "1.5", "", "x", "\u00b2"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number above 0"):
            arguments.positive(text)


def test_counts_are_whole_numbers() -> None:
    assert arguments.count("0") == 0
    for text in ("-1", "x", "1e3"):
        with pytest.raises(argparse.ArgumentTypeError, match="0 or more"):
            arguments.count(text)


def test_amounts_are_numbers() -> None:
    assert (arguments.amount("0"), arguments.amount("1e9"), arguments.amount(".5")) == (0, 1e9, 0.5)
    for text in ("-1", "x", "nan", "inf", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number, 0 or more"):
            arguments.amount(text)


def test_shared_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    arguments.add_shards(parser)
    arguments.add_workers(parser)
    arguments.add_tokenizer(parser)
    found = parser.parse_args(["a.tar", "b", "--workers", "3", "--tokenizer", "t"])
    assert [str(path) for path in found.paths] == ["a.tar", "b"]
    assert (found.workers, found.tokenizer, found.image_token) == (3, "t", "<|image|>")
    assert parser.parse_args(["a"]).workers >= 1
    with pytest.raises(SystemExit):
        parser.parse_args(["a", "--workers", "0"])
    assert "found '0', expected a whole number above 0" in capsys.readouterr().err


def test_progress_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with arguments.progress("shards") as advance:
        advance(1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "shards" in captured.err
