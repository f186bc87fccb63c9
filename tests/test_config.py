from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from vlm import config
from vlm.config_model import FoveationConfig, LatentConfig, PoolingConfig
from vlm.errors import ConfigError, one_line

RECIPES = sorted(Path(__file__).parents[1].glob("recipes/*.yaml"))


def tree() -> dict[str, Any]:
    """The least that a recipe holds."""
    return {
        "name": "small",
        "output_dir": "runs/small",
        "model": {
            "family": "foveated",
            "vision": {"config": {"model_type": "dinov2", "hidden_size": 8}},
            "language": {"pretrained": "some/model"},
            "tokenizer": "data/tokenizer",
        },
        "data": {
            "train": "data/train.parquet",
            "eval": "data/eval.parquet",
            "micro_batches": 4,
            "budget": 1024,
        },
        "train": {"steps": 10},
    }


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str, **changes: Any) -> config.Recipe:
    return config.load(write(folder, yaml.safe_dump({**tree(), **changes})), overrides)


def refusal(folder: Path, *overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides, **changes)
    assert one_line(caught.value).isprintable()
    return str(caught.value)


def test_the_least_recipe_loads_with_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert [one.manifest for one in recipe.data.train] == [Path("data/train.parquet")]
    assert recipe.data.batching == "bucketed"
    assert recipe.optim.lr.connector > recipe.optim.lr.language
    assert recipe.model.freeze == {}


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.steps = 20  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian.steps=1", "trian: unknown key; did you mean train?"),
        (
            "model.connector.querydim=3",
            "model.connector.querydim: unknown key; did you mean",
        ),
        ("model.connector.fine_loss=last", "model.connector.fine_loss: Input should be 'final', "),
        ("model.family=clip", "model.family: Input should be 'foveated'"),
        ("model.family=blind", "model: Value error, family blind has no vision and no connector"),
        ("train.step=1", "train.step: unknown key; did you mean steps?"),
        ("optim.lr.conector=1e-3", "optim.lr.conector: unknown key; did you mean connector?"),
        ("model.vision.pretraned=a", "model.vision.pretraned: unknown key; did you mean"),
        ("data.augment.shift=2", "data.augment.shift: unknown key; did you mean shift_px?"),
        ("data.zzz=2", "data.zzz: unknown key; known here: train, eval"),
        ("gradient_clipping=1", "gradient_clipping: unknown key"),
    ],
)
def test_unknown_keys_are_refused_at_every_level(
    tmp_path: Path, override: str, expected: str
) -> None:
    message = refusal(tmp_path, override)
    assert expected in message
    assert "recipe.yaml" in message


@pytest.mark.parametrize("key", ["name", "output_dir", "model", "data", "train"])
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    held = {k: v for k, v in tree().items() if k != key}
    with pytest.raises(ConfigError, match=f"{key}: missing, and it has no default"):
        config.load(write(tmp_path, yaml.safe_dump(held)))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=0", "train.steps: "),
        ("train.steps=ten", "train.steps: "),
        ("train.steps=1.5", "train.steps: "),
        ("data.budget=-1", "data.budget: "),
        ("data.text_frac=1", "data.text_frac: "),
        ("data.batching=random", "data.batching: "),
        ("optim.lr.vision=-1e-3", "optim.lr.vision: "),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.schedule.floor_frac=2", "optim.schedule.floor_frac: "),
        ("model.freeze=[everything]", "model.freeze.everything"),
        ("name=../up", "name: "),
        ("name=", "name: "),
        ("seed=-1", "seed: "),
        ("log.wandb=maybe", "log.wandb: "),
        ("train=5", "train: "),
        ("model={family: fovea, connector: {dim: 3}}", "model.family: Input should be 'foveated'"),
    ],
)
def test_wrong_values_are_refused_with_their_key(
    tmp_path: Path, override: str, expected: str
) -> None:
    assert expected in refusal(tmp_path, override)


@pytest.mark.parametrize("value", [".nan", ".inf", "1e999"])
@pytest.mark.parametrize("key", ["optim.lr.vision", "optim.eps", "data.frame_cost"])
def test_numbers_are_finite(tmp_path: Path, key: str, value: str) -> None:
    assert f"{key}: " in refusal(tmp_path, f"{key}={value}")


def test_a_part_has_one_source(tmp_path: Path) -> None:
    assert "exactly one of" in refusal(tmp_path, "model.vision.pretrained=some/model")
    assert "exactly one of" in refusal(tmp_path, "model.language.pretrained=null")
    assert "needs `model_type`" in refusal(tmp_path, "model.vision.config={hidden_size: 8}")


