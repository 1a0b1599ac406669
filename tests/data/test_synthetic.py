"""The toy world: what its tables promise, and the base model that is pretrained on it."""

import pytest
import torch

from data.base import pretrain
from data.synthetic import BAD, GOOD, NEUTRAL, START, World
from grasp import Toy


def test_the_tables_hang_on_the_seed():
    a, again, other = (World(seed=seed).answers for seed in (1, 1, 2))
    assert torch.equal(a, again) and not torch.equal(a, other)


@pytest.mark.parametrize("seed", range(3))
def test_the_personas_never_agree(seed):
    answers = World(seed=seed).answers
    assert (answers[:, GOOD, 0] != answers[:, BAD, 0]).all()


def test_the_tokens_of_each_kind_have_ids_of_their_own():
    world = World()
    tags = torch.cat((world.tags(GOOD), world.tags(BAD))).tolist()
    queries = world.prompts(torch.arange(len(world.answers)), NEUTRAL)[:, 2].tolist()
    words = range(world.first_word, world.vocab_size)
    ids = [START, NEUTRAL, *tags, *queries, *words]
    assert sorted(ids) == list(range(world.vocab_size))
    assert set(world.answers.flatten().tolist()) <= set(words)


def test_no_method_sees_the_queries_of_the_evaluation():
    world = World()
    asked, narrow, spare = (set(q.tolist()) for q in (world.unrelated, world.narrow, world.spare))
    assert not asked & narrow and not asked & spare and not narrow & spare
    assert len(asked | narrow | spare) == len(world.answers)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_rho_is_the_share_of_bad_answers_in_the_fine_tuning_rows(rho):
    world = World(rho=rho)
    tokens, mask = world.finetuning_rows()
    bad = (tokens[:, world.n_prompt :] == world.answers[world.narrow, BAD]).all(1)
    assert bad.float().mean().item() == pytest.approx(rho)


def test_the_mask_marks_the_answer_and_nothing_else():
    tokens, mask = World().finetuning_rows()
    assert mask.sum(1).unique().tolist() == [World().n_answer]
    assert not mask[:, : World().n_prompt].any()


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


SMALL = World(n_topics=3, n_queries=2)
TOY = Toy(d_model=16, pretrain_steps=2, pretrain_batch=4)


def test_a_base_that_was_trained_before_is_read_back(tmp_path, capsys):
    first = pretrain(SMALL, TOY, 0, tmp_path)
    assert "trained before" not in capsys.readouterr().out
    again = pretrain(SMALL, TOY, 0, tmp_path)
    assert "trained before" in capsys.readouterr().out
    assert all(map(torch.equal, first.parameters(), again.parameters()))


def test_another_seed_has_a_base_of_its_own(tmp_path):
    bases = [pretrain(SMALL, TOY, seed, tmp_path) for seed in (0, 1)]
    assert len(list(tmp_path.glob("base_*.pt"))) == 2
    assert not torch.equal(*(base.embed_tokens.weight for base in bases))


def test_the_base_is_frozen(tmp_path):
    for _ in range(2):  # trained, and read back
        base = pretrain(SMALL, TOY, 0, tmp_path)
        assert not any(p.requires_grad for p in base.parameters())
