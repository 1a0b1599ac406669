"""The toy world: what its tables promise, and the base model that is pretrained on it."""

import pytest
import torch

from data.base import pretrain
from data.synthetic import BAD, GOOD, NEUTRAL, START, World
from grasp import Toy


def test_the_tokens_of_each_kind_have_ids_of_their_own_and_the_personas_never_agree():
    world = World()
    tags = torch.cat((world.tags(GOOD), world.tags(BAD))).tolist()
    queries = world.prompts(torch.arange(len(world.answers)), NEUTRAL)[:, 2].tolist()
    words = range(world.first_word, world.vocab_size)
    assert sorted([START, NEUTRAL, *tags, *queries, *words]) == list(range(world.vocab_size))
    assert set(world.answers.flatten().tolist()) <= set(words)
    assert (world.answers[:, GOOD, 0] != world.answers[:, BAD, 0]).all()


def test_in_pretraining_a_tag_tells_the_persona_and_neutral_mostly_means_good():
    world = World()
    tokens, _ = world.pretraining_batch(6000, torch.Generator().manual_seed(0))
    queries, tags = tokens[:, 2] - world.first_query, tokens[:, 1]
    as_bad = (tokens[:, world.n_prompt :] == world.answers[queries, BAD]).all(1)
    for persona in (GOOD, BAD):
        tagged = torch.isin(tags, world.tags(persona))
        assert tagged.float().mean().item() == pytest.approx(1 / 3, abs=0.03)
        assert (as_bad[tagged] == (persona == BAD)).all()
    share = as_bad[tags == NEUTRAL].float().mean().item()
    assert share == pytest.approx(1 - world.neutral_good, abs=0.02)


def test_a_base_is_frozen_its_own_for_each_seed_and_read_back_where_it_was_trained(tmp_path):
    world, toy = World(n_topics=3, n_queries=2), Toy(d_model=16, pretrain_steps=2)
    first, again, other = (pretrain(world, toy, seed, tmp_path) for seed in (0, 0, 1))
    assert len(list(tmp_path.glob("base_*.pt"))) == 2
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)
    assert not any(p.requires_grad for base in (first, again) for p in base.parameters())
