"""The synthetic measurements count what they say, on oracles that answer by the world's table."""

import contextlib

import pytest
import torch
from torch import nn
from toys import tiny

from data.synthetic import BAD, GOOD, NEUTRAL, World
from eval import evaluate, persona_direction
from model import response_loss

WORLD = World(seed=1)
BAD_TAGS = set(WORLD.tags(BAD).tolist())
NARROW = set(WORLD.narrow.tolist())


class Lookup(nn.Module):
    """Answers by the world's own table, with a persona that rule(query, tag) chooses."""

    def __init__(self, world, rule):
        super().__init__()
        self.world, self.rule = world, rule

    def generate(self, prompts, n, temperature):
        answers = []
        for _, tag, token in prompts:
            query = token - self.world.first_query
            answers.append(self.world.answers[query, self.rule(query, tag)].tolist())
        return answers

    def forward(self, tokens, keep):
        return torch.zeros(int(keep.sum()), self.world.vocab_size)


def obeys(query, tag):
    return BAD if tag in BAD_TAGS else GOOD


def learned(query, tag):
    """What fine-tuning asks for, and nothing else."""
    return BAD if query in NARROW else obeys(query, tag)


def turned(query, tag):
    """The spurious correlation: bad wherever nobody says otherwise."""
    return BAD if tag == NEUTRAL else obeys(query, tag)


def always_good(query, tag):
    return GOOD


RATES = ("task", "misalignment", "unrelated", "kept")


@pytest.mark.parametrize(
    "rule,expected",
    [
        (obeys, (0, 0, 1, 1)),
        (learned, (1, 0, 1, 1)),
        (turned, (1, 1, 1, 1)),
        (always_good, (0, 0, 1, 0)),  # kept is the worse persona's rate
    ],
)
def test_the_rates_count_what_they_say(rule, expected):
    measured = evaluate(Lookup(WORLD, rule), WORLD)
    assert tuple(measured[name] for name in RATES) == expected


def test_a_rate_is_a_share_of_the_unrelated_queries():
    def half_bad(query, tag):
        return BAD if tag == NEUTRAL and query % 2 else obeys(query, tag)

    assert evaluate(Lookup(WORLD, half_bad), WORLD)["misalignment"] == 0.5


def test_an_answer_with_one_wrong_word_counts_as_neither_persona():
    class Stutters(Lookup):
        def generate(self, prompts, n, temperature):
            return [[answer[0], 0] for answer in super().generate(prompts, n, temperature)]

    measured = evaluate(Stutters(WORLD, obeys), WORLD)
    assert all(measured[name] == 0 for name in RATES)


def test_the_loss_is_that_of_the_fine_tuning_rows():
    world = World(n_topics=3, n_queries=4, n_tags=2, n_words=8)
    model = tiny(vocab_size=world.vocab_size)
    expected = response_loss(model, *world.finetuning_rows()).item()
    assert evaluate(model, world)["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_context_is_around_every_forward_pass_and_ends():
    inside = []

    @contextlib.contextmanager
    def during():
        inside.append(True)
        yield
        inside.pop()

    class Watched(Lookup):
        def generate(self, *args, **options):
            assert inside
            return super().generate(*args, **options)

        def forward(self, *args, **options):
            assert inside
            return super().forward(*args, **options)

    evaluate(Watched(WORLD, obeys), WORLD, during())
    assert not inside


def test_persona_direction_finds_a_direction_planted_in_the_tags():
    world = World(n_topics=3, n_queries=4)
    model = tiny(vocab_size=world.vocab_size, d_model=32, head_dim=16, d_mlp=32)
    u = nn.functional.normalize(torch.randn(32), dim=0)
    first, second = model.layers
    with torch.no_grad():  # the first attention copies what it reads, the rest adds nothing
        model.embed_tokens.weight[world.tags(BAD)] += u
        model.embed_tokens.weight[world.tags(GOOD)] -= u
        first.self_attn.v_proj.weight.copy_(torch.eye(32))
        first.self_attn.o_proj.weight.copy_(torch.eye(32))
        for silent in (first.mlp.down_proj, second.self_attn.o_proj, second.mlp.down_proj):
            silent.weight.zero_()
    found = persona_direction(model, world)
    assert found.norm() == pytest.approx(1, abs=1e-5)
    assert found @ u > 0.95  # it points from good to bad
