"""Counts from shapes against torch's own counter, which sees every matrix product that is run."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from tests.models import adapted, cases, test_latent, tiny
from vlm.batch import Batch
from vlm.models import registry
from vlm.models.flops.counters import COUNTERS, FoveatedCounter
from vlm.models.flops.shapes import laid_out, shapes_of
from vlm.models.foveated import FoveatedConfig, FoveatedModel
from vlm.models.latent import TASKS, FoveatedLatentModel
from vlm.models.latent_layout import Order, lay_out

#: (frames, text tokens): padding, one frame alone, text between videos
MIXED = tiny.make_batch([(5, 9), (0, 4), (1, 13)])
TEXT = tiny.make_batch([(0, 7), (0, 12)])
QUESTION_FIRST = tiny.make_batch([(3, 9), (2, 6)], before=4)
PARTS = ("vision", "connector", "language")
#: all that can be frozen
FREEZES = [frozen for n in range(3) for frozen in itertools.combinations(PARTS, n)]
TOWERS = {
    "dinov2 gated": {"use_swiglu_ffn": True},
    "registers": {"model_type": "dinov2_with_registers", "num_register_tokens": 3},
    "dinov3": {"model_type": "dinov3_vit", "num_register_tokens": 2, "use_gated_mlp": True},
}
LANGUAGES = {
    "one key for all heads": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 16},
    "untied": {"tie_word_embeddings": False},
}


def make_model(vision: dict | None = None, language: dict | None = None) -> FoveatedModel:
    torch.manual_seed(0)
    tower = {**tiny.VISION, "num_hidden_layers": 3, **(vision or {})}
    if tower["model_type"] == "dinov3_vit":
        tower |= {"intermediate_size": 40}
        del tower["mlp_ratio"]
    language = {**tiny.LANGUAGE, **(language or {})}
    config = FoveatedConfig(vision_config=tower, language_config=language, connector=tiny.CONNECTOR)
    return FoveatedModel(config).train()


def freeze(model: Any, parts: tuple[str, ...]) -> Any:
    for part in parts:
        model.get_submodule(part).requires_grad_(False)
    return model


def measured(model: Any, batch: Batch, mode: str) -> float:
    # only this kernel is made of products that the counter sees on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(batch, mode=mode).loss_sum
        if mode in model.train_modes:
            loss.backward()
    return counter.get_total_flops()


def check(model: Any, batch: Batch, mode: str) -> None:
    counted = COUNTERS[type(model)](model).micro_batch(shapes_of(batch), mode)
    assert counted.hardware == pytest.approx(measured(model, batch, mode), rel=1e-9)
    assert counted.model <= counted.hardware
    assert counted.hardware == sum(part.total for part in counted.parts.values())


@pytest.mark.parametrize("frozen", FREEZES, ids="+".join)
@pytest.mark.parametrize("mode", ["coarse_only", "coarse_fine", "coarse_loss"])
def test_frozen_parts_in_every_mode(frozen: tuple[str, ...], mode: str) -> None:
    model = freeze(make_model(), frozen)
    model.coarse_weight = 0.5 if mode == "coarse_loss" else 0.0
    check(model, MIXED, mode.replace("coarse_loss", "coarse_fine"))


@pytest.mark.parametrize("fine_weights", [(0.0, 0.0, 1.0), (0.25, 0.75)], ids=str)
def test_several_fine_passes(fine_weights: tuple[float, ...]) -> None:
    model = make_model()
    model.coarse_weight, model.fine_weights = 0.0, fine_weights
    model.vision.gradient_checkpointing = True
    check(model, MIXED, "coarse_fine")


@pytest.mark.parametrize("batch", [TEXT, QUESTION_FIRST], ids=["text", "question first"])
@pytest.mark.parametrize("mode", ["coarse_only", "coarse_fine"])
def test_micro_batches_of_other_kinds(batch: Batch, mode: str) -> None:
    check(make_model(), batch, mode)


@pytest.mark.parametrize("frozen", [(), ("vision",), ("connector", "language")], ids="+".join)
@pytest.mark.parametrize("checkpointed", [("language",), ("vision",), PARTS], ids="+".join)
def test_gradient_checkpointing(frozen: tuple[str, ...], checkpointed: tuple[str, ...]) -> None:
    model = freeze(make_model(), frozen)
    plain = FoveatedCounter(model).micro_batch(shapes_of(MIXED))
    model.vision.gradient_checkpointing = "vision" in checkpointed
    model.connector.gradient_checkpointing = "connector" in checkpointed
    if "language" in checkpointed:
        model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, MIXED, "coarse_fine")
    # the mathematics stays the same
    assert FoveatedCounter(model).micro_batch(shapes_of(MIXED)).model == plain.model


@pytest.mark.parametrize("tower", TOWERS)
def test_towers(tower: str) -> None:
    for frozen in ((), ("vision",)):
        check(freeze(make_model(vision=TOWERS[tower]), frozen), MIXED, "coarse_fine")


@pytest.mark.parametrize("shallow", [True, False])
@pytest.mark.parametrize("sees_itself", [True, False])
def test_ways_of_looking(shallow: bool, sees_itself: bool) -> None:
    for frozen, lean in itertools.product(((), ("vision",)), (False, True)):
        model = freeze(make_model(), frozen)
        model.vision.shallow, model.vision.sees_itself = shallow, sees_itself
        model.vision.gradient_checkpointing = lean
        check(model, MIXED, "coarse_only")


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages(language: str) -> None:
    check(make_model(language=LANGUAGES[language]), MIXED, "coarse_fine")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": tiny.VOCAB},
        {**tiny.LANGUAGE, "model_type": "qwen3", "head_dim": 8},
        {**tiny.LANGUAGE, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
    ],
    ids=lambda config: config["model_type"],
)
def test_other_families_of_language_models(config: dict) -> None:
    known = type(AutoConfig.for_model(config["model_type"]))().to_dict()
    values = {k: v for k, v in config.items() if k in known}
    family = FoveatedConfig(
        vision_config=tiny.VISION, language_config=values, connector=tiny.CONNECTOR
    )
    model = FoveatedModel(family).train()
    check(freeze(model, ("vision",)), QUESTION_FIRST, "coarse_fine")


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("frozen", [(), ("vision", "connector")], ids=str)
def test_adapters(targets: list[str] | str, checkpointed: bool, frozen: tuple[str, ...]) -> None:
    model = freeze(make_model(), frozen)
    if checkpointed:
        model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
    config = peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    model.language.lm = peft.get_peft_model(model.language.lm, config)
    check(model, MIXED, "coarse_fine")


def test_the_head_in_pieces() -> None:
    model = make_model()
    model.language.num_loss_chunks = 3
    check(model, MIXED, "coarse_fine")


def test_frame_after_frame_without_a_gradient() -> None:
    check(make_model().requires_grad_(False), MIXED, "autoregressive")


def test_every_family_is_counted() -> None:
    assert set(COUNTERS) == set(registry.FAMILIES.values())


def alone(samples: list[tuple[int, int]], count: Callable[[Batch], float]) -> float:
    return sum(count(tiny.make_batch([sample])) for sample in samples)


def test_padding_and_blank_frames_are_no_work_of_the_model() -> None:
    """What is needed is the sum over samples, each by itself, of what is executed."""
    model = make_model()
    counter = FoveatedCounter(model)
    samples = [(5, 9), (2, 30), (1, 3)]
    together = counter.micro_batch(shapes_of(tiny.make_batch(samples)))
    each = alone(samples, lambda batch: counter.micro_batch(shapes_of(batch)).hardware)
    assert together.model == pytest.approx(each, rel=1e-12)
    assert together.hardware > 1.2 * together.model
    text = counter.micro_batch(shapes_of(TEXT))
    assert text.parts["vision"].forward > 0
    assert text.model == pytest.approx(
        sum(flops.useful for name, flops in text.parts.items() if name in ("language", "head")),
        rel=0.4,
    )


@pytest.mark.parametrize("frozen", [(), ("vision",), ("connector", "language")], ids="+".join)
@pytest.mark.parametrize("lean", [False, True])
def test_a_fixed_grid_for_every_frame(frozen: tuple[str, ...], lean: bool) -> None:
    for keys in ({"tokens_per_frame": 4}, {"tokens_per_frame": 1, "reduction": "pixel_shuffle"}):
        model = freeze(tiny.make_baseline(**keys).float().train(), frozen)
        model.vision.gradient_checkpointing = lean
        if lean:
            model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
        per_frame = keys["tokens_per_frame"]
        for samples in ([(5, 9), (0, 4), (1, 13)], [(0, 7), (0, 12)]):
            check(model, tiny.make_batch(samples, per_frame=per_frame), "one_pass")


def test_text_alone() -> None:
    model = tiny.make_baseline().float().train()
    check(model, TEXT, "one_pass")
    counted = COUNTERS[type(model)](model).micro_batch(shapes_of(TEXT))
    assert counted.parts["vision"].total == 0 < counted.parts["head"].total


@pytest.mark.parametrize("frozen", [(), ("vision",), ("connector", "language")], ids="+".join)
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(("family", "per_frame"), [("perceiver", 3), ("prefix", 4)])
def test_projections(family: str, per_frame: int, frozen: tuple[str, ...], lean: bool) -> None:
    model = freeze(tiny.make_projected(family).float().train(), frozen)
    if lean:
        model.vision.gradient_checkpointing = True
        model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
    for samples in ([(5, 9), (0, 4), (1, 13)], [(0, 7), (0, 12)]):
        check(model, tiny.make_batch(samples, per_frame=per_frame), "one_pass")


@pytest.mark.parametrize("frozen", [(), ("vision",), ("connector", "language")], ids="+".join)
@pytest.mark.parametrize("lean", [False, True])
def test_blocks_that_look_at_frames_beside_the_text(frozen: tuple[str, ...], lean: bool) -> None:
    model = freeze(cases.make_looking().float().train(), frozen)
    if lean:
        model.vision.gradient_checkpointing = True
        model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
    for samples in ([(5, 9), (0, 4), (1, 13)], [(0, 7), (0, 12)]):
        check(model, tiny.make_batch(samples, per_frame=0), "one_pass")


def latent(frozen: tuple[str, ...] = (), **connector: Any) -> FoveatedLatentModel:
    model = freeze(test_latent.make_model(**connector).float().train(), frozen)
    model.connector.gradient_checkpointing = model.vision.gradient_checkpointing = False
    return model


@pytest.mark.parametrize("frozen", FREEZES, ids="+".join)
def test_a_family_that_predicts_latents(frozen: tuple[str, ...]) -> None:
    batch = test_latent.with_latents(MIXED)
    for mode in TASKS:
        check(latent(frozen), batch, mode)


@pytest.mark.parametrize("head", ["film", "mlp", "cross_attention"])
def test_what_latents_are_predicted_with(head: str) -> None:
    model = latent(head=head, fine_passes=2)
    for samples in ([(5, 9), (1, 13)], [(0, 7), (0, 12)]):
        check(model, test_latent.with_latents(tiny.make_batch(samples)), "joint")
    check(model.requires_grad_(False), test_latent.with_latents(MIXED), "autoregressive")


@pytest.mark.parametrize("frozen", [(), ("connector", "language")], ids="+".join)
def test_latents_with_gradient_checkpointing(frozen: tuple[str, ...]) -> None:
    model = latent(frozen)
    model.vision.gradient_checkpointing = True
    model.connector.gradient_checkpointing = True
    model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
    for mode in ("joint", "unconditioned"):
        check(model, test_latent.with_latents(MIXED), mode)


def test_a_frozen_autoencoder_is_forward_only(tmp_path: Path) -> None:
    model = latent(autoencoder=test_latent.save_autoencoder(tmp_path), latent_size=tiny.SIZE // 2)
    check(model, MIXED, "joint")
    parts = COUNTERS[type(model)](model).micro_batch(shapes_of(MIXED), "joint").parts
    assert parts["autoencoder"].forward > 0 == parts["autoencoder"].backward


@pytest.mark.parametrize("order", ["text first", "no text", "frames first"])
def test_shapes_of_what_is_laid_out_anew(order: Order) -> None:
    for batch in (MIXED, TEXT, QUESTION_FIRST):
        assert laid_out(shapes_of(batch), order) == shapes_of(lay_out(batch, order).batch)


def test_adapters_on_a_base_that_is_not_exported(tmp_path: Path) -> None:
    config = adapted.recipe(adapted.write_base(tmp_path / "base"))
    model = registry.build(config, tiny.VOCAB, 0).float().train()
    check(freeze(model, ("vision",)), tiny.make_batch([(2, 9), (0, 4)], per_frame=3), "one_pass")
