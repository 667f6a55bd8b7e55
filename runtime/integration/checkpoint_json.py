"""A checkpoint's `config.json` and `tokenizer_config.json`: refuses entries that mislead transformers or fail late."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...artifacts import KvcalError

_MOST_LEVELS = 60
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "num_key_value_heads", "num_kv_heads", "num_heads", "n_head", "n_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "head_dim", "v_head_dim")
_SIZES = {
    **dict.fromkeys(_LAYERS, (1, 10_000)),
    **dict.fromkeys(_HEADS, (1, 1 << 16)),
    **dict.fromkeys(_EXPERTS, (0, 1 << 16)),
    **dict.fromkeys(_WIDTHS, (1, 1 << 24)),
    "intermediate_size": (0, 1 << 24),
    "num_labels": (0, 1 << 20),
    "vocab_size": (1, 1 << 28),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), (1, 1 << 40)),
}
"""Name -> least and most. With more, a constructor would run for days before any error."""
_ATTENTION = ("eager", "sdpa")
_EXPERTS_LOOPS = ("eager", "batched_mm", "grouped_mm")
_ONLINE = ("hf-hub:", "hf_hub:", "local-dir:")
PLAIN = re.compile(r"[\w+-][\w.+-]*", re.ASCII)
"""What a file's name in a checkpoint is made of."""
_TOKENIZER = re.compile(r"(?!Auto)\w*(Tokenizer\w*|Backend)", re.ASCII)


def check_config(path: Path, body: Any) -> None:
    """Raise KvcalError for impossible sizes, for other files in the place of these, and for models to be fetched."""

    def check(name: str, value: Any) -> str | None:
        text = value if isinstance(value, str) else ""
        if name in _SIZES:
            return _no_size(value, *_SIZES[name])
        if name in ("dtype", "torch_dtype"):
            return "expected a dtype, e.g. bfloat16" if text and not _is_dtype(text) else None
        if name == "transformers_weights":
            return None if value is None or is_plain(value) else "expected a file in this folder"
        if name == "configuration_files":
            return "another config instead of this one: rename the one that is meant to config.json" if value else None
        if name == "tokenizer_class":
            return _not_a_tokenizer(value)
        if name in ("backbone", "use_pretrained_backbone") or (name == "architecture" and text.startswith(_ONLINE)):
            return "another model, that would be fetched" if value and not isinstance(value, dict) else None
        return None

    _walk(path, body, check)


def check_tokenizer(path: Path, body: Any) -> None:
    """Raise KvcalError for files outside of the checkpoint, to be read or written, and for what is no tokenizer."""

    def check(name: str, value: Any) -> str | None:
        if name == "tokenizer_class":
            return _not_a_tokenizer(value)
        if name == "init_inputs" and value:
            return "arguments without names: save the tokenizer again"
        if name.endswith("_file") and isinstance(value, str) and _leads_out(path.parent, value):
            return "a file outside of this folder"
        return None

    _walk(path, body, check)
    templates = body.get("chat_template")
    named = templates.keys() if isinstance(templates, dict) else templates if isinstance(templates, list) else ()
    for template in named:
        name = template.get("name") if isinstance(template, dict) else template
        if not is_plain(name):
            raise KvcalError(f"{path}: chat_template: the name {str(name)[:80]!r} is none of a file: get another one")


def harmless(config: Any) -> Any:
    """The config, changed: it asks for no attention and no expert kernels but torch's, and names no code to run.

    transformers takes both kernels from a config, and fetches and runs what it names. None lets transformers choose.
    """
    for part in _configs(config):
        for name in ("auto_map", "fusion_config"):  # the latter changes classes for all models of the process
            part.__dict__.pop(name, None)
        for name, allowed in (("_attn_implementation", _ATTENTION), ("_experts_implementation", _EXPERTS_LOOPS)):
            if getattr(part, name, None) not in allowed:
                setattr(part, name, {"": None})  # of this config, not of those inside it
    return config


def check_heads(where: object, config: Any) -> None:
    """Raise KvcalError for heads that cannot be grouped."""
    text = config.get_text_config()
    heads, groups = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if type(heads) is int and type(groups) is int and groups > 0 and heads % groups:
        raise KvcalError(f"{where}: {heads} attention heads cannot share {groups} KV heads: get a whole config.json")


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_diff_dict") and value is not config:
            yield from _configs(value)


def _walk(path: Path, body: Any, check: Callable[[str, Any], str | None]) -> None:
    """Raise KvcalError for the first entry, at any depth, of which `check` says what is wrong."""
    pending: list[tuple[str, Any, int]] = [("", body, 0)]
    while pending:
        name, value, level = pending.pop()
        if level > _MOST_LEVELS:
            raise KvcalError(f"{path}: more than {_MOST_LEVELS} levels: get the file of another checkpoint")
        if problem := check(name, value):
            raise KvcalError(f"{path}: {name} is {str(value)[:80]!r}: {problem}")
        if isinstance(value, dict):
            pending += [(key, item, level + 1) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [("", item, level + 1) for item in value if isinstance(item, (dict, list))]


def _leads_out(folder: Path, name: str) -> bool:
    """Whether `name` exists outside of the folder. Many checkpoints name files of the machine that they come from."""
    try:
        return Path(name).exists() and not Path(name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def _not_a_tokenizer(value: Any) -> str | None:
    good = value is None or (isinstance(value, str) and _TOKENIZER.fullmatch(value))
    return None if good else "expected the class of a tokenizer"


def is_plain(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= 200 and PLAIN.fullmatch(name) is not None


def _no_size(value: Any, least: int, most: int) -> str | None:
    """What is wrong with a size, or a list of them by layer, where a layer may have none; None: nothing."""
    if isinstance(value, list):
        good, expected = all(_is_number(size, 0, most) for size in value), f"0 to {most} for each layer"
    else:
        good, expected = isinstance(value, dict) or _is_number(value, least, most), f"{least} to {most}"
    return None if good else f"expected a whole number from {expected}"


def _is_number(value: Any, least: int, most: int) -> bool:
    return value is None or (type(value) is int and least <= value <= most)


def _is_dtype(name: str) -> bool:
    import torch

    return name == "auto" or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
