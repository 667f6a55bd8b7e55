"""What is fuzzed: bytes of a stranger go in, and what comes out is a result or one of our named errors, in one line.

Any other exception is a fault of ours and is let through. `tests/fuzz.py` runs these under atheris, `test_fuzz.py`
under hypothesis, `tests/attacks/test_attacks.py` on the kept abusive files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from samples import artifact, codebook

from kvcal.artifacts import Artifact, KvcalError, Stage, load, save
from kvcal.artifacts.manifest import MANIFEST
from kvcal.artifacts.schema import LAYER_TENSORS
from kvcal.calibrate.chats import Chat
from kvcal.calibrate.cli import cli
from kvcal.calibrate.cli.pca import pca_command
from kvcal.calibrate.cli.recipe_arguments import STAGES, arguments, options_of
from kvcal.calibrate.cli.summary import artifact_summary, print_summary
from kvcal.calibrate.data import open_data
from kvcal.calibrate.models.gguf_file import plain_gguf
from kvcal.calibrate.models.gguf_header import read_header
from kvcal.calibrate.recipe import read_recipe
from kvcal.calibrate.recipe_of import recipe_of
from kvcal.calibrate.text_files import KNOWN, read
from kvcal.runtime.cla.method import stage_map

_MOST_TEXTS = 100
_FIRST = (".txt", ".md", ".py", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
"""In the order in which the kept files name them by number."""
ENDINGS = (*_FIRST, *sorted({*KNOWN, ".csv.gz", ".jsonl.zst", ".txt.xz", ".json.bz2"} - {*_FIRST}))


def manifest(data: bytes) -> None:
    """A manifest whose content hash is right, which any forger can compute; then all that is said of the artifact."""
    folder = _sample()
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(data)
        if isinstance(body, dict):
            data = _hashed(body)
    (folder / MANIFEST).write_bytes(data)
    found = load(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_summary(artifact_summary(found))
    if "cla" in found.stages:
        stage_map(found)
    made = recipe_of(found, options_of(pca_command))
    (printed.getvalue() + made).encode()
    with contextlib.suppress(KvcalError):  # of an artifact that was made in Python some things have to be put in
        _read_recipe(made.encode())


def stage_file(data: bytes) -> None:
    """A stage file whose hash, size and name are right."""
    folder = _sample()
    digest = hashlib.sha256(data).hexdigest()
    path = folder / f"pca.{digest[:8]}.safetensors"
    body = _seeds()
    body["stages"]["pca"] |= {"file": path.name, "sha256": digest, "bytes": len(data)}
    (folder / MANIFEST).write_bytes(_hashed(body))
    own = not path.exists()
    path.write_bytes(data)
    try:
        found = load(folder).stages["pca"].tensors
        for name in found:
            found[name]
    finally:
        if own:
            path.unlink()


def recipe(data: bytes) -> None:
    """A recipe, up to the point at which its commands would be run."""
    _read_recipe(data)


def data_spec(data: bytes) -> None:
    """A specification of text, as a command line gives it; in a folder of its own and without a network."""
    spec, _, split = data.decode("utf-8", "surrogateescape").partition("\n")
    if spec.strip().startswith("/") or ".." in spec:
        return  # this machine's own files are no input of ours
    before, home = Path.cwd(), os.environ.get("HOME", "/")
    os.chdir(_texts())
    os.environ["HOME"] = str(_texts())  # what ~ stands for
    try:
        _first(open_data(spec, split or None))
    finally:
        os.chdir(before)
        os.environ["HOME"] = home


def text_file(data: bytes) -> None:
    """A file of text: the first byte chooses its ending, the others are what is in it."""
    path = _texts() / f"text{ENDINGS[data[0] % len(ENDINGS)] if data else '.txt'}"
    path.write_bytes(data[1:])
    try:
        _first(read(path))
    finally:
        path.unlink()


def gguf_file(data: bytes) -> None:
    """A model's GGUF file, up to the point at which transformers would read it."""
    from kvcal.calibrate.models.gguf_checks import check_header

    path = _texts() / "a.gguf"
    path.write_bytes(data)
    check_header(read_header(plain_gguf(path, "a.gguf"), "a.gguf"), "a.gguf")


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (manifest, stage_file, recipe, data_spec, text_file, gguf_file)
}


def refusal(target: str, data: bytes) -> str | None:
    """The named error that the bytes meet, None when they are taken; anything else that is raised comes through."""
    try:
        TARGETS[target](data)
    except KvcalError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 5000, message
        message.encode()
        return message
    return None


def seeds(target: str) -> list[bytes]:
    """Inputs that are taken, to start from."""
    folder = _sample()
    specs = ["stdlib", "stdlib:heldout", "a.txt", "set:plain:train", "*.txt", "org/name@main:config\ntrain", "~/a"]
    texts = (b'{"text": "a"}\n', b"a", _CHAT)
    return {
        "manifest": [json.dumps(_seeds()).encode()],
        "stage_file": [path.read_bytes() for path in folder.glob("pca.*")],
        "recipe": [_RECIPE],
        "data_spec": [spec.encode() for spec in specs],
        "gguf_file": [_GGUF],
        "text_file": [bytes([index]) + text for index in range(len(ENDINGS)) for text in texts],
    }[target]


