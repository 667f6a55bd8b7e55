"""Which tensors each stage holds, with their shapes and dtypes.

Dimension symbols: Hkv (KV heads), D (key and query head dim), Dv (value head dim) come from the
manifest's layers, L is their number, a number stands for itself, _ for any number; every other symbol is free but
must have one value within a stage.
docs/format.md is the prose of this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .artifact import Layer, indices_in
from .errors import ArtifactError

SCHEMA_VERSION = 6
STAGE_SINCE = {"cla": 2, "codebook": 4, "xcla": 5}
"""Schema version of stages that version 1 does not have; an artifact states the lowest version that has its stages."""
SLIM_SINCE = 6
"""Schema version of the manifest's `slim_of`."""
SLIM_LEAVES_OUT = ("moments", "reservoir")
"""Stages that nothing decodes with: other stages are derived from them, and checked against them."""
WITHOUT_WINDOWS = ("reservoir", "clusters", "codebook", "xcla")
"""Stages that may leave out layers with a sliding window, which keep the model's own cache; since version 3."""

QUANTITIES = ("key_pre", "key_post", "query_pre", "query_post", "value")
"""What is measured per KV head; queries are pooled over the heads of their group."""

FLOATS = ("F32", "BF16", "F16")
Spec = tuple[str, tuple[str, ...]]
"""(shape as space-separated symbols, allowed safetensors dtypes)."""


def _layer_tensors() -> dict[str, dict[str, Spec]]:
    moments: dict[str, Spec] = {}
    pca: dict[str, Spec] = {}
    for quantity in QUANTITIES:
        dim = "Dv" if quantity == "value" else "D"
        moments[f"{quantity}.count"] = ("", ("I64",))
        moments[f"{quantity}.mean"] = (f"Hkv {dim}", ("F64",))
        moments[f"{quantity}.covariance"] = (f"Hkv {dim} {dim}", ("F64",))
        pca[f"{quantity}.eigenvalues"] = (f"Hkv {dim}", ("F64",))
        pca[f"{quantity}.eigenvalues_uncentred"] = (f"Hkv {dim}", ("F64",))
    for quantity in ("key_pre", "key_post"):
        pca[f"{quantity}.mean"] = ("Hkv D", ("F32",))
        pca[f"{quantity}.components"] = ("Hkv D D", ("F32",))
    score: dict[str, Spec] = {}
    for rotary_stage in ("pre", "post"):
        score[f"{rotary_stage}.query_map"] = ("Hkv D D", ("F32",))
        score[f"{rotary_stage}.key_map"] = ("Hkv D D", ("F32",))
        score[f"{rotary_stage}.singular_values"] = ("Hkv D", ("F64",))
    reservoir: dict[str, Spec] = {
        "key_post": ("Hkv N D", FLOATS),
        "query_post": ("Hkv N D", FLOATS),
        "value": ("Hkv N Dv", FLOATS),
    }
    clusters: dict[str, Spec] = {
        "centroids": ("Hkv C D", ("F32",)),
        "sizes": ("Hkv C", ("I64",)),
        "radius_mean": ("Hkv C", ("F32",)),
        "radius_p95": ("Hkv C", ("F32",)),
        "radius_max": ("Hkv C", ("F32",)),
        "value_mean": ("Hkv C Dv", ("F32",)),
        "inertia": ("Hkv", ("F64",)),
        "silhouette": ("Hkv", ("F64",)),
        "curve.counts": ("P", ("I64",)),
        "curve.radius": ("Hkv P", ("F32",)),
        "curve.query_norm_max": ("Hkv", ("F32",)),
        "curve.query_norm_p99": ("Hkv", ("F32",)),
    }
    for start in ("calibrated", "plusplus", "random"):
        clusters[f"warm_start.{start}_iterations"] = ("Hkv", ("I64",))
        clusters[f"warm_start.{start}_inertia"] = ("Hkv", ("F64",))
    codebook: dict[str, Spec] = {
        "key": ("Hkv C D", ("F32",)),
        "value": ("Hkv C Dv", ("F32",)),
        "spread": ("Hkv 2", ("F32",)),
        "sizes": ("Hkv C", ("I64",)),
        "code.query_map": ("Hkv D D", ("F32",)),
        "code.key_map": ("Hkv D D", ("F32",)),
        "code.singular_values": ("Hkv D", ("F64",)),
    }
    pair_measures = ("key_r2", "key_r2_unaligned", "value_r2", "value_r2_unaligned", "cost_as_is", "cost_aligned")
    cla: dict[str, Spec] = dict.fromkeys(pair_measures, ("L", ("F64",)))
    xcla: dict[str, Spec] = {"earlier": ("_", ("I64",)), "told": ("2", ("F64",)), "lost": ("2", ("F64",))}
    for kind, dim in (("key", "D"), ("value", "Dv")):
        xcla[f"{kind}.offset"] = (f"Hkv {dim}", ("F32",))
        xcla[f"{kind}.basis"] = (f"Hkv {dim} _", ("F32",))
        xcla[f"{kind}.back"] = (f"Hkv _ {dim}", ("F32",))
        xcla[f"{kind}.counts"] = ("3", ("I64",))
    fitted = {"moments": moments, "pca": pca, "score": score, "reservoir": reservoir}
    return {**fitted, "clusters": clusters, "codebook": codebook, "cla": cla, "xcla": xcla}


