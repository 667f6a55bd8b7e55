"""An artifact's manifest turned back into the recipe that makes the same artifact."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..artifacts import Artifact, KvcalError
from ..artifacts.errors import one_line
from ..runtime.planned import has_plan
from .codebook_stage import usual_codewords
from .models import MODEL_ALIASES, spec_of
from .recipe import MOST_BYTES, VERSION
from .reservoir import sampled_tokens

_PASS = ("reservoir", "seed", "batch_size", "dtype", "device")
_CLUSTER = ("clusters", "tokens_per_cluster", "metric", "iterations", "seed")
"""Settings that pass and clustering put into a manifest. A stranger's may have more, e.g. where to write a figure."""
_UPTRAINING = ("steps", "lr", "distill", "train", "pool", "batch_size", "warmup", "seed", "dtype", "device")


def recipe_of(artifact: Artifact, pca_options: Collection[str]) -> str:
    """YAML for `calibrate run --recipe`; what the manifest cannot tell is said in comments.

    Args:
        pca_options: names that the section `pca` of a recipe may have.
    """
    notes = [f"The recipe of {artifact.name}, content {artifact.content_hash}.", _made_with(artifact)]
    source = dict(artifact.data.get("source", {}))
    head: dict[str, Any] = {"recipe": VERSION, "model": _model(artifact, notes), "data": data_spec(source, notes)}
    if artifact.folder is not None:
        head["output"] = artifact.folder.absolute().name or "artifact"
    expect = {"text_sha256": artifact.data["content_sha256"], "weights_sha256": artifact.model.weights_sha256}
    body: dict[str, Any] = {"pca": _pca(artifact, source, pca_options, notes)}
    if artifact.slim_of is not None:
        notes.append(f"It is slim: this makes the full artifact, content {artifact.slim_of.content_hash}.")
    if stages := _stages(artifact, notes):
        body["stages"] = stages
    comment = "".join(f"# {one_line(note)[:2000]}\n" for note in notes)
    text = "\n".join((comment, _yaml(head), _yaml(body), _yaml({"expect": expect})))
    if len(text.encode()) > MOST_BYTES:
        raise KvcalError(f"{artifact.name}: its manifest has names of more than the {MOST_BYTES} bytes of a recipe")
    return text


def data_spec(source: Mapping[str, Any], notes: list[str]) -> str | list[str] | None:
    """What `open_data` takes, from what it put into the manifest."""
    if source.get("kind") == "several":
        return [_one_spec(entry, notes) or "" for entry in _sources(source)]
    return _one_spec(source, notes)


def text_column(source: Mapping[str, Any]) -> dict[str, Any]:
    """The option that the text was opened with, {} without one."""
    columns = [entry["text_column"] for entry in _sources(source) if isinstance(entry.get("text_column"), str)]
    return {"text_column": columns[0]} if columns else {}


def _sources(source: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    several = source.get("sources")
    return [entry for entry in several if isinstance(entry, Mapping)] if isinstance(several, list) else [source]


def _one_spec(source: Mapping[str, Any], notes: list[str]) -> str | None:
    name, kind = source.get("id"), source.get("kind")
    if not isinstance(name, str) or kind not in ("builtin", "hub", "local"):
        notes.append("The text was given in Python: the manifest does not say where it is, put it in at `data`.")
        return name if isinstance(name, str) else None
    if kind == "builtin":
        return f"{name}:{source.get('split') or 'train'}"
    revision = f"@{source['revision']}" if source.get("revision") else ""
    if kind == "local":
        notes.append(
            f"The text was local: {name!r}, from the folder that the run was started in. It may have been moved or "
            "changed since; the run is refused where its blocks do not have the hash below."
        )
    return f"{name}{revision}:{source.get('config') or ''}:{source.get('split') or ''}".rstrip(":")


def _model(artifact: Artifact, notes: list[str]) -> str:
    model = artifact.model
    if model.revision is None and model.id not in MODEL_ALIASES:
        notes.append(
            f"The model was a folder or file, {model.id!r}, from the folder that the run was started in; put another "
            "path in at `model` where it lies elsewhere."
        )
    return spec_of(model)


def _made_with(artifact: Artifact) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(artifact.versions.items()))
    return f"Same bytes on the same machine with as many threads and {versions}; elsewhere within rounding."


