"""Whether an artifact was calibrated on enough tokens for its head dim.

Of n independent tokens whose D dimensions have the same variance, the eigenvalues of the covariance are not all the
same: they lie in a half circle of radius 2 √(D/n) around it (Marchenko and Pastur, for n much greater than D). The
largest of them seem to hold more than they do, and so rank@90 comes out too small, by

    ∫ x f(x) dx · 2 √(D/n) / 0.9 = 0.18 √(D/n)   of itself, f the half circle's density, over its upper 90 %.

This is 1.6 % with 128 tokens per dimension (to first order in √(D/n); 1.8 % in all). Text repeats itself, and counts
for less: SmolLM2's keys after the rotary embedding (D = 64) have rank 40.66, 41.22, 41.46 and 41.51 with 128, 512,
2048 and 8192 tokens per dimension (docs/results/real.md), so that with 128 it is 2.0 % too small. That is as much as
the choice of the text changes it (prose 41.3, code 40.3): with fewer tokens a rank says less about the model than
about how little was read.
"""

from __future__ import annotations

import math
import warnings

from ..artifacts import Artifact

TOKENS_PER_DIMENSION = 128
ERROR = 0.02
"""Of rank@90, with so many tokens per dimension; it falls with their square root."""


class SmallSampleWarning(UserWarning):
    """Too few tokens for the head dim: ranks and bases are of the sample more than of the model."""


def small_sample(artifact: Artifact) -> str | None:
    """What is wrong with the size of an artifact's sample, and what would be enough; None: nothing.

    Sliding-window layers count only where there are no others.
    """
    tokens = int(artifact.data["tokens_counted"])
    head_dim = max(layer.head_dim for layer in artifact.full_layers or artifact.layers)
    enough = TOKENS_PER_DIMENSION * head_dim
    if tokens >= enough:
        return None
    wanted = math.ceil(1.01 * enough / 1024)  # some of those that are run begin or separate texts, and do not count
    advice = f"give at least {wanted}k (--num-tokens, --data)"
    if tokens <= head_dim:  # their covariance has no full rank
        return f"{tokens} tokens span no basis of {head_dim} dimensions: {advice}"
    error = ERROR * math.sqrt(enough / tokens)
    return (
        f"{tokens} tokens are few for a head dim of {head_dim}: ranks come out about {100 * error:.0f} % too small, "
        f"and bases fit this text more than the model: {advice}"
    )


def warn_if_small(artifact: Artifact) -> None:
    """Issue a SmallSampleWarning where `small_sample` finds something."""
    if problem := small_sample(artifact):
        warnings.warn(problem, SmallSampleWarning, stacklevel=3)
