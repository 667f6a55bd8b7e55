"""The JSON of one GPU, and what stands in it beside the times."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

RESULTS = Path(__file__).parent / "results"
PAGES = Path(__file__).parent.parent / "docs" / "results"
Results = dict[str, Any]


def machine(device: torch.device) -> Results:
    """What times depend on besides the code."""
    import transformers

    found: Results = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
            "cuda": torch.version.cuda,
            "driver": said_by(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]),
        }
    return found


def commit() -> str | None:
    """With a plus sign where files differ from it; None where there is no repository."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = said_by([*git, "rev-parse", "HEAD"])
    return f"{head}+" if head and said_by([*git, "status", "--porcelain", "--untracked-files=no"]) else head


def said_by(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def save(results: Results, folder: Path) -> None:
    """Whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results['machine']['gpu'].lower().replace(' ', '-')}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def brief(row: Results) -> str:
    """A row as it is printed; all of it is in the JSON."""
    hidden = ("ours", "dense", "bytes", "copies", "low", "high", "cache_bytes")
    shown = []
    for name, value in row.items():
        if isinstance(value, dict):
            times = [
                f"{part} {of['us']:.1f}" if "us" in of else f"{part} –"
                for part, of in value.items()
                if isinstance(of, dict)
            ]
            shown += [f"({', '.join(times)})"] if times else [f"{name} {value['us']:.1f}"] if "us" in value else []
        elif name not in hidden:
            shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {str(value)[:70]}")
    return "; ".join(shown)
