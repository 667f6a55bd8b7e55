"""Questions and answers of rows of unequal lengths in one batch, against plain `generate()` of each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import KV_HEADS, build

from kvcal.calibrate import TokenBlocks, calibrate
from kvcal.calibrate.evaluation.decoding import RaggedCalls
from kvcal.calibrate.evaluation.measurements import Batch, batches
from kvcal.calibrate.evaluation.prefilled import prefill
from kvcal.calibrate.evaluation.prompts import Prompts
from kvcal.calibrate.evaluation.protocol import evaluate
from kvcal.calibrate.evaluation.results import Results
from kvcal.calibrate.evaluation.side_by_side import continue_prompt
from kvcal.calibrate.evaluation.tasks.sample import Sample, Task
from kvcal.runtime import CompressedCache, compress
from kvcal.runtime.methods.h2o import H2O

CONTEXTS, QUESTIONS, NEW = (40, 23, 40, 31, 6), (3, 9, 1, 6, 3), 6
TINY = {"window": 4, "sinks": 2}
LOSSY: list[dict[str, Any]] = [
    {"method": "loki", "basis": "pca", "select": "head", "rank": 4, "keep": 0.25},
    {"method": "quest", "select": "head", "keep": 0.5, "page": 4},
    {"method": "sparq", "select": "head", "rank": 4, "keep": 0.25},
    {"method": "clusterkv", "keep": 12, "tokens_per_cluster": 4, **TINY},
    {"method": "h2o", "keep": 0.25},
    {"method": "streaming", "keep": 0.25},
    {"method": "subgen", "clusters": 4, "t": 2, "s": 8, "normaliser": "clusters", **TINY},
]
EVICTING = [setting for setting in LOSSY if setting["method"] in ("h2o", "streaming", "subgen")]
KEEPING = [setting for setting in LOSSY if setting not in EVICTING]


def named(setting: dict[str, Any]) -> str:
    return str(setting["method"])


class Numbers:
    """A tokenizer whose text is the ids."""

    pad_token_id = 0

    def decode(self, ids: Any, **settings: Any) -> str:
        return " ".join(map(str, ids.tolist() if isinstance(ids, torch.Tensor) else ids))


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


SAMPLES = tuple(
    Sample(ids(context, row), ids(question, 50 + row), ("999",), (1,), None)
    for row, (context, question) in enumerate(zip(CONTEXTS, QUESTIONS, strict=True))
)
PROMPTS = Prompts(None, (Task("asked", None, SAMPLES, NEW, "digits"),))


def plain(model: Any, sample: Sample, compression: dict[str, Any] | None = None) -> str:
    """What `generate()` says after context and question, its end of sequence left out."""
    prompt = torch.tensor([[*sample.context, *sample.question]])
    given: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "do_sample": False}
    if compression is None:
        out = model.generate(prompt, **given)
    else:
        with compress(model, **compression):
            out = model.generate(prompt, **given)
    said = out[0, prompt.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id or []
    return Numbers().decode(said[:-1] if said[-1] in ends else said)


def recorded(model: Any) -> dict[str, list[bool]]:
    """Attention in every layer, which h2o starts from."""
    return {"record_mass": [True] * model.config.num_hidden_layers}


def answered(model: Any, artifact: Any, question: str, setting: dict[str, Any], rows: int = len(SAMPLES)) -> list[str]:
    """Predictions by sample, `rows` in a batch."""
    found: dict[int, str] = {}
    for batch in batches(PROMPTS, rows):
        prefilled = prefill(model, PROMPTS, batch, Numbers(), question, recorded(model))
        measured = prefilled.measure(artifact, setting, lambda: None)
        found |= {sample["index"]: sample["prediction"] for sample in measured.samples}
    return [found[index] for index in range(len(SAMPLES))]


@pytest.fixture(scope="module")
def model() -> Any:
    """With two ends of sequence, which end two rows before their last token."""
    found = build("llama").requires_grad_(False)
    found.model.embed_tokens.weight[0] = 0.1  # the padding's is zero, and makes ties
    found.generation_config.eos_token_id = None
    said = [plain(found, sample).split() for sample in SAMPLES]
    found.generation_config.eos_token_id = [int(said[1][2]), int(said[4][3])]
    return found


@pytest.fixture(scope="module")
def artifact(model: Any) -> Any:
    blocks = torch.tensor([ids(64, seed) for seed in range(8)]).int()
    everything = torch.ones_like(blocks, dtype=torch.bool)
    return calibrate(model, TokenBlocks(blocks, everything, everything, {"id": "noise"}), model_id="tiny")


@pytest.mark.parametrize("question", ["decoded", "prefilled"])
@pytest.mark.parametrize(
    "setting",
    [{"method": "full"}, {"method": "loki", "basis": "pca", "select": "head", "rank": 0.25, "keep": 1.0}],
    ids=named,
)
def test_with_all_tokens_it_is_plain_generation(model, artifact, question, setting):
    expected = [plain(model, sample) for sample in SAMPLES]
    lengths = [len(said.split()) for said in expected]
    assert min(lengths) < NEW and max(lengths) == NEW  # some rows end while others go on
    assert answered(model, artifact, question, setting) == expected


@pytest.mark.parametrize("setting", LOSSY, ids=named)
def test_a_decoded_question_is_one_that_is_fed_token_by_token(model, artifact, setting):
    """Against one row at a time; the first word of an answer comes from a decoded step, too."""
    alone = []
    for sample in SAMPLES:
        found = continue_prompt(model, Numbers(), artifact, sample.context, sample.question, tokens=NEW, **setting)
        said = found.text.split()
        ends = [at for at, token in enumerate(said) if int(token) in model.generation_config.eos_token_id]
        alone.append(" ".join(said[: ends[0]] if ends else said))
    together = answered(model, artifact, "decoded", setting)
    assert together == alone
    assert answered(model, artifact, "decoded", setting, rows=1) == alone
    assert alone != [plain(model, sample) for sample in SAMPLES]


@pytest.mark.parametrize("setting", KEEPING, ids=named)
def test_a_prefilled_question_is_part_of_the_prompt_of_methods_that_keep_all(model, artifact, setting):
    compression = {"artifact": artifact, **setting}
    expected = [plain(model, sample, compression) for sample in SAMPLES]
    assert answered(model, artifact, "prefilled", setting) == expected
    assert expected != answered(model, artifact, "decoded", setting)


@pytest.mark.parametrize("setting", EVICTING, ids=named)
def test_methods_that_evict_have_done_so_before_a_prefilled_question(model, setting):
    """Against calls by hand, one row at a time."""
    expected = []
    for sample in SAMPLES:
        cache, said = CompressedCache(model, None, **setting), []
        model(torch.tensor([sample.context]), past_key_values=cache)
        cache.make_room()
        logits = model(torch.tensor([sample.question]), past_key_values=cache).logits
        while len(said) < NEW and (token := int(logits[0, -1].argmax())) not in model.generation_config.eos_token_id:
            said.append(token)
            logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
        expected.append(Numbers().decode(said))
    assert answered(model, None, "prefilled", setting, rows=1) == expected
    assert answered(model, None, "prefilled", setting) == expected
    # Seen with the question, or asked token by token, it is another.
    assert expected != [plain(model, sample, {"artifact": None, **setting}) for sample in SAMPLES]


def test_a_method_that_says_that_it_is_query_aware_sees_the_question(model, monkeypatch):
    monkeypatch.setattr(H2O, "query_aware", True)
    setting = {"method": "h2o", "keep": 0.25}
    expected = [plain(model, sample, {"artifact": None, **setting}) for sample in SAMPLES]
    assert answered(model, None, "prefilled", setting) == expected


def test_what_h2o_evicts_is_chosen_by_the_queries_of_the_context_alone():
    """The positions held, against the attention of the model itself (`output_attentions`)."""
    model, eager = build("llama").requires_grad_(False), build("llama", attention="eager").requires_grad_(False)
    for layer in (*model.model.layers, *eager.model.layers):  # else attention is almost uniform
        layer.self_attn.q_proj.weight.mul_(6)
        layer.self_attn.k_proj.weight.mul_(6)
    keep = 12
    questions = prefill(model, PROMPTS, *batches(PROMPTS, len(SAMPLES)), Numbers(), "prefilled", recorded(model))
    cache = CompressedCache(model, None, "h2o", keep=keep)
    cache.adopt(questions.contexts[0])
    cache.make_room()
    order = list(questions.samples.values())
    questions.contexts[1].copy()(cache, [sample.question for sample in order])
    differs = 0
    for row, sample in enumerate(order):
        context = len(sample.context)
        if context < keep:
            continue
        whole = torch.tensor([[*sample.context, *sample.question]])
        attentions = eager(whole, output_attentions=True).attentions
        for layer, store in cache.stores.items():
            weights = attentions[layer][0].double().unflatten(0, (KV_HEADS, -1)).sum(1)  # [Hkv, queries, keys]
            for head in range(KV_HEADS):
                held = store.tokens["position"].view[row, head, : store.held[row], 0].tolist()
                chosen = {
                    queries: heavy(weights[head, :queries, :context].sum(0), context, keep)
                    for queries in (context, whole.shape[1])
                }
                assert {at for at in held if at < context} == chosen[context]
                differs += chosen[context] != chosen[whole.shape[1]]
    assert differs  # had they seen the question, they would have kept others


def heavy(mass: torch.Tensor, context: int, keep: int) -> set[int]:
    """What is left of a context when one more token comes: the last `keep` // 2 - 1, and of the others the heaviest."""
    recent = set(range(context + 1 - keep // 2, context))
    others = mass[: context + 1 - keep // 2].topk(keep - 1 - len(recent)).indices.tolist()
    return recent | set(others)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("question", ["decoded", "prefilled"])
def test_other_architectures_up_to_the_end_of_their_context(name, question):
    """Sliding windows, and learned positions, of which there is none for a row that has ended while others go on."""
    longest = CONTEXTS[0] + QUESTIONS[0] + NEW
    model = build(name, max_position_embeddings=longest).requires_grad_(False)
    model.generation_config.eos_token_id = []
    results = Results({})
    evaluate(model, None, PROMPTS, [], tokenizer=Numbers(), question=question, results=results)
    found = {line["index"]: line["prediction"] for line in results.predictions}
    assert found == {index: plain(model, sample) for index, sample in enumerate(SAMPLES)}


def test_an_answer_ends_at_a_score_of_one(model):
    said = plain(model, SAMPLES[0]).split()
    sample = Sample(SAMPLES[0].context, SAMPLES[0].question, (said[0],), (1,), None)
    prompts = Prompts(None, (Task("asked", None, (sample,), NEW, "digits"),))
    for question, steps in (("decoded", QUESTIONS[0]), ("prefilled", 1)):
        measured = prefill(model, prompts, Batch("asked", 0, 1, (0,)), Numbers(), question, recorded(model)).measure(
            None, {"method": "full"}, lambda: None
        )
        (found,) = measured.samples
        assert (found["prediction"], found["score"]) == (said[0], 1.0)
        assert len(measured.bytes_read) == len(measured.ms) == steps  # one is always taken, for what it costs


def test_the_end_of_a_question_is_kept_beside_its_answer(model):
    """300 characters of it, however long it is."""

    class Long(Numbers):
        def decode(self, ids: Any, **settings: Any) -> str:
            return "".join(f"{int(each):05}" for each in ids)

    long = Sample(SAMPLES[0].context, ids(75, 7), ("999",), (1,), None)
    short = Sample(SAMPLES[0].context, (5, 6, 7), ("999",), (1,), None)
    results = Results({})
    prompts = Prompts(None, (Task("asked", None, (long, short), 2, "digits"),))
    evaluate(model, None, prompts, [], tokenizer=Long(), results=results)
    first, second = (line["question"] for line in sorted(results.predictions, key=lambda line: line["index"]))
    whole = Long().decode(long.question)
    assert len(whole) == 375 and first == "…" + whole[-299:]
    assert second == "000050000600007"


def test_rows_without_padding_are_called_without_a_mask(model):
    """As windows are: masks cost time."""
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    rows, cache = RaggedCalls(model, 2), CompressedCache(model, None, "full")
    rows(cache, [ids(5, 0), ids(5, 1)])
    rows(cache, [[3], [4]])
    handle.remove()
    assert all("attention_mask" not in given and "position_ids" not in given for given in seen)
