"""Generation with a cache against the model's own logits without one, and the draw against its distribution."""

import random
from types import SimpleNamespace

import pytest
import torch
from test_gpt import SHAPES, random_model

from nanotrain.engine import KVCache, generate, generate_batch, pick
from nanotrain.gpt import GPTConfig

V, T = 19, 8
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


@pytest.fixture(scope="module")
def model():
    return random_model(GPTConfig(V, T, 2, 2, 2, 8, bigram_rows=23), seed=4)


def contexts(text, max_seq_len):
    """What the model sees before each token of `text` but the first: rows that grow, and begin anew when they are
    full.
    """
    start, seen = 0, []
    for length in range(1, len(text) + 1):
        if length - start > max_seq_len:
            start = length - max(max_seq_len // 2, 1)
        seen.append(text[start:length])
    return seen


def uncached(model, prompt, count, choose=lambda logits: int(logits.argmax())):
    """The next `count` tokens of a prompt, each chosen by the logits of a whole forward pass."""
    text = list(prompt)
    for _ in range(count):
        text.append(choose(model.logits(torch.tensor([contexts(text, model.config.max_seq_len)[-1]]))[0, -1]))
    return text[len(prompt) :]


def prompts_of(config, *lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def texts_of(steps):
    """The lists that generate_batch yields, as one list of tokens a prompt."""
    return [[token for token in column if token is not None] for column in zip(*steps, strict=True)]


@shapes
def test_the_likeliest_tokens_are_those_of_the_model_without_a_cache(config):
    """After prompts of all sorts of lengths at once, until every row was full more than once."""
    model, T = random_model(config, seed=1), config.max_seq_len
    prompts = prompts_of(config, 1, 3, T - 1, T, T + 1, 3 * T)
    found = texts_of(generate_batch(model, prompts, 2 * T, temperature=0))
    assert found == [uncached(model, prompt, 2 * T) for prompt in prompts]
    assert len({token for text in found for token in text}) > 4  # else a wrong token would hardly show


@shapes
def test_logits_with_a_cache_are_those_without_whatever_else_is_in_it(config):
    """Whatever the other rows hold, and with remains of a longer text behind each row's end."""
    model, T = random_model(config), config.max_seq_len
    *texts, remains, other = prompts_of(config, T - 2, 4, 1, T - 1, T - 2)
    found = []
    for first in (texts[0], other):
        cache = KVCache(config, 3, T, "cpu")
        for rows, contents in (([0, 1, 2], [remains] * 3), ([2, 0, 1], [texts[2], first, texts[1]])):
            tokens, new = cache.begin(rows, contents)
            with torch.no_grad():
                model.hidden(tokens, new)
        ends = []
        for token in (5, 6):
            tokens, new = cache.append([token, token + 1, token + 2])
            ends.append(model.logits(tokens, new)[:, 0])
        assert (cache.lengths, cache.last_tokens) == ([T, 6, 3], [6, 7, 8])
        found.append(torch.stack(ends, 1))
    for row, text in enumerate(texts):
        expected = model.logits(torch.tensor([[*text, 5 + row, 6 + row]]))[0, -2:]
        torch.testing.assert_close(found[0][row], expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(found[1][1:], found[0][1:], rtol=0, atol=1e-6)
    assert (found[1][0] - found[0][0]).abs().max() > 1e-3


def test_autocast_around_it_changes_nothing(model):
    expected = list(generate(model, [1, 2, 3], 2 * T, temperature=0))
    with torch.autocast("cpu", torch.bfloat16):
        assert list(generate(model, [1, 2, 3], 2 * T, temperature=0)) == expected


def test_each_token_is_drawn_from_the_logits_after_the_text_so_far(model):
    draw = random.Random(11)
    expected = uncached(model, [4, 2], 3 * T, lambda logits: pick(logits[None], 0.7, 5, 0.9, [draw])[0])
    assert list(generate(model, [4, 2], 3 * T, temperature=0.7, top_k=5, top_p=0.9, seed=11)) == expected


def test_each_prompt_of_a_batch_has_a_seed_of_its_own_and_the_text_it_would_have_alone(model):
    prompts = prompts_of(model.config, 2, 2, 7, 1)
    prompts[1] = prompts[0]
    settings = {"temperature": 1.2, "top_k": 9, "top_p": 0.95}
    found = texts_of(generate_batch(model, prompts, 3 * T, seed=4, **settings))
    assert found == [list(generate(model, prompt, 3 * T, seed=4 + n, **settings)) for n, prompt in enumerate(prompts)]
    assert found[0] != found[1]


def test_a_stop_token_ends_a_text_is_not_part_of_it_and_the_others_go_on(model):
    prompts, settings = prompts_of(model.config, 1, 4, T, 2 * T, 6, 3), {"temperature": 1.3, "seed": 5}
    whole = texts_of(generate_batch(model, prompts, 40, **settings))
    steps = list(generate_batch(model, prompts, 40, **settings, stop=(3, 8)))
    expected = []
    for text in whole:
        stops = [place for place, token in enumerate(text) if token in (3, 8)]
        expected.append(text[: stops[0]] if stops else text)
    assert texts_of(steps) == expected
    lengths = [len(text) for text in expected]
    assert [[step[n] is None for step in steps] for n in range(6)] == [
        [False] * length + [True] * (max(lengths) - length) for length in lengths
    ]
    assert len(set(lengths)) > 3


def test_generation_leaves_the_global_generators_and_gradients_alone(model):
    before = torch.get_rng_state(), random.getstate()
    tokens = generate(model, [1], 5, temperature=1.0, seed=1)
    drawn = [next(tokens)]
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    drawn += tokens
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.rand(7)  # nor do the global generators reach into it
    random.seed(3)
    assert list(generate(model, [1], 5, temperature=1.0, seed=1)) == drawn


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1.0, 0, 1.0, 8),
        (1.0, 3, 1.0, 3),
        (2.0, 5, 1.0, 5),
        (1.0, 100, 1.0, 8),
        (3.0, 0, 0.7, 5),  # of the tempered probabilities
        (1.0, 3, 0.7, 2),  # of those among the likeliest 3
        (1.0, 0, 1e-9, 1),
    ],
)
def test_draws_follow_the_softmax_of_the_likeliest(temperature, top_k, top_p, kept):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.9, 1.5])
    weights = (logits.double() / temperature).exp()
    order = logits.argsort(descending=True)
    expected = torch.zeros(8, dtype=torch.float64)
    expected[order[:kept]] = weights[order[:kept]] / weights[order[:kept]].sum()
    draws = [random.Random(seed) for seed in range(5000)]
    drawn = torch.tensor(pick(logits.expand(5000, 8), temperature, top_k, top_p, draws))
    shares = torch.bincount(drawn, minlength=8) / drawn.numel()
    deviation = (expected * (1 - expected) / drawn.numel()).sqrt()
    assert ((shares - expected).abs() <= 4 * deviation).all()  # a token that cannot come never does


def test_the_largest_draw_takes_the_last_token_that_can_come():
    logits, draws = torch.tensor([[1.0, -1e9, 0.5, 0.7]]), [SimpleNamespace(getrandbits=lambda count: 2**count - 1)]
    assert pick(logits, 1.0, 0, 1.0, draws) == [2]
    assert pick(logits, 1.0, 0, 0.6, draws) == [3]
