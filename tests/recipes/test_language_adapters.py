"""The recipes of perceiver and prefix: rehearsed at full size, run in order at a tiny one.

No weights are fetched: the published geometries stand in for what the ids name.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import ranks
from tests.models import test_cross_attention, tiny
from tests.recipes.full_size import write_configs
from tests.recipes.test_fvlm import smollm
from tests.train import helpers, runs
from vlm import config
from vlm.ckpt.save import MODEL
from vlm.config import Recipe
from vlm.data.format.schema import Sample, Turn
from vlm.models import registry
from vlm.train.dry_run import dry_run

RECIPES = Path(__file__).parents[2] / "recipes"
PATHS = [*sorted(RECIPES.glob("anymal/*.yaml")), *sorted(RECIPES.glob("prefix/*.yaml"))]
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")


def tower(width: int, layers: int, heads: int, ffn: int, size: int, patch: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "image_size": size,
        "patch_size": patch,
    }


#: config.json of what is published under these ids, and the parameters of a language model
PUBLISHED: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {
        "model_type": "clip",
        "projection_dim": 768,
        "vision_config": tower(1024, 24, 16, 4096, 224, 14),
    },
    "google/vit-base-patch16-224-in21k": {
        "model_type": "vit",
        **tower(768, 12, 12, 3072, 224, 16),
    },
    "distilbert/distilgpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 6,
        "n_head": 12,
        "vocab_size": 50257,
    },
    "google/siglip-base-patch16-224": {
        "model_type": "siglip",
        "vision_config": tower(768, 12, 12, 3072, 224, 16),
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip",
        "vision_config": tower(1152, 27, 16, 4304, 384, 14),
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        **smollm(4096, 32, 32, 8, 14336),
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolLM-135M": smollm(576, 30, 9, 3, 1536),
    "HuggingFaceTB/SmolLM-360M": smollm(960, 32, 15, 5, 2560),
    "HuggingFaceTB/SmolLM-1.7B": smollm(2048, 24, 32, 32, 8192),
    "Qwen/Qwen2-0.5B": {
        **smollm(896, 24, 14, 2, 4864),
        "model_type": "qwen2",
        "vocab_size": 151936,
    },
    "microsoft/Phi-3-mini-4k-instruct": {
        **smollm(3072, 32, 32, 32, 8192),
        "model_type": "phi3",
        "vocab_size": 32064,
        "tie_word_embeddings": False,
        "pad_token_id": 32000,
    },
}
RESAMPLER = 1_615_597_568
#: recipe -> trained parameters of tower, connector and language model; the first three published
TRAINED = {
    "anymal_stage1": (0, RESAMPLER, 0),
    "anymal_stage2": (0, RESAMPLER, 167_772_160),
    "prefix_captions_135m": (0, 442_944, 1_843_200),
    "prefix_captions_360m": (0, 738_240, 3_276_800),
    "prefix_captions_1.7b": (0, 2_361_344, 6_291_456),
    "prefix_captions_phi3": (0, 2_362_368, 9_437_184),
    # ViT-base without its pooler; DistilGPT2 and a second attention of 2,363,904 in each block
    "prefix_legacy_vit_gpt2": (85_798_656, 0, 81_912_576 + 6 * 2_363_904),
    # 768 x 2048 + 2048 + 2048 x 896 + 896; rank 16 on maps of 896, 128, 128 and 896 rows
    "prefix_captions_qwen2": (0, 3_410_816, 24 * 16 * (4 * 896 + 2 * 896 + 2 * 128)),
}


@functools.cache
def images() -> Path:
    """A manifest of single images, each with a question, beside the tiny data's tokenizer."""
    turns = (
        Turn(role="user", content="What colour is the circle?"),
        Turn(role="assistant", content="It is red.", task="colour"),
    )
    sample = Sample(version=1, kind="image", source="tiny", frame_count=1, turns=turns)
    helpers.write_split(helpers.world(), "images", [sample] * 40)
    return helpers.world() / "images.parquet"


def on_images() -> list[str]:
    """Overrides that put them in the place of each manifest."""
    return [
        f"data.train={images()}",
        f"data.eval={images()}",
        f"model.tokenizer={helpers.world() / 'tokenizer'}",
        f"model.image_token={helpers.IMAGE_TOKEN}",
        "log.wandb=disabled",
    ]


def at_full_size(path: Path, folder: Path) -> Recipe:
    return config.load(path, on_images() + write_configs(config.load(path), PUBLISHED, folder))


def counts(output: str, component: str) -> tuple[int, int]:
    """All parameters, and those that train."""
    ((total, trained),) = re.findall(rf"│ {component}\s+│\s*([\d,]+)\s*│\s*([\d,]+)", output)
    return int(total.replace(",", "")), int(trained.replace(",", ""))


