"""Memory of one forward and backward pass, found without running it: activations and logits.

The model's own code runs on the meta device, where tensors have shapes and no contents, so
whatever it keeps is counted as it is kept: by forward mode, freezing, gradient checkpointing,
pieces of the loss. Attention is made to keep what flash attention keeps, on a GPU as on a CPU.
Gradients of parameters are taken away as they come: they are DeepSpeed's (``vlm.engine.memory``).

``tests/estimate/test_activations.py`` compares with what real passes save.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vlm.batch import Batch


@dataclass(frozen=True)
class PassBytes:
    #: kept at the end of the forward pass for the backward one
    kept: int
    #: at the worst moment, without logits
    activations: int
    #: tensors as wide as the vocabulary, at that moment
    logits: int

    @property
    def peak(self) -> int:
        return self.activations + self.logits


def pass_bytes(model: Any, batch: Batch, dtype: torch.dtype, mode: str | None = None) -> PassBytes:
    """
    Args:
        model: on the meta device and frozen as it trains; its weights are cast.
        dtype: that DeepSpeed casts the weights to.
    """
    model.to(dtype).train()
    vocab_size = model.language.lm.get_input_embeddings().num_embeddings
    meta = batch.to(torch.device("meta"))
    options: dict[str, Any] = {} if mode is None else {"mode": mode}
    with contextlib.ExitStack() as hooks:
        for parameter in model.parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(_drop_gradient)
                hooks.callback(handle.remove)
        with _flash_attention(), Allocations(vocab_size) as watch:
            loss = model(meta, **options).loss_sum
            kept = watch.live
            loss.backward()
    return PassBytes(kept, watch.peak - watch.peak_logits, watch.peak_logits)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextlib.contextmanager
def _flash_attention() -> Iterator[None]:
    """On the meta device torch would choose attention that keeps all probabilities.

    The function is replaced for a while, as a function mode does not reach what checkpointing
    computes again in the backward pass.
    """
    plain = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Of dropout, flash attention keeps a seed alone."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


class Allocations(TorchDispatchMode):
    """Adds up what operations allocate, and takes away what is released."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._known: Any = WeakIdKeyDictionary()
        self.live = self.live_logits = self.peak = self.peak_logits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # transformers asks whether positions count on without a break: in rows they do
            return True
        for given in _tensors((args, kwargs)):  # weights and batches were there before
            self._known.setdefault(given.untyped_storage(), True)
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            self._add(tensor)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        logits = size if tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size else 0
        weakref.finalize(storage, self._release, size, logits)
        self.live, self.live_logits = self.live + size, self.live_logits + logits
        if self.live > self.peak:
            self.peak, self.peak_logits = self.live, self.live_logits

    def _release(self, size: int, logits: int) -> None:
        self.live, self.live_logits = self.live - size, self.live_logits - logits


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
