"""Generation against the model's own logits, and the draw against its distribution."""

import inspect
from itertools import islice

import pytest
import torch

from nanotrain.engine import generate, pick
from nanotrain.gpt import GPT, GPTConfig

V, T = 19, 8


@pytest.fixture(scope="module")
def model():
    """A small model whose likeliest tokens change as the text goes on."""
    with torch.device("meta"):
        model = GPT(GPTConfig(V, T, 2, 2, 2, 8))
    model.to_empty(device="cpu")
    model.init_weights(0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.size(1) ** -0.5, generator=generator)
    return model


def greedy(model, prompt, count):
    """The likeliest token after the last T tokens, again and again."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(torch.tensor([tokens[-T:]]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("length", [1, 3, T - 1, T, T + 1, 3 * T])
def test_temperature_zero_takes_the_likeliest_token_after_any_length_of_prompt(model, length):
    prompt = torch.randint(V, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    expected = greedy(model, prompt, 2 * T)
    assert list(generate(model, prompt, 2 * T, temperature=0)) == expected
    assert list(generate(model, prompt, 2 * T, temperature=1.0, top_k=1, seed=3)) == expected
    assert len(set(expected)) > 4


def test_each_token_is_drawn_from_the_logits_after_the_text_so_far(model):
    generator, tokens = torch.Generator().manual_seed(11), [4, 2]
    for token in generate(model, [4, 2], 3 * T, temperature=0.7, top_k=5, seed=11):
        assert token == pick(model.logits(torch.tensor([tokens[-T:]]))[0, -1], 0.7, 5, generator)
        tokens.append(token)
    assert len(tokens) == 2 + 3 * T


def test_the_seed_decides_the_text(model):
    texts = [list(generate(model, [1], 20, temperature=1.5, seed=seed)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_tokens_come_one_by_one_and_the_prompt_stays_as_it_was(model):
    prompt = [1, 2]
    tokens = generate(model, prompt, 10**9)
    assert inspect.isgenerator(tokens)
    assert len(list(islice(tokens, 3))) == 3
    assert prompt == [1, 2]
    assert list(generate(model, prompt, 0)) == []


def test_generation_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    drawn = list(generate(model, [1], 5, temperature=1.0, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)  # nor does the global generator reach into it
    assert list(generate(model, [1], 5, temperature=1.0, seed=1)) == drawn


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(model):
    text = list(generate(model, [1], 30, temperature=1.5, seed=2))
    stop, never = text[10], next(token for token in range(V) if token not in text)
    assert list(generate(model, [1], 30, temperature=1.5, seed=2, stop=(never,))) == text
    assert list(generate(model, [1], 30, temperature=1.5, seed=2, stop=(never, stop))) == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "likeliest"),
    [(1.0, 0, 8), (1.0, 3, 3), (0.5, 0, 8), (2.0, 5, 5), (1.0, 8, 8), (1.0, 100, 8)],
)
def test_draws_follow_the_softmax_of_the_likeliest(temperature, top_k, likeliest):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.9, 1.5])
    weights = (logits.double() / temperature).exp()
    kept = logits.argsort(descending=True)[:likeliest]
    expected = torch.zeros(8, dtype=torch.float64)
    expected[kept] = weights[kept] / weights[kept].sum()
    draws, generator = 5000, torch.Generator().manual_seed(0)
    drawn = torch.tensor([pick(logits, temperature, top_k, generator) for _ in range(draws)])
    shares = torch.bincount(drawn, minlength=8) / draws
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((shares - expected).abs() <= 4 * deviation).all()  # a token that cannot come never does
