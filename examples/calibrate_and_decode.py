"""Calibrate a model on your own text, then generate with several methods from the same prompt.

    python calibrate_and_decode.py [MODEL [TEXT]]     # e.g. smollm2-135m notes/

MODEL is an alias, a Hub id, a folder or a GGUF file; TEXT a file, a folder, a Hub data set or an alias.
"""

import sys

import kvcal
from kvcal.calibrate import calibrate, load_model
from kvcal.runtime import CompressedCache

METHODS = {
    "full": {},
    "spectral": {"keep": 1 / 16},
    "loki": {"rank": 0.25, "keep": 0.25},
    "streaming": {"keep": 0.25},
}
PROMPT = '''import os


def newest(folder):
    """The path of the file in a folder that was changed last."""
    paths = [os.path.join(folder, name) for name in os.listdir(folder)]
    return max(paths, key=os.path.getmtime)


def largest(folder):
    """'''


def main(model_name: str = "demo", text: str = "stdlib") -> None:
    artifact = calibrate(model_name, text, num_tokens=16384, seq_len=1024)
    print(artifact)
    # artifact = artifact.save_pretrained("my-artifact"), and from then on kvcal.load("my-artifact")

    loaded = load_model(model_name)
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt").to(loaded.model.device)
    length = inputs["input_ids"].shape[1]
    for method, settings in METHODS.items():
        # With a cache of one's own; `with kvcal.compress(model, artifact, …):` makes one for every generate() inside.
        cache = CompressedCache(loaded.model, artifact, method, **settings)
        output = loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=32, do_sample=False)
        written = loaded.tokenizer.decode(output[0, length:], skip_special_tokens=True)
        read, held = cache.bytes_read(), cache.resident_bytes()
        print(f"{method:10} read {read:>8} bytes in its last step, and holds {held:>8}: {written!r}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except kvcal.KvcalError as error:
        sys.exit(f"Error: {error}")
