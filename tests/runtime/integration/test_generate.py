"""`generate()` in `compress()`, on every architecture, against plain `generate()` and against rows run alone."""

import gc

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from compressed import CLOSE, SMALL, artifact, close, greedy, make_cache, model, padded, random_ids, small, traces
from transformers import DynamicCache, GptOssConfig
from transformers.cache_utils import DynamicLayer

from kvcal.runtime import METHODS, compress
from kvcal.runtime.integration import disable, enable
from kvcal.runtime.integration.layer import CompressedLayer

pytestmark = pytest.mark.filterwarnings("ignore:kvcal. no layer")
DENSE = [("full", {}), ("loki", {"keep": 1.0, "rank": 0.25, "basis": "pca", "select": "head"})]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_and_loki_that_keeps_all_generate_what_plain_generate_does(name):
    of, inputs = model(name), padded(9, 23, 40)
    gc.collect()  # caches of an earlier test's exceptions let go of the model
    before = traces(of)
    tokens, logits, stock = greedy(of, inputs)
    for method, settings in DENSE:
        with compress(of, artifact(name), method, **settings):
            assert traces(of) != before
            found, found_logits, cache = greedy(of, inputs)
        assert torch.equal(found, tokens), method
        torch.testing.assert_close(found_logits, logits, **CLOSE)
        for ours, theirs in zip(cache.layers, stock.layers, strict=True):
            assert type(ours) is (CompressedLayer if type(theirs) is DynamicLayer else type(theirs))
        del cache
        assert traces(of) == before


def test_every_method_is_among_the_small_ones():
    assert {small(form)["method"] for form in SMALL} == METHODS.keys()


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_rows_of_a_padded_batch_are_generated_as_if_alone(method, name):
    of, inputs = model(name), padded(9, 23, 40)
    with compress(of, artifact(name), **small(method)):
        tokens, logits, _ = greedy(of, inputs, new=12)
        for row, length in enumerate((9, 23, 40)):
            alone, alone_logits, _ = greedy(of, {"input_ids": inputs["input_ids"][row : row + 1, -length:]}, new=12)
            torch.testing.assert_close(logits[row : row + 1], alone_logits, **close(method))
            assert torch.equal(tokens[row, -12:], alone[0, -12:])
    if method not in ("full", "xcla"):  # or nothing would be tested; xcla has 8 bits here, and few in test_group_code
        _, dense, _ = greedy(of, inputs, new=12)
        assert (dense - logits).abs().max() > 2e-4


@pytest.mark.parametrize("method", SMALL)
def test_a_prompt_prefilled_in_chunks_equals_one_prefilled_at_once(method):
    of = model()
    for inputs in (padded(9, 23, 40), padded(40)):
        with compress(of, artifact(), **small(method)):
            tokens, logits, _ = greedy(of, inputs)
            chunked, chunked_logits, cache = greedy(of, inputs, prefill_chunk_size=7)
        assert torch.equal(chunked, tokens)
        # Of an earlier chunk, what is kept in groups of layers is read, and no row as it came.
        tolerance = {"rtol": 0.05, "atol": 0.05} if "xcla" in method else close(method)
        torch.testing.assert_close(chunked_logits, logits, **tolerance)
        assert cache.get_seq_length() == 40 + 5


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-window"])
def test_beams_sampling_and_several_sequences_equal_plain_generate(name):
    of, inputs = model(name), padded(9, 23, 40)
    ways = {
        "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
        "beam sampling": {"do_sample": True, "num_beams": 2},
    }
    for way, settings in ways.items():
        expected = []
        for method in (None, "full"):
            torch.manual_seed(3)
            if method is None:
                expected = greedy(of, inputs, **settings)
                continue
            with compress(of, artifact(name), method):
                found = greedy(of, inputs, **settings)
            assert torch.equal(found[0], expected[0]), way
            torch.testing.assert_close(found[1], expected[1], **CLOSE)


@pytest.mark.parametrize("method", [name for name in SMALL if name != "full"])
def test_beams_of_a_batch_equal_those_of_its_rows_alone(method):
    of, inputs = model(), padded(11, 30)
    settings = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": 8}
    with compress(of, artifact(), **small(method)):
        together = of.generate(**inputs, **settings, output_scores=True, return_dict_in_generate=True)
        for row, length in enumerate((11, 30)):
            ids = inputs["input_ids"][row : row + 1, -length:]
            alone = of.generate(ids, **settings, output_scores=True, return_dict_in_generate=True)
            rows = slice(3 * row, 3 * row + 3)
            assert torch.equal(together.sequences[rows, -8:], alone.sequences[:, -8:])
            torch.testing.assert_close(together.sequences_scores[rows], alone.sequences_scores, **close(method))
            # A beam's score is the sum of the log-probabilities that teacher forcing gives its tokens.
            for beam, score in zip(alone.sequences, alone.sequences_scores, strict=True):
                log_likelihood = forced(of, method, beam[None], length)
                assert score.item() * 8 == pytest.approx(log_likelihood, abs=1e-3)


def forced(of, method, ids, prompt):
    cache = make_cache(method)
    with torch.no_grad():
        parts = [of(ids[:, :prompt], past_key_values=cache).logits[:, -1:]]
        parts += [of(ids[:, at : at + 1], past_key_values=cache).logits for at in range(prompt, ids.shape[1] - 1)]
    scores = torch.cat(parts, 1).log_softmax(-1)
    return scores.gather(-1, ids[:, prompt:, None]).sum().item()


def test_the_model_is_as_before_after_an_exception():
    of, before = model("gemma3"), traces(model("gemma3"))
    with pytest.raises(ZeroDivisionError), compress(of, artifact("gemma3")):
        greedy(of, padded(9))
        raise ZeroDivisionError
    assert traces(of) == before
    enable(of, artifact("gemma3"))
    with pytest.raises(IndexError):  # no such token, in the middle of a forward call
        of(torch.tensor([[1000, 3]]))
    disable(of)
    assert traces(of) == before


@pytest.mark.parametrize("attention", ["eager", None])
def test_attention_sinks_of_gpt_oss(attention):
    config = GptOssConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        pad_token_id=0,
        eos_token_id=None,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    of = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for layer in of.model.layers:
            layer.self_attn.sinks.normal_()
    inputs = padded(9, 23, 40)
    tokens, logits, stock = greedy(of, inputs)
    assert isinstance(stock, DynamicCache)
    for method in ("full", "exact_topk", "quest", "sparq", "streaming", "h2o", "clusterkv"):
        keep = {} if method == "full" else {"keep": 1.0}
        with compress(of, None, method, **keep):
            found, found_logits, _ = greedy(of, inputs)
        assert torch.equal(found, tokens), method
        torch.testing.assert_close(found_logits, logits, **CLOSE)
    for form in ("exact_topk", "clusterkv", "clusterkv-tail"):
        with compress(of, None, **small(form)):
            together = greedy(of, inputs)[1]
            alone = greedy(of, {"input_ids": random_ids(9)})[1]
        torch.testing.assert_close(together[:1], alone, **CLOSE)
