from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .completion import complete_pattern
from .loading import load_calibrated
from .numbers import fixed
from .options import artifact_argument, calibrated_model_option
from .output import json_option, plot_option, print_lines, print_result, print_table, progress_bar, write_plot
from .uptrain_options import (
    UptrainOptions,
    print_uptraining,
    remove_loss_figure,
    run_uptraining,
    uptrain_options,
)

if TYPE_CHECKING:
    from ...artifacts import Artifact


@click.command("share")
@artifact_argument()
@calibrated_model_option()
@click.option(
    "--group", type=click.Choice(["2", "3", "4"]), default="2", help="Put this many layers into a full group."
)
@click.option(
    "--pattern",
    default="uniform",
    metavar="PATTERN",
    shell_complete=complete_pattern,
    help="Group layers by uniform, keep-ends, dense-front, dense-back (as in the CLA paper), auto (least predicted "
    "loss, in groups of at most 4 layers unless fewer are to be stored), or name the groups, e.g. 0-1,2-3.",
)
@click.option(
    "--budget-layers",
    "stored_layers",
    type=click.IntRange(1),
    show_default="what pattern and group give",
    help="Let this many layers store keys and values.",
)
@click.option(
    "--force", "--overwrite", "overwrite", is_flag=True, help="Replace a stage `cla` that has trained weights."
)
@uptrain_options
@plot_option
@json_option
def share_command(
    artifact: Path, model_spec: str, group: str, plot: Path | None, as_json: bool, **settings: Any
) -> None:
    """Find which layers are to share keys and values.

    It is measured what sharing between neighbouring layers costs, and ARTIFACT gets the stage `cla` with the map. MODEL
    is checked and not changed.

    With --uptrain the shared model is trained, by the map in ARTIFACT where there is one and no other is asked for;
    the stage then holds the trained weights, and --plot shows the loss curve.

    \b
    Example:
      calibrate share mistral-7b-wikitext --model mistral-7b --pattern auto --budget-layers 16
      calibrate share mistral-7b-wikitext --model mistral-7b --uptrain --data wikitext --steps 1000 --lr 1e-4
    """
    from ...artifacts import load, save
    from ...artifacts.places import check_can_write_in
    from ...runtime.cla.method import stage_map
    from ..card import card_files
    from ..cla.figures import share_figure
    from ..cla.requested import check_can_share, check_sample, refuse_to_lose, requested_map
    from ..cla.rotation import rotation_of
    from ..cla.stage import share, share_report

    training = UptrainOptions.take(settings)
    found = load(artifact)
    check_can_write_in(artifact)
    if training.uptrain:
        check_can_write_in(artifact.absolute().parent, f"{artifact.absolute().name}.uptraining")
    overwrite = settings.pop("overwrite")
    settings["group"] = int(group)
    if training.uptrain and _has_the_map(found, settings):
        _uptrain(found, artifact, model_spec, training, overwrite, plot, as_json)
        return
    refuse_to_lose(found, overwrite)
    check_sample(found)
    requested = requested_map(found, **settings)
    # In the dtype of the run: another one may round the weights, and then they are others.
    model = load_calibrated(found, model_spec, device="cpu", dtype=str(found.settings.get("dtype", "auto"))).model
    check_can_share(found, model, requested)
    with progress_bar("measuring pairs of layers") as progress:
        shared = share(found, **settings, rotation=rotation_of(found, model), overwrite=overwrite, progress=progress)
    if requested is None:
        check_can_share(found, model, stage_map(shared))
    saved = save(shared, artifact, card_files(shared))
    remove_loss_figure(artifact)
    if training.uptrain:
        _uptrain(saved, artifact, model_spec, training, overwrite, plot, as_json)
        return
    report = share_report(saved)
    step = f"next: calibrate share {artifact} --model {model_spec} --uptrain --steps 0 --data …"
    print_result(as_json, report, lambda: print_sharing(report), artifact, step)
    if plot is not None:
        write_plot(plot, share_figure(saved, report))


