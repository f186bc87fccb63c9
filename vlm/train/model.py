"""The model of a run: as the recipe says, and scored in as many pieces as its budget asks for."""

from typing import Any

from vlm.config import Recipe
from vlm.models import registry, token_loss


def build(recipe: Recipe, vocab_size: int) -> Any:
    """Before anything is frozen. On the meta device there are shapes alone.

    Args:
        vocab_size: of the tokenizer; the model's own may be larger.
    """
    model = registry.build(recipe.model, vocab_size, recipe.seed)
    limit_logits(model, recipe)
    return model


def limit_logits(model: Any, recipe: Recipe) -> None:
    """Scores a full micro-batch in pieces, of which one's logits exist at a time."""
    width = model.language.lm.get_input_embeddings().num_embeddings
    model.language.num_loss_chunks = token_loss.loss_chunks(recipe.data.budget, width)
