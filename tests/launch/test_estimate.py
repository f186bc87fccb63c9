"""The command, in this process: a table for people, JSON for programs, one line for mistakes."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.train import helpers
from vlm.errors import ConfigError

SCRIPT = helpers.ROOT / "launch/estimate.py"


def arguments(*more: str) -> list[str]:
    recipe = helpers.world() / "recipe.yaml"
    files = ["--recipe", str(recipe), "--ds_config", str(helpers.ds_file(2))]
    return [*files, "--gpu", "rtx-4090", "--gpus_per_node", "2", *more]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # so that it is as before afterwards
    return runpy.run_path(str(SCRIPT))["main"]


def test_a_table_and_the_same_as_json(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("--price", "0.5", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == "zero2" and found["fits"]["zero2"]["fits"]
    assert found["price"] == pytest.approx(found["hours"] * 2 * 0.5)
    assert main(arguments("--price", "0.5", "train.steps=77")) == 0
    shown = capsys.readouterr().out
    assert "zero3_offload" in shown and "zero2*" in shown and "activations" in shown
    assert "for 77 steps" in shown and "assumed: 40% of 165.2 TFLOP/s" in shown
    assert f"plan {found['source'].split()[1]}" in shown


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--mfu", "40"], "--mfu: found 40"),
        (["--gpus_per_node", "3"], "data.micro_batches is 4, which 3 ranks cannot share"),
        (["--gpu", "abacus"], "found 'abacus', expected one of a100-40gb"),
        (["train.stepz=1"], "train.stepz: unknown key"),
    ],
)
def test_mistakes(main: Any, more: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        main(arguments(*more))


def test_pretrained_parts_that_are_not_here(main: Any, tmp_path: Path) -> None:
    part = f'model.language={{"pretrained": "{tmp_path}/none"}}'
    with pytest.raises(ConfigError, match=r"model\.language\.pretrained .*none"):
        main(arguments(part))
