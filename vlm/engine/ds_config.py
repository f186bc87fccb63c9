"""The DeepSpeed file: read, checked, and completed for ``deepspeed.initialize``.

DeepSpeed owns sharding, clipping and precision, the recipe owns what is trained; a knob has one
owner, and a file that sets the other's is refused. ``load`` checks the file by itself, ``resolve``
beside the recipe and the machine. Not here: the keys themselves (``ds_keys``), and the dialect of
other trainers in which any value may be ``"auto"``; here that is ``bf16.enabled`` alone.
"""

import copy
import difflib
import json
import math
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from vlm.engine.ds_keys import OWNED_BY_RECIPE, REFUSED, fields, schema, walk
from vlm.errors import ConfigError

AUTO = "bf16.enabled"


def load(path: Path) -> dict[str, Any]:
    """Reads a DeepSpeed file and checks every key and value of it.

    Raises:
        ConfigError: no such file, not a JSON object, a key that is unknown or does not work here,
            a value of a wrong type or range; the message holds the dotted keys.
    """
    tree = _read(path)
    problems = [
        *_refused_keys(tree),
        *_unknown_keys(tree, schema(), ""),
        *(
            f'{key}: "auto" is for other trainers; write a value (only {AUTO} may be "auto")'
            for key, value in walk(tree)
            if value == "auto" and key != AUTO and key.split(".")[0] not in OWNED_BY_RECIPE
        ),
    ]
    if not problems:
        problems = [*_wrong_values(tree), *_wrong_together(tree)]
    if problems:
        raise ConfigError(f"DeepSpeed file {path}: " + "; ".join(problems))
    return tree


def resolve(
    raw: dict[str, Any],
    *,
    path: Path,
    recipe_path: Path,
    micro_batches: int,
    world_size: int,
    cpu: bool,
) -> dict[str, Any]:
    """What ``deepspeed.initialize`` gets: ``raw`` with the recipe's numbers and the machine's.

    Args:
        raw: from ``load``, left as it is.
        path: where ``raw`` is from, for messages.
        recipe_path: where ``micro_batches`` is from, for messages.
        micro_batches: the recipe's ``data.micro_batches``, those of one global step.
        world_size: ranks that share them.
        cpu: whether the ranks compute on a CPU.

    Raises:
        ConfigError: a key that the recipe owns, precisions that do not go together, or a number of
            ranks that does not divide the micro-batches.
    """
    if owned := [f"{key} (there {OWNED_BY_RECIPE[key]})" for key in raw if key in OWNED_BY_RECIPE]:
        raise ConfigError(
            f"DeepSpeed file {path} sets what recipe {recipe_path} owns: {', '.join(owned)};"
            f" take it out of {path}"
        )
    config = copy.deepcopy(raw)
    _resolve_auto(config, cpu)
    _check_precision(config, path, cpu)
    if micro_batches % world_size:
        fitting = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        raise ConfigError(
            f"recipe {recipe_path}: data.micro_batches is {micro_batches}, which {world_size} ranks"
            f" cannot share equally; start {' or '.join(map(str, fitting))} ranks, or set"
            f" data.micro_batches to a multiple of {world_size}"
        )
    config["train_batch_size"] = micro_batches
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = micro_batches // world_size
    zero = config["zero_optimization"]
    # Stage 3 would overlap them by default, which has brought NaNs: off until somebody asks for it.
    zero.setdefault("overlap_comm", False)
    offloads = "offload_optimizer" in zero
    # One buffer for all gradients keeps a GPU's memory in one piece. On a CPU it is a copy of each
    # and nothing else, a tenth of a small model's step; DeepSpeed offloads by way of it.
    zero.setdefault("contiguous_gradients", offloads or not cpu)
    if offloads:
        # DeepSpeed's own CPU Adam is compiled on first use, which takes a compiler and a minute.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def _read(path: Path) -> dict[str, Any]:
    where = f"DeepSpeed file {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{where}: {error.strerror}; expected a JSON file such as ds_configs/zero2.json"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: is not UTF-8 text; expected JSON") from None
    try:
        tree = json.loads(
            text,
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}: not JSON, line {error.lineno} column {error.colno}: {error.msg}"
            " (comments and trailing commas are not JSON)"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: found {type(tree).__name__}, expected an object of keys")
    return tree


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"{', '.join(twice)}: set twice in one section; keep one")
    return tree


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"found the number {text}, expected a finite one")
    return number


def _refused_keys(tree: dict[str, Any]) -> Iterator[str]:
    for key, _ in walk(tree):
        if key in REFUSED:
            yield f"{key}: {REFUSED[key]}"