def test_overrides_set_what_the_file_says_and_what_it_does_not(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "train.steps=7",
        "optim.lr.connector=1e-3",
        "optim.lr.vision=0.5",
        "model.freeze=[vision, language]",
        "data.augment={shift_px: 2}",
        "output_dir=runs/a=b",
        "log.tensorboard=true",
    )
    assert recipe.train.steps == 7
    assert recipe.optim.lr.connector == 1e-3
    assert recipe.optim.lr.vision == 0.5
    assert recipe.model.freeze == {"vision": None, "language": None}
    assert recipe.data.augment.shift_px == 2
    assert recipe.output_dir == Path("runs/a=b")
    assert recipe.log.tensorboard is True


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "train.steps=7", "train.steps=8").train.steps == 8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "expected a.b=value"),
        ("=1", "expected a.b=value"),
        ("train..steps=1", "expected a.b=value"),
        (".steps=1", "expected a.b=value"),
        ("seed.below=1", "seed is a value, it has no keys below it"),
        ("train.steps=[1", "the value is not YAML"),
    ],
)
def test_overrides_that_say_nothing_are_refused(
    tmp_path: Path, override: str, expected: str
) -> None:
    message = refusal(tmp_path, override, seed=1)
    assert expected in message
    assert override in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "is not YAML"),
        ("- a", "found list, expected a mapping"),
        ("", "found NoneType, expected a mapping"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        config.load(write(tmp_path, text))
    assert one_line(caught.value).isprintable()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        config.load(tmp_path / "absent.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError):
        config.load(path)


def test_a_key_set_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(tree()) + "seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="seed"):
        config.load(path)


def test_numbers_for_transformers_are_numbers(tmp_path: Path) -> None:
    recipe = load(tmp_path, "model.vision.config.layer_norm_eps=1e-6")
    assert recipe.model.vision.config is not None
    assert recipe.model.vision.config["layer_norm_eps"] == 1e-6


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "train.steps=0", "data.budgt=1")
    assert "train.steps" in message
    assert "data.budgt" in message


def test_the_resolved_recipe_reads_back_as_the_same(tmp_path: Path) -> None:
    recipe = load(tmp_path, "optim.lr.vision=1e-7", "model.freeze=[vision]", "train.steps=3")
    again = config.load(write(tmp_path, config.to_yaml(recipe)))
    assert again == recipe
    assert config.to_yaml(again) == config.to_yaml(recipe)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_reads_back(path: Path, tmp_path: Path) -> None:
    recipe = config.load(path)
    assert recipe.name == path.stem
    assert config.load(write(tmp_path, config.to_yaml(recipe))) == recipe


def test_the_connector_has_the_keys_of_its_family(tmp_path: Path) -> None:
    recipe = load(tmp_path, "model.family=multi_token", "model.connector.tokens_per_frame=49")
    assert recipe.model.connector.tokens_per_frame == 49
    assert config.load(write(tmp_path, config.to_yaml(recipe))) == recipe
    wrong = refusal(tmp_path, "model.family=multi_token", "model.connector.query_dim=8")
    assert "model.connector.query_dim: unknown key; known here: tokens_per_frame, red" in wrong


def test_an_overlay_holds_only_what_it_changes(tmp_path: Path) -> None:
    load(tmp_path, optim={"betas": [0.9, 0.95], "lr": {"vision": 0.5}})
    (tmp_path / "overlays").mkdir()
    middle, top = tmp_path / "overlays" / "middle.yaml", tmp_path / "overlays" / "top.yaml"
    middle.write_text("base: ../recipe.yaml\noptim: {lr: {language: 0.25}, betas: [0.8, 0.9]}\n")
    top.write_text("base: middle.yaml\nname: top\nmodel: {connector: {query_bias: true}}\n")
    found = config.load(top, ["train.steps=3"])
    assert (found.name, found.train.steps, found.optim.betas) == ("top", 3, (0.8, 0.9))
    assert (found.optim.lr.vision, found.optim.lr.language) == (0.5, 0.25)
    assert found.model.connector == FoveationConfig(query_bias=True)
    assert config.load(tmp_path / "recipe.yaml").model.connector == FoveationConfig()
    middle.write_text("base: ../recipe.yaml\nmodel: {family: multi_token}\n")
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(tree() | {"model": tree()["model"] | {"connector": {"query_dim": 8}}})
    )
    assert config.load(middle).model.connector == PoolingConfig()
    middle.write_text("base: top.yaml\n")
    with pytest.raises(ConfigError, match="is its own base"):
        config.load(top)
    middle.write_text("base: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"gone.yaml .the base of \S*middle.yaml.: No such"):
        config.load(top)
    middle.write_text("base: [1]\n")
    with pytest.raises(ConfigError, match="base: found .1., expected the path"):
        config.load(top)


def test_stored_latents_are_those_of_frames_as_they_are(tmp_path: Path) -> None:
    changes = ("model.family=foveated_latent", "data.augment.shift_px=2")
    assert "stored latents; remove it" in refusal(tmp_path, *changes)
    made = load(tmp_path, *changes, "model.connector.autoencoder=some/vae")
    assert isinstance(made.model.connector, LatentConfig)
    assert made.model.connector.stored_shape is None
    assert load(tmp_path, changes[0]).model.connector.stored_shape == (4, 32, 32)
