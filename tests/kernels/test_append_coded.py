"""append_coded: a token's codeword, codes and rows, and the correction of a page that it fills, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compiling import compiled
from scan_problem import PAGE, Problem, by_head, drawn, in_pages

from kvcal.kernels.append import append_coded
from kvcal.kernels.codes import Calibrated, correction_of, decode, encode_tokens, rotation
from kvcal.kernels.scan import Tokens

CAPACITY, CODEWORDS = 4 * PAGE, 6
LENGTHS = torch.tensor([PAGE - 1, 10, CAPACITY, 3 * PAGE - 1], dtype=torch.int32)
"""Two of the tokens fill a page, one has no room."""
FORMS = {
    "4 bits": {},
    "2 bits, 32 of 40 dimensions": {"bits": 2, "head_dim": 40, "rank": 32, "value_dim": 24},
    "rows of 8 bits": {"rows": 8, "value_dim": 12},
    "codewords of float32": {"rounded": False},
    "codewords of float32, rows of 8 bits, wider values": {"rounded": False, "rows": 8, "value_dim": 24},
    "8 bits, bfloat16": {"bits": 8, "dtype": torch.bfloat16},
}


def problem(form: str) -> tuple[Problem, Calibrated, torch.Tensor, torch.Tensor]:
    """(what is held, calibrated tables, new keys, new values)"""
    made = drawn([PAGE] * 4, capacity=CAPACITY, codewords=CODEWORDS, **FORMS[form])
    random = torch.Generator().manual_seed(1)
    width, values = made.query.shape[-1], made.tokens.value.shape[-1]
    tables = Calibrated({
        "key": made.tables.key, "value": made.tables.value, "half": torch.randn(2, 1, CODEWORDS, generator=random),
        "inverse": torch.rand(2, 2, 1, 1, generator=random) + 0.5, "key_map": made.tables.query_map,
        "turn_key": rotation(width).float(), "turn_value": rotation(values).float(),
        "head": torch.arange(2).unsqueeze(1),
    })  # fmt: skip
    key, value = (torch.randn(4, 2, dims, generator=random).to(made.query.dtype) for dims in (width, values))
    return made, tables, key, value


def copied(tokens: Tokens) -> Tokens:
    held = {**tokens.of_tokens(), **tokens.of_pages()}
    return Tokens(**{name: by_head(part.clone()) for name, part in held.items()})


@pytest.mark.parametrize("backend", ["triton", "numba", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_a_token_is_kept_as_it_is_encoded(form, backend):
    made, tables, key, value = problem(form)
    bits, tokens = FORMS[form].get("bits", 4), copied(made.tokens)
    append_coded(key, value, tokens, tables, LENGTHS, bits=bits, backend=backend)
    coded = "rows" in FORMS[form]
    kept = encode_tokens(key.unsqueeze(2), value.unsqueeze(2), tables, bits, coded)
    expected = copied(made.tokens)
    written = {"key": key.unsqueeze(2), "value": value.unsqueeze(2), **kept, "reduced": kept["code"]}
    for sequence, token in enumerate(LENGTHS.tolist()):
        for name, part in expected.of_tokens().items() if token < CAPACITY else ():
            part[sequence, :, token] = written[name][sequence, :, 0]
    for sequence, page in ((0, 0), (3, 2)):
        of = {
            name: part[sequence : sequence + 1, :, page * PAGE :][:, :, :PAGE]
            for name, part in expected.of_tokens().items()
        }
        found = correction_of(of["value"], of.get("value_scale"), of["codeword"], tables)
        for name, part in expected.of_pages().items():
            part[sequence, :, page] = found[name][0]
    for name, part in {**expected.of_tokens(), **expected.of_pages()}.items():
        found = getattr(tokens, name)
        # numba adds up in another order: one number of all may lie between two levels, and get the other one.
        assert (found != part).sum() <= (backend == "numba" and name != "codeword"), name


def test_what_is_kept_means_the_token():
    """The nearest codeword, written down; and of 8 bits for everything what is kept gives the token back."""
    _, tables, key, value = problem("rows of 8 bits")
    kept = encode_tokens(key.unsqueeze(2), value.unsqueeze(2), tables, 8, True)
    for sequence in range(4):
        for head in range(2):
            inverse = tables["inverse"][head].flatten()
            by = [
                tables["half"][head, 0, word] - inverse[0] * key[sequence, head] @ tables["key"][head, word]
                - inverse[1] * value[sequence, head] @ tables["value"][head, word]
                for word in range(CODEWORDS)
            ]  # fmt: skip
            assert int(kept["codeword"][sequence, head]) == int(torch.stack(by).argmin())
    words = kept["codeword"].squeeze(-1).long()
    for name, token in (("key", key), ("value", value)):
        rest = decode(kept[name], kept[f"{name}_scale"].squeeze(-1), 8) @ tables[f"turn_{name}"]
        again = (rest + tables[name][tables["head"], words]).squeeze(2)
        assert (again - token).norm() < 0.01 * token.norm()


@pytest.mark.parametrize("backend", ["triton", "numba", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_pages_in_any_order(form, backend):
    made, tables, key, value = problem(form)
    bits, expected = FORMS[form].get("bits", 4), copied(made.tokens)
    append_coded(key, value, expected, tables, LENGTHS, bits=bits, backend=backend)
    tokens, table = in_pages(made.tokens)
    others = torch.ones(len(tokens.key), dtype=torch.bool).index_fill(0, table.flatten().long(), False)
    before = {name: part[others].clone() for name, part in {**tokens.of_tokens(), **tokens.of_pages()}.items()}
    append_coded(key, value, tokens, tables, LENGTHS, bits=bits, table=table, backend=backend)
    ordered = tokens.ordered(table)
    for name, part in {**ordered.of_tokens(), **ordered.of_pages()}.items():
        assert torch.equal(part, getattr(expected, name)), name
        assert torch.equal(getattr(tokens, name)[others].view(torch.uint8), before[name].view(torch.uint8)), name


def test_operands_that_do_not_fit_are_named():
    made, tables, key, value = problem("4 bits")
    with pytest.raises(ValueError, match=r"key_new: received \[4, 2, 8\]"):
        append_coded(key[..., :8], value, made.tokens, tables, LENGTHS, bits=4)
    with pytest.raises(ValueError, match="expected codes"):
        append_coded(key, value, replace(made.tokens, codeword=None), tables, LENGTHS, bits=4)
    with pytest.raises(ValueError, match="received 8 for 8 bytes of a code"):
        append_coded(key, value, made.tokens, tables, LENGTHS, bits=8)
    with pytest.raises(ValueError, match=r"received torch\.int64, expected int32"):
        append_coded(key, value, made.tokens, tables, LENGTHS.long(), bits=4)
    apart = replace(made.tokens, key=torch.nn.functional.pad(made.tokens.key, (0, 1))[..., :-1])
    for refused in ((key.half(), value.half(), made.tokens), (key, value, apart)):
        with pytest.raises(ValueError, match="'numba' takes float32"):
            append_coded(*refused, tables, LENGTHS, bits=4, backend="numba")


def test_nothing_is_spilled_and_capacities_compile_nothing_anew():
    launches = compiled("""
import torch
from scan_problem import drawn, in_pages
from kvcal.kernels.append import append_coded
from kvcal.kernels.codes import Calibrated, rotation
turn, one = rotation(128).float(), torch.ones(2, dtype=torch.int32)
for rows in (16, 8):
    for capacity in (256, 8192):
        made = drawn([128] * 2, heads=2, head_dim=128, rank=64, bits=2, rows=rows, dtype=torch.bfloat16, codewords=256,
                     capacity=capacity)
        tables = Calibrated(key=made.tables.key, value=made.tables.value, half=torch.zeros(2, 1, 256),
                      inverse=torch.ones(2, 2, 1, 1), key_map=made.tables.query_map, turn_key=turn, turn_value=turn)
        new = torch.zeros(2, 2, 128).bfloat16()
        append_coded(new, new, made.tokens, tables, one, bits=2, backend="triton")
        tokens, table = in_pages(made.tokens)
        append_coded(new, new, tokens, tables, one, bits=2, table=table, backend="triton")
""")
    assert all(launch["stack"] == 0 for launch in launches), launches
    assert len(launches) == 8 and len({launch["hash"] for launch in launches}) == 4