def _unknown_keys(tree: dict[str, Any], model: type[BaseModel], prefix: str) -> Iterator[str]:
    known = fields(model)
    for key, value in tree.items():
        dotted = prefix + key
        if dotted in REFUSED or dotted in OWNED_BY_RECIPE:
            continue
        if key not in known:
            yield f"{dotted}: unknown key; {_suggest(key, known)}"
            continue
        below = known[key]
        if below is None:
            continue
        if isinstance(value, dict):
            yield from _unknown_keys(value, below, f"{dotted}.")
        else:
            yield f"{dotted}: found {reprlib.repr(value)}, expected an object of keys"


def _suggest(key: str, known: dict[str, Any]) -> str:
    elsewhere = [
        f"{section}.{key}"
        for section, below in fields(schema()).items()
        if below is not None and key in fields(below)
    ]
    close = difflib.get_close_matches(key, [*known, *OWNED_BY_RECIPE], n=1)
    guesses = close or elsewhere[:1]
    if guesses:
        return f"did you mean {guesses[0]}?"
    return f"known here: {', '.join(sorted(known))}"


def _wrong_values(tree: dict[str, Any]) -> Iterator[str]:
    ours = {key: value for key, value in tree.items() if key not in OWNED_BY_RECIPE}
    try:
        schema().model_validate(ours)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "missing":
                yield f"{key}: missing; write it down, DeepSpeed's silent default may surprise"
            else:
                yield f"{key}: {item['msg']} (found {reprlib.repr(item['input'])})"


def _wrong_together(tree: dict[str, Any]) -> Iterator[str]:
    zero = tree.get("zero_optimization", {})
    stage = zero.get("stage")
    if type(stage) is not int:
        yield f"zero_optimization.stage: found {stage!r}, expected 0, 1, 2 or 3"
    if stage != 3 and "offload_param" in zero:
        yield f"zero_optimization.offload_param: only stage 3 offloads parameters (found {stage})"
    if stage == 0 and "offload_optimizer" in zero:
        yield "zero_optimization.offload_optimizer: stage 0 offloads nothing; use stage 2 or 3"
    for name in ("offload_param", "offload_optimizer"):
        offload = zero.get(name, {})
        if offload.get("device") == "nvme" and "nvme_path" not in offload:
            yield f"zero_optimization.{name}.nvme_path: missing, and device is nvme"


def _resolve_auto(config: dict[str, Any], cpu: bool) -> None:
    """``bf16.enabled: "auto"`` is bf16 on an accelerator and fp32 in all places on a CPU."""
    bf16 = config.get("bf16", {})
    if bf16.get("enabled") != "auto":
        return
    bf16["enabled"] = not cpu
    if cpu:
        config.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"


def _check_precision(config: dict[str, Any], path: Path, cpu: bool) -> None:
    where = f"DeepSpeed file {path}"
    on = [k for k in ("bf16", "fp16", "torch_autocast") if config.get(k, {}).get("enabled") is True]
    if len(on) > 1:
        raise ConfigError(f"{where}: {' and '.join(on)} are both enabled; enable one")
    if cpu and on == ["fp16"]:
        raise ConfigError(
            f'{where}: fp16 needs a GPU, and this is a CPU; set bf16.enabled to "auto" instead, '
            "which is fp32 there"
        )
    stage = config["zero_optimization"]["stage"]
    accumulate = config.get("data_types", {}).get("grad_accum_dtype")
    weights = "fp32" if not on or on == ["torch_autocast"] else on[0]
    if accumulate not in (None, "fp32", weights):
        raise ConfigError(
            f"{where}: data_types.grad_accum_dtype is {accumulate}, but weights and gradients are "
            f'{weights}, which would lose bits without need; write "fp32"'
        )
    if weights == "fp32":
        return
    if stage == 0:
        raise ConfigError(
            f"{where}: stage 0 with {on[0]} steps the optimizer once on zero gradients at the"
            f" start; use stage 1, 2 or 3, or set {on[0]}.enabled to false"
        )
    if accumulate is None:
        raise ConfigError(
            f"{where}: data_types.grad_accum_dtype is missing, so gradients would add up in"
            f' {on[0]}; write "fp32" (stages 2 and 3), or "{on[0]}" if that is meant'
        )
    if stage == 1 and on == ["bf16"] and accumulate == "fp32":
        raise ConfigError(
            f"{where}: stage 1 with bf16 and data_types.grad_accum_dtype fp32 clips by a norm that"
            " differs between ranks; use stage 2, or grad_accum_dtype bf16"
        )
