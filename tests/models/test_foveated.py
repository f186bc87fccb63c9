"""The three modes against plain forwards, loops and each other; all in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.tiny import make_batch, make_model
from vlm.models.foveated import FoveatedModel, first_frames
from vlm.models.generate import generate
from vlm.models.splice import fill

SAMPLES = [(3, 7), (1, 12), (6, 4)]


def reference(model: FoveatedModel, batch, sample: int, queries):
    """(hidden, tokens) of one sample by the tower's and language model's own forwards, given the
    query of each frame."""
    first, last = batch.cu_frames[sample], batch.cu_frames[sample + 1]
    a, b = batch.cu_seqlens[sample], batch.cu_seqlens[sample + 1]
    _, cache = model.vision(batch.frames[first:last])
    looked = model.vision.look(model.connector.query_input_proj(queries), cache)
    tokens = model.connector.dino_to_llm(model.connector.output_proj(looked))
    embeds = model.language.embed(batch.input_ids[a:b]).clone()
    embeds[batch.frame_index[first:last] - a] = 0.5 * tokens
    return model.language.lm.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state[0]


def loss_of(model, batch, sample, hidden):
    a, b = batch.cu_seqlens[sample], batch.cu_seqlens[sample + 1]
    logits = model.language.logits(hidden)[:-1]
    return F.cross_entropy(logits, batch.labels[a + 1 : b], reduction="sum", ignore_index=-100)


def coarse_fine_reference(model, batch):
    fine = coarse = 0.0
    for s in range(batch.num_samples):
        count = int(batch.cu_frames[s + 1] - batch.cu_frames[s])
        static = model.connector.q_static.weight.expand(count, -1)
        hidden = reference(model, batch, s, static)
        coarse += loss_of(model, batch, s, hidden)
        at = batch.frame_index[batch.cu_frames[s] : batch.cu_frames[s + 1]] - batch.cu_seqlens[s]
        asked = model.connector.llm_to_query(hidden[at])
        shifted = torch.cat([model.connector.q_init.weight, asked[:-1]])
        fine += loss_of(model, batch, s, reference(model, batch, s, shifted))
    return fine, coarse


@pytest.mark.parametrize("before", [0, 2], ids=["visual first", "text before"])
def test_coarse_and_fine_equal_plain_forwards_sample_by_sample(before):
    model, batch = make_model(), make_batch(SAMPLES, before=before)
    fine, coarse = coarse_fine_reference(model, batch)
    out = model(batch, with_coarse_loss=True)
    torch.testing.assert_close(out.parts["fine"].double(), fine, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.parts["coarse"].double(), coarse, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.loss_sum, out.parts["fine"] + 0.5 * out.parts["coarse"])
    only = model(batch, mode="coarse_only")
    torch.testing.assert_close(only.parts["coarse"].double(), coarse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("before", [0, 2])
def test_coarse_pass_without_its_text_gives_the_same_fine_loss(before):
    model, batch = make_model(), make_batch(SAMPLES, before=before)
    whole = model(batch, with_coarse_loss=True).parts["fine"]
    assert set(model(batch, with_coarse_loss=False).parts) == {"fine"}
    prefix = model(batch, with_coarse_loss=False).parts["fine"]
    torch.testing.assert_close(whole, prefix, rtol=1e-6, atol=0)


@pytest.mark.parametrize("before", [0, 2])
def test_autoregressive_equals_a_loop_that_starts_over_for_every_frame(before):
    """No cache, no batch: the query of frame t comes from a whole forward over frames < t."""
    model, batch = make_model(), make_batch(SAMPLES, before=before)
    expected = 0.0
    for s in range(batch.num_samples):
        first, last = int(batch.cu_frames[s]), int(batch.cu_frames[s + 1])
        at = batch.frame_index[first:last] - batch.cu_seqlens[s]
        queries = model.connector.q_init.weight
        for t in range(last - first - 1):
            padded = torch.cat([queries, torch.zeros(last - first - t - 1, 20).double()])
            hidden = reference(model, batch, s, padded)
            queries = torch.cat([queries, model.connector.llm_to_query(hidden[at[t]])[None]])
        expected += loss_of(model, batch, s, reference(model, batch, s, queries))
    found = model(batch, mode="autoregressive").parts["fine"]
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=0)


def test_modes_agree_where_there_is_one_frame_and_differ_elsewhere():
    model = make_model()
    single, several = make_batch([(1, 6), (1, 9)]), make_batch(SAMPLES)
    for batch, same in ((single, True), (several, False)):
        fine = model(batch).parts["fine"]
        autoregressive = model(batch, mode="autoregressive").parts["fine"]
        assert torch.allclose(fine, autoregressive, rtol=1e-6) == same


def test_a_sample_does_not_feel_its_neighbours():
    model = make_model()
    batch = make_batch(SAMPLES)
    for mode in ("coarse_only", "coarse_fine", "autoregressive"):
        total = sum(
            value.double()
            for s in range(len(SAMPLES))
            for value in [single_loss(model, batch, s, mode)]
        )
        found = next(iter(model(batch, mode=mode).parts.values())).double()
        torch.testing.assert_close(found, total, rtol=1e-6, atol=0)


def single_loss(model, batch, s, mode):
    from vlm.batch import build_batch

    a, b = batch.cu_seqlens[s], batch.cu_seqlens[s + 1]
    first, last = batch.cu_frames[s], batch.cu_frames[s + 1]
    alone = build_batch(
        frames=batch.frames[first:last],
        frame_counts=[int(last - first)],
        input_ids=[batch.input_ids[a:b].tolist()],
        labels=[batch.labels[a:b].tolist()],
        image_token_id=3,
        tokens_per_frame=1,
        keys=["alone"],
        kind="video",
    )
    return next(iter(model(alone, mode=mode).parts.values()))


@pytest.mark.parametrize("coarse_weight", [0.0, 0.5])
@pytest.mark.parametrize("samples", [[(0, 9), (0, 4)], [(1, 5)], SAMPLES])
def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(samples, coarse_weight):
    """Else ZeRO reduces gradients of different parameters together (deepspeed, silent)."""
    model = make_model(coarse_weight=coarse_weight)
    model(make_batch(samples)).loss_sum.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None and "mask_token" not in n]
    assert missing == []


def test_a_blank_frame_changes_nothing_in_a_text_only_batch():
    model = make_model()
    batch = make_batch([(0, 9), (0, 4)])
    plain = sum(
        loss_of(model, batch, s, model.language.lm.get_decoder()(
            input_ids=batch.input_ids[None, batch.cu_seqlens[s] : batch.cu_seqlens[s + 1]]
        ).last_hidden_state[0])
        for s in range(2)
    )  # fmt: skip
    found = model(batch)
    torch.testing.assert_close(found.parts["fine"].double(), plain, rtol=1e-6, atol=0)
    found.loss_sum.backward()
    moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert all(name.startswith("language.") for name in moved) and moved


def test_the_last_frame_predicts_the_first_text_token():
    model, batch = make_model(), make_batch([(3, 4)])
    labels = batch.labels.clone()
    assert labels[3] != -100, "the first text token is learned in this batch"
    assert batch.target_index[0] == batch.frame_index[-1]
    model(batch).parts["fine"].backward()


def test_first_frames_of_empty_and_full_samples():
    batch = make_batch([(2, 3), (0, 3), (3, 3)])
    assert first_frames(batch).tolist() == [True, False, True, False, False]
    assert first_frames(make_batch([(0, 3)])).tolist() == [True]


def test_fill_overwrites_only_placeholders():
    embeds = torch.randn(6, 4)
    index = torch.tensor([1, 4])
    filled = fill(embeds, index, torch.ones(2, 4))
    assert torch.equal(filled[index], torch.ones(2, 4))
    assert torch.equal(filled[[0, 2, 3, 5]], embeds[[0, 2, 3, 5]])
    assert torch.equal(fill(embeds, index[:0], torch.ones(1, 4)), embeds)


def test_save_and_load_round_trip(tmp_path):
    from vlm.models import registry

    model, batch = make_model(), make_batch(SAMPLES)
    model.save_pretrained(tmp_path)
    loaded = registry.load(tmp_path).double().eval()
    for mode in ("coarse_only", "coarse_fine", "autoregressive"):
        assert torch.equal(model(batch, mode=mode).loss_sum, loaded(batch, mode=mode).loss_sum)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("mode", ["coarse_only", "coarse_fine", "autoregressive"])
def test_generation_equals_forwards_without_a_cache(mode):
    """Each token is the argmax of a whole forward over the prompt and what was said before."""
    model = make_model()
    prompts = [(3, 5), (1, 9), (0, 4), (5, 2)]
    batch = make_batch(prompts)
    steps = 5
    found = generate(model, batch, eos_token_id=-1, max_new_tokens=steps, mode=mode)
    for s in range(len(prompts)):
        said: list[int] = []
        for _ in range(steps):
            said.append(next_token(model, batch, s, said, mode))
        assert found[s] == said


def next_token(model, batch, s, said, mode):
    from vlm.batch import build_batch

    a, b = batch.cu_seqlens[s], batch.cu_seqlens[s + 1]
    first, last = int(batch.cu_frames[s]), int(batch.cu_frames[s + 1])
    ids = batch.input_ids[a:b].tolist() + said + [7]  # the loss at the last token names the next
    whole = build_batch(
        frames=batch.frames[first:last] if last > first else batch.frames[:1],
        frame_counts=[last - first],
        input_ids=[ids],
        labels=[[-100] * (len(ids) - 1) + [7]],
        image_token_id=3,
        tokens_per_frame=1,
        keys=["x"],
        kind="video",
    )
    grabbed = []
    original = model.language.logits
    model.language.logits = lambda hidden: grabbed.append(original(hidden)) or grabbed[-1]
    try:
        with torch.no_grad():
            model(whole, mode=mode)
    finally:
        del model.language.logits
    return int(grabbed[-1][-1].argmax())


def test_generation_stops_at_the_end_of_turn():
    model, batch = make_model(), make_batch([(3, 5), (1, 9)])
    free = generate(model, batch, eos_token_id=-1, max_new_tokens=6)
    eos = free[0][2]
    stopped = generate(model, batch, eos_token_id=eos, max_new_tokens=6)
    assert stopped[0] == free[0][: free[0].index(eos)]
    assert stopped[1] == (free[1][: free[1].index(eos)] if eos in free[1] else free[1])
