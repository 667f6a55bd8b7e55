"""Small artifacts and blocks that tests of several rooms share."""

from __future__ import annotations

import torch

from kvcal.artifacts import QUANTITIES, Artifact, Layer, ModelIdentity, Stage

FINGERPRINT = {"model_type": "llama", "num_hidden_layers": 2, "head_dim": 4}


def artifact(seed: int = 0, layers: int = 2, head_dim: int = 4, value_dim: int = 3, tokens: int = 7) -> Artifact:
    """An artifact of random numbers in every stage but the clusters, of the right shapes and dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    kv_heads = 2
    moments, pca, score = {}, {}, {}
    reservoir = {"token": torch.arange(tokens), "position": torch.arange(tokens)}
    for layer in range(layers):
        prefix = f"layers.{layer}"
        for quantity in QUANTITIES:
            dim = value_dim if quantity == "value" else head_dim
            moments[f"{prefix}.{quantity}.count"] = torch.tensor(10)
            moments[f"{prefix}.{quantity}.mean"] = draw(kv_heads, dim)
            moments[f"{prefix}.{quantity}.covariance"] = draw(kv_heads, dim, dim)
            for suffix in ("eigenvalues", "eigenvalues_uncentred"):
                pca[f"{prefix}.{quantity}.{suffix}"] = draw(kv_heads, dim).abs().sort(-1, descending=True).values
        for stage in ("pre", "post"):
            pca[f"{prefix}.key_{stage}.mean"] = draw(kv_heads, head_dim).float()
            pca[f"{prefix}.key_{stage}.components"] = torch.linalg.qr(draw(kv_heads, head_dim, head_dim)).Q.float()
            score[f"{prefix}.{stage}.query_map"] = draw(kv_heads, head_dim, head_dim).float()
            score[f"{prefix}.{stage}.key_map"] = draw(kv_heads, head_dim, head_dim).float()
            score[f"{prefix}.{stage}.singular_values"] = draw(kv_heads, head_dim)
        for quantity, dim in (("key_post", head_dim), ("query_post", head_dim), ("value", value_dim)):
            reservoir[f"{prefix}.{quantity}"] = draw(kv_heads, tokens, dim, dtype=torch.float32)
    stages = {"moments": moments, "pca": pca, "score": score, "reservoir": reservoir}
    return Artifact(
        model=ModelIdentity("org/model", None, dict(FINGERPRINT), "0" * 64),
        layers=tuple(Layer(i, kv_heads, 4, head_dim, value_dim, 0.5, None, "unrotate") for i in range(layers)),
        data={"source": {"id": "text"}, "content_sha256": "1" * 64, "blocks": 1, "seq_len": 7, "tokens_counted": 7},
        settings={"seed": seed, "centred": True},
        versions={"kvcal": "0"},
        stages={name: Stage(tensors) for name, tensors in stages.items()},
    )
