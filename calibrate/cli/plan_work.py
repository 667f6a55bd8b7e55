"""What `calibrate plan` has measured before, with a line for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import say

if TYPE_CHECKING:
    from ...artifacts import Artifact
    from ..evaluation.prompts import Prompts
    from ..planning.kept import Kept


def open_kept(path: Path, artifact: Artifact, loaded: Any, prompts: Prompts, **how: Any) -> Kept:
    """What was measured before on the same tokens of the same model, and is not measured again."""
    from ...artifacts import weights_sha256
    from ..one_pass import versions
    from ..planning.kept import Kept

    measured_on = {
        "weights_sha256": weights_sha256(loaded.model),
        "artifact": artifact.content_hash,
        "tokens_sha256": prompts.tokens_sha256,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "versions": versions(),
        **how,
    }
    kept, replaced = Kept.open(measured_on, path)
    if replaced:
        say(f"{path}: was measured on something else, and is measured again")
    elif kept.checked:
        say(f"{path}: goes on with what was measured")
    return kept
