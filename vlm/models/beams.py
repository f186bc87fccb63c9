"""Beam search: the likeliest continuations kept side by side. Nothing is drawn, so it repeats.

As transformers does it with its defaults: a sequence counts by its mean log probability, its end
included, and a search is over when nothing that goes on can come before what has ended.

Legend: S samples, B beams, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: of a beam that there is not yet
NEVER = -1e9


class Choice(NamedTuple):
    """What goes on after a step."""

    #: (S * B,) rows that go on, of the rows before
    rows: Tensor
    #: (S * B,) their next tokens
    tokens: Tensor


class Beams:
    """The search of a batch. Rows are samples' beams one after another."""

    def __init__(
        self, num_samples: int, num_beams: int, stops: Sequence[int], device: torch.device
    ) -> None:
        self.num_beams, self.stops = num_beams, torch.tensor(stops, device=device)
        #: (S, B) log probabilities of what goes on; at first there is one beam
        self.sums = torch.full((num_samples, num_beams), NEVER, device=device)
        self.sums[:, 0] = 0.0
        #: (S, B, T) tokens of what goes on
        self.going = torch.zeros(num_samples, num_beams, 0, dtype=torch.long, device=device)
        #: of each sample: mean log probability and tokens of what has ended, the best first
        self.ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(num_samples)]
        self.done = [False] * num_samples

    def step(self, logits: Tensor, is_last: bool) -> Choice | None:
        """Takes the (S * B, V) logits after the newest tokens; None: all have ended."""
        num_samples, width = len(self.sums), logits.shape[-1]
        scores = logits.float().log_softmax(-1).view(num_samples, self.num_beams, width)
        scores = (self.sums[..., None] + scores).flatten(1)
        # so many that all beams go on even where each of them could end in every way
        enough = (1 + len(self.stops)) * self.num_beams
        sums, index = scores.topk(min(enough, scores.shape[1]))
        beams, tokens = index // width, index % width
        sample = torch.arange(num_samples, device=sums.device)[:, None]
        texts = torch.cat([self.going[sample, beams], tokens[..., None]], dim=-1)
        ends = torch.isin(tokens, self.stops)
        self._collect(sums, texts, ends | is_last)
        sums, kept = sums.masked_fill(ends, NEVER).topk(self.num_beams)
        self.sums, self.going = sums, texts[sample, kept]
        self._close()
        if is_last or all(self.done):
            return None
        rows = sample * self.num_beams + beams.gather(1, kept)
        return Choice(rows.flatten(), tokens.gather(1, kept).flatten())

    def best(self) -> list[list[int]]:
        """The likeliest sequence of each sample, its end included."""
        return [ended[0][1] for ended in self.ended]

    def _collect(self, sums: Tensor, texts: Tensor, ends: Tensor) -> None:
        """Keeps what ends among the likeliest; an end further down is given up."""
        length = texts.shape[-1]
        for s, found in enumerate(self.ended):
            if self.done[s]:
                continue
            for rank in range(self.num_beams):
                if ends[s, rank] and sums[s, rank] > NEVER / 2:
                    found.append((float(sums[s, rank]) / length, texts[s, rank].tolist()))
            found.sort(key=lambda one: -one[0])
            del found[self.num_beams :]

    def _close(self) -> None:
        length = self.going.shape[-1]
        for s, found in enumerate(self.ended):
            if len(found) == self.num_beams:
                self.done[s] |= float(self.sums[s, 0]) / length <= found[-1][0]
