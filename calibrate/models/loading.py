"""Load a model and its tokenizer."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...artifacts import KvcalError
from ...artifacts.packages import require
from ...artifacts.shown import Shown
from ...runtime import hub
from ...runtime.cla.file import NAME as CLA_FILE
from ..dtypes import dtype_name
from . import aliases
from .source import ModelSource, has_tokenizer, resolve_model

_ENTRANCES = ("transformers.models.auto.", "transformers.modeling_utils", "transformers.utils.")
"""Modules that would raise for wrong arguments of ours."""


@dataclass(frozen=True, repr=False)
class LoadedModel(Shown):
    model: Any
    """In eval mode, without gradients."""
    tokenizer: Any
    source: ModelSource
    exact: bool = False
    """It has its checkpoint's numbers, none of them rounded; False: some are, or that is not known."""

    def facts(self) -> dict[str, str]:
        dtype, device = str(self.model.dtype).removeprefix("torch."), str(self.model.device)
        return {"id": self.source.id, "type": type(self.model).__name__, "dtype": dtype, "device": device}


def load_model(
    spec: str | os.PathLike[str],
    device: str = "auto",
    dtype: str = "auto",
    placement: Callable[[Any], dict[str, Any]] | None = None,
    progress: Callable[..., None] | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        spec: see `resolve_model`.
        device: auto (CUDA if there is one, under torchrun the one of this process's number), cpu, cuda or cuda:N.
        dtype: auto (float32 on CPU, the checkpoint's own on CUDA), float32 (or fp32), bfloat16 (bf16) or float16
            (fp16, half).
        placement: (config) -> more options of `from_pretrained`, which say on which devices the model lies; `device`
            then only decides about the dtype. See `calibrate.placement`.
        progress: called as progress(done, total, note=...) while a GGUF file is converted, which is done once.

    Raises:
        KvcalError: not found, not loadable, or no such device or dtype.
    """
    require("transformers", to="load a model")
    where = _device(device)
    name = dtype_name(dtype)
    if name == "auto" and where.type == "cpu":
        name = "float32"  # bfloat16 on a CPU makes the numbers depend on the batch size far beyond 1e-5
    wanted = name if name == "auto" else getattr(torch, name)
    source = resolve_model(spec)
    if source.gguf:
        from .converted import converted

        with _quiet(progress=False):
            source = dataclasses.replace(source, folder=converted(source.gguf, source.id, progress))

    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ...runtime.integration.checkpoint_folder import CHECKED, check_folder, check_size
    from ...runtime.integration.checkpoint_json import check_heads, harmless
    from .same_weights import is_exact

    place = str(source.folder or source.id)
    options: dict[str, Any] = {"trust_remote_code": False}
    if source.folder is None:
        options["revision"] = source.revision
    with _quiet(progress=source.folder is None):
        downloaded = source.folder or hub.fetch(source.id, source.revision, CHECKED)
        if downloaded != aliases.DEMO_FOLDER:  # its files are ours, and links with some installers
            check_folder(downloaded)
        with _user_errors(source, "config.json"):
            config = harmless(AutoConfig.from_pretrained(place, **options))
            check_heads(downloaded / "config.json", config)
            check_size(downloaded, config)
        if getattr(config, "is_encoder_decoder", False):
            raise KvcalError(
                f"model {source.id}: {config.model_type} is an encoder-decoder: only decoders are supported"
            )
        with _user_errors(source, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(place, config=config, **options)
        if not has_tokenizer(downloaded):
            raise KvcalError(f"model {source.id}: the repository has no tokenizer (tokenizer.json): choose another one")
        placed = placement(config) if placement else {}
        missing = []
        with _user_errors(source, "weights"):
            if (downloaded / CLA_FILE).is_file():
                if placed:
                    raise KvcalError(f"model {source.id}: layers that share keys cannot be spread over devices")
                model = _shared(downloaded, wanted)
            else:
                model, report = AutoModelForCausalLM.from_pretrained(
                    place, config=config, dtype=wanted, output_loading_info=True, **options, **placed
                )
                missing = sorted(report["missing_keys"])
    if missing:
        raise KvcalError(
            f"model {source.id}: {len(missing)} weights are not in its files, e.g. {missing[0]}: "
            "the checkpoint is incomplete, or not of a causal language model"
        )
    try:
        model = model if placed else model.to(where)
    except torch.OutOfMemoryError as error:
        raise KvcalError(f"model {source.id} does not fit on {where} as {model.dtype}: give --device cpu") from error
    exact = is_exact(downloaded, model.dtype)
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, source, exact)


def _shared(folder: Path, wanted: Any) -> Any:
    """A model that `calibrate export --cla` wrote: transformers alone would make up the projections it lacks."""
    from ...runtime.cla.checkpoint import load_cla

    return load_cla(folder, dtype=None if wanted == "auto" else wanted)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise KvcalError(f"unknown device {name!r}: give auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise KvcalError(f"device {name}: this machine has {count} usable CUDA devices: give another, or --device cpu")
    return device


@contextmanager
def _user_errors(source: ModelSource, part: str) -> Iterator[None]:
    """Turn what a faulty checkpoint makes transformers raise into one line; bugs pass."""
    from safetensors import SafetensorError

    try:
        yield
    except KvcalError:
        raise
    except BaseException as error:
        # A tokenizer's parser is in Rust, whose panics are no Exception. Our own arguments are constant; while weights
        # are loaded, what a model's constructor raises is the config's fault.
        panic = type(error).__name__ == "PanicException"
        if not (isinstance(error, Exception) or panic):
            raise
        # Damaged .bin files and shapes that contradict the config come as bare RuntimeError.
        messages = ("PytorchStreamReader", "ignore_mismatched_sizes", "can't allocate memory")
        faults = (OSError, ValueError, ImportError, EOFError, SafetensorError, pickle.UnpicklingError, MemoryError)
        file_s_fault = part != "weights" or isinstance(error, faults) or any(text in str(error) for text in messages)
        if not (file_s_fault or _in_a_constructor(error)):
            raise
        reason = "shapes differ from config.json" if messages[1] in str(error) else hub.one_line(error)
        raise KvcalError(
            f"model {source.id}: its {part} cannot be loaded from {source.folder or 'the Hub'} ({reason}): "
            "check that it is complete and a causal language model that this transformers version knows"
        ) from error


def _in_a_constructor(error: BaseException) -> bool:
    """Whether it was raised where transformers builds a model from its config alone."""
    place = error.__traceback__
    while place is not None:
        module = str(place.tb_frame.f_globals.get("__name__"))
        if module.startswith("transformers.") and not module.startswith(_ENTRANCES):
            return True
        place = place.tb_next
    return False


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Silence transformers' warnings, and its progress bars unless `progress`; as before on leaving."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL + 1)  # errors quote the files, terminal escapes and all
    if not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars and not progress:
            logging.enable_progress_bar()
