"""Ask your own questions through several methods, and see what each answers and loses.

    python evaluate_prompts.py MODEL ARTIFACT QUESTIONS.jsonl
    python evaluate_prompts.py                                   # the built-in model, and two questions

A line of QUESTIONS is {"context": "…", "question": "…", "answers": ["…"]}: see docs/tasks.md.
"""

import json
import sys
import tempfile
from pathlib import Path

import kvcal
from kvcal.calibrate import calibrate, evaluate, load_model, make_grid, make_prompts

METHODS = ["spectral", "loki", "clusterkv", "streaming"]
KEEP = [0.25]
FACTS = {"the harbour": "48719", "the tower": "20653"}


def some_questions(folder: Path) -> Path:
    """Facts in the middle of text that has nothing to do with them."""
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 12
    path = folder / "questions.jsonl"
    with path.open("w") as file:
        for place, code in FACTS.items():
            context = f"{filler}The code of {place} is {code}. {filler}"
            line = {"context": context, "question": f"The code of {place} is ", "answers": [code]}
            file.write(json.dumps(line) + "\n")
    return path


def main(model_name: str, artifact: kvcal.Artifact, questions: Path) -> None:
    loaded = load_model(model_name)
    prompts = make_prompts((), loaded.tokenizer, tasks=[], prompt_files=[questions], max_new_tokens=8)
    grid = make_grid(METHODS, {"keep": KEEP})
    rows = evaluate(loaded.model, artifact, prompts, grid, tokenizer=loaded.tokenizer)
    full = rows[0]
    for row in rows:
        read = row["bytes_per_step"] / full["bytes_per_step"]
        for task, score in row["scores"].items():
            error = row["scores_se"][task]  # None of a single question
            print(f"{row['method']:10} reads {read:6.1%}, {task} {score:.2f}" + (f" ± {error:.2f}" if error else ""))


if __name__ == "__main__":
    try:
        if len(sys.argv) == 4:
            main(sys.argv[1], kvcal.load(sys.argv[2]), Path(sys.argv[3]))
        elif len(sys.argv) == 1:
            with tempfile.TemporaryDirectory() as folder:
                main("demo", calibrate("demo", "stdlib", num_tokens=16384, seq_len=1024), some_questions(Path(folder)))
        else:
            sys.exit(__doc__)
    except kvcal.KvcalError as error:
        sys.exit(f"Error: {error}")
