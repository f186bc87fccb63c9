"""Cross entropies in pieces and by Liger against plain ones, in value and gradient."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.models import token_loss

T, H, V = 23, 16, 97


def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    head = nn.Linear(H, V, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, H, generator=generator))
    states = torch.randn(T, H, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (T,), generator=generator)
    return head, states, targets, torch.rand(T, generator=generator)


def check(losses: Tensor, head: nn.Linear, states: Tensor, targets: Tensor, of: Tensor) -> None:
    """Equal to plain cross entropy; tokens count as much as ``of`` says."""
    expected = F.cross_entropy(states @ head.weight.T, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    inputs = (states, head.weight)
    pair = (torch.autograd.grad((each * of).sum(), inputs) for each in (losses, expected))
    for own, plain in zip(*pair, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [1, 2, 7, 40])
def test_pieces_have_the_value_and_gradient_of_the_whole(chunks: int) -> None:
    head, states, targets, of = problem()
    losses = token_loss.token_losses(head, states, targets, chunks)
    assert losses.shape == (T,) and losses.dtype == torch.float32
    check(losses, head, states, targets, of)


def test_liger_has_the_value_and_gradient_of_the_whole() -> None:
    """Its kernels run on a CPU in Triton's interpreter, which a process of their own asks for."""
    if not token_loss.has_liger():
        pytest.skip("liger_kernel is not installed; pip install saccade[liger]")
    code = (
        "from tests.models.test_token_loss import check, problem; from vlm.models import token_loss"
        "; head, states, targets, of = problem()"
        "; check(token_loss.fused(head, states, targets), head, states, targets, of)"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


def test_liger_is_for_whole_plain_heads_on_a_gpu() -> None:
    head, states, *_ = problem()
    assert token_loss.is_plain(head, states)
    assert not token_loss.is_plain(nn.Linear(H, V), states)  # a bias
    assert not token_loss.is_plain(nn.Sequential(head), states)  # something wrapped
    assert not token_loss.is_plain(head, states.bfloat16())
    head.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    assert not token_loss.is_plain(head, states)


def test_pieces_bound_the_logits() -> None:
    assert token_loss.loss_chunks(1000, 512) == 1
    count = token_loss.loss_chunks(8192, 49_152)
    most = token_loss.MAX_LOGITS
    assert 8192 / count * 49_152 <= most < 8192 / (count - 1) * 49_152
