"""What a rank's forward pass calls, agreed over ranks.

Under ZeRO every rank must call the same modules in the same order, or their collectives pair up
wrongly: a hang, or gradients of different parameters averaged together. ``agreed`` turns that into
an error that says what each rank called.

The signature of a forward pass is its list of calls: the name of each module, with the type, the
number of dimensions and the need of a gradient of its inputs. Lengths are not part of it, they
differ between ranks, nor are masks, which transformers leaves out where they hide nothing. It is
compared before the collectives that depend on it: before each call under ZeRO-3, which gathers
there what a module owns or has read of others, else once before the backward pass.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from vlm import dist

#: a float64, in which ranks compare hashes, holds integers of 53 bits
HASH_BYTES = 6
END = "end of the forward pass"

Calls = tuple[str, ...]


class RankMismatchError(RuntimeError):
    """Ranks called different modules."""


@contextmanager
def agreed(engine: Any, about: str) -> Iterator[None]:
    """Wraps one forward pass on all ranks.

    Args:
        about: what else must be the same on all ranks (the mode, the number of micro-batches).

    Raises:
        RankMismatchError: on all ranks, with the signatures.
    """
    calls, digest = [about], hashlib.blake2b(about.encode(), digest_size=HASH_BYTES)
    every_call = engine.zero_optimization_stage() == 3

    def note(call: str) -> None:
        calls.append(call)
        digest.update(call.encode())

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        note(f"{names[module]}({_classes((*args, *kwargs.values()))})")
        if every_call:
            _agree(calls, digest.digest(), engine.device)

    names = {m: n for n, m in engine.module.named_modules() if n}
    # before DeepSpeed's own hooks, which gather
    handles = [m.register_forward_pre_hook(hook, prepend=True, with_kwargs=True) for m in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    note(END)
    _agree(calls, digest.digest(), engine.device)


def _classes(values: tuple) -> str:
    tensors = [v for v in values if isinstance(v, Tensor) and v.dtype != torch.bool]
    return ", ".join(
        f"{str(t.dtype).removeprefix('torch.')}[{t.ndim}]{'' if t.requires_grad else ' no grad'}"
        for t in tensors
    )


def _agree(calls: list[str], digest: bytes, device: torch.device) -> None:
    number = float(int.from_bytes(digest, "big"))
    high, low = dist.all_reduce([number, -number], device, "max")
    if high != -low:
        raise RankMismatchError(explain(dist.gather_objects(tuple(calls))))


def explain(calls_of_ranks: list[Calls]) -> str:
    """The first call that differs and the whole signatures, by the ranks that share them."""
    by_calls: dict[Calls, list[int]] = {}
    for rank, calls in enumerate(calls_of_ranks):
        by_calls.setdefault(calls, []).append(rank)
    first = 0
    while len({calls[first : first + 1] for calls in by_calls}) == 1:
        first += 1
    lines = [f"ranks differ in what they call, first in call {first}"]
    for calls, ranks in by_calls.items():
        here = calls[first] if first < len(calls) else "nothing yet"
        lines.append(
            f"rank {', '.join(map(str, ranks))} calls {here} after {_brief(calls[:first])}"
        )
    lines.append("let every rank make the same calls, with a dummy input where it has none")
    return "; ".join(lines)


def _brief(calls: Calls) -> str:
    """Calls in a row to one component as one."""
    parts = groupby(calls[1:], lambda call: call.partition("(")[0].partition(".")[0])
    runs = [f"{part} x{sum(1 for _ in group)}" for part, group in parts]
    return " ".join([f"[{calls[0]}]", *runs]) if calls else "nothing"
