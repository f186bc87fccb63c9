"""Runs a script of tools/ as ``python tools/NAME.py`` would, but in this process.

A fresh process spends seconds on imports; the test of precompute starts a real one.
"""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

TOOLS = Path(__file__).parents[2] / "tools"


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_tool(name: str, *args: object) -> Result:
    path = str(TOOLS / f"{name}.py")
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [path, *map(str, args)]),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as exit:
            code = exit.code
    assert isinstance(code, int)
    return Result(code, stdout.getvalue(), stderr.getvalue())


def error_line(result: Result) -> str:
    """The one line that a user's mistake ends with."""
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    return line
