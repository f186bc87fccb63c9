"""The recipe: what is trained, on what, for how long.

A recipe is YAML, whole or as changes to a ``base`` recipe. ``load`` reads it, applies
``a.b=value`` overrides and checks every key and type; what it returns is frozen. What DeepSpeed
owns (sharding, clipping, precision) is not here but in ``ds_configs/``; ``vlm.engine.ds_config``
refuses a value that stands in both.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from vlm.config_model import (
    CONNECTORS,
    FoveationConfig,
    ModelConfig,
)
from vlm.config_optim import OptimConfig
from vlm.config_train import HealthConfig, LogConfig, Strict, TrainConfig
from vlm.errors import ConfigError

# YAML 1.1 wants a dot in every float; people write 1e-6
_FLOAT = re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-6 is a number and a key set twice is an error."""

    yaml_implicit_resolvers = {
        **yaml.SafeLoader.yaml_implicit_resolvers,
        **{
            first: [
                ("tag:yaml.org,2002:float", _FLOAT),
                *yaml.SafeLoader.yaml_implicit_resolvers.get(first, []),
            ]
            for first in "-+0123456789"
        },
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(sorted(twice))}: set twice, keep one", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class AugmentConfig(Strict):
    """Changes to training frames that leave every answer true. One draw per sample."""

    #: translate by up to this many pixels, repeating the border
    shift_px: int = Field(0, ge=0)
    #: multiply by 1 +- this
    contrast: float = Field(0.0, ge=0, lt=1)
    #: add up to +- this times 255
    brightness: float = Field(0.0, ge=0, lt=1)


class StorageConfig(Strict):
    """How shards are reached: how long they are waited for, what is kept of remote ones."""

    #: where ranges of remote shards are kept; all ranks of a host share it
    cache_dir: Path = Path("~/.cache/saccade/shards")
    cache_gb: float = Field(50.0, gt=0)
    #: ranges of remote shards asked for ahead of their turn, by each rank
    read_ahead_mb: float = Field(256.0, gt=0)
    #: requests at a time of each rank
    connections: int = Field(8, gt=0)
    #: until a request must begin to answer, and then go on
    timeout_s: float = Field(60.0, gt=0)
    #: a shard that cannot be reached is tried again so long, then the run fails
    give_up_s: float = Field(900.0, gt=0)


class SourceConfig(Strict):
    """One source of a mixture: a manifest, and how much of it."""

    manifest: Path
    #: what `weights_at` and errors call it; the manifest's file name if not set
    name: str = ""
    #: share among the sources that have one like it (frames, or text alone); all have one or none
    weight: float | None = Field(None, ge=0)
    #: passes in an epoch, where there are no weights
    repeat: float = Field(1.0, gt=0)
    #: most samples in an epoch (of those with frames, and of the text-only ones)
    cap: int | None = Field(None, gt=0)
    #: samples with frames that have fewer, or more, are left out
    min_frames: int = Field(0, ge=0)
    max_frames: int | None = Field(None, gt=0)
    #: frames that each image is shown as
    image_frames: int = Field(1, gt=0, le=64)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, found: Any) -> Any:
        if isinstance(found, dict) and not found.get("name") and "manifest" in found:
            return {**found, "name": Path(str(found["manifest"])).stem}
        return found

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        if self.weight is not None and self.repeat != 1:
            raise ValueError("set one of `weight` and `repeat`: weights say how often samples come")
        if self.max_frames is not None and self.max_frames < self.min_frames:
            raise ValueError(f"max_frames is below min_frames={self.min_frames}; no sample fits")
        return self


def _short_form(found: Any) -> Any:
    """A path alone is a mixture of one source."""
    return (_short_source(found),) if isinstance(found, str | Path) else found


def _short_source(found: Any) -> Any:
    return {"manifest": found} if isinstance(found, str | Path) else found


#: where the frames of a sample stand: before its text, or behind its first question
Order = Literal["frames_first", "question_first"]


class DataConfig(Strict):
    #: a manifest, or a list of sources
    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(_short_form)] = Field(min_length=1)
    #: a manifest, or one source, of which every sample with frames counts once
    eval: Annotated[SourceConfig, BeforeValidator(_short_source)]
    #: what weights are shares of
    weight_by: Literal["samples", "tokens", "frames"] = "samples"
    #: global step -> source -> its weight from there on; others keep theirs
    weights_at: dict[int, dict[str, float]] = {}
    batching: Literal["bucketed", "packed"] = "bucketed"
    #: micro-batches of a global step, over all ranks; world size must divide it
    micro_batches: int = Field(gt=0)
    #: most that one micro-batch may cost, in tokens, padding included
    budget: int = Field(gt=0)
    #: what a frame costs beside its tokens in the language model, in tokens
    frame_cost: float = Field(0.0, ge=0)
    #: share of text-only samples among all samples
    text_frac: float = Field(0.0, ge=0, lt=1)
    #: share of samples whose question stands before their frames
    question_first_frac: float = Field(0.0, ge=0, le=1)
    #: orders in which held-out samples are asked, the first also in training; empty: the trained
    eval_orders: tuple[Order, ...] = ()
    #: samples planned at a time
    window: int = Field(262_144, gt=0)
    #: `answers` learns assistant turns, `all` every text token, `preference` pairs (DPO)
    loss_on: Literal["answers", "all", "preference"] = "answers"
    #: longer texts are cut here, behind which an answer ends; images are never cut. None: whole
    max_text_tokens: int | None = Field(None, gt=1)
    augment: AugmentConfig = AugmentConfig()
    #: JPEG decoding threads of each rank
    decode_threads: int = Field(2, gt=0)
    #: micro-batches prepared ahead
    prefetch: int = Field(4, gt=0)
    #: share of samples that may be bad and replaced before the run stops
    max_bad_frac: float = Field(0.001, ge=0, le=1)
    storage: StorageConfig = StorageConfig()

    @property
    def orders(self) -> tuple[Order, ...]:
        """In which held-out samples are asked, without doubles."""
        if self.eval_orders:
            return tuple(dict.fromkeys(self.eval_orders))
        if self.question_first_frac == 1:
            return ("question_first",)
        return ("frames_first", "question_first") if self.question_first_frac else ("frames_first",)

    @model_validator(mode="after")
    def _weighed(self) -> "DataConfig":
        if self.eval.weight is not None or self.eval.repeat != 1:
            raise ValueError("eval: each held-out sample counts once; remove weight and repeat")
        names = [source.name for source in self.train]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"sources named {', '.join(sorted(twice))} twice; set their `name`")
        weighed = [source.name for source in self.train if source.weight is not None]
        if len(weighed) not in (0, len(names)):
            without = ", ".join(name for name in names if name not in weighed)
            raise ValueError(f"{without} without `weight`; give one to all sources or to none")
        for step, weights in self.weights_at.items():
            if unknown := sorted(set(weights) - set(weighed)):
                raise ValueError(
                    f"weights_at.{step}: {', '.join(unknown)}: no source with a weight; expected "
                    f"some of {', '.join(weighed) or 'none'}"
                )
            if step < 1 or min(weights.values(), default=0) < 0:
                raise ValueError(f"weights_at.{step}: expected a step from 1 up, weights from 0 up")
        return self


