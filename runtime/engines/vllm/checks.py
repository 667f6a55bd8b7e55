"""Whether an engine can do what was asked: said before it starts, in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ....artifacts import KvcalError
from ....kernels.pages import PAGE
from ...loading import check_model
from ...methods import Method
from .config import Asked

VERSION = (0, 32)
"""The minor version of vLLM whose interfaces these are: they move from one to the next."""
PLATFORMS = ("cpu", "cuda")
WITHOUT_DRAFT_MODEL = ("ngram", "suffix")
"""Methods of speculative decoding that guess from text."""


def check_version(found: str) -> None:
    """Raises KvcalError: vLLM is of another minor version."""
    parts = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if parts != VERSION:
        wanted = ".".join(map(str, VERSION))
        raise KvcalError(
            f"vLLM {found} is installed, and this version of kvcal was made for {wanted}: pip install 'kvcal[vllm]'"
        )


def check_engine(asked: Asked, vllm_config: Any, platform: str) -> dict[int, Method]:
    """The method of each layer of full attention.

    Raises:
        KvcalError: names what does not fit, and what to do.
    """
    if platform not in PLATFORMS:
        raise KvcalError(f"vLLM runs on {platform}: kvcal's backend has {' and '.join(PLATFORMS)}")
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    if asked.artifact is not None:
        check_model(asked.artifact, SimpleNamespace(config=model.hf_config))
    if model.use_mla:
        raise KvcalError(f"{model.model}: its attention is latent (MLA), which keeps no keys and values of heads")
    if model.runner_type != "generate" or model.is_encoder_decoder:
        raise KvcalError(f"{model.model}: vLLM runs it as something else than a decoder that generates text")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in WITHOUT_DRAFT_MODEL:
        raise KvcalError(
            f"speculative decoding by {speculative.method}: its draft model has layers of its own, of which the "
            f"artifact knows nothing: take {' or '.join(WITHOUT_DRAFT_MODEL)}"
        )
    if cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise KvcalError(
            f"kv_cache_dtype {cache.cache_dtype}: kvcal keeps keys and values in the model's dtype, or (spectral, "
            "rows=8) in 8 bits of its own: leave it out"
        )
    if cache.user_specified_block_size and cache.block_size % PAGE:
        raise KvcalError(f"block_size {cache.block_size}: give a multiple of {PAGE}, or leave it out")
    for name, here in {
        "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
        "attention in both directions within a prompt": model.is_mm_prefix_lm,
        "attention to a window beside the prompt (R-SWA)": model.rswa_window is not None,
        "layers that read other layers' keys and values": getattr(model.hf_text_config, "num_kv_shared_layers", 0),
    }.items():
        if here:
            raise KvcalError(f"{model.model}: {name}: kvcal's backend has nothing for it: leave kvcal out")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise KvcalError(f"{name} {getattr(parallel, name)}: a sequence's pages have to lie on one worker: give 1")
    text = model.hf_text_config
    layers = full_layers(text)
    if not layers:
        raise KvcalError(f"{model.model}: no layer sees all tokens, and others stay vLLM's: leave kvcal out")
    methods = asked.methods(layers, text.num_hidden_layers)
    heads, head_dim = model.get_total_num_kv_heads(), model.get_head_size()
    for layer, method in methods.items():
        asked.policy(method, layer, head_dim, heads)
    return methods


def full_layers(config: Any) -> list[int]:
    """Layers whose attention sees every token; those with a window, or with another kind of state, stay vLLM's."""
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, (list, tuple)):
        return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return [] if windowed else list(range(config.num_hidden_layers))
