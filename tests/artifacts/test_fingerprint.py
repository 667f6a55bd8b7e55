import hashlib

import pytest
import torch
from architectures import build

from kvcal.artifacts import differences, fingerprint, weights_sha256


def test_weights_hash_is_over_names_shapes_and_float32_bytes():
    model = torch.nn.Linear(3, 2)
    digest = hashlib.sha256()
    for name, parameter in (("bias", model.bias), ("weight", model.weight)):
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        digest.update(parameter.detach().numpy().tobytes())
    assert weights_sha256(model) == digest.hexdigest()


def test_weights_hash_is_the_same_in_either_dtype_of_a_bf16_checkpoint():
    model = build("llama").to(torch.bfloat16)
    in_bf16 = weights_sha256(model)
    assert in_bf16 == weights_sha256(model.float())


def test_weights_hash_notices_one_changed_number():
    model = build("llama")
    before = weights_sha256(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] += 1e-6
    assert weights_sha256(model) != before


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt-neox"])
def test_fingerprint_survives_json(name):
    import json

    found = fingerprint(build(name).config)
    assert json.loads(json.dumps(found)) == found
    assert found["num_hidden_layers"] == 3 and found["num_attention_heads"] == 4


def test_differences_name_both_sides():
    a, b = fingerprint(build("llama").config), fingerprint(build("qwen3").config)
    assert ("model_type", "llama", "qwen3") in differences(a, b)
    assert differences(a, a) == []