class Recipe(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output_dir: Path
    seed: int = Field(0, ge=0)
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    health: HealthConfig = HealthConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _latents_are_of_the_frames(self) -> "Recipe":
        if self.model.latent_shape is not None and self.data.augment != AugmentConfig():
            raise ValueError(
                "data.augment changes frames, but not their stored latents; remove it, or name an "
                "autoencoder in model.connector.autoencoder"
            )
        return self

    @model_validator(mode="after")
    def _compares_like_with_like(self) -> "Recipe":
        """Pairs are compared with what one pass of one mode said before training."""
        if self.data.loss_on != "preference":
            return self
        connector, data = self.model.connector, self.data
        several = isinstance(connector, FoveationConfig) and (
            connector.coarse_weight > 0
            or (connector.fine_passes > 1 and connector.fine_loss != "final")
        )
        problems = {
            "data.text_frac, expected 0": data.text_frac > 0,
            "data.augment, expected none": data.augment != AugmentConfig(),
            "train.modes, expected at most one": len(self.train.modes) > 1,
            "model.family, expected one without latents": self.model.family == "foveated_latent",
            "model.connector.coarse_weight and fine_loss, expected 0 and final": several,
        }
        if found := [text for text, wrong in problems.items() if wrong]:
            raise ValueError(f"data.loss_on=preference: change {'; '.join(found)}")
        return self

    @model_validator(mode="after")
    def _within_the_run(self) -> "Recipe":
        last = max([*filter(None, self.model.freeze.values()), *self.optim.lr_at], default=0)
        if last >= self.train.steps:
            raise ValueError(
                f"model.freeze and optim.lr_at name step {last}, but train.steps is "
                f"{self.train.steps}; name steps within the run"
            )
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies dotted overrides.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type or value; the message
            holds the dotted path.
    """
    tree = _read(path, ())
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(path, error, tree)) from None


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a recipe over those of its ``base``, the path of another one beside it.

    Args:
        above: recipes that have this one as a base.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        whose = f" (the base of {above[-1]})" if above else ""
        raise ConfigError(
            f"recipe {path}{whose}: {error.strerror}; expected a YAML file such as "
            "recipes/quickstart.yaml"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path}: is not UTF-8 text; expected YAML") from None
    try:
        tree = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path}: found {type(tree).__name__}, expected a mapping of keys")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"recipe {path}: base: found {base!r}, expected the path of a recipe")
    if path.resolve() in above:
        raise ConfigError(f"recipe {path}: is its own base; name another recipe")
    below = _read(path.parent / base, (*above, path.resolve()))
    return _over(tree, below)


def _over(tree: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Sections are joined key by key; lists and values replace those of the base.

    Another family takes nothing of the base's connector: its keys are those of its family.
    """
    joined = dict(base)
    if "family" in tree and tree["family"] != base.get("family"):
        joined.pop("connector", None)
    for key, value in tree.items():
        below = joined.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _over(value, below)
        joined[key] = value
    return joined


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe; ``load`` reads it back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, sign, text = override.partition("=")
    keys = dotted.split(".")
    if not sign or not all(keys):
        raise ConfigError(f"override {override!r}: expected a.b=value, for example train.steps=100")
    node = tree
    for depth, key in enumerate(keys[:-1], start=1):
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            where = ".".join(keys[:depth])
            raise ConfigError(f"override {override!r}: {where} is a value, it has no keys below it")
    try:
        node[keys[-1]] = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None


def _explain(path: Path, error: ValidationError, tree: dict[str, Any]) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key{_suggest(item['loc'], tree)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing, and it has no default")
        else:
            found = f" (found {item['input']!r})" if item["loc"] else ""
            lines.append(f"{where}: {item['msg']}{found}")
    return f"recipe {path} (with its base and overrides): " + "; ".join(lines)


def _suggest(loc: tuple[int | str, ...], tree: dict[str, Any]) -> str:
    model: Any = Recipe
    for depth, part in enumerate(loc[:-1]):
        field = model.model_fields.get(part)
        if loc[: depth + 1] == ("model", "connector"):
            model = CONNECTORS[tree["model"]["family"]]  # the union of all families' is no model
        elif field is None or not hasattr(field.annotation, "model_fields"):
            return ""
        else:
            model = field.annotation
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"
