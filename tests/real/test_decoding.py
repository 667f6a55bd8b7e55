"""A real model's own generate() is what methods that read everything, padding and decode() have to agree with."""

import pytest
import torch

from kvcal.runtime import compress, decode

pytestmark = pytest.mark.real
STEPS = 8
METHODS = {
    "full": {"method": "full"},
    "loki": {"method": "loki", "basis": "pca", "select": "head", "rank": 0.25, "keep": 0.5},
    "loki, as it decodes when nothing is said": {"method": "loki"},
    "clusterkv": {"method": "clusterkv", "keep": 12, "tokens_per_cluster": 4, "window": 6, "sinks": 2},
    "spectral": {"method": "spectral", "keep": 12, "sinks": 2, "recent": 3},
}


@pytest.fixture(scope="module")
def generate(smollm2):
    def generate(inputs):
        return smollm2.generate(**inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)

    return generate


def row_of(inputs, row):
    """One prompt without its padding."""
    inside = inputs["attention_mask"][row].bool()
    return {name: tensor[row : row + 1, inside] for name, tensor in inputs.items()}


@pytest.fixture(scope="module")
def plain(prompts, generate):
    return generate(prompts)


def test_the_model_can_go_on(plain, tokenizer):
    """Otherwise what follows would compare noise."""
    week, code = tokenizer.batch_decode(plain)
    assert "Tuesday, Wednesday, Thursday" in week and "fibonacci(n - 1) + fibonacci(n - 2)" in code


def test_loki_that_reads_everything_is_plain_generate(smollm2, artifact, prompts, generate, plain):
    with compress(smollm2, artifact, method="loki", basis="pca", select="head", rank=0.25, keep=1.0):
        assert torch.equal(generate(prompts), plain)


@pytest.mark.parametrize("method", METHODS)
def test_decode_and_padding(smollm2, artifact, prompts, generate, plain, method):
    settings = METHODS[method]
    with compress(smollm2, artifact, **settings):
        together = generate(prompts)
        if method in ("loki", "spectral"):  # the prompt that is padded, without its padding
            alone = generate(row_of(prompts, 0))
            assert torch.equal(together[0, -alone.shape[1] :], alone[0])
    out = decode(
        smollm2, artifact=artifact, max_new_tokens=STEPS, eos_token_id=[], pad_token_id=0, **prompts, **settings
    )
    assert torch.equal(out.tokens, together)
    assert method != "full" or torch.equal(together, plain)
