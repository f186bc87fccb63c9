import json
from pathlib import Path
from typing import Any

import pytest

from vlm.engine import ds_config
from vlm.errors import ConfigError, one_line

RECIPE = Path("recipes/some.yaml")


def config(**changes: Any) -> dict[str, Any]:
    """A correct file in bf16 and stage 2; ``None`` takes a key out."""
    tree = {
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2},
        **changes,
    }
    return {key: value for key, value in tree.items() if value is not None}


def write(folder: Path, text: str) -> Path:
    path = folder / "ds.json"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, tree: object) -> str:
    """What ``load`` says about ``tree``, less the name of the file, which must be in it."""
    path = write(folder, tree if isinstance(tree, str) else json.dumps(tree))
    with pytest.raises(ConfigError) as caught:
        ds_config.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert one_line(caught.value) == message
    return message.replace(str(path), "")


def resolve(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    arguments = {
        "path": Path("ds.json"),
        "recipe_path": RECIPE,
        "micro_batches": 8,
        "world_size": 2,
        "cpu": True,
        **changes,
    }
    return ds_config.resolve(raw, **arguments)


def test_a_correct_file_comes_back_as_it_is(tmp_path: Path) -> None:
    assert ds_config.load(write(tmp_path, json.dumps(config()))) == config()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON, line 1"),
        ('{"gradient_clipping": 1.0,}', "trailing commas"),
        ("[1]", "found list, expected an object"),
        ('{"gradient_clipping": NaN}', "found the number NaN"),
        ('{"gradient_clipping": -Infinity}', "found the number -Infinity"),
        ('{"gradient_clipping": 1e999}', "found the number 1e999"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage: set twice"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json: No such file"):
        ds_config.load(tmp_path / "absent.json")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        ds_config.load(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"gradient_cliping": 0.5},
            "gradient_cliping: unknown key; did you mean gradient_clipping?",
        ),
        ({"nonsense": {}}, "nonsense: unknown key; known here: aio, "),
        (
            {"overlap_comm": False},
            "overlap_comm: unknown key; did you mean zero_optimization.overlap_comm?",
        ),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": False}},
            "zero_optimization.overlap_com: unknown key; did you mean overlap_comm?",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise: unknown key; did you mean device?",
        ),
        (
            {"data_types": {"grad_acum_dtype": "fp32"}},
            "data_types.grad_acum_dtype: unknown key; did you mean grad_accum_dtype?",
        ),
        (
            {"checkpoint": {"tag_validatoin": "Fail"}},
            "checkpoint.tag_validatoin: unknown key; did you mean tag_validation?",
        ),
        (
            {"flops_profiler": {"enable": True}},
            "flops_profiler.enable: unknown key; did you mean enabled?",
        ),
        (
            {"timers": {"throughput": {"enable": True}}},
            "timers.throughput.enable: unknown key; did you mean enabled?",
        ),
    ],
)
def test_unknown_keys_are_refused_at_every_level(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(tmp_path, config(**changes))


def test_the_hugging_face_name_of_a_key_works(tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_max_live_parameters": 1e6, "stage3_prefetch_bucket_size": 5e7}
    ds_config.load(write(tmp_path, json.dumps(config(zero_optimization=zero))))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"elasticity": {"enabled": True}}, "elasticity: DeepSpeed removed it"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size: DeepSpeed"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "use offload_optimizer.device"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"a": 1}}}, "zenflow: it overrides"),
        ({"compile": {"deepcompile": True}}, "compile: compiled ZeRO hangs"),
        ({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint.writer: a checkpoint is"),
        ({"data_types": {"buffer_dtype": "bf16"}}, "buffer_dtype: buffers keep their precision"),
    ],
)
def test_keys_that_do_not_work_say_why(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    message = refusal(tmp_path, config(**changes))
    assert expected in message
    assert "unknown key" not in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gradient_clipping": None}, "gradient_clipping: missing"),
        ({"gradient_clipping": -1.0}, "gradient_clipping: Input should be greater than"),
        ({"gradient_clipping": True}, "gradient_clipping: Input should be a valid number"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping: Input should be a valid number"),
        ({"gradient_clipping": "auto"}, 'gradient_clipping: "auto" is for other trainers'),
        ({"bf16": True}, "bf16: found True, expected an object"),
        ({"bf16": {"enabled": "maybe"}}, "bf16.enabled: Input should be a valid boolean"),
        ({"zero_optimization": None}, "zero_optimization: missing"),
        ({"zero_optimization": {}}, "zero_optimization.stage: found None"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: found True"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: Input should be 0, 1, 2"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage: "auto" is for'),
        ({"zero_optimization": {"stage": 3, "leaf_module": 1}}, "leaf_module: found 1, expected"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}},
            "zero_optimization.reduce_bucket_size: Input should be greater than 0",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            "zero_optimization.offload_optimizer.device: Input should be 'none', 'cpu' or 'nvme'",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.nvme_path: missing",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param: only stage 3",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer: stage 0 offloads nothing",
        ),
        (
            {"data_types": {"grad_accum_dtype": "float32"}},
            "data_types.grad_accum_dtype: Input should be 'fp32', 'bf16' or 'fp16'",
        ),
        ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale: Value error"),
        ({"steps_per_print": 0}, "steps_per_print: Input should be greater than 0"),
    ],
)
def test_wrong_values_are_refused_with_their_key(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(tmp_path, config(**changes))


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, config(gradient_cliping=1, amp={}, bf16={"enable": True}))
    for key in ("gradient_cliping", "amp", "bf16.enable"):
        assert key in message


