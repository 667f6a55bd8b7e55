"""The steps of `calibrate plan`, with progress bars and lines for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import progress_bar, say, working

if TYPE_CHECKING:
    from ...artifacts import Artifact
    from ..evaluation.prompts import Prompts
    from ..planning.allocate import Choice
    from ..planning.body import Made
    from ..planning.kept import Kept
    from ..planning.subject import Subject


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


def make_plan(
    subject: Subject, prompts: Prompts, method: str, windows: int, budget: float, quality: float | None
) -> Made:
    """
    Args:
        windows: how many of the prompts' windows are measured on; the others are for the check.
        quality: None: plan for the budget.
    """
    from ..evaluation.grid import FULL
    from ..planning.body import Made
    from ..planning.divergence import Decoder
    from ..planning.plan import check_choice, evaluated, for_bytes, for_quality, measure_points, weigh
    from ..planning.prompts import QUESTIONS, answerable, split_prompts

    with working("asking the model itself"):
        _, checked_on = split_prompts(prompts, windows, QUESTIONS)
        (full,) = evaluated(subject, checked_on, [FULL])
    prompts, dropped = answerable(full, prompts)
    for task, score in dropped.items():
        say(f"{task}: full itself scores {score:.2f}, too little to plan by: left out")
    rows, checked_on = split_prompts(prompts, windows, QUESTIONS)
    decoder = Decoder(subject, rows)
    with progress_bar("measuring layers") as progress:
        points = measure_points(subject, rows, method, progress)
    with progress_bar("weighing layers") as progress:
        offers = weigh(decoder, points, progress)

    def check(choice: Choice) -> dict[str, Any]:
        with working(f"decoding with {choice.bytes:.4f} of the bytes"):
            return check_choice(subject, checked_on, offers, choice)

    if quality is not None:
        choice = for_quality(offers, quality, check)
        return Made(subject, checked_on, offers, choice, check(choice), dropped)
    with progress_bar("decoding candidates") as progress:
        tried = for_bytes(decoder, offers, budget, progress)
    choice = tried[0].choice
    return Made(subject, checked_on, offers, choice, check(choice), dropped, tried)
