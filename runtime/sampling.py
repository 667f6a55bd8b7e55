"""The next token from logits, without the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifacts import KvcalError
from .methods.amounts import check_count, check_number


@dataclass(frozen=True)
class Sampler:
    """Greedy unless a temperature is given; top-k before top-p, as transformers applies them."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is None:
            if self.top_k is not None or self.top_p is not None:
                raise KvcalError("top_k and top_p are for sampling: give a temperature, too, such as 1.0")
            return
        check_number("temperature", self.temperature, 1e-4, 1e4, "a number")
        if self.top_k is not None:
            check_count("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 1e-6, 1.0, "a probability")

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B, vocabulary] -> [B] int64."""
        if self.temperature is None:
            return logits.argmax(-1)
        kept = self.kept(logits.float() / self.temperature)
        # The largest of log p + Gumbel noise is a draw from p; torch.multinomial may wait for the device.
        noise = torch.rand(kept.shape, generator=generator, device=kept.device).clamp_min(1e-20).log().neg()
        return (kept - noise.clamp_min(1e-20).log()).argmax(-1)

    def kept(self, logits: Tensor) -> Tensor:
        """The same, -inf where top-k or top-p leave a token out."""
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, index = logits.sort(descending=True)
            share = ordered.softmax(-1)
            # A token stays while those before it hold less than top_p: the first always does.
            beyond = share.cumsum(-1) - share >= self.top_p
            logits = logits.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)
        return logits
