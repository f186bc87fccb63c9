"""The head scores a full micro-batch in pieces, in training as in evaluation."""

import torch

from tests.engine import engines
from tests.models import tiny
from vlm.models import token_loss
from vlm.train import model as models


def test_pieces_follow_from_budget_and_vocabulary() -> None:
    recipe = engines.recipe("data.budget=100000")
    with torch.device("meta"):
        for vocab_size, width in ((50_000, 50_000), (20, 50)):
            config = {**tiny.LANGUAGE, "vocab_size": width}
            part = recipe.model.language.model_copy(update={"config": config})
            section = recipe.model.model_copy(update={"language": part})
            built = models.build(recipe.model_copy(update={"model": section}), vocab_size)
            expected = -(-100_000 * max(vocab_size, width) // token_loss.MAX_LOGITS)
            assert built.language.num_loss_chunks == expected
    assert engines.make_model().language.num_loss_chunks == 1


def test_a_loaded_model_is_limited_alike() -> None:
    model = engines.make_model()
    models.limit_logits(model, engines.recipe(f"data.budget={3 * token_loss.MAX_LOGITS // 50}"))
    assert model.language.num_loss_chunks == 3
