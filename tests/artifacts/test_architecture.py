import pytest
from architectures import build

from kvcal.artifacts import differences, fingerprint


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
