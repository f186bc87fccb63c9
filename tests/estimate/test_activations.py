"""Bytes found without running against what autograd is handed in real passes."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.estimate.allocated import allocated
from tests.models import cases, test_latent, tiny
from tests.models import test_cross_attention as cross_attention
from vlm.autoencoder import shapes_of
from vlm.estimate.activations import PassBytes, pass_bytes
from vlm.models import registry
from vlm.models.foveated import FoveatedModel

BATCH = tiny.make_batch([(9, 12), (0, 5), (4, 30)])
LOOKING = cross_attention.GPT2 | cases.NO_DROPOUT
#: bytes: single numbers, of which a CPU makes some more
NUMBERS = 64


def prepare(frozen: list[str], checkpointed: bool, chunks: int, **language: Any) -> FoveatedModel:
    config = tiny.make_config()
    config.language_config = {**config.language_config, **language}
    model = FoveatedModel(config).train()
    for part in frozen:
        model.get_submodule(part).requires_grad_(False)
    if checkpointed:
        model.vision.gradient_checkpointing = model.connector.gradient_checkpointing = True
        model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
    model.language.num_loss_chunks = chunks
    return model


def estimated(
    mode: str, *setup: Any, dtype: torch.dtype = torch.bfloat16, **language: Any
) -> PassBytes:
    with torch.device("meta"):
        model = prepare(*setup, **language)
    return pass_bytes(model, BATCH, dtype, mode)


def saved(mode: str, *setup: Any) -> int:
    """What is handed to autograd in a real forward pass and is still there at its end."""
    model = prepare(*setup).to(torch.bfloat16)
    given = [*model.parameters(), *model.buffers(), *filter(is_tensor, vars(BATCH).values())]
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    found: dict[int, tuple[weakref.ref, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[id(storage)] = weakref.ref(storage), storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(BATCH, mode=mode).loss_sum
    total = sum(size for storage, size in found.values() if storage() is not None)
    assert loss.requires_grad
    return total


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize("mode", ["coarse_only", "coarse_fine"])
@pytest.mark.parametrize("frozen", [[], ["vision"], ["connector", "language"]], ids=str)
def test_what_is_kept_for_the_backward_pass(mode: str, frozen: list[str]) -> None:
    assert estimated(mode, frozen, False, 1).kept == pytest.approx(
        saved(mode, frozen, False, 1), rel=0.05
    )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("frozen", [[], ["vision"], ["connector", "language"]], ids=str)
def test_what_is_kept_and_the_peak_are_those_of_the_allocator(
    checkpointed: bool, frozen: list[str]
) -> None:
    """To the byte but for single numbers: in both passes, recomputed and in pieces, too."""
    for mode, chunks in (("coarse_only", 1), ("coarse_fine", 3)):
        setup = (frozen, checkpointed, chunks)
        found = estimated(mode, *setup, dtype=torch.float32)
        real = allocated(prepare(*setup), BATCH, mode)
        assert found.kept == pytest.approx(real.kept, abs=NUMBERS)
        assert found.peak == pytest.approx(real.peak, abs=NUMBERS)


@pytest.mark.parametrize("lean", [False, True])
def test_a_decoder_that_looks_beside_the_text(lean: bool) -> None:
    def make() -> Any:
        model = registry.build(cross_attention.recipe(language={"config": LOOKING}), tiny.VOCAB, 0)
        if lean:
            model.vision.gradient_checkpointing = True
            model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    batch = tiny.make_batch([(3, 12), (0, 5), (2, 30)], per_frame=0)
    with torch.device("meta"):
        found = pass_bytes(make(), batch, torch.float32)
    real = allocated(make(), batch, "one_pass")
    assert (found.kept, found.peak) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(("made", "lean"), [(False, True), (True, False)])
def test_a_model_that_predicts_latents(made: bool, lean: bool, tmp_path: Path) -> None:
    """What convolutions need for a moment on a CPU is torch's own business."""
    keys: dict[str, Any] = {}
    if made:
        name = test_latent.save_autoencoder(tmp_path)
        keys = {"autoencoder": name, "latent_size": tiny.SIZE // 2}
        shapes_of(name)  # its weights are there before the pass

    def make() -> Any:
        model = test_latent.make_model(head="mlp", **keys).float().train()
        model.vision.gradient_checkpointing = model.connector.gradient_checkpointing = lean
        if lean:
            model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    batch = BATCH if made else test_latent.with_latents(BATCH)
    for mode in ("joint", "unconditioned"):
        with torch.device("meta"):
            found = pass_bytes(make(), batch, torch.float32, mode)
        real = allocated(make(), batch, mode)
        assert found.kept == pytest.approx(real.kept, rel=1e-3)
        assert found.peak == pytest.approx(real.peak, rel=0.02)


def test_checkpointing_and_pieces_keep_less() -> None:
    plain, lean = (estimated("coarse_fine", [], on, 1) for on in (False, True))
    assert lean.kept < 0.6 * plain.kept and lean.peak < plain.peak
    vocab = {"vocab_size": 5000}
    whole, pieces = (estimated("coarse_fine", [], True, n, **vocab) for n in (1, 4))
    # in a pass back: 16-bit logits, their float32 copy, its softmax, gradients of some of them
    numbers = BATCH.num_loss_tokens * 5000
    assert 8 * numbers <= whole.logits <= 16 * numbers
    assert pieces.logits < 0.4 * whole.logits
