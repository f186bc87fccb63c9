"""The latent family sample by sample, with lists, loops and whole forwards; in float64."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.reference import check_greedy, sample, single
from tests.models.tiny import CONNECTOR, IMAGE, LANGUAGE, SIZE, VISION, make_batch
from vlm.autoencoder import autoencoder
from vlm.errors import ConfigError
from vlm.models import registry
from vlm.models.latent import TASKS, FoveatedLatentModel, LatentConfig

SHAPE = (4, 2, 2)
SAMPLES = [(3, 7), (1, 5), (4, 3)]


def make_model(language=None, **connector) -> FoveatedLatentModel:
    torch.manual_seed(0)
    values = {"head": "film", "latent_channels": 4, "latent_size": 2, "autoencoder": None}
    config = LatentConfig(
        vision_config=VISION,
        language_config=LANGUAGE | (language or {}),
        connector={**CONNECTOR, **values, "reconstruction_weight": 0.5, **connector},
    )
    return FoveatedLatentModel(config).double().eval()


def with_latents(batch):
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(len(batch.frames), *SHAPE, generator=generator)
    return dataclasses.replace(batch, latents=latents)


def tokens_of(model, frames: Tensor, queries: Tensor) -> Tensor:
    connector = model.connector
    _, cache = model.vision(frames)
    looked = model.vision.look(connector.query_input_proj(queries), cache)
    tokens = connector.dino_to_llm(connector.output_proj(looked))
    scale = connector.visual_scale
    tokens = scale * tokens  # cancels, but for the epsilon
    return torch.stack([scale * t / (t.std(correction=0) + 1e-6) for t in tokens])


class Plain(NamedTuple):
    #: square error sums, and queries (T, Q), of the coarse and the fine pass
    errors: list[Tensor]
    queries: list[Tensor]
    #: of the fine pass
    hidden: Tensor
    text: Tensor
    #: of the text in ``hidden``
    place: int


def plain(model, frames: Tensor, ids: Tensor, latents: Tensor, mode: str) -> Plain:
    connector, count = model.connector, len(frames)
    is_frame = (ids == IMAGE) & ((ids == IMAGE).cumsum(0) <= count)  # later ones were said
    text = ids[~is_frame]
    words = model.language.embed(text)
    token = {n: getattr(connector, n).weight for n in ("coarse_token", "fine_token", "end_token")}
    queries, errors, asked_with = connector.q_static.weight.expand(count, -1), [], []
    for marker in ("coarse_token", "fine_token"):
        asked_with.append(queries)
        seen = torch.cat([token[marker], tokens_of(model, frames, queries)])
        before = {"reconstruction": words, "unconditioned": connector.no_text_token.weight}
        first = before.get(mode, words[:0])
        behind = torch.cat([token["end_token"], words]) if mode in ("joint", "caption") else None
        row = torch.cat([part for part in (first, seen, behind) if part is not None])
        hidden = model.language.lm.get_decoder()(inputs_embeds=row[None]).last_hidden_state[0]
        start = len(first)
        total = torch.zeros((), dtype=torch.float64)
        for t in range(count):
            previous = latents[t - 1] if t else connector.z_vae_init.weight.view(SHAPE)
            predicted = connector.head(hidden[start + t][None], previous[None])[0]
            total = total + F.mse_loss(predicted, latents[t])
        errors.append(total)
        asked = connector.llm_to_query(hidden[start + 1 : start + 1 + count])
        queries = torch.cat([connector.q_init.weight, asked[:-1]])
    return Plain(errors, asked_with, hidden, text, start + 1 + count)


@pytest.mark.parametrize("mode", TASKS)
@torch.no_grad()
def test_losses_equal_plain_forwards_sample_by_sample(mode: str) -> None:
    model, batch = make_model(), with_latents(make_batch(SAMPLES))
    coarse = fine = caption = 0.0
    for index in range(len(SAMPLES)):
        frames, ids, labels = sample(batch, index)
        own = batch.latents[batch.cu_frames[index] : batch.cu_frames[index + 1]].double()
        (one, two), _, hidden, text, place = plain(model, frames, ids, own, mode)
        coarse, fine = coarse + float(one), fine + float(two)
        if mode in ("joint", "caption"):
            learned = labels[ids != IMAGE]
            logits = model.language.logits(hidden[place : place + len(text)])
            loss = F.cross_entropy(logits, learned, ignore_index=-100, reduction="sum")
            caption += float(loss)
    out = model(batch, mode=mode)
    assert float(out.parts["fine"]) == pytest.approx(fine, rel=1e-6)
    assert float(out.parts["coarse"]) == pytest.approx(coarse, rel=1e-6)
    errors = (model.predictions(batch, mode) - batch.latents).square().flatten(1).mean(1)
    assert float(errors.sum()) == pytest.approx(fine, rel=1e-6), "those of the last pass"
    both = fine + 0.5 * coarse
    expected = {"joint": caption + 0.5 * both, "caption": caption}.get(mode, both)
    assert float(out.loss_sum) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", TASKS)
@pytest.mark.parametrize("samples", [[(0, 9), (0, 4)], SAMPLES], ids=["text only", "video"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient(
    mode: str, samples: list[tuple[int, int]], tied: bool
) -> None:
    model = make_model(language={"tie_word_embeddings": tied})
    out = model(with_latents(make_batch(samples)), mode=mode)
    out.loss_sum.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None and "mask_token" not in n]
    assert missing == [] and out.loss_sum.isfinite()


@pytest.mark.parametrize("mode", [*TASKS, "autoregressive"])
def test_samples_do_not_feel_each_other(mode: str) -> None:
    model, batch = make_model(), with_latents(make_batch(SAMPLES))
    total = 0.0
    for index in range(len(SAMPLES)):
        total += float(model(single(batch, index), mode=mode).loss_sum)
    assert float(model(batch, mode=mode).loss_sum) == pytest.approx(total, rel=1e-6)


def test_visual_tokens_have_one_scale_each_in_training_and_frame_after_frame() -> None:
    model, batch = make_model(), with_latents(make_batch([(1, 6), (1, 3)]))
    queries = model.static_queries(batch)
    tokens = model.connector(model.vision, model.vision(batch.frames)[1], queries)
    torch.testing.assert_close(
        tokens.std(-1, correction=0), torch.full((2,), 0.5).double(), rtol=1e-4, atol=0
    )
    # with one frame there is nothing that could differ
    parallel, stepped = (model(batch, mode=m).parts["fine"] for m in ("joint", "autoregressive"))
    torch.testing.assert_close(parallel, stepped)


def test_captions_are_what_forwards_without_a_cache_say() -> None:
    def hidden(model, frames: Tensor, ids: Tensor) -> Tensor:
        unused = torch.zeros(len(frames), *SHAPE, dtype=torch.float64)
        return plain(model, frames, ids, unused, "caption").hidden

    model = make_model()
    check_greedy(model, make_batch(SAMPLES), hidden, 4)
    # with one frame there is nothing that could differ frame after frame
    single_frames = make_batch([(1, 6), (1, 3)])
    found = [
        model.generate(single_frames, mode=mode, eos_token_id=-1, max_new_tokens=4)
        for mode in ("caption", "autoregressive")
    ]
    assert found[0] == found[1]


def test_captions_are_generated_and_survive_a_round_trip(tmp_path: Path) -> None:
    model, batch = make_model().float(), with_latents(make_batch(SAMPLES))
    model.save_pretrained(tmp_path)
    loaded = registry.load(tmp_path).eval()
    for mode in ("caption", "autoregressive"):
        options = {"eos_token_id": -1, "max_new_tokens": 3, "mode": mode}
        assert loaded.generate(batch, **options) == model.generate(batch, **options)
    assert torch.equal(loaded(batch).loss_sum, model(batch).loss_sum)
    assert torch.equal(loaded.predictions(batch), model.predictions(batch))


def save_autoencoder(folder: Path) -> str:
    """Where a tiny random one lies, which halves a side once."""
    diffusers = pytest.importorskip("diffusers", reason="pip install saccade[latents]")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return str(folder)


def test_latents_are_made_on_the_fly_and_decoded(tmp_path: Path) -> None:
    save_autoencoder(tmp_path)
    batch = make_batch(SAMPLES)
    model = make_model(autoencoder=str(tmp_path), latent_size=SIZE // 2)
    known = dataclasses.replace(batch, latents=autoencoder(str(tmp_path)).encode(batch.frames))
    assert torch.equal(model(batch).loss_sum, model(known).loss_sum)
    assert not any("autoencoder" in name for name, _ in model.named_parameters())
    pixels = autoencoder(str(tmp_path)).decode(model.predictions(batch))
    assert pixels.shape == batch.frames.shape and pixels.dtype == torch.uint8


def test_latents_that_are_missing_or_of_another_size_are_named() -> None:
    batch = make_batch(SAMPLES)
    with pytest.raises(ConfigError, match="no latents and no autoencoder"):
        make_model()(batch)
    with pytest.raises(ConfigError, match="latents of 4 x 2 x 2, expected 4 x 3 x 3"):
        make_model(latent_size=3)(with_latents(batch))
