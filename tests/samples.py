"""Small artifacts and blocks that tests of several rooms share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from kvcal.artifacts import Artifact, Layer, ModelIdentity, Stage

FINGERPRINT = {"model_type": "llama", "num_hidden_layers": 2, "head_dim": 4}
KV_HEADS, GROUP = 2, 2


def artifact(seed: int = 0, layers: int = 2, head_dim: int = 4, value_dim: int = 3, tokens: int = 7) -> Artifact:
    """What calibration would have found had a model computed random numbers; every stage but the clusters.

    Args:
        tokens: in the reservoir; the text has enough of them for moments of full rank.
    """
    generator = torch.Generator().manual_seed(seed)
    text = max(4 * head_dim, tokens)
    stages: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("moments", "pca", "score", "reservoir")}
    stages["reservoir"] |= {"token": torch.arange(tokens), "position": torch.arange(tokens)}
    for layer in range(layers):
        _add_layer(stages, f"layers.{layer}", generator, text, tokens, head_dim, value_dim)
    shape = (KV_HEADS, KV_HEADS * GROUP, head_dim, value_dim, 0.5, None, "unrotate")
    source = {"id": "text"}
    data = {"source": source, "content_sha256": "1" * 64, "blocks": 1, "seq_len": text, "tokens_counted": text}
    return Artifact(
        model=ModelIdentity("org/model", None, dict(FINGERPRINT), "0" * 64),
        layers=tuple(Layer(index, *shape) for index in range(layers)),
        data=data,
        settings={"seed": seed, "centred": True},
        versions={"kvcal": "0"},
        stages={name: Stage(tensors) for name, tensors in stages.items()},
    )


def _add_layer(
    stages: dict[str, dict[str, torch.Tensor]],
    prefix: str,
    generator: torch.Generator,
    text: int,
    tokens: int,
    head_dim: int,
    value_dim: int,
) -> None:
    """Draw a layer's keys, queries and values, and write down their statistics as docs/format.md defines them."""
    second, covariance = {}, {}
    for quantity in ("key_pre", "key_post", "query_pre", "query_post", "value"):
        dim = value_dim if quantity == "value" else head_dim
        count = text * GROUP if quantity.startswith("query") else text
        seen = torch.randn(KV_HEADS, count, dim, generator=generator)
        mean = seen.double().mean(1)
        centred = seen.double() - mean.unsqueeze(1)
        covariance[quantity] = centred.mT @ centred / count
        second[quantity] = covariance[quantity] + mean.unsqueeze(-1) * mean.unsqueeze(-2)
        unbiased, vectors = torch.linalg.eigh(covariance[quantity] * count / (count - 1))
        stages["moments"] |= {
            f"{prefix}.{quantity}.count": torch.tensor(count),
            f"{prefix}.{quantity}.mean": mean,
            f"{prefix}.{quantity}.covariance": covariance[quantity],
        }
        stages["pca"] |= {
            f"{prefix}.{quantity}.eigenvalues": unbiased.flip(-1).clamp_min(0),
            f"{prefix}.{quantity}.eigenvalues_uncentred": torch.linalg.eigvalsh(second[quantity]).flip(-1).clamp_min(0),
        }
        if quantity.startswith("key"):
            rows = vectors.mT.flip(-2)
            largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
            stages["pca"] |= {
                f"{prefix}.{quantity}.mean": mean.float(),
                f"{prefix}.{quantity}.components": (rows * largest.sign()).float(),
            }
        if not quantity.endswith("_pre"):
            stages["reservoir"][f"{prefix}.{quantity}"] = seen[:, :tokens].clone()
    for stage in ("pre", "post"):
        roots = []
        for matrix in (second[f"query_{stage}"], covariance[f"key_{stage}"]):
            values, vectors = torch.linalg.eigh(matrix)
            roots.append(vectors @ torch.diag_embed(values.clamp_min(0).sqrt()) @ vectors.mT)
        left, values, right = torch.linalg.svd(roots[0] @ roots[1])
        scale = values.rsqrt().unsqueeze(-1)
        stages["score"] |= {
            f"{prefix}.{stage}.query_map": (scale * (right @ roots[1])).float(),
            f"{prefix}.{stage}.key_map": (scale * (left.mT @ roots[0])).float(),
            f"{prefix}.{stage}.singular_values": values,
        }


