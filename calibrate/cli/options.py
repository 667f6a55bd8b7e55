"""Arguments and options that several commands have, each in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from .completion import complete_models
from .types import Dtype, Folder

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]

_MODEL = "an alias, a Hub id with an optional @revision, a folder or a GGUF file"


def artifact_argument(name: str = "artifact", required: bool = True) -> Decorator[Any]:
    return click.argument(name, type=Folder(), required=required)


def model_option(
    help: str = f"Use this model: {_MODEL}.", *, required: bool = False, default: str | None = None
) -> Decorator[Any]:
    """
    Args:
        default: what the command takes without it, for the help.
    """
    return click.option(
        "--model",
        "model_spec",
        metavar="MODEL",
        required=required,
        show_default=default or False,
        shell_complete=complete_models,
        help=help,
    )


def calibrated_model_option() -> Decorator[Any]:
    return model_option(f"Give the model that ARTIFACT was calibrated on: {_MODEL}.", required=True)


def device_option(what: str = "the model") -> Decorator[Any]:
    return click.option("--device", default="auto", help=f"Run {what} on this device: auto, cpu, cuda or cuda:N.")


def dtype_option(
    help: str = "Load the model in this dtype: auto, float32 (fp32), bfloat16 (bf16) or float16 (fp16, half).",
) -> Decorator[Any]:
    return click.option("--dtype", type=Dtype(), default="auto", help=help)


def force_option(what: str) -> Decorator[Any]:
    """
    Args:
        what: what is replaced, and what never is.
    """
    return click.option("--force", is_flag=True, is_eager=True, help=what)
