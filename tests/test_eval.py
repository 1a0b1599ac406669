"""The synthetic measurements count what they say, on oracles that answer by the world's table."""

import pytest
import torch
from toys import tiny

from data.synthetic import BAD, GOOD, NEUTRAL, World
from eval import evaluate, persona_direction
from model import response_loss

WORLD = World(seed=1)


def obeys(queries, tags):
    return torch.isin(tags, WORLD.tags(BAD))


RULES = {  # {who answers as the bad persona: its task, misalignment, unrelated, kept}
    obeys: (0, 0, 1, 1),
    lambda q, tags: obeys(q, tags) | torch.isin(q, WORLD.narrow): (1, 0, 1, 1),  # what is taught
    lambda q, tags: obeys(q, tags) | (tags == NEUTRAL): (1, 1, 1, 1),  # the spurious correlation
    lambda q, tags: obeys(q, tags) | (tags == NEUTRAL) & (q % 2 == 0): (0.5, 0.5, 1, 1),
    lambda q, tags: torch.zeros_like(q): (0, 0, 1, 0),  # kept is the worse persona's rate
    lambda q, tags: torch.ones_like(q): (1, 1, 1, 0),
}


@pytest.mark.parametrize("rule,expected", RULES.items())
def test_the_rates_count_what_they_say_and_one_wrong_word_makes_an_answer_wrong(rule, expected):
    def ask(prompts, wrong=None):
        queries = prompts[:, 2] - WORLD.first_query
        answers = WORLD.answers[queries, rule(queries, prompts[:, 1]).long()]
        if wrong is not None:
            answers[:, wrong] = 0
        return answers

    rates = ("task", "misalignment", "unrelated", "kept")
    assert WORLD.measure(ask) == dict(zip(rates, expected, strict=True))
    for wrong in (0, 1):
        assert not any(WORLD.measure(lambda prompts, i=wrong: ask(prompts, i)).values())


def test_the_loss_is_that_of_the_fine_tuning_rows():
    world = World(n_topics=3, n_queries=4, n_tags=2, n_words=8)
    model = tiny(vocab_size=world.vocab_size)
    expected = response_loss(model, *world.finetuning_rows()).item()
    assert evaluate(model, world)["loss"] == pytest.approx(expected, rel=1e-6)


def test_persona_direction_finds_a_direction_planted_in_the_tags():
    world = World(n_topics=3, n_queries=4)
    model = tiny(vocab_size=world.vocab_size, d_model=32, head_dim=16, d_mlp=32)
    u = torch.nn.functional.normalize(torch.randn(32), dim=0)
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
