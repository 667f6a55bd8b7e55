"""The definition of `append` in plain torch, without reading a number on the host."""

import torch
from torch import Tensor

from ..codes import Calibrated, correction_of, encode_tokens
from ..pages import PAGE
from ..pages.table import capacity_of
from ..scan.operands import Tokens


def append(
    key_new: Tensor, value_new: Tensor, key: Tensor, value: Tensor, lengths: Tensor, table: Tensor | None
) -> None:
    """Writes into the caches, already checked; see `kvcal.kernels.append.append`."""
    written = (lengths >= 0) & (lengths < capacity_of(key, table))
    slots = lengths.masked_fill(~written, 0).long()
    place = torch.arange(lengths.shape[0], device=key.device)
    if table is not None:
        # A sequence that is not written repeats the write of the first one that is, so no other page is touched.
        source = torch.where(written, place, written.int().argmax())
        key_new, value_new, slots, written = key_new[source], value_new[source], slots[source], written[source]
        pages = table[source].gather(1, (slots // PAGE).unsqueeze(1)).squeeze(1)
        place, slots = pages.masked_fill(~written, 0).long(), slots % PAGE
    write(key, key_new, place, slots, written)
    write(value, value_new, place, slots, written)


def write(cache: Tensor, new: Tensor, place: Tensor, slots: Tensor, written: Tensor) -> None:
    """`cache[place[b], :, slots[b]] = new[b]` in the sequences that are `written`."""
    cache[place, :, slots] = torch.where(written.view(-1, 1, 1), new.to(cache.dtype), cache[place, :, slots])


def append_coded(
    key_new: Tensor, value_new: Tensor, tokens: Tokens, tables: Calibrated, lengths: Tensor, bits: int,
    table: Tensor | None,
) -> None:  # fmt: skip
    """See `kvcal.kernels.append.append_coded`; the operands are checked."""
    coded, key, value = tokens.key_scale is not None, key_new.unsqueeze(2), value_new.unsqueeze(2)
    kept = {"key": key, "value": value, **encode_tokens(key, value, tables, bits, coded)}
    kept["reduced"] = kept.pop("code")
    for sequence, token in enumerate(lengths.tolist()):
        if not 0 <= token < capacity_of(tokens.key, table):
            continue
        page, at = (sequence, token) if table is None else (int(table[sequence, token // PAGE]), token % PAGE)
        for name, part in tokens.of_tokens().items():
            part[page, :, at] = kept[name][sequence, :, 0].to(part.dtype)
        if tokens.correction is not None and at % PAGE == PAGE - 1:
            of_page = {
                name: part[page : page + 1, :, at + 1 - PAGE : at + 1] for name, part in tokens.of_tokens().items()
            }
            found = correction_of(of_page["value"], of_page.get("value_scale"), of_page["codeword"], tables)
            for name, part in tokens.of_pages().items():
                part[page, :, at // PAGE] = found[name][0]
