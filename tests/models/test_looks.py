"""How the model looks, counted again frame by frame and sample by sample, in numpy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.models import test_latent as latent
from tests.models.reference import plain_queries, sample
from tests.models.tiny import IMAGE, make_batch, make_config, make_model
from vlm.batch import Batch, build_batch
from vlm.models import looks
from vlm.models.foveated import MODES, FoveatedModel, Mode
from vlm.models.latent import TASKS

SAMPLES = [(3, 7), (0, 4), (1, 12), (5, 4)]


def means(measures: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in measures.items() if count}


def entropies(model: FoveatedModel, frames: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    """(F,) of one sample, by definition."""
    _, cache = model.vision(frames)
    maps = model.vision.attention(model.connector.query_input_proj(queries), cache).numpy()
    return -(maps * np.log(maps)).sum(-1).mean((1, 2))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


Measures = dict[str, float]
#: the queries of a sample's coarse and last fine pass, given its frames and ids
Queries = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def plain_pair(model: FoveatedModel) -> Queries:
    modes: tuple[Mode, Mode] = ("coarse_only", "coarse_fine")

    def both(frames: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = (plain_queries(model, frames, ids, mode) for mode in modes)
        return first, last

    return both


def expected(model: FoveatedModel, batch: Batch, queries: Queries) -> tuple[Measures, Measures]:
    """Of a coarse and a fine pass, and of the coarse pass alone."""
    lists: dict[str, list] = {name: [] for name in ("fine", "static", "query", "look", "glance")}
    fine, coarse = [], []
    for index in range(batch.num_samples):
        frames, ids, _ = sample(batch, index)
        if not len(frames):
            continue
        static, own = queries(frames, ids)
        lists["fine"] += entropies(model, frames, own).tolist()
        lists["static"] += entropies(model, frames, static).tolist()
        _, cache = model.vision(frames)
        fine.append(model.connector(model.vision, cache, own).numpy())
        coarse.append(model.connector(model.vision, cache, static).numpy())
        for t in range(1, len(frames)):
            lists["query"].append(cosine(own[t].numpy(), own[t - 1].numpy()))
            lists["look"].append(cosine(fine[-1][t], fine[-1][t - 1]))
            lists["glance"].append(cosine(coarse[-1][t], coarse[-1][t - 1]))
    seen, glanced = np.concatenate(fine), np.concatenate(coarse)
    text = model.language.embed(batch.input_ids[batch.input_ids != 3])
    same = {
        "attention_entropy_static": np.mean(lists["static"]),
        "attention_entropy_max": math.log(5),  # CLS and 4 patches
        "q_static_std": model.connector.q_static.weight.numpy().std(),
        "embedding_std": text.numpy().std(),
    }
    both = {
        "attention_entropy": np.mean(lists["fine"]),
        "query_similarity": np.mean(lists["query"]),
        "look_similarity": np.mean(lists["look"]),
        "look_change": np.abs(seen - glanced).mean() / glanced.std(),
        "visual_std": seen.std(),
    }
    alone = {"look_similarity": np.mean(lists["glance"]), "visual_std": glanced.std()}
    return same | both, same | alone


@pytest.mark.parametrize("fine_passes", [1, 2])
@torch.no_grad()
def test_measures_are_those_of_all_frames_of_all_samples(fine_passes: int) -> None:
    model, batch = make_model(fine_passes=fine_passes), make_batch(SAMPLES)
    measures = model(batch, measure_all=True).measures
    both, _ = expected(model, batch, plain_pair(model))
    assert means(measures) == pytest.approx(both, rel=1e-5)
    assert measures["attention_entropy"][1] == 9 and measures["query_similarity"][1] == 6


@torch.no_grad()
def test_a_coarse_pass_alone_has_what_needs_no_second_look() -> None:
    model, batch = make_model(), make_batch(SAMPLES)
    found = means(model(batch, mode="coarse_only", measure_all=True).measures)
    _, alone = expected(model, batch, plain_pair(model))
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("mode", TASKS)
@torch.no_grad()
def test_measures_of_the_latent_family_in_all_its_modes(mode: str) -> None:
    """Whose queries are those of plain forwards, sample by sample."""
    model, batch = latent.make_model(), latent.with_latents(make_batch([(3, 7), (1, 5), (4, 3)]))
    unused = torch.zeros(9, *latent.SHAPE, dtype=torch.float64)

    def queries(frames: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = latent.plain(model, frames, ids, unused, mode).queries
        return first, last

    both, _ = expected(model, batch, queries)
    output = model(batch, mode=mode, measure_all=True)
    assert means(output.measures) == pytest.approx(both, rel=1e-5, abs=1e-6)
    assert model(batch, mode=mode).measures == model(batch, mode=mode).maps == {}


@torch.no_grad()
def test_micro_batches_add_up_and_nothing_is_measured_unasked() -> None:
    model = make_model()
    parts = [make_batch([shape], seed=seed) for seed, shape in enumerate([(4, 3), (2, 9)])]
    found = [model(batch, measure_all=True).measures for batch in parts]
    total = {name: found[0][name] + found[1][name] for name in found[0]}
    entropy = [float(one["attention_entropy"][0]) for one in found]
    assert means(total)["attention_entropy"] == pytest.approx(sum(entropy) / 6)
    for mode in MODES:
        output = model(parts[0], mode=mode)
        assert output.measures == output.maps == {}


@torch.no_grad()
def test_a_blank_frame_that_nobody_owns_counts_for_nothing() -> None:
    measures = make_model()(make_batch([(0, 5), (0, 3)]), measure_all=True).measures
    assert len(measures) == 9
    assert all(pair.tolist() == [0.0, 0.0] for pair in measures.values())


def test_what_is_uniform_has_the_highest_entropy_and_equal_queries_a_cosine_of_one() -> None:
    uniform = torch.full((2, 3, 4, 257), 1 / 257)
    assert looks.entropy(uniform).tolist() == pytest.approx([math.log(257)] * 2)
    certain = torch.zeros(1, 1, 1, 257)
    certain[..., 7] = 1
    assert looks.entropy(certain).item() == 0
    assert looks.to_the_one_before(torch.ones(3, 8)).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_measuring_looks_changes_no_gradient_and_draws_no_numbers(checkpointing: bool) -> None:
    dropout = {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.3}
    model = FoveatedModel(make_config(vision=dropout)).train()
    model.vision.gradient_checkpointing = checkpointing
    batch, found = make_batch(SAMPLES), []
    for measure_all in (False, True):
        torch.manual_seed(1)
        loss = model(batch, measure_all=measure_all).loss_sum
        gradient = torch.autograd.grad(loss, model.connector.llm_to_query.weight)[0]
        found.append((loss, gradient, torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- maps ---------------------------------------------------------------------------------------

REGISTERS = {"model_type": "dinov2_with_registers", "num_register_tokens": 2}


def with_registers() -> FoveatedModel:
    torch.manual_seed(0)
    return FoveatedModel(make_config(REGISTERS)).double().eval()


def wide_batch() -> Batch:
    """Two clips of 16 x 24 pixels, which are 2 x 3 patches."""
    generator = torch.Generator().manual_seed(3)
    return build_batch(
        frames=torch.randint(0, 256, (3, 3, 16, 24), generator=generator).to(torch.uint8),
        frame_counts=[2, 1],
        input_ids=[[IMAGE, IMAGE, 5, 6], [IMAGE, 7]],
        labels=[[-100, -100, 5, 6], [-100, 7]],
        image_token_id=IMAGE,
        tokens_per_frame=1,
        keys=["a", "b"],
        kind="video",
    )


@pytest.mark.parametrize("build", [make_model, with_registers])
@pytest.mark.parametrize("batch", [make_batch([(3, 5), (1, 4)]), wide_batch()])
@torch.no_grad()
def test_maps_are_the_mean_over_layers_and_heads_of_each_frame_s_own_query(
    build: Callable[[], FoveatedModel], batch: Batch
) -> None:
    model = build()
    maps = model(batch, measure_all=True).maps
    height, width = batch.frames.shape[2] // 8, batch.frames.shape[3] // 8
    modes: dict[str, Mode] = {"coarse": "coarse_only", "fine": "coarse_fine"}
    for name, mode in modes.items():
        found = maps[name].numpy()
        assert found.shape == (len(batch.frames), height, width)
        assert found.dtype == np.float32
        wanted = []
        for index in range(batch.num_samples):
            frames, ids, _ = sample(batch, index)
            queries = plain_queries(model, frames, ids, mode)
            _, cache = model.vision(frames)
            plain = model.vision.attention(model.connector.query_input_proj(queries), cache)
            wanted += plain.mean(2).mean(1)[:, -height * width :].tolist()
        assert np.allclose(found.reshape(len(found), -1), wanted, atol=1e-6)
        assert (found.sum((1, 2)) < 1).all(), "CLS and registers take their share"
        assert np.abs(found[0] - found[-1]).max() > 1e-4
    (alone,) = model(batch, mode="coarse_only", measure_all=True).maps.values()
    assert torch.equal(alone, maps["coarse"])


@pytest.mark.parametrize("build", [make_model, with_registers])
@torch.no_grad()
def test_a_patch_s_place_in_the_map_is_its_place_in_the_picture(
    build: Callable[[], FoveatedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which token changes with a patch's pixels is asked of the tower, not assumed."""
    model, batch = build(), wide_batch()
    embed = model.vision.tower.embeddings
    plain = embed(model.vision.normalise(batch.frames[:1]))
    num_tokens = plain.shape[1]
    for row, column in np.ndindex(2, 3):
        frame = batch.frames[:1].clone()
        frame[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] ^= 255
        changed = (embed(model.vision.normalise(frame)) != plain).any(-1)[0].nonzero().flatten()
        (token,) = changed.tolist()
        at_token = torch.zeros(3, 2, 2, num_tokens)
        at_token[..., token] = 1
        monkeypatch.setattr(model.vision, "attention", lambda query, cache, maps=at_token: maps)
        found = model(batch, measure_all=True).maps["fine"]
        assert found[0, row, column] == 1 and found[0].sum() == 1
