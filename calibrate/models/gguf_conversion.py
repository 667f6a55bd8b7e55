"""A GGUF file written as a checkpoint folder, so that from there on it is loaded as any other model.

transformers reads GGUF slowly, and what it gives cannot be saved. Unpacked weights are products and sums of a block's
scales and small integers: float32 holds them, bfloat16 would round them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ...artifacts import KvcalError
from ...runtime import hub
from ...runtime.integration.checkpoint_folder import weights_of
from ...runtime.integration.checkpoint_json import check_config, check_heads, harmless
from .gguf_checks import ROPE_FACTORS, check_described
from .gguf_header import GgufHeader
from .gguf_reading import quick_reading

Progress = Callable[..., None]
"""Takes done, total and note=""."""
_DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""Pre-tokenizers, by llama.cpp's names, that transformers does not tell from GPT-2's, which joins digits."""
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""transformers' name -> GGUF's."""


def convert(folder: Path, file: str, header: GgufHeader, name: str, building: Path, progress: Progress) -> None:
    """Write config, tokenizer and weights of `folder / file` into the folder `building`.

    Args:
        folder: has nothing but the file: transformers looks at what lies beside it.
        name: of the file, for people.

    Raises:
        KvcalError: transformers cannot read it, or would read another model out of it.
    """
    from transformers import AutoConfig, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": file, "trust_remote_code": False, "local_files_only": True}
    total = len(header.tensors)
    with quick_reading(lambda done: progress(done, total, "unpacking")):
        progress(0, total, "reading")
        with _said(name, header, "metadata"):
            config = harmless(AutoConfig.from_pretrained(folder, **place))
        check_config(Path(name), config.to_dict())
        check_heads(name, config)
        with _said(name, header, "metadata"):
            _set_rope(config, folder / file, header, name)
            weights = weights_of(config)
        if getattr(config, "is_encoder_decoder", False):
            raise KvcalError(f"{name}: {config.model_type} is an encoder-decoder: only decoders are supported")
        if weights is None:
            raise KvcalError(
                f"{name}: transformers can build no {config.model_type} decoder of its metadata: give its original "
                "checkpoint"
            )
        check_described(header, config, weights, name)
        with _said(name, header, "tokenizer"):
            tokenizer = _as_stated(AutoTokenizer.from_pretrained(folder, **place), header)
        with _said(name, header, "weights"):
            model = _whole_model(folder, config, place, name)
    progress(total, total, "writing")
    _set_ends(model, header)
    # Under torchrun transformers would write on rank 0 only; the rank that converts is the first to arrive.
    model.should_save_on_this_rank = lambda *_, **__: True
    try:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # what tokenizers raises for a full disk
        raise OSError(errno.EIO, hub.one_line(error)) from error


def _whole_model(folder: Path, config: Any, place: dict[str, Any], name: str) -> Any:
    """The model on the CPU, in the narrowest dtype that holds its weights, with nothing quantised about it."""
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if packed := getattr(transformers, "GgufConfig", None):  # otherwise kernels are fetched and run where it can
        place = {**place, "quantization_config": packed(dequantize=True)}
    read, report = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, **place
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise KvcalError(f"{name}: {len(missing)} weights are not in it, e.g. {missing[0]}: get another file")
    dtype = _narrowest(read.parameters())
    state = read.to(dtype).state_dict()
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model


def _narrowest(weights: Iterable[Tensor]) -> torch.dtype:
    """bfloat16 or float16 where that is exact, as for a file that was written in it; otherwise float32."""
    exact = [torch.bfloat16, torch.float16]
    for weight in weights:
        exact = [dtype for dtype in exact if torch.equal(weight.to(dtype).float(), weight)]
    return exact[0] if exact else torch.float32


def _set_rope(config: Any, file: Path, header: GgufHeader, name: str) -> None:
    """Set Llama 3.1's rotary scaling: GGUF holds only the resulting divisors, and transformers does not read those."""
    if all(tensor.name != ROPE_FACTORS for tensor in header.tensors):
        return
    import gguf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == ROPE_FACTORS)
    divisors = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).flatten()
    plain = dict(config.rope_parameters)
    scaled = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config.rope_parameters = plain | scaled
    found = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    size = 2 * len(found)
    unscaled = plain["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    if len(divisors) != len(found) or not torch.allclose(found.double() * divisors, unscaled, rtol=1e-4):
        raise KvcalError(f"{name}: {ROPE_FACTORS} is no rotary scaling of Llama 3's kind: give its original checkpoint")


def _as_stated(tokenizer: Any, header: GgufHeader) -> Any:
    """The tokenizer with the file's special tokens and treatment of digits, which transformers may pass over."""
    metadata = header.metadata
    for token, key in _SPECIAL_TOKENS.items():
        if (number := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(tokenizer, f"{token}_token", tokenizer.convert_ids_to_tokens(number))
    if metadata.get("tokenizer.ggml.model") == "gpt2" and metadata.get("tokenizer.ggml.pre") in _DIGIT_BY_DIGIT:
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
    return tokenizer


def _set_ends(model: Any, header: GgufHeader) -> None:
    """Let generation end where a chat's turn ends, too."""
    ends = [header.metadata.get(f"tokenizer.ggml.{which}_token_id") for which in ("eos", "eot")]
    token_ids = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    if len(token_ids) > 1:
        model.generation_config.eos_token_id = token_ids


@contextmanager
def _said(name: str, header: GgufHeader, part: str) -> Iterator[None]:
    """Whatever a file makes transformers, gguf and tokenizers raise, in one line: nothing of ours runs inside."""
    import transformers

    try:
        yield
    except (KvcalError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError as error:
        raise KvcalError(f"{name}: does not fit into memory unpacked: use a machine with more, or a smaller") from error
    except BaseException as error:  # a tokenizer's parser is in Rust, whose panics are no Exception
        raise KvcalError(
            f"{name}: its {part} cannot be read ({hub.one_line(error)}): transformers {transformers.__version__} may "
            f"not know the architecture {header.architecture!r} as GGUF: give its original checkpoint"
        ) from error
