"""The definition of `append` in plain torch, without reading a number on the host."""

import torch
from torch import Tensor

from ..codes import Calibrated, correction_of, encode_tokens
from ..scan.operands import PAGE, Tokens


def append(key_new: Tensor, value_new: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> None:
    """Writes into the caches, already checked; see `kvcal.kernels.append.append`."""
    written = lengths < key.shape[2]
    slots = lengths.clamp(0, key.shape[2] - 1).long()
    write(key, key_new, slots, written)
    write(value, value_new, slots, written)


def write(cache: Tensor, new: Tensor, slots: Tensor, written: Tensor) -> None:
    """`cache[b, :, slots[b]] = new[b]` in the sequences that are `written`."""
    batch = torch.arange(cache.shape[0], device=cache.device)
    cache[batch, :, slots] = torch.where(written.view(-1, 1, 1), new.to(cache.dtype), cache[batch, :, slots])


def append_coded(
    key_new: Tensor, value_new: Tensor, tokens: Tokens, tables: Calibrated, lengths: Tensor, bits: int
) -> None:
    """See `kvcal.kernels.append.append_coded`; the operands are checked."""
    coded, key, value = tokens.key_scale is not None, key_new.unsqueeze(2), value_new.unsqueeze(2)
    kept = {"key": key, "value": value, **encode_tokens(key, value, tables, bits, coded)}
    kept["reduced"] = kept.pop("code")
    for sequence, token in enumerate(lengths.tolist()):
        if not 0 <= token < tokens.capacity:
            continue
        page, at = (
            (sequence, token) if tokens.table is None else (int(tokens.table[sequence, token // PAGE]), token % PAGE)
        )
        for name, part in tokens.of_tokens().items():
            part[page, :, at] = kept[name][sequence, :, 0].to(part.dtype)
        if tokens.correction is not None and at % PAGE == PAGE - 1:
            of_page = {
                name: part[page : page + 1, :, at + 1 - PAGE : at + 1] for name, part in tokens.of_tokens().items()
            }
            found = correction_of(of_page["value"], of_page.get("value_scale"), of_page["codeword"], tables)
            for name, part in tokens.of_pages().items():
                part[page, :, at // PAGE] = found[name][0]