@each
def test_a_rehearsal_at_full_size(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = at_full_size(path, tmp_path)
    assert dry_run(recipe, helpers.resolved(2, 1, recipe.data.micro_batches)) == 0
    output = capsys.readouterr().out
    name = re.sub(r"_(paper|cc3m|llava)$", "", recipe.name)
    for part, expected in zip(("vision", "connector", "language"), TRAINED[name], strict=True):
        assert counts(output, part)[1] == expected, part
    assert counts(output, "all")[1] == sum(TRAINED[name])
    assert ("would not start yet: model.init_from" in output) == bool(recipe.model.init_from)
    if name == "prefix_captions_135m":
        assert counts(output, "all")[1] == 2_286_144


@each
def test_recipes_are_named_after_their_file_and_follow_each_other(path: Path) -> None:
    recipe = config.load(path)
    assert recipe.name == f"{path.parent.name}_{path.stem}" == recipe.output_dir.name
    assert len(path.read_text().splitlines()) < 60
    if recipe.model.init_from is not None:
        assert recipe.model.init_from.name in {config.load(one).name for one in PATHS}


def test_a_step_has_about_the_published_number_of_samples() -> None:
    """Of 15 tokens a caption, 400 a conversation."""
    for name, wanted, tokens in (
        ("anymal/stage1", 64, 15),
        ("anymal/stage1_paper", 2048, 15),
        ("anymal/stage1_cc3m", 1024, 15),
        ("anymal/stage2_paper", 256, 400),
        ("anymal/stage2_llava", 128, 400),
        ("prefix/captions_135m", 64, 15),
        ("prefix/captions_360m", 64, 15),
        ("prefix/captions_1.7b", 64, 15),
        ("prefix/captions_phi3", 64, 15),
        ("prefix/captions_qwen2", 64, 15),
        ("prefix/legacy_vit_gpt2", 64, 15),
    ):
        recipe = config.load(RECIPES / f"{name}.yaml")
        cost = recipe.model.connector.tokens_per_frame + tokens + recipe.data.frame_cost
        found = recipe.data.micro_batches * (recipe.data.budget // cost)
        assert 0.85 * wanted <= found <= 1.5 * wanted, (name, found)
        longest = cost - tokens + (recipe.data.max_text_tokens or 0)
        assert longest <= recipe.data.budget, name


def tiny_recipe(path: Path, folder: Path, base: Path, *more: str) -> Recipe:
    """The recipe with parts, data and steps of a second; all else as it says."""
    recipe = config.load(path)
    part = tiny.CLIP if recipe.model.family == "perceiver" else tiny.SIGLIP
    size = {"tokens_per_frame": 3, "num_layers": 2, "num_heads": 4}
    if recipe.model.family == "prefix":
        size = {"tokens_per_frame": 4, "hidden_dim": 40}
    elif recipe.model.family == "cross_attention":
        part, size = test_cross_attention.VIT, {}
        more = (*more, f"model.language={json.dumps({'config': test_cross_attention.GPT2})}")
        more = (*more, "model.language.config.vocab_size=300", "model.freeze=[]")
    overrides = [
        *on_images(),
        f"output_dir={folder}",
        f"model.vision={json.dumps({'config': part})}",
        f"model.language.pretrained={base}",
        *(f"model.connector.{key}={value}" for key, value in size.items()),
        "data.micro_batches=4",
        "data.budget=500",
        "train.steps=3",
        "train.log_every=1",
        "train.eval_every=3",
        "train.checkpoint_every=3",
        "train.eval_steps=1",
        "train.cpu_threads=1",
        *more,
    ]
    if recipe.model.language.lora is not None and recipe.model.language.lora.targets is None:
        overrides.append("model.language.lora.rank=4")
    return config.load(path, overrides)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model that all stand on."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tiny.make_lm(hidden_size=64, intermediate_size=128, vocab_size=300).save_pretrained(folder)
    return folder


def refused(recipe: Recipe) -> str:
    return runs.refused(recipe, 2)


@pytest.mark.slow
def test_each_stage_trains_on_two_ranks_and_the_second_takes_the_first_s_resampler(
    base: Path,
) -> None:
    folder = runs.new_folder()
    path = RECIPES / "anymal/stage2.yaml"
    lost = tiny_recipe(path, folder / "two", base, f"model.init_from={folder / 'one'}")
    assert "found no run" in ranks(2).run(refused, lost)[0]
    first = tiny_recipe(RECIPES / "anymal/stage1.yaml", folder / "one", base)
    assert [len(steps) for steps in ranks(2).run(runs.fit, first, 2)] == [3, 3]
    second = tiny_recipe(
        path, folder / "two", base, f"model.init_from={folder / 'one'}", "optim.lr.connector=0.0"
    )
    assert [len(steps) for steps in ranks(2).run(runs.fit, second, 2)] == [3, 3]
    one, two = (registry.load(runs.checkpoint(run, 3) / MODEL) for run in (first, second))
    for name, tensor in one.connector.state_dict().items():
        assert torch.equal(two.connector.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in PATHS if p.stem not in ("stage1", "stage2")], ids=lambda p: p.stem
)
def test_each_recipe_trains_on_two_ranks(path: Path, base: Path) -> None:
    recipe = tiny_recipe(path, runs.new_folder() / path.stem, base, "model.init_from=null")
    assert [len(steps) for steps in ranks(2).run(runs.fit, recipe, 2)] == [3, 3]
