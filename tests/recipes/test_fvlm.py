"""The recipes of the foveated model and their overlays: rehearsed at full size, run at a tiny one.

No weights are fetched: the published geometries stand in for what the ids name.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import ranks
from tests.models import tiny
from tests.recipes.full_size import write_configs
from tests.train import helpers, runs
from vlm import config
from vlm.config import Recipe
from vlm.data.plan import planning
from vlm.train.dry_run import dry_run

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = [f"fvlm_{n}" for n in ("stage1_video_caption", "stage2_vl_sft", "stage3_video_sft", "dpo")]
PATHS = [
    *sorted(RECIPES.glob("fvlm_*.yaml")),
    *sorted(RECIPES.glob("sizes/*.yaml")),
    *sorted(RECIPES.glob("ablations/fvlm/*.yaml")),
]
QUICK = {"f1_freeze_both", "a5_frozen_dino", "a7_shallow_coarse", "b3_pixel_shuffle", "blind"}
SMOLLM = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True}


def smollm(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> dict[str, Any]:
    return SMOLLM | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
    }


#: config.json of what is published under these ids
PUBLISHED: dict[str, dict[str, Any]] = {
    "facebook/dinov2-small": {
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "patch_size": 14,
        "image_size": 518,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": smollm(576, 30, 9, 3, 1536),
    "HuggingFaceTB/SmolLM2-360M-Instruct": smollm(960, 32, 15, 5, 2560),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": smollm(2048, 24, 32, 32, 8192),
}


def named(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


def on_tiny_data(recipe: Recipe) -> list[str]:
    """Overrides that put the tiny data in the place of each manifest."""
    world = helpers.world()
    data = helpers.pairs() if recipe.data.loss_on == "preference" else world
    sources = [source.model_dump(mode="json") for source in recipe.data.train]
    for source in sources:
        source |= {"manifest": str(data / "train.parquet")}
        source["min_frames"] = min(source["min_frames"], 3)  # there are none of 30
    held_out = recipe.data.eval.model_dump(mode="json") | {"manifest": str(data / "eval.parquet")}
    return [
        f"data.train={json.dumps(sources)}",
        f"data.eval={json.dumps(held_out)}",
        f"model.tokenizer={world / 'tokenizer'}",
        f"model.image_token={helpers.IMAGE_TOKEN}",
        "log.wandb=disabled",
    ]


def tiny_recipe(path: Path, folder: Path, *more: str) -> Recipe:
    """The recipe with parts, data and steps of a second; all else as it says."""
    recipe = config.load(path)
    language = {k: v for k, v in tiny.LANGUAGE.items() if k != "vocab_size"}
    overrides = [
        *on_tiny_data(recipe),
        f"output_dir={folder}",
        f"model.vision={json.dumps({'config': tiny.VISION})}",
        f"model.language={json.dumps({'config': language})}",
        "train.steps=3",
        "train.log_every=1",
        "train.eval_every=3",
        "train.eval_steps=1",
        "train.cpu_threads=1",
    ]
    if recipe.model.family == "multi_token":  # a grid of 2 x 2 patches
        overrides += ["model.connector.tokens_per_frame=4", "model.connector.shuffle=1"]
    return config.load(path, [*overrides, *more])


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_a_rehearsal_at_full_size(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = config.load(path)
    overrides = on_tiny_data(recipe) + write_configs(recipe, PUBLISHED, tmp_path)
    recipe = config.load(path, overrides)
    micro_batches = recipe.data.micro_batches
    assert dry_run(recipe, helpers.resolved(2, 2, micro_batches)) == 0
    output = capsys.readouterr().out
    assert f"steps {recipe.train.steps}, micro-batches a step {micro_batches}, ranks 2" in output
    assert ("would not start yet: model.init_from" in output) == bool(recipe.model.init_from)
    total = int(re.findall(r"│ all\s+│ ([\d,]+)", output)[0].replace(",", ""))
    if recipe.model.family == "foveated":
        (published,) = [n for n in (157.6e6, 382.6e6, 1.733e9) if abs(total / n - 1) < 0.01]
        size = next((s for s in ("360m", "1.7b") if s in recipe.name), "135m")
        assert published == {"135m": 157.6e6, "360m": 382.6e6, "1.7b": 1.733e9}[size]


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_overlays_are_small_and_named_after_their_file(path: Path) -> None:
    recipe = config.load(path)
    assert recipe.name in (path.stem, f"fvlm_{path.stem}")
    assert recipe.output_dir.name == recipe.name
    text = path.read_text()
    assert text.startswith("base: ") or "\nbase: " in text or path.stem == STAGES[0]
    assert len(text.splitlines()) < (25 if "\nbase: " in text else 55)
    if recipe.model.init_from is not None:
        assert recipe.model.init_from.name in {config.load(one).name for one in PATHS}
        assert recipe.model.init_from != recipe.output_dir


def train(recipe: Recipe) -> int:
    """On a rank: the steps of a run, all of them finite."""
    losses = [step.result.losses["loss"] for step in runs.fit(recipe, 2)]
    assert np.isfinite(losses).all(), losses
    return len(losses)


def refused(recipe: Recipe) -> str:
    return runs.refused(recipe, 2)


def test_each_stage_starts_from_the_best_of_the_one_before_and_not_without_it() -> None:
    folder = runs.new_folder()
    for before, name in zip([None, *STAGES], STAGES, strict=False):
        path = RECIPES / f"{name}.yaml"
        chained = config.load(path).model.init_from
        assert chained == (before and Path("runs") / before)
        start = "null" if before is None else str(folder / before)
        if before is not None:
            lost = tiny_recipe(path, folder / name, f"model.init_from={folder / 'nowhere'}")
            (refusal,) = ranks(1).run(refused, lost)
            assert "finish that stage first" in refusal and "to null to start anew" in refusal
        recipe = tiny_recipe(path, folder / name, f"model.init_from={start}")
        assert ranks(1).run(train, recipe) == [3]
        assert (folder / name / "checkpoints" / "best").read_text() == "step_00000003"


def ablations() -> list[Any]:
    """Those that change numbers alone are slow."""
    found = sorted(RECIPES.glob("ablations/fvlm/*.yaml"))
    return [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in found
    ]


@pytest.mark.parametrize("path", ablations())
def test_each_ablation_trains(path: Path) -> None:
    recipe = tiny_recipe(path, runs.new_folder() / path.stem)
    assert ranks(1).run(train, recipe, timeout_s=600) == [3]


def test_held_out_images_are_shown_as_often_as_trained_ones() -> None:
    path = RECIPES / "ablations/fvlm/a8_image_4_frames.yaml"
    recipe = config.load(path, on_tiny_data(config.load(path)))
    for training in (True, False):
        catalog, plan = planning.open_plan(recipe, training=training)
        own = slice(*catalog.first_rows[:2])  # images of the first source
        images = catalog.kind[own] == 1
        assert images.any() and set(plan.rows.num_frames[own][images]) == {4}
