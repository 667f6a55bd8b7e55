"""Every decoder that transformers has a configuration for, tiny and random, on all roads.

    python -m benchmarks.architectures                 # all, a few minutes on one core
    python -m benchmarks.architectures llama doge      # some, printed only

Each is tried in a process of its own. Within `compress`, `full`, and `loki` with every token kept, must give the tokens
of plain `generate()` on a left-padded batch, and logits within 1e-4 of their spread; `decode()` the tokens. Anything
else must be refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..shared.places import RESULTS
from .page import NOT_BUILT

SECONDS, AT_ONCE = 120, 2
STEPS = 12


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.architectures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="TYPE", help="model types of transformers  [default: all]")
    parser.add_argument("--output", type=Path, default=RESULTS / "architectures" / "decoders.json")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(every())):
        parser.error(f"{', '.join(unknown)}: no decoder of transformers has such a model type")
    import transformers

    import kvcal.calibrate.one_pass
    import kvcal.runtime.integration.contexts  # noqa: F401  (once, before the processes fork)

    rows = tried(options.names or every())
    if options.names:
        print(json.dumps(rows, indent=1))
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        written = json.dumps({"transformers": transformers.__version__, "rows": rows}, indent=1)
        options.output.write_text(written + "\n")
    faults = [name for name, row in rows.items() if "FAULT" in str(row)]
    print(f"{len(rows)} tried, faults: {', '.join(faults) or 'none'}")
    return bool(faults)


def every() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tried(names: list[str]) -> dict[str, dict[str, str]]:
    """By model type, what each road did."""
    waiting, running, rows = list(names), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                name = waiting.pop(0)
                sys.stdout.flush()
                if (process := os.fork()) == 0:
                    _child(name, Path(folder) / name)
                running[process] = (name, time.monotonic())
            time.sleep(0.02)
            for process, (name, began) in list(running.items()):
                if time.monotonic() - began > SECONDS:
                    os.kill(process, 9)
                if os.waitpid(process, os.WNOHANG)[0]:
                    del running[process]
                    found = Path(folder) / name
                    over = {"calibrates": f"FAULT: no end in {SECONDS} s, or the process died"}
                    rows[name] = json.loads(found.read_text()) if found.exists() else over
    return {name: rows[name] for name in names}


def _child(name: str, result: Path) -> None:
    """Never returns."""
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        result.write_text(json.dumps(attempt(name)))
    finally:
        os._exit(0)


def attempt(name: str) -> dict[str, str]:
    from kvcal.calibrate import calibrate
    from kvcal.calibrate.blocks import TokenBlocks
    from kvcal.runtime import compress, decode

    from .overrides import OVERRIDES
    from .tiny import VOCAB, build

    try:
        model = build(name, OVERRIDES.get(name, {}))
    except Exception as error:
        return {NOT_BUILT: _line(error)}
    generate, fails = _generator(model), ""
    try:
        expected = generate()
    except Exception as error:  # refused then, as a rule
        expected, fails = None, _line(error)
    ids, mask = _prompts()
    draw = torch.Generator().manual_seed(2)
    block = torch.randint(3, VOCAB, (2, 32), generator=draw, dtype=torch.int32)
    every_token = torch.ones(2, 32, dtype=torch.bool)
    blocks = TokenBlocks(block, every_token, every_token, {"id": "random", "num_tokens": 64})
    made: list[Any] = []

    def calibrates() -> str:
        made.append(calibrate(model, blocks, reservoir=32))
        return "yes"

    def compressed(method: str, **settings: Any) -> str:
        with compress(model, made[0] if made else None, method, **settings):
            return _compared(generate(), expected)

    def decodes() -> str:
        found = decode(model, ids, None, "full", max_new_tokens=STEPS, attention_mask=mask, eos_token_id=[VOCAB])
        return "equal" if torch.equal(found.tokens, expected.sequences) else "FAULT: other tokens"

    row = {"calibrates": _said(calibrates), "full": _said(lambda: compressed("full"))}
    if made:
        row["loki"] = _said(lambda: compressed("loki", basis="pca", select="head", rank=0.5, keep=1.0))
    row["decode()"] = _said(decodes)
    refused = all(said.startswith("refused") for said in row.values())
    return {NOT_BUILT: fails} if fails and not refused else row


def _prompts() -> tuple[torch.Tensor, torch.Tensor]:
    from .tiny import VOCAB

    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def _generator(model: Any) -> Callable[[], Any]:
    """Greedy decoding that nothing but the number of steps ends."""
    ids, mask = _prompts()
    for part in model.modules():
        if getattr(part, "generation_config", None) is not None:
            part.generation_config.forced_eos_token_id = None
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": [999], "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)


def _compared(found: Any, expected: Any) -> str:
    if not torch.equal(found.sequences, expected.sequences):
        return "FAULT: other tokens"
    pairs = zip(found.logits, expected.logits, strict=True)
    worst = max(float((ours - theirs).abs().max() / theirs.std()) for ours, theirs in pairs)
    return "equal" if worst < 1e-4 else f"FAULT: logits off by {worst:.0e} of their spread"


def _said(road: Callable[[], str]) -> str:
    from kvcal.artifacts import KvcalError

    try:
        return road()
    except KvcalError as error:
        return f"refused: {re.sub(r'^[^:]* [(]model type [^)]*[)]: ', '', str(error))}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAULT: {type(error).__name__} {str(error)[:100]} ({Path(last.filename).name}:{last.lineno})"


def _line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:160]


if __name__ == "__main__":
    sys.exit(main())