_GGUF = b"".join((
    b"GGUF", struct.pack("<IQQ", 3, 1, 4), *(struct.pack("<Q", len(part)) + part if isinstance(part, bytes)
    else struct.pack(f"<{len(part)}I", *part) for part in (
        b"general.architecture", (8,), b"llama", b"tokenizer.ggml.model", (8,), b"gpt2",
        b"llama.block_count", (4, 1), b"tokenizer.ggml.tokens", (9, 8, 1, 0), b"a",
        b"blk.0.attn_q.weight", (1, 32, 0, 8, 0, 0),
    )), bytes(99),
))  # fmt: skip
_RECIPE = b"""recipe: 1
model: demo
data: stdlib
pca: {num_tokens: 5, uncentred: true, dtype: float32}
stages:
- cluster: {metric: l2}
- share
- evaluate: {data: x, keep: [0.5, 2], set: {basis: pca}}
expect: {}
"""
_CHAT = b"""{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant",
"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, {"from": "human", "value": "b"}], "tools": "[{}]"}"""
_CARD = "---\nconfigs:\n- config_name: plain\n  data_files: a.txt\n---\n"


def _read_recipe(data: bytes) -> None:
    path = _texts().parent / "recipe.yaml"
    path.write_bytes(data)
    found = read_recipe(path, STAGES)
    for section in (found.pca, *found.stages):
        command = cli.get_command(click.Context(cli), section.command)
        given = arguments(found, section, command)
        with contextlib.suppress(click.UsageError):  # becomes a named error in `calibrate run`
            command.make_context(section.command, [*given, *([] if command is pca_command else ["--", "a"])])


def _first(texts: Iterator[str]) -> None:
    for _, text in zip(range(_MOST_TEXTS), texts, strict=False):
        if isinstance(text, Chat):
            text = text.text(_Speaker())
        assert isinstance(text, str)


class _Speaker:
    """Of a tokenizer what chats need."""

    chat_template = "all that is said"

    def get_chat_template(self, template: object, tools: object) -> str:
        return self.chat_template

    def apply_chat_template(self, messages: list[dict], tools: object, **options: object) -> str:
        calls = (call["function"]["name"] for message in messages for call in message.get("tool_calls", ()))
        return "".join((*(message["role"] + message["content"] for message in messages), *map(str, calls)))


def _hashed(body: dict) -> bytes:
    body = {name: value for name, value in body.items() if name != "content_hash"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "content_hash": hashlib.sha256(canonical.encode()).hexdigest()}).encode()


@functools.cache
def _folder() -> Path:
    keep = tempfile.TemporaryDirectory(prefix="kvcal-fuzz-")
    _kept.append(keep)
    return Path(keep.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _sample() -> Path:
    folder = _folder() / "artifact"
    save(_small(), folder)
    return folder


@functools.cache
def _manifest_of_sample() -> bytes:
    folder = _folder() / "unchanged"
    save(_small(), folder)
    return (folder / MANIFEST).read_bytes()


def _seeds() -> dict:
    return json.loads(_manifest_of_sample())


def _small() -> Artifact:
    """All stages, also those whose settings are read."""
    found = artifact(layers=2, head_dim=2, value_dim=1, tokens=2)
    sizes = {"Hkv": 2, "D": 2, "Dv": 1, "L": 2, "C": 1, "P": 1}
    found = found.with_stage("codebook", codebook(found, tokens=2 + 2))
    for name, settings in (("clusters", {"clusters": 1, "metric": "l2", "iterations": 20, "seed": 0}), ("cla", _CLA)):
        tensors = {}
        for tensor, (symbols, kinds) in LAYER_TENSORS[name].items():
            shape = [sizes[symbol] for symbol in symbols.split()]
            value = _CLUSTERED.get(tensor, 0)
            tensors |= {f"layers.{at}.{tensor}": torch.full(shape, value, dtype=_DTYPES[kinds[0]]) for at in range(2)}
        found = found.with_stage(name, Stage(tensors, settings))
    return found


_CLUSTERED = {"sizes": 2, "curve.counts": 1} | dict.fromkeys(
    [name for name in LAYER_TENSORS["clusters"] if name.endswith("_iterations")], 1
)
_DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
_TRAINING = {
    "run": "0", "groups": "0-1", "pool": "mean", "train": "all", "steps": 1, "lr": 0.1, "first_losses": {"loss": 1.5},
    "last_losses": {"loss": 1.0}, "warmup": 1, "data": {"source": {"kind": "builtin", "id": "stdlib"}, "block_size": 8},
}  # fmt: skip
_CLA = {
    "groups": "0-1", "pattern": "uniform", "pool": "mean", "stored_layers": 1, "keys_aligned": "pre",
    "uptraining": {**_TRAINING, "earlier": _TRAINING},
}  # fmt: skip


@functools.cache
def _texts() -> Path:
    folder = _folder() / "texts"
    (folder / "set").mkdir(parents=True)
    (folder / "set" / "README.md").write_text(_CARD)
    for name in ("a.txt", "set/a.txt"):
        (folder / name).write_text("some text")
    return folder
