from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from vlm.config import Recipe
from vlm.engine.ds_keys import OWNED_BY_RECIPE, REFUSED, fields, schema, walk


def test_every_key_that_deepspeed_removed_is_refused() -> None:
    removed = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    removed |= {f"zero_optimization.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS}
    assert removed <= set(REFUSED)


def test_every_key_that_deepspeed_deprecates_is_refused() -> None:
    deprecated = {
        f"zero_optimization.{name}"
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated")
    }
    assert deprecated
    assert deprecated <= set(REFUSED)


def test_no_key_is_both_allowed_and_refused() -> None:
    allowed = set(fields(schema()))
    assert not allowed & set(OWNED_BY_RECIPE)
    assert not allowed & {key for key in REFUSED if "." not in key}
    assert not set(OWNED_BY_RECIPE) & set(REFUSED)


def test_owners_name_keys_that_the_recipe_has() -> None:
    for key, where in OWNED_BY_RECIPE.items():
        dotted = [word.strip(",:();") for word in where.split() if "." in word]
        for name in dotted:
            section, _, rest = name.partition(".")
            if section == "metrics":
                continue
            known = fields(Recipe)[section]
            assert known is not None
            assert rest.split(".")[0] in known.model_fields, (key, name)


def test_fields_hold_aliases_and_sections() -> None:
    known = fields(DeepSpeedZeroConfig)
    assert {"prefetch_bucket_size", "stage3_prefetch_bucket_size", "stage"} <= set(known)
    assert known["offload_optimizer"] is not None
    assert "device" in fields(known["offload_optimizer"])
    assert known["stage"] is None


def test_walk_names_everything() -> None:
    tree = {"a": {"b": {"c": 1}, "d": [2]}, "e": 3}
    assert dict(walk(tree)) == {
        "a": tree["a"],
        "a.b": {"c": 1},
        "a.b.c": 1,
        "a.d": [2],
        "e": 3,
    }
