"""The connector by hand."""

import pytest
import torch

from tests.models.tiny import SIZE, make_tower
from vlm.models.foveation import Foveation, LearnedQuery
from vlm.models.vision import VisionEncoder

F, Q, D, H = 4, 20, 24, 32


def make(**changes: float | bool) -> Foveation:
    torch.manual_seed(0)
    values = {"query_bias": False, "query_std": 1.0, "visual_scale": 0.14} | changes
    return Foveation(vision_dim=D, language_dim=H, query_dim=Q, **values).double()  # type: ignore[arg-type]


def test_tokens_are_what_the_query_saw_projected_twice_and_scaled() -> None:
    connector = make()
    tower = VisionEncoder(make_tower()).double().eval()
    frames = torch.randint(0, 256, (F, 3, SIZE, SIZE)).to(torch.uint8)
    _, cache = tower(frames)
    queries = torch.randn(F, Q, dtype=torch.float64)
    found = connector(tower, cache, queries)
    weights = dict(connector.named_parameters())
    for frame in range(F):
        entering = weights["query_input_proj.weight"] @ queries[frame]
        own = [type(kv)(kv.key[frame : frame + 1], kv.value[frame : frame + 1]) for kv in cache]
        looked = tower.look(entering[None], own)[0]
        token = weights["output_proj.weight"] @ looked + weights["output_proj.bias"]
        token = weights["dino_to_llm.weight"] @ token + weights["dino_to_llm.bias"]
        torch.testing.assert_close(found[frame], 0.14 * token, rtol=0, atol=1e-12)


def test_each_frame_gets_what_the_one_before_asked_for() -> None:
    connector = make()
    hidden = torch.randn(F, H, dtype=torch.float64)
    is_first = torch.tensor([True, False, True, False])
    found = connector.next_queries(hidden, is_first)
    asked = hidden @ connector.llm_to_query.weight.T + connector.llm_to_query.bias
    init = connector.q_init.weight[0]
    for got, expected in zip(found, (init, asked[0], init, asked[2]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_query_weights_are_shared_by_all_frames() -> None:
    query = LearnedQuery(5, 1.0)
    assert torch.equal(query(3), query.weight.repeat(3, 1))
    query(3).sum().backward()
    assert query.weight.grad is not None and query.weight.grad.tolist() == [[3.0] * 5]


def test_the_options_reach_it() -> None:
    assert make().query_input_proj.bias is None
    assert make(query_bias=True).query_input_proj.bias is not None
    assert make(query_std=0.02).q_static.weight.detach().std() == pytest.approx(0.02, rel=0.5)
    assert make().q_init.weight.detach().std() == pytest.approx(1.0, rel=0.5)
    assert not torch.equal(make().q_init.weight, make().q_static.weight)
