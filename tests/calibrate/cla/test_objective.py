"""The losses of uptraining against their formulas, written out in numpy's double precision."""

import numpy as np
import pytest
import torch

from kvcal.calibrate.cla.objective import losses

VOCABULARY = 11


def draw(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(logits):
    powers = np.exp(logits.double().numpy() - logits.double().numpy().max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("lengths", [(7, 7), (7, 4)], ids=["whole", "padded"])
def test_cross_entropy_and_divergence_are_means_over_predicted_tokens(lengths):
    shared, original = draw(2, 7, VOCABULARY), draw(2, 7, VOCABULARY, seed=1)
    ids = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
    attended = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    p, q = probabilities(original), probabilities(shared)
    entropies, divergences = [], []
    for row, length in enumerate(lengths):
        for at in range(length - 1):  # predicts the token after it
            entropies.append(-np.log(q[row, at, ids[row, at + 1]]))
            divergences.append((p[row, at] * np.log(p[row, at] / q[row, at])).sum())
    cross_entropy, kl = losses(shared, original, ids, attended)
    assert cross_entropy.item() == pytest.approx(np.mean(entropies), rel=1e-5)
    assert kl.item() == pytest.approx(np.mean(divergences), rel=1e-5)


def test_equal_predictions_do_not_diverge_and_without_an_original_there_is_no_divergence():
    logits, ids, attended = draw(1, 5, VOCABULARY), torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5).bool()
    assert losses(logits, logits.clone(), ids, attended)[1].item() == pytest.approx(0, abs=1e-7)
    assert losses(logits, None, ids, attended)[1] is None


def test_sixteen_bit_logits_are_compared_in_float32():
    logits, original = draw(1, 9, VOCABULARY).bfloat16(), draw(1, 9, VOCABULARY, seed=1).bfloat16()
    ids, attended = torch.zeros(1, 9, dtype=torch.int64), torch.ones(1, 9).bool()
    expected = losses(logits.float(), original.float(), ids, attended)
    assert all(torch.equal(a, b) for a, b in zip(losses(logits, original, ids, attended), expected, strict=True))
