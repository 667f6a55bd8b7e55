"""What a calibration pass runs: a model and token blocks, given as such or by name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

from ..artifacts import KvcalError
from ..runtime.wrapped import unwrapped
from .blocks import TokenBlocks, make_blocks
from .data import open_data
from .defaults import NUM_TOKENS
from .models import check_seq_len, default_seq_len, load_model
from .text_data import TextData

TextNames: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""What `open_data` finds: an alias, a file, a folder, a Hub id, or a list of these."""


class Named(TypedDict, total=False):
    """How a model and text that are given by name are loaded and cut; refused beside those that are not."""

    device: str
    """Of a named model, see `load_model`; "auto" by default."""
    dtype: str
    """Of a named model, see `load_model`; "auto" by default."""
    tokenizer: Any
    """Of a model that is given as a module; a named one brings its own."""
    split: str
    """Of the text, see `open_data`."""
    text_column: str
    """Of the text, see `open_data`."""
    num_tokens: int
    """Tokens to run, BOS and separators included; 131072 by default, fewer where the text ends before."""
    seq_len: int
    """Tokens per block, no fewer than contexts will have; the model's context by default, 8192 at most."""


@dataclass(frozen=True)
class Inputs:
    model: Any
    """In eval mode, without the modules around it."""
    blocks: TokenBlocks
    id: str
    """How the artifact names the model."""
    revision: str | None


def load_inputs(model: Any, data: TokenBlocks | TextNames, named: Named, seed: int) -> Inputs:
    """Load what is given by name, text before the model, which takes longer.

    Args:
        model: see `load_model`, or a transformers decoder.
        seed: of the order in which several files are mixed.

    Raises:
        KvcalError: not found, not loadable, too little text, or an option for what was not given by name.
    """
    _check_names(named)
    if isinstance(data, TokenBlocks):
        _refuse(named, ("tokenizer", "split", "text_column", "num_tokens", "seq_len"), "token blocks")
    elif not isinstance(data, (str, os.PathLike, list, tuple)):
        raise KvcalError(f"data: a {type(data).__name__}: name text, or give what make_blocks(documents, …) makes")
    else:
        text = open_data(data, named.get("split"), text_column=named.get("text_column"), seed=seed)
    if isinstance(model, (str, os.PathLike)):
        _refuse(named, ("tokenizer",), "a named model")
        loaded = load_model(model, named.get("device", "auto"), named.get("dtype", "auto"))
        model, tokenizer, source = loaded.model, loaded.tokenizer, loaded.source
        name, revision = source.id, source.revision
    else:
        _refuse(named, ("device", "dtype"), "a model that is loaded already")
        model, tokenizer, name, revision = unwrapped(model), named.get("tokenizer"), "unnamed", None
    if isinstance(data, TokenBlocks):
        return Inputs(model, data, name, revision)
    if tokenizer is None:
        raise KvcalError("data: text is cut into the model's tokens: give its tokenizer=, or name the model, too")
    blocks = cut(text, tokenizer, model, named.get("num_tokens", NUM_TOKENS), named.get("seq_len"))
    return Inputs(model, blocks, name, revision)


def cut(text: TextData, tokenizer: Any, model: Any, num_tokens: int, seq_len: int | None) -> TokenBlocks:
    """Blocks of a text, by `make_blocks`.

    Args:
        seq_len: tokens of a block; None: as long as the model's context, 8192 at most, and shorter where the text is.

    Raises:
        KvcalError: longer than the model's context, or too little text.
    """
    length = default_seq_len(model) if seq_len is None else seq_len
    check_seq_len(length, model.config)
    return make_blocks(text, tokenizer, num_tokens, length, source=text.source, shorten=seq_len is None)


def _check_names(named: Named) -> None:
    for name in named:
        if name not in Named.__annotations__:
            near = difflib.get_close_matches(name, Named.__annotations__, n=1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(Named.__annotations__)}"
            raise KvcalError(f"calibrate has no parameter {name!r}: {known}")


def _refuse(named: Named, options: Sequence[str], what: str) -> None:
    given = [option for option in options if option in named]
    if given:
        raise KvcalError(f"{', '.join(given)}: has no meaning beside {what}: leave it out")