def test_a_hostile_key_stays_on_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(config(**{"a\n\x1b[31mb": 1})))
    with pytest.raises(ConfigError) as caught:
        ds_config.load(path)
    assert one_line(caught.value).isprintable()


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("optimizer", {"type": "AdamW", "params": {"lr": "auto"}}, "optim.lr"),
        ("scheduler", {"type": "WarmupLR"}, "optim.schedule"),
        ("train_batch_size", "auto", "data.micro_batches"),
        ("train_micro_batch_size_per_gpu", 4, "data.budget"),
        ("gradient_accumulation_steps", 8, "data.micro_batches"),
        ("wandb", {"enabled": True}, "log.wandb"),
        ("tensorboard", {"enabled": True}, "log.tensorboard"),
        ("csv_monitor", {"enabled": True}, "metrics.csv"),
        ("activation_checkpointing", {}, "model.language.gradient_checkpointing"),
    ],
)
def test_what_the_recipe_owns_is_refused_naming_both_files(
    tmp_path: Path, key: str, value: object, where: str
) -> None:
    path = write(tmp_path, json.dumps(config(**{key: value})))
    with pytest.raises(ConfigError) as caught:
        resolve(ds_config.load(path), path=path)
    for part in (key, where, str(path), str(RECIPE)):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("cpu", "enabled", "accumulate"), [(True, False, "fp32"), (False, True, "bf16")]
)
def test_auto_is_bf16_on_an_accelerator_and_fp32_on_a_cpu(
    cpu: bool, enabled: bool, accumulate: str
) -> None:
    raw = config(bf16={"enabled": "auto"}, data_types={"grad_accum_dtype": "bf16"})
    resolved = resolve(raw, cpu=cpu)
    assert resolved["bf16"]["enabled"] is enabled
    assert resolved["data_types"]["grad_accum_dtype"] == accumulate
    assert raw["bf16"]["enabled"] == "auto", "resolve must not change what it is given"


FP16 = {"bf16": None, "fp16": {"enabled": True}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
            "bf16 and torch_autocast are both enabled",
        ),
        ({"zero_optimization": {"stage": 0}}, "stage 0 with bf16"),
        ({**FP16, "zero_optimization": {"stage": 0}}, "stage 0 with fp16"),
        ({"zero_optimization": {"stage": 1}}, "stage 1 with bf16"),
        ({"data_types": None}, "data_types.grad_accum_dtype is missing"),
        ({**FP16, "data_types": None}, "would add up in fp16"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, "is fp16, but weights .* are bf16"),
        ({"bf16": None, "data_types": {"grad_accum_dtype": "bf16"}}, "weights .* are fp32"),
        (
            {
                "bf16": None,
                "torch_autocast": {"enabled": True, "dtype": "bf16"},
                "data_types": {"grad_accum_dtype": "bf16"},
            },
            "is bf16, but weights .* are fp32",
        ),
    ],
)
def test_precisions_that_train_wrongly_are_refused(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    raw = ds_config.load(write(tmp_path, json.dumps(config(**changes))))
    with pytest.raises(ConfigError, match=expected):
        resolve(raw, cpu=False)


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    raw = ds_config.load(write(tmp_path, json.dumps(config(**FP16))))
    with pytest.raises(ConfigError, match='fp16 needs a GPU.*bf16.enabled to "auto"'):
        resolve(raw, cpu=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "bf16"}},
        {"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}, "data_types": None},
        {**FP16, "zero_optimization": {"stage": 1}},
        {"bf16": None, "torch_autocast": {"enabled": True, "dtype": "bf16"}, "data_types": None},
    ],
)
def test_precisions_that_train_well_pass(tmp_path: Path, changes: dict[str, Any]) -> None:
    resolve(ds_config.load(write(tmp_path, json.dumps(config(**changes)))), cpu=False)


def test_communication_overlaps_only_where_the_file_says_so() -> None:
    """DeepSpeed's own default depends on the stage."""
    zero = resolve(config(zero_optimization={"stage": 3}))["zero_optimization"]
    assert zero["overlap_comm"] is False
    zero = resolve(config(zero_optimization={"stage": 3, "overlap_comm": True}))
    assert zero["zero_optimization"]["overlap_comm"] is True


def test_gradients_lie_in_one_buffer_on_a_gpu_or_where_they_are_offloaded() -> None:
    def contiguous(cpu: bool, **zero: Any) -> bool:
        raw = config(zero_optimization={"stage": 2, **zero})
        return resolve(raw, cpu=cpu)["zero_optimization"]["contiguous_gradients"]

    assert contiguous(cpu=False) is True
    assert contiguous(cpu=True) is False
    assert contiguous(cpu=True, offload_optimizer={"device": "cpu"}) is True
    assert contiguous(cpu=True, contiguous_gradients=True) is True


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_recipe_sets_the_batch(world_size: int) -> None:
    resolved = resolve(config(), micro_batches=8, world_size=world_size)
    assert resolved["train_batch_size"] == 8
    assert resolved["train_micro_batch_size_per_gpu"] == 1
    assert resolved["gradient_accumulation_steps"] * world_size == 8


@pytest.mark.parametrize("world_size", [5, 24])
def test_ranks_that_cannot_share_the_micro_batches_are_refused(world_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(config(), micro_batches=12, world_size=world_size)
    for part in ("is 12", f"{world_size} ranks", "1 or 2 or 3 or 4 or 6 or 12 ranks", str(RECIPE)):
        assert part in str(caught.value)


def test_offload_does_not_ask_for_a_compiled_adam() -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert resolve(config(zero_optimization=zero))["zero_force_ds_cpu_optimizer"] is False
    asked = config(zero_optimization=zero, zero_force_ds_cpu_optimizer=True)
    assert resolve(asked)["zero_force_ds_cpu_optimizer"] is True
