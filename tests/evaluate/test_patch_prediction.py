"""A predictor against movements that can be foretold, and on the clips of a tiny run."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.evaluate.world import make_run, make_samples
from tests.tools.run_tool import error_line, run_tool
from vlm.evaluate import patch_prediction
from vlm.evaluate.judge import open_run
from vlm.evaluate.patch_prediction import Predicted, Predictor, errors, fit


def moving(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of which each goes one place to the right."""
    before = torch.randn(64, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    return before, before.roll(1, dims=3)


def test_it_begins_as_a_copy_and_learns_what_can_be_foretold() -> None:
    train, judged = moving(1), moving(2)
    own, copied = errors(Predictor(4), *judged)
    plain = ((judged[0] - judged[1]) ** 2).mean().item()
    assert own == copied == pytest.approx(plain, rel=1e-5)
    own, copied = errors(fit(*train, steps=60, seed=0), *judged)
    assert copied == pytest.approx(plain, rel=1e-5) and own < 0.7 * copied


def test_patches_that_rest_cannot_be_bettered() -> None:
    before = moving(3)[0]
    own, copied = errors(fit(before, before, steps=5, seed=0), before, before)
    assert own == copied == 0


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_samples(8))  # twice one to four frames each
    recipe = json.loads((run / "recipe.yaml").read_text())
    recipe["data"]["train"] = recipe["data"]["eval"]
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    result = run_tool("../launch/predict_patches", "--run", run, "--steps", 3, "--gap", 2)
    assert result.returncode == 0, result.stderr
    found = json.loads((run / "patch_prediction.json").read_text())
    assert found["gap"] == 2 and found["num_train"] == found["num_eval"] == 2 * (1 + 2)
    assert found["error_of_copying"] == found["gain_frac"] == 0  # these clips rest
    assert Predicted(1, 9, 9, 0.9, 1.0).gain_frac == pytest.approx(0.1)
    assert "6 held-out pairs" in result.stdout
    far = run_tool("../launch/predict_patches", "--run", run, "--gap", 4)
    assert "no clip has more than 4 frames" in error_line(far)


def test_pairs_are_of_one_clip_and_so_far_apart(tmp_path: Path) -> None:
    """Clips that grow lighter by 20 a frame, from 0, 1, 2 ... on."""
    samples = [
        loaded._replace(
            frames=np.stack([np.full((16, 16, 3), i + 20 * t) for t in range(1 + i % 4)]).astype(
                np.uint8
            )
        )
        for i, loaded in enumerate(make_samples(8))
    ]
    recipe, _, _ = open_run(make_run(tmp_path, samples))
    vision = SimpleNamespace(patches=lambda frames: frames)
    model = SimpleNamespace(device=torch.device("cpu"), vision=vision)
    before, after = patch_prediction._pairs(model, recipe, 2, 8, training=False)
    shades = [round(float(frame.mean())) for frame in before]
    assert sorted(shades) == [2, 3, 6, 7, 23, 27]
    assert [round(float(frame.mean())) for frame in after] == [shade + 40 for shade in shades]
