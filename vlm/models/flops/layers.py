"""Floating-point operations of what models are made of: linear maps, attention, whole layers.

A multiplication and an addition are two operations, as ``torch.utils.flop_counter`` counts them.
Only matrix products count, and attention has all its pairs, causal or not. Of the backward pass
only what autograd needs is counted: a frozen map takes no weight gradient, and no input gradient
either where nothing below it trains. What attention kernels compute again inside is left out.

Sizes come from the modules, not from their tensors, which are empty under ZeRO-3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from vlm.errors import ConfigError

#: in the name of the attention that looks at something beside the text
CONTEXT = "crossattention"


@dataclass
class Flops:
    """Of some part of a micro-batch."""

    forward: float = 0.0
    backward: float = 0.0
    #: what gradient checkpointing computes once more
    recompute: float = 0.0

    def __iadd__(self, other: "Flops") -> "Flops":
        self.forward += other.forward
        self.backward += other.backward
        self.recompute += other.recompute
        return self

    def times(self, count: int) -> "Flops":
        return Flops(self.forward * count, self.backward * count, self.recompute * count)

    @property
    def useful(self) -> float:
        return self.forward + self.backward

    @property
    def total(self) -> float:
        return self.useful + self.recompute


class Map(NamedTuple):
    """A linear map and the low-rank adapters beside it."""

    #: numbers that it takes
    width: int
    #: weights of the map itself, and whether they train
    base: int
    base_trains: bool
    #: weights of its adapters, first and second factors; 0 without
    down: int = 0
    up: int = 0
    adapters_train: bool = False

    @property
    def trains(self) -> bool:
        return self.base_trains or self.adapters_train

    @property
    def last(self) -> int:
        """Weights of the product that is computed last."""
        return self.up or self.base

    def forward(self, tokens: int) -> float:
        return 2.0 * tokens * (self.base + self.down + self.up)

    def backward(self, tokens: int, grad: bool) -> float:
        """``grad``: the input asks for a gradient."""
        factors = self.base * (self.base_trains + grad)
        factors += self.down * (self.adapters_train + grad)
        factors += self.up * (self.adapters_train + (grad or self.adapters_train))
        return 2.0 * tokens * factors

    def run(self, flops: Flops, tokens: int, grad: bool) -> bool:
        """Adds what it costs; True if the output asks for a gradient."""
        flops.forward += self.forward(tokens)
        flops.backward += self.backward(tokens, grad)
        return grad or self.trains


def linear_map(module: nn.Module) -> Map:
    """Of an ``nn.Linear``, a ``Conv1D`` of transformers, or what PEFT made of one."""
    base, down, up, width = [], [], [], 0
    for name, leaf in module.named_modules():
        if not _is_linear(leaf) or "original_module" in name.split("."):
            continue  # PEFT keeps the original of a module that it trains a copy of
        if "lora_A" in name:
            down.append(leaf)
        elif "lora_B" in name:
            up.append(leaf)
        else:
            base.append(leaf)
            width = _sides(leaf)[0]
    assert len(base) == 1, module
    return Map(
        width, _size(base), _trains(base), _size(down), _size(up), _trains(down) or _trains(up)
    )


def attend(flops: Flops, pairs: float, width: int, grads: Sequence[bool]) -> bool:
    """Adds scores and their mixture of values.

    Args:
        pairs: of queries and keys.
        width: of all heads together.
        grads: whether queries, keys and values ask for a gradient.

    Returns:
        True if the mixture asks for one.
    """
    query, key, value = grads
    flops.forward += 4.0 * pairs * width
    flops.backward += 2.0 * pairs * width * (query + key + (query or key) + value)
    return any(grads)


class Context(NamedTuple):
    """What a layer looks at beside the tokens that it reads."""

    tokens: int
    #: of a token that is read and one that is looked at
    pairs: float
    #: whether what is looked at asks for a gradient
    grad: bool


class Branch(NamedTuple):
    """Maps side by side, and one that takes what comes of them: attention, or an MLP."""

    inner: tuple[Map, ...]
    outer: Map


@dataclass(frozen=True)
class Layer:
    """A transformer layer: attention, then MLPs, each behind a norm and beside the residual."""

    attention: Branch
    mlps: tuple[Branch, ...]
    #: whether norms or anything else beside the maps trains
    norms_train: bool
    #: nothing behind the last map keeps a tensor, so recomputing stops before that
    ends_in_map: bool
    #: attention to a context, if it has one: its keys and values in one map, then its queries
    looking: Branch | None = None

    def run(
        self,
        flops: Flops,
        tokens: int,
        pairs: float,
        grad: bool,
        recomputed: bool = False,
        context: Context | None = None,
    ) -> bool:
        """Adds what it costs; True if the output asks for a gradient."""
        own = Flops()
        inner, outer = self.attention
        grads = [one.run(own, tokens, grad or self.norms_train) for one in inner]
        # one fused map makes all three
        mixed = attend(own, pairs, outer.width, grads if len(grads) == 3 else [any(grads)] * 3)
        grad = outer.run(own, tokens, mixed) or grad
        if self.looking is not None and context is not None:
            grad = self._look(self.looking, own, tokens, context, grad)
        grad = self.run_mlps(own, tokens, grad)
        if recomputed and grad:
            own.recompute = self.recomputed(own.forward, tokens)
        flops += own
        return grad

    def _look(
        self, looking: Branch, flops: Flops, tokens: int, context: Context, grad: bool
    ) -> bool:
        (key_value, query), outer = looking
        keys = key_value.run(flops, context.tokens, context.grad)
        asks = query.run(flops, tokens, grad or self.norms_train)
        mixed = attend(flops, context.pairs, outer.width, (asks, keys, keys))
        return outer.run(flops, tokens, mixed) or grad

    def run_mlps(self, flops: Flops, tokens: int, grad: bool) -> bool:
        for inner, outer in self.mlps:
            grads = [one.run(flops, tokens, grad or self.norms_train) for one in inner]
            grad = outer.run(flops, tokens, any(grads)) or grad
        return grad

    def recomputed(self, forward: float, tokens: int) -> float:
        if not self.ends_in_map:
            return forward
        return forward - 2.0 * tokens * self.mlps[-1].outer.last


def decoder_layers(decoder: nn.Module) -> list[Layer]:
    """The layers of a causal language model.

    Raises:
        ConfigError: they are not attention and dense MLPs, so that nothing here counts them.
    """
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{type(decoder).__name__} has no list of layers to count")
    return [_decoder_layer(layer) for layer in max(lists, key=len)]


def _decoder_layer(layer: nn.Module) -> Layer:
    """Groups maps by the module that holds them; the last of each takes what the others make."""
    groups: dict[str, list[Map]] = {}
    for name, module in _units(layer):
        groups.setdefault(name.rpartition(".")[0], []).append(linear_map(module))
    if len(groups) < 2 or any(len(group) < 2 for group in groups.values()):
        raise ConfigError(
            f"{type(layer).__name__}: found linear maps in {', '.join(groups) or 'no module'}, "
            "expected those of attention and of dense MLPs; such layers cannot be counted"
        )
    branches = {name: Branch(tuple(group[:-1]), group[-1]) for name, group in groups.items()}
    looking = branches.pop(CONTEXT, None)
    attention, *mlps = branches.values()
    return Layer(attention, tuple(mlps), norms_train(layer), ends_in_map=True, looking=looking)


def mlp_branches(mlp: nn.Module) -> tuple[Branch, ...]:
    maps = [linear_map(module) for _, module in _units(mlp)]
    return (Branch(tuple(maps[:-1]), maps[-1]),)


def norms_train(layer: nn.Module) -> bool:
    inside = {id(p) for _, module in _units(layer) for p in module.parameters()}
    return any(p.requires_grad and id(p) not in inside for p in layer.parameters())


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _units(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear maps by name; PEFT's count as one with the map that they wrap."""
    found: list[str] = []
    for name, module in layer.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if _is_linear(module) or hasattr(module, "base_layer"):
            found.append(name)
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _sides(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, Conv1D)
    return module.nx, module.nf


def _size(modules: Sequence[nn.Module]) -> int:
    return sum(a * b for a, b in map(_sides, modules))


def _trains(modules: Sequence[nn.Module]) -> bool:
    return any(module.weight.requires_grad for module in modules)
