import torch

from vlm.models.splice import fill


def test_fill_overwrites_only_placeholders() -> None:
    embeds = torch.randn(6, 4)
    index = torch.tensor([1, 4])
    filled = fill(embeds, index, torch.stack([torch.ones(4), torch.full((4,), 2.0)]))
    assert filled[[1, 4]].tolist() == [[1.0] * 4, [2.0] * 4]
    assert torch.equal(filled[[0, 2, 3, 5]], embeds[[0, 2, 3, 5]])


def test_fill_leaves_its_input_alone_and_passes_gradients() -> None:
    embeds = torch.zeros(3, 2, requires_grad=True)
    tokens = torch.ones(1, 2, requires_grad=True)
    fill(embeds, torch.tensor([1]), tokens).sum().backward()
    assert embeds.detach().abs().sum() == 0
    assert embeds.grad is not None and embeds.grad.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert tokens.grad is not None and tokens.grad.tolist() == [[1, 1]]


def test_without_placeholders_tokens_change_nothing_but_get_a_gradient() -> None:
    embeds, tokens = torch.randn(3, 2), torch.randn(1, 2, requires_grad=True)
    filled = fill(embeds, torch.tensor([], dtype=torch.long), tokens)
    assert torch.equal(filled, embeds)
    filled.sum().backward()
    assert tokens.grad is not None and tokens.grad.tolist() == [[0, 0]]


def test_tokens_take_the_type_of_the_text() -> None:
    embeds = torch.zeros(2, 2, dtype=torch.bfloat16)
    for index in (torch.tensor([0]), torch.tensor([], dtype=torch.long)):
        assert fill(embeds, index, torch.ones(1, 2)).dtype == torch.bfloat16