def clusters(seed: int = 0, layers: int = 2, head_dim: int = 4, value_dim: int = 3, tokens: int = 7) -> Stage:
    """A stage `clusters` that `load` takes for that of `artifact(…)`: two clusters, of no particular keys."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.ones(KV_HEADS, 1)
    tensors: dict[str, torch.Tensor] = {}
    for prefix in (f"layers.{layer}." for layer in range(layers)):
        for name, dim in (("centroids", head_dim), ("value_mean", value_dim)):
            tensors[prefix + name] = torch.randn(KV_HEADS, 2, dim, generator=generator)
        tensors[prefix + "sizes"] = torch.tensor([[tokens - 2, 2]]).repeat(KV_HEADS, 1)
        for name, radius in (("radius_mean", 0.5), ("radius_p95", 0.9), ("radius_max", 1.0)):
            tensors[prefix + name] = radius * one.repeat(1, 2)
        tensors[prefix + "curve.counts"] = torch.tensor([1, 2])
        tensors[prefix + "curve.radius"] = torch.cat((2 * one, one), 1)
        for name, norm in (("max", 2.0), ("p99", 1.5)):
            tensors[f"{prefix}curve.query_norm_{name}"] = norm * one[:, 0]
        tensors |= {prefix + name: one[:, 0].double() for name in ("inertia", "silhouette")}
        for start in ("calibrated", "plusplus", "random"):
            tensors[f"{prefix}warm_start.{start}_iterations"] = torch.full((KV_HEADS,), 3)
            tensors[f"{prefix}warm_start.{start}_inertia"] = one[:, 0].double()
    return Stage(tensors, {"clusters": 2, "metric": "l2", "iterations": 20, "seed": seed})


def codebook(found: Artifact, seed: int = 0, tokens: int = 7) -> Stage:
    """A stage `codebook` that `load` takes for that of `found`: two codewords, of no particular keys and values."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in found.layers:
        prefix = f"layers.{layer.index}."
        for name, dim in (("key", layer.head_dim), ("value", layer.value_dim)):
            tensors[prefix + name] = torch.randn(KV_HEADS, 2, dim, generator=generator)
            for text in ("fitted", "unseen"):
                tensors[f"{prefix}carry.{name}_{text}"] = torch.full((KV_HEADS, 2), 0.5, dtype=torch.float64)
        tensors[prefix + "spread"] = torch.full((KV_HEADS, 2), 0.7)
        tensors[prefix + "sizes"] = torch.tensor([[tokens - 2, 2]]).repeat(KV_HEADS, 1)
        tensors[prefix + "carry.sizes"] = torch.tensor([1, 2])
        for part in ("query_map", "key_map", "singular_values"):
            tensors[f"{prefix}code.{part}"] = found.tensor("score", layer.index, f"post.{part}").clone()
    return Stage(tensors, {"codewords": 2, "iterations": 20, "seed": seed})


def rescored(found: Artifact, by: float = 1.0) -> Stage:
    """Its stage `score` with other numbers that `load` takes, too: one map longer, the other shorter."""
    factors = {"query_map": 1 + by / 1000, "key_map": 1 / (1 + by / 1000)}
    tensors = found.stages["score"].tensors.items()
    return Stage({name: tensor * factors.get(name.rpartition(".")[2], 1) for name, tensor in tensors})


def edit_manifest(folder: Path, edit: Callable[[dict], None]) -> None:
    """Change the manifest as a forger would: with a content hash that is right."""
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    del body["content_hash"]
    edit(body)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**body, "content_hash": hashlib.sha256(canonical.encode()).hexdigest()}))


def edit_stage(folder: Path, stage: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a stage's tensors; hash, size and name in the manifest are made to match."""

    def in_manifest(body: dict) -> None:
        entry = body["stages"][stage]
        tensors = load_file(folder / entry["file"])
        (folder / entry["file"]).unlink()
        edit(tensors)
        data = save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        entry |= {"file": f"{stage}.{digest[:8]}.safetensors", "sha256": digest, "bytes": len(data)}
        (folder / entry["file"]).write_bytes(data)

    edit_manifest(folder, in_manifest)
