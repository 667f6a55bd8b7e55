"""Start vLLM's OpenAI-compatible server, which decodes from an artifact.

    python serve.py MODEL ARTIFACT [OPTIONS OF vllm serve …]     # MODEL: a folder or a Hub id

That the artifact is whole and belongs to the model is checked before the engine takes minutes to start. Then

    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "MODEL", "prompt": "Once upon a time", "max_tokens": 32}'
"""

import json
import os
import sys

import kvcal
from kvcal.runtime import check_model

SETTINGS = {"method": "spectral", "keep": 1 / 16, "dense_below": 512}
"""As of `kvcal.compress`; requests of fewer than `dense_below` tokens are read whole."""


class Described:
    """What `check_model` looks at: a model's config, without its weights."""

    def __init__(self, name: str):
        from transformers import AutoConfig

        try:
            self.config = AutoConfig.from_pretrained(name)
        except OSError as error:
            raise kvcal.KvcalError(
                f"{name}: no folder and no model of the Hub ({error}): vLLM takes no aliases"
            ) from None


def command(model: str, artifact: str, options: list[str]) -> list[str]:
    check_model(kvcal.load(artifact), Described(model))
    asked = json.dumps({"kvcal": {"artifact": artifact, **SETTINGS}})
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return [*server, "--model", model, "--additional-config", asked, *options]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        started = command(sys.argv[1], sys.argv[2], sys.argv[3:])
    except kvcal.KvcalError as error:
        sys.exit(f"Error: {error}")
    os.execv(started[0], started)
