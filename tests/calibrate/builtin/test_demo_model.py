"""The shipped model really retrieves: plain `generate()` answers questions about facts far back in held-out text."""

import random

import pytest
import torch

from kvcal.calibrate.builtin.recall import dictionary, make_episode
from kvcal.calibrate.builtin.stdlib_text import documents
from kvcal.calibrate.models import DEMO_FOLDER, load_model


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def text():
    return [text for _, text in documents("heldout")]


@pytest.fixture(scope="module")
def words():
    """Of all text of the training part, to be read once: it takes longer than the model does."""
    return dictionary(text for _, text in documents("train"))[1]


def test_it_is_small_enough_to_ship_and_has_a_card():
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= 16e6
    card = (DEMO_FOLDER / "README.md").read_text()
    assert all(fact in card for fact in ("perplexity", "exact recall", "minutes", "seed", "| 2048 |"))


def test_shape(demo):
    config = demo.model.config
    assert config.num_key_value_heads >= 2 and config.num_attention_heads > config.num_key_value_heads
    assert config.head_dim == 64 and config.max_position_embeddings >= 4096 and 4 <= config.num_hidden_layers <= 8


@pytest.mark.parametrize("length", [256, 1024, 2048])
def test_greedy_generation_answers_with_the_code(demo, text, words, length):
    def encode(string):
        return demo.tokenizer.encode(string, add_special_tokens=False, verbose=False)

    rng = random.Random(length)
    # Unknown to training: the words, the text and the codes.
    filler = [token for document in text[:12] for token in encode(document)]
    hits = 0
    for _ in range(10):
        at = rng.randrange(len(filler) - length)
        episode = make_episode(encode, filler[at : at + length - 136], words, 8, rng)
        answer = episode.answers[0]
        prompt = torch.tensor([[demo.tokenizer.bos_token_id, *episode.ids[: answer.start]]])
        assert abs(prompt.shape[1] - length) < 60
        out = demo.model.generate(prompt, max_new_tokens=len(answer), do_sample=False)
        hits += out[0, prompt.shape[1] :].tolist() == [episode.ids[position] for position in answer]
    assert hits >= 8  # its card claims 95 % or more: 7 of 10 or fewer would then come once in a hundred times


def test_it_predicts_unseen_text_far_better_than_chance(demo, text):
    ids = torch.tensor([demo.tokenizer(text[0])["input_ids"][:1024]])
    with torch.no_grad():
        loss = demo.model(ids, labels=ids).loss.item()
    assert loss < 4.5  # uniform over 4096 tokens is 8.3 nats
