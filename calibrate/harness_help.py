"""What `--model_args` takes, for the harness's `--help`."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

from ..runtime import METHODS


def arguments(of_the_harness: Sequence[str]) -> str:
    """
    Args:
        of_the_harness: names that are handed on to lm_eval's own model.
    """
    lines = [
        "--model kvcal: a model whose keys and values are held by a compressed cache. Its --model_args, NAME=VALUE,…,",
        "or a JSON object where a value has commas of its own:",
        "  pretrained=MODEL     alias, Hub id, folder or GGUF file, as `calibrate` takes them",
        "  artifact=ARTIFACT    folder or Hub id of what `calibrate pca` made; for the methods that need one",
        *_wrapped(
            "  method=METHOD        ",
            f"{', '.join(METHODS)}; plan: as the artifact's plan.json says; cla, or cla+METHOD: layers share keys and "
            "values  [default: loki]",
        ),
        "  dtype=, device=      as `calibrate` takes them  [default: auto; --device is lm_eval's]",
        *_wrapped("  of lm_eval's HF model ", ", ".join(of_the_harness)),
        "and the parameters of the method:",
    ]
    for name, method in METHODS.items():
        defaults = [f"{field.name}={field.default}" for field in dataclasses.fields(method)]
        lines += _wrapped(f"  {name:20} ", " ".join(defaults) or "none")
    lines += [
        "  of all               dense_layers=N: the first N layers stay full",
        "",
        "  python -m kvcal.calibrate.harness --model kvcal --tasks TASK --batch_size 8 \\",
        "    --model_args pretrained=smollm2-135m,artifact=DIR,method=loki,keep=0.25",
    ]
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=label, subsequent_indent=" " * 23, break_on_hyphens=False)
