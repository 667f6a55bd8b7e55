"""Our streaming PCA and scikit-learn's IncrementalPCA, on the same keys, against the PCA of all keys at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcal.calibrate.moments import MomentsFitter
from kvcal.calibrate.pca import fit_pca, principal_angles

from ..shared.measure import Timer

HEADS, TOKENS, DIM, BATCH = 2, 32768, 128, 2048
Fitted = tuple[Tensor, Tensor]
"""Eigenvalues [H, D], descending, and components [H, D, D] in rows; float64."""


def measure_pca(timer: Timer, rounds: int) -> dict[str, Any]:
    """Seconds and accuracy of each method; the keys are float32, as models on a CPU compute them."""
    keys = made_keys()
    methods: dict[str, Callable[[], Fitted]] = {
        "kvcal": lambda: ours(keys),
        "scikit-learn, float32": lambda: theirs(keys),
        "scikit-learn, float64": lambda: theirs(keys.double()),
    }
    seconds = timer.alternate(
        {name: lambda _, fit=fit: timer.seconds(fit) for name, fit in methods.items()},  # type: ignore[misc]
        rounds,
    )
    exact = exact_pca(keys)
    found = {name: {"seconds": seconds[name], **errors(fit(), exact)} for name, fit in methods.items()}
    return {
        "heads": HEADS,
        "tokens": TOKENS,
        "head_dim": DIM,
        "batch": BATCH,
        "methods": found,
        "time_ratio": {name: seconds["kvcal"] / spent for name, spent in seconds.items() if name != "kvcal"},
    }


def made_keys() -> Tensor:
    """[H, n, D] float32: a steep spectrum along random directions, around a mean that exceeds the spread."""
    torch.manual_seed(0)
    scales = torch.arange(1, DIM + 1, dtype=torch.float64).pow(-1.0)
    directions = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, dtype=torch.float64)).Q
    mean = 2 * torch.randn(HEADS, 1, DIM, dtype=torch.float64)
    return (torch.randn(HEADS, TOKENS, DIM, dtype=torch.float64) * scales @ directions + mean).float()


def ours(keys: Tensor) -> Fitted:
    fitter = MomentsFitter(HEADS, DIM)
    for batch in keys.split(BATCH, dim=1):
        fitter.update(batch)
    pca = fit_pca(fitter.finalize())
    return pca.eigenvalues, pca.components


def theirs(keys: Tensor) -> Fitted:
    from sklearn.decomposition import IncrementalPCA

    fitted = [IncrementalPCA() for _ in range(HEADS)]
    for batch in keys.split(BATCH, dim=1):
        for pca, samples in zip(fitted, batch.numpy(), strict=True):
            pca.partial_fit(samples)
    values = [torch.from_numpy(pca.explained_variance_).double() for pca in fitted]
    return torch.stack(values), torch.stack([torch.from_numpy(pca.components_).double() for pca in fitted])


def exact_pca(keys: Tensor) -> Fitted:
    """By SVD of the centred keys in float64, which never forms a covariance."""
    centred = keys.double() - keys.double().mean(1, keepdim=True)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    return singular**2 / (TOKENS - 1), components


def errors(found: Fitted, exact: Fitted) -> dict[str, float]:
    (values, components), (true_values, true_components) = found, exact
    top, rank = DIM // 2, DIM // 4
    relative = ((values - true_values).abs() / true_values)[:, :top]
    angles = principal_angles(components[:, :rank], true_components[:, :rank])
    return {"eigenvalue_error": relative.max().item(), "subspace_angle": angles.max().item()}