LAYER_TENSORS = _layer_tensors()
OPTIONAL_LAYER_TENSORS: dict[str, dict[str, Spec]] = {
    "cla": {name: spec for name, spec in LAYER_TENSORS["pca"].items() if name.startswith(("key_pre.", "key_post."))},
    "codebook": {
        "carry.sizes": ("P", ("I64",)),
        **{f"carry.{part}_{text}": ("Hkv P", ("F64",)) for part in ("key", "value") for text in ("fitted", "unseen")},
    },
}
"""Tensors that a layer has all of or none of: bases of keys that uptraining changed, how well codebooks carry over."""
STAGE_TENSORS: dict[str, dict[str, Spec]] = {
    "reservoir": {"token": ("N", ("I64",)), "position": ("N", ("I64",))},
    "xcla": {"angles": ("P", ("F64",))},
}
"""Tensors that a stage has once, not per layer."""
NAMED_TENSORS = {"cla": re.compile(r"weights\.[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")}
"""Tensors of any number and shape, in FLOATS: trained parameters, by the names of the model's that they replace."""

Header = dict[str, tuple[str, tuple[int, ...]]]
"""name -> (safetensors dtype, shape)."""


def layers_left_out(stage: str, names: Iterable[str], layers: Sequence[Layer]) -> set[int]:
    """Indices of the layers with a sliding window that a stage leaves out, by the names of its tensors."""
    if stage not in WITHOUT_WINDOWS:
        return set()
    return {layer.index for layer in layers if layer.window is not None} - indices_in(names)


def version_of(stages: Mapping[str, Iterable[str]], layers: Sequence[Layer], slim: bool = False) -> int:
    """The lowest schema version that has these stages, by the names of their tensors, and slim artifacts if need be."""
    without = any(layers_left_out(stage, names, layers) for stage, names in stages.items())
    least = SLIM_SINCE if slim else 3 if without else 1
    return max(least, *(STAGE_SINCE.get(name, 1) for name in ("moments", *stages)))


def check_stage(where: str, stage: str, header: Header, layers: Sequence[Layer]) -> None:
    """Compare the tensors of a stage's file with the schema.

    Raises:
        ArtifactError: the first missing, unexpected, wrongly shaped or wrongly typed tensor.
    """
    expected: dict[str, tuple[Spec, dict[str, int]]] = {
        name: (spec, {}) for name, spec in STAGE_TENSORS.get(stage, {}).items()
    }
    left_out = layers_left_out(stage, header, layers)
    for layer in layers:
        if layer.index in left_out:
            continue
        prefix = f"layers.{layer.index}."
        sizes = {"Hkv": layer.kv_heads, "D": layer.head_dim, "Dv": layer.value_dim, "L": len(layers)}
        specs = dict(LAYER_TENSORS[stage])
        optional = OPTIONAL_LAYER_TENSORS.get(stage, {})
        if any(prefix + name in header for name in optional):
            specs |= optional
        for name, spec in specs.items():
            expected[prefix + name] = (spec, sizes)

    for name in sorted(expected.keys() - header.keys()):
        raise ArtifactError(f"{where}: tensor {name} is missing: {_REMEDY}")
    for name in sorted(header.keys() - expected.keys()):
        if not (stage in NAMED_TENSORS and NAMED_TENSORS[stage].fullmatch(name)):
            raise ArtifactError(f"{where}: unexpected tensor {name}: {_REMEDY}")
        if header[name][0] not in FLOATS:
            raise ArtifactError(
                f"{where}: tensor {name} has dtype {header[name][0]}, expected {' or '.join(FLOATS)}: {_REMEDY}"
            )
    free: dict[str, int] = {}
    for name, ((symbols, dtypes), sizes) in expected.items():
        dtype, shape = header[name]
        if dtype not in dtypes:
            raise ArtifactError(f"{where}: tensor {name} has dtype {dtype}, expected {' or '.join(dtypes)}: {_REMEDY}")
        dims = symbols.split()
        wanted = tuple(int(dim) if dim.isdigit() else sizes.get(dim, free.get(dim, -1)) for dim in dims)
        fits = len(shape) == len(dims) and all(want in (-1, got) for want, got in zip(wanted, shape, strict=True))
        if not fits:
            raise ArtifactError(f"{where}: tensor {name} has shape {list(shape)}, expected [{symbols}]: {_REMEDY}")
        free |= {dim: size for dim, size in zip(dims, shape, strict=True) if dim not in sizes and dim != "_"}


_REMEDY = f"the file does not follow schema {SCHEMA_VERSION}; fetch or calibrate it again"
