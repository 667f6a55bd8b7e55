"""What SmolLM2's layers compute, written out from hooks on its projections: numpy, float64, no kvcal code."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

HEAD_DIM = 64


@torch.no_grad()
def recorded(model: Any, ids: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """By layer, arrays [heads, T, D] of one sequence: query_pre, key_pre, value, query_post, key_post."""
    seen: list[dict[str, np.ndarray]] = []
    handles = []
    for layer in model.model.layers:
        record: dict[str, np.ndarray] = {}
        seen.append(record)
        for name, module in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            hook = _keep(record, name if name == "value" else f"{name}_pre")
            handles.append(getattr(layer.self_attn, module).register_forward_hook(hook))
    model.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    theta = model.config.rope_parameters["rope_theta"]
    for record in seen:
        for name in ("query", "key"):
            record[f"{name}_post"] = rotated(record[f"{name}_pre"], theta)
    return seen


def rotated(rows: np.ndarray, theta: float) -> np.ndarray:
    """Rotary embedding: dimensions i and i + D/2 of position t turn by t · theta^(-2i/D)."""
    half = HEAD_DIM // 2
    angle = np.arange(rows.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    turned = (rows[..., :half] + 1j * rows[..., half:]) * np.exp(1j * angle)
    return np.concatenate((turned.real, turned.imag), -1)


def rank(spectrum: np.ndarray, variance: float) -> int:
    """Smallest r whose first r eigenvalues, descending, have this fraction of their sum."""
    return 1 + int((np.cumsum(spectrum) < variance * spectrum.sum()).sum())


def _keep(record: dict[str, np.ndarray], name: str) -> Any:
    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        record[name] = output[0].double().numpy().reshape(output.shape[1], -1, HEAD_DIM).swapaxes(0, 1)

    return hook
