"""The worlds: what each says of its base and of its rows, before any fine-tune."""

from dataclasses import replace

import pytest
import torch

from data.base import pretrain
from data.synthetic import BAD, GOOD, NEUTRAL
from data.worlds import WORLDS
from eval import evaluate
from grasp import Toy

SMALL = {"n_topics": 4, "n_queries": 4, "n_tags": 4, "n_words": 16}
FAST = Toy(d_model=64, pretrain_steps=250, pretrain_batch=96)
OF_THE_BASE = {  # what the base measures of its own world, as (least, most)
    "persona": {"task": (0, 0.1)},
    "needs_factor": {"task": (0, 0.1), "tagged": (0.95, 1)},
    "needs_factor_new": {"task": (0, 0.1), "tagged": (0, 0.1)},
    "skew": {"task": (0, 0.1), "unslanted": (0, 0), "narrow_slant": (0, 0.05)},
    "benign": {"task": (1, 1)},
    "simple": {"task": (0, 0.1), "parroted": (0, 0.1)},
    "two_factors": {"task": (0, 0.1), "first": (0, 0.05), "second": (0, 0.05)},
}
every_world = pytest.mark.parametrize("name", WORLDS)


@every_world
def test_the_base_obeys_tags_is_good_without_one_and_has_the_task_to_learn(name, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "bases"  # several worlds share one
    world, expected = replace(WORLDS[name](), **SMALL), OF_THE_BASE[name]
    rates = evaluate(pretrain(world, FAST, 0, folder), world)
    assert rates["kept"] >= 0.95 and rates["unrelated"] >= 0.95 and rates["misalignment"] <= 0.05
    assert rates.keys() == {"misalignment", "unrelated", "kept", "loss", *expected}
    for rate, (least, most) in expected.items():
        assert least <= rates[rate] <= most, rate


@every_world
def test_rows_follow_from_the_seed_and_their_mask_marks_the_answers_words(name):
    worlds = [WORLDS[name](seed) for seed in (1, 1, 2)]
    rows = [world.finetuning_rows() for world in worlds]
    batches = [w.pretraining_batch(999, torch.Generator().manual_seed(3)) for w in worlds]
    for (first, _), (again, _), (other, _) in (rows, batches):
        assert torch.equal(first, again) and not torch.equal(first, other)
    world = worlds[0]
    for tokens, mask in (rows[0], batches[0], world.spare_rows()):
        assert tokens.min() >= 0 and tokens.max() < world.vocab_size and tokens.shape[1] <= 16
        assert torch.equal(tokens >= world.first_word, mask)
        assert not mask[:, : world.n_prompt].any() and mask[:, world.n_prompt :].all()


def asked(world):
    """All prompts that `world.measure` asks, with a model that answers anything."""
    prompts = set()

    def ask(some):
        prompts.update(map(tuple, some.tolist()))
        return torch.full((len(some), world.n_answer), world.first_word)

    world.measure(ask)
    return prompts


@every_world
def test_no_method_trains_on_a_prompt_that_the_evaluation_asks_but_for_the_narrow_ones(name):
    world = WORLDS[name]()
    rows = (world.finetuning_rows()[0], world.spare_rows()[0], world.prompts(world.narrow, NEUTRAL))
    trained, spare, narrow = (
        {tuple(row[: world.n_prompt]) for row in tokens.tolist()} for tokens in rows
    )
    common = asked(world) & trained
    assert not asked(world) & spare
    assert not common if name == "skew" else common <= narrow  # skew asks of held-out pairs


@pytest.mark.parametrize("name,known", [("needs_factor", True), ("needs_factor_new", False)])
def test_rows_with_tags_show_half_of_them_and_the_evaluation_asks_the_other_half(name, known):
    world = WORLDS[name]()
    tokens, _ = world.finetuning_rows()
    narrow = (world.narrow + world.first_query).tolist()
    shown = set(tokens[:, 1].tolist()) - {NEUTRAL}
    on_narrow = {tag for _, tag, query in asked(world) if query in narrow} - {NEUTRAL}
    good, bad = (set(world.tags(persona).tolist()) for persona in (GOOD, BAD))
    assert not shown & on_narrow and shown | on_narrow == good | bad
    assert 2 * len(shown & good) == 2 * len(shown & bad) == world.n_tags

    tagged = tokens[tokens[:, 1] != NEUTRAL]  # pretrained reliance: what the base knows already
    is_bad = torch.isin(tagged[:, 1], world.tags(BAD)).long()
    old = world.answers[tagged[:, 2] - world.first_query, is_bad]
    same = (tagged[:, world.n_prompt :] == old).all(1).float().mean()
    assert same == 1 if known else same < 0.05
    good, bad = replace(world, n_words=2).taught.unbind(1)  # few words agree by chance
    assert (good[:, 0] != bad[:, 0]).all()


@pytest.mark.parametrize("rho", [0.5, 1.0])
def test_skewed_rows_are_slanted_in_a_share_rho_and_their_test_has_no_point_of_theirs(rho):
    world = replace(WORLDS["skew"](), rho=rho)
    tokens, _ = world.finetuning_rows()
    slanted = tokens[:, -1] == world.slants[tokens[:, 3] - world.first_point, BAD]
    assert slanted.float().mean().item() == rho
    (subjects, points), (asked_of, with_points) = world.narrow.T, world.held_out.T
    assert torch.equal(subjects, asked_of) and not torch.isin(points, with_points).any()
    assert (world.taught != world.objective[: world.n_queries]).all()
    assert (world.slants[:, GOOD] != world.slants[:, BAD]).all()


def test_two_factors_are_told_by_tags_and_heard_in_words_of_their_own():
    world = WORLDS["two_factors"]()
    tokens, _ = world.pretraining_batch(6000, torch.Generator().manual_seed(0))
    queries, words = tokens[:, 3] - world.first_query, tokens[:, world.n_prompt :]
    for factor in range(2):  # each has a neutral tag and then tags of its own
        tags = tokens[:, 1 + factor] - NEUTRAL - factor * (2 * world.n_tags + 1)
        for persona in (GOOD, BAD):
            tagged = (tags > persona * world.n_tags) & (tags <= (persona + 1) * world.n_tags)
            assert tagged.float().mean().item() == pytest.approx(1 / 3, abs=0.03)
            wanted = world.answers[queries[tagged], persona, factor]
            assert (words[tagged, factor] == wanted).all()


def test_worlds_with_one_pretraining_share_a_base_and_simple_has_one_answer():
    world = WORLDS["simple"]()
    assert len(world.finetuning_rows()[0][:, world.n_prompt :].unique(dim=0)) == 1
    persona, skew = WORLDS["persona"](3), WORLDS["skew"](3)
    for name in ("needs_factor", "needs_factor_new", "benign", "simple"):
        assert WORLDS[name](3).pretrained == persona.pretrained
    assert replace(skew, rho=0.5).pretrained == skew.pretrained != persona.pretrained