def _pca(artifact: Artifact, source: Mapping[str, Any], options: Collection[str], notes: list[str]) -> dict[str, Any]:
    data = artifact.data
    positions = source.get("num_tokens")
    if type(positions) is not int:
        positions = data["blocks"] * data["seq_len"]
        notes.append("The manifest does not tell whether the last block was padded: num_tokens is of full blocks.")
    found: dict[str, Any] = {"num_tokens": positions, "seq_len": data["seq_len"], **text_column(source)}
    if source.get("order_seed", artifact.settings.get("seed")) != artifact.settings.get("seed"):
        notes.append("The files were mixed with another seed than the pass had, which a recipe cannot say.")
    for name, value in artifact.settings.items():
        if name == "centred":
            found |= {} if value else {"uncentred": True}
        elif name in _PASS and name in options:
            found[name] = value
        else:
            notes.append(f"Of the pass the manifest also says {name} {value!r}, which is left out.")
    return found


def _codebook(artifact: Artifact) -> list[dict[str, Any]]:
    """The stages that make the codebook: none where the pass makes the same one."""
    settings = artifact.stages["codebook"].settings
    usual = {"codewords": usual_codewords(sampled_tokens(artifact)), "iterations": 20, "seed": 0}
    if {name: settings.get(name) for name in usual} == usual:
        return []
    given = {name: settings[name] for name in ("iterations", "seed") if name in settings}
    return [{"cluster": {"metric": "joint", "clusters": settings.get("codewords"), **given}}]


def _stages(artifact: Artifact, notes: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if has_plan(artifact):
        notes.append("plan.json is no part of the manifest: copy it, or add the stage `plan` with what it says.")
    if "clusters" in artifact.stages:
        settings = artifact.stages["clusters"].settings
        found.append({"cluster": {name: settings[name] for name in _CLUSTER if name in settings}})
    if "codebook" in artifact.stages:
        found += _codebook(artifact)
    if "xcla" in artifact.stages:
        settings = artifact.stages["xcla"].settings
        found.append({"xcla": {name: settings[name] for name in ("group", "memory") if name in settings}})
    if "cla" in artifact.stages:
        settings = artifact.stages["cla"].settings
        asked = _sharing(artifact, settings, notes)
        trainings = _trainings(settings.get("uptraining"))
        if not trainings:
            found.append({"share": asked})
        for number, training in enumerate(reversed(trainings)):
            found.append({"share": {**(asked if number == 0 else {"continue": True}), **_training(training, notes)}})
    return found


def _sharing(artifact: Artifact, settings: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Options of `calibrate share` that give these groups under this name of a pattern."""
    from .cla.requested import requested_map

    pattern, stored, groups = settings.get("pattern"), settings.get("stored_layers"), settings["groups"]
    stored = stored if type(stored) is int else None
    if pattern == "list":
        return {"pattern": groups}
    if pattern == "auto":
        return {"pattern": pattern, "budget_layers": stored}
    for group in (2, 3, 4):
        for budget in (None, stored):
            try:
                requested = requested_map(artifact, group=group, pattern=str(pattern), stored_layers=budget)
            except KvcalError:
                continue
            if str(requested) == groups:
                return {"pattern": pattern, "group": group, **({"budget_layers": budget} if budget else {})}
    notes.append(f"No size of groups makes the pattern {pattern!r} share {groups}: they are listed, instead.")
    return {"pattern": groups}


def _trainings(last: Any) -> list[Mapping[str, Any]]:
    """The trainings of a stage `cla`, the last one first."""
    found = []
    while last is not None:
        found.append(last)
        last = last.get("earlier")
    return found


def _training(settings: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    data = settings.get("data")
    data = data if isinstance(data, Mapping) else {}
    source = data.get("source")
    given = {name: settings[name] for name in _UPTRAINING if name in settings}
    if "loss" not in settings and isinstance(beside := settings.get("distill"), float) and beside > 0:
        given["distill"] = beside / (1 + beside)
        notes.append(
            f"The training minimised cross entropy + {beside:g} KL: below is that up to a factor, and gradients are "
            "clipped at another length."
        )
    source = source if isinstance(source, Mapping) else {}
    return {
        "uptrain": True,
        "data": data_spec(source, notes),
        **text_column(source),
        "seq_len": data.get("block_size"),
        **given,
    }


def _yaml(value: Mapping[str, Any]) -> str:
    """YAML that `read_recipe` reads as the same values; with escapes where a terminal would not show it as it is."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True  # a recipe has none

    options: dict[str, Any] = {"sort_keys": False, "width": 110}
    text: str = yaml.dump(dict(value), Dumper=Dumper, allow_unicode=True, **options)
    if all(line == one_line(line) for line in text.split("\n")):
        return text
    escaped: str = yaml.dump(dict(value), Dumper=Dumper, **options)
    return escaped
