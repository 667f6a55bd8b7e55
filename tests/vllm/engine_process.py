"""One engine of vLLM in a process of its own: reads what to do from the file named by its argument, and writes what
came of it to the same name with `.out` behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(path: Path) -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(path.read_text())
    options: dict[str, Any] = {
        "enforce_eager": True, "dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 160,
        "disable_log_stats": False, **asked.get("engine", {}),
    }  # fmt: skip
    if asked["kvcal"] is not None:
        options["additional_config"] = {"kvcal": asked["kvcal"]}
    engine = LLM(asked["model"], **options)
    found = []
    for call in asked["calls"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in call["prompts"]]
        sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": 16, **call.get("sampling", {})}
        results = engine.generate(prompts, SamplingParams(**sampling), use_tqdm=False)
        found.append([
            [
                {
                    "tokens": list(output.token_ids), "text": output.text, "finished": output.finish_reason,
                    "cached": result.num_cached_tokens, "logprobs": logprobs(output),
                }
                for output in result.outputs
            ]
            for result in results
        ])  # fmt: skip
    preempted = sum(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
    path.with_suffix(".out").write_text(json.dumps({"calls": found, "preempted": preempted}))


def logprobs(output: Any) -> list[dict[str, float]] | None:
    if output.logprobs is None:
        return None
    return [{str(token): one.logprob for token, one in position.items()} for position in output.logprobs]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
