"""What uptraining minimises: next-token cross entropy, and how far predictions are from the original model's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def losses(logits: Tensor, original: Tensor | None, ids: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | None]:
    """(cross entropy, KL(original ‖ shared) or None), both in nats, averaged over the tokens that are predicted.

    Args:
        logits: [B, T, vocabulary] of the model whose layers share.
        original: [B, T, vocabulary] of the model as it was, on the same tokens; None: without distillation.
        ids: [B, T] int64.
        attended: [B, T] bool, False at padding, which is neither predicted nor predicts.
    """
    predicted = attended[:, 1:]
    log_probability = logits[:, :-1][predicted].float().log_softmax(-1)
    cross_entropy = F.nll_loss(log_probability, ids[:, 1:][predicted])
    if original is None:
        return cross_entropy, None
    wanted = original[:, :-1][predicted].float().log_softmax(-1)
    return cross_entropy, F.kl_div(log_probability, wanted, log_target=True, reduction="batchmean")