def _has_the_map(artifact: Artifact, settings: dict[str, Any]) -> bool:
    """Whether the stage `cla` is there and shares what is asked for, if anything is."""
    from ..cla.requested import default_stored, requested_map

    if "cla" not in artifact.stages:
        return False
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    if all(context.get_parameter_source(name) == default for name in ("group", "pattern", "stored_layers")):
        return True
    found, requested = artifact.stages["cla"].settings, requested_map(artifact, **settings)
    if requested is not None:
        return str(requested) == found["groups"]
    stored = settings["stored_layers"] or default_stored(artifact, settings["group"])
    return (found.get("pattern"), found.get("stored_layers")) == ("auto", stored)


def _uptrain(
    found: Artifact,
    folder: Path,
    model_spec: str,
    training: UptrainOptions,
    overwrite: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    from ..cla.figures import loss_figure
    from ..cla.stage import share_report
    from ..plots import plain_name

    trained, history = run_uptraining(found, folder, model_spec, training, overwrite)
    report = share_report(trained)
    step = f"next: calibrate evaluate {folder} --method cla,cla+loki --data …"
    print_result(as_json, {**report, "history": history}, lambda: print_uptraining(report["settings"]), folder, step)
    if plot is not None and history:
        write_plot(plot, loss_figure(history, f"{plain_name(trained.model.id)}, groups {report['settings']['groups']}"))


def print_sharing(report: dict[str, Any]) -> None:
    """Neighbouring and sharing layers; then the groups and what they save."""
    settings = report["settings"]
    layers = sorted({pair[side] for pair in report["pairs"] for side in ("storing", "reading")})
    before = dict(zip(layers[1:], layers, strict=False))
    rows = [
        [
            f"{pair['storing']} → {pair['reading']}",
            *(_number(pair[name]) for name in ("key_r2", "value_r2", "cost_as_is", "cost_as_group")),
            "yes" if pair["shared"] else "",
        ]
        for pair in report["pairs"]
        if pair["shared"] or before[pair["reading"]] == pair["storing"]
    ]
    header = ["storing → reading", "R² keys", "R² values", "cost as is", "cost of the group", "shared"]
    print_table("sharing keys and values between layers", header, rows)
    _print_patterns(report)
    frame = "before" if settings["keys_aligned"] == "pre" else "after"
    size = report["bytes_per_token"]
    stored, total = settings["stored_layers"], sum(map(len, report["groups"]))
    print_lines(
        f"R²: of the best linear alignment of all heads, on held-out tokens, keys {frame} their rotary embedding",
        "cost as is: ‖o' - o‖ / ‖o‖ of the reading layer's attention output, with the storing layer's keys and values; "
        "of the group: the sum of its square over all layers from the one to the other, with those that fit them best",
        f"groups {settings['groups']} ({settings['pattern']}): predicted loss {_number(report['predicted_loss'])}, "
        "what they cost in all",
        f"stored {stored} of {total} full-attention layers: {size['before']} → {size['after']} bytes per token at "
        "16 bit",
        report["bandwidth"],
    )


def _print_patterns(report: dict[str, Any]) -> None:
    """What the cache would take with each pattern and size of groups."""
    found = {(cost["pattern"], cost["group"]): cost for cost in report["patterns"]}
    sizes = sorted({size for _, size in found})
    rows = [
        [pattern, *(_stored(found.get((pattern, size))) for size in sizes)]
        for pattern in dict.fromkeys(pattern for pattern, _ in found)
    ]
    if rows:
        title = "layers that store, bytes per token at 16 bit, and predicted loss, by pattern"
        print_table(title, ["pattern", *(f"groups of {size}" for size in sizes)], rows)


def _stored(cost: dict[str, Any] | None) -> str:
    if cost is None:
        return ""
    loss = "" if cost["predicted_loss"] is None else f", {fixed(cost['predicted_loss'], 2)}"
    return f"{cost['stored_layers']}: {cost['bytes_per_token']}{loss}"


def _number(value: float | None) -> str:
    """An artifact of before has no costs of groups."""
    return "" if value is None else fixed(value, 3)
