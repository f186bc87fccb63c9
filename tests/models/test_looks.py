"""How the model looks, counted again frame by frame and sample by sample, in numpy."""

import math

import numpy as np
import pytest
import torch

from tests.models.reference import plain_queries, sample
from tests.models.tiny import make_batch, make_config, make_model
from vlm.batch import Batch
from vlm.models import looks
from vlm.models.foveated import FoveatedModel

SAMPLES = [(3, 7), (0, 4), (1, 12), (5, 4)]


def means(measures: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in measures.items() if count}


def entropies(model: FoveatedModel, frames: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    """(F,) of one sample, by definition."""
    _, cache = model.vision(frames)
    maps = model.vision.attention(model.connector.query_input_proj(queries), cache).numpy()
    return -(maps * np.log(maps)).sum(-1).mean((1, 2))


def tokens_of(model: FoveatedModel, frames: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    _, cache = model.vision(frames)
    return model.connector(model.vision, cache, queries).numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def expected(model: FoveatedModel, batch: Batch) -> dict[str, float]:
    lists: dict[str, list] = {name: [] for name in ("fine", "static", "query", "look")}
    fine, coarse = [], []
    for index in range(batch.num_samples):
        frames, ids, _ = sample(batch, index)
        if not len(frames):
            continue
        queries = plain_queries(model, frames, ids, "coarse_fine")
        static = plain_queries(model, frames, ids, "coarse_only")
        lists["fine"] += entropies(model, frames, queries).tolist()
        lists["static"] += entropies(model, frames, static).tolist()
        fine.append(tokens_of(model, frames, queries))
        coarse.append(tokens_of(model, frames, static))
        for t in range(1, len(frames)):
            lists["query"].append(cosine(queries[t].numpy(), queries[t - 1].numpy()))
            lists["look"].append(cosine(fine[-1][t], fine[-1][t - 1]))
    seen, glanced = np.concatenate(fine), np.concatenate(coarse)
    text = model.language.embed(batch.input_ids[batch.input_ids != 3])
    return {
        "attention_entropy": np.mean(lists["fine"]),
        "attention_entropy_static": np.mean(lists["static"]),
        "attention_entropy_max": math.log(5),  # CLS and 4 patches
        "query_similarity": np.mean(lists["query"]),
        "look_similarity": np.mean(lists["look"]),
        "look_change": np.abs(seen - glanced).mean() / glanced.std(),
        "q_static_std": model.connector.q_static.weight.numpy().std(),
        "visual_std": seen.std(),
        "embedding_std": text.numpy().std(),
    }


@pytest.mark.parametrize("fine_passes", [1, 2])
@torch.no_grad()
def test_measures_are_those_of_all_frames_of_all_samples(fine_passes: int) -> None:
    model, batch = make_model(fine_passes=fine_passes), make_batch(SAMPLES)
    measures = model(batch, measure_all=True).measures
    assert means(measures) == pytest.approx(expected(model, batch), rel=1e-5)
    assert measures["attention_entropy"][1] == 9 and measures["query_similarity"][1] == 6


@torch.no_grad()
def test_micro_batches_add_up_and_nothing_is_measured_unasked() -> None:
    model = make_model()
    parts = [make_batch([shape], seed=seed) for seed, shape in enumerate([(4, 3), (2, 9)])]
    found = [model(batch, measure_all=True).measures for batch in parts]
    total = {name: found[0][name] + found[1][name] for name in found[0]}
    entropy = [float(one["attention_entropy"][0]) for one in found]
    assert means(total)["attention_entropy"] == pytest.approx(sum(entropy) / 6)
    assert model(parts[0]).measures == {}
    assert model(parts[0], mode="coarse_only", measure_all=True).measures == {}


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
