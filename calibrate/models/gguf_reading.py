"""Changes to how transformers reads GGUF files, in force while it reads one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quick_reading(unpacked: Callable[[int], None]) -> Iterator[None]:
    """While transformers reads a GGUF file: parsed once instead of five times, progress to us, no kernels fetched."""
    import gguf
    import numpy as np
    import transformers.modeling_gguf_pytorch_utils as reader

    class Reader(gguf.GGUFReader):
        # Slices of a plain view of the file cost half of those of a memmap, and there are millions.
        data = property(lambda self: self._plain, lambda self, mapped: setattr(self, "_plain", np.asarray(mapped)))

    def told(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            unpacked(done)
            yield tensor

    parsed = functools.cache(Reader)
    changes: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", lambda path, *_: parsed(str(path))),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (reader, "tqdm", told),
    ]
    try:
        import transformers.integrations.gguf.kernels as kernels  # since 5.2x

        changes.append((kernels, "is_kernels_available", lambda *_, **__: False))
    except ImportError:
        pass
    before = [(module, key, getattr(module, key)) for module, key, _ in changes if hasattr(module, key)]
    try:
        for module, key, value in changes:
            if hasattr(module, key):
                setattr(module, key, value)
        yield
    finally:
        for module, key, value in before:
            setattr(module, key, value)
