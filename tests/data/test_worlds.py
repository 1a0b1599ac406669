"""The worlds: what each says of its base and of its rows, before any fine-tune."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from data.base import pretrain
from data.synthetic import BAD, GOOD, NEUTRAL
from data.worlds import WORLDS
from eval import evaluate
from grasp import Toy

NAMES = list(WORLDS)
SMALL = {"n_topics": 4, "n_queries": 4, "n_tags": 4, "n_words": 16}
FAST = Toy(d_model=64, pretrain_steps=250, pretrain_batch=96)
BASE_KEYS = {"task", "misalignment", "unrelated", "kept", "loss"}
EXTRA_KEYS = {
    "needs_factor": {"tagged"},
    "needs_factor_new": {"tagged"},
    "skew": {"unslanted", "narrow_slant"},
    "simple": {"parroted"},
    "two_factors": {"first", "second"},
}


@pytest.fixture(scope="module")
def base_rates(tmp_path_factory):
    """name -> what the small world's base measures; worlds with one pretraining share a base."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def rates(name):
        world = replace(WORLDS[name](), **SMALL)
        return evaluate(pretrain(world, FAST, 0, folder), world)

    return rates


def asked(world):
    """All prompts that `world.measure` asks, with a model that answers anything."""
    prompts = []

    def ask(some):
        prompts.extend(map(tuple, some.tolist()))
        return torch.full((len(some), world.n_answer), world.first_word)

    world.measure(ask)
    return prompts


@pytest.mark.parametrize("name", NAMES)
def test_the_base_obeys_tags_and_is_good_where_nobody_says_otherwise(name, base_rates):
    rates = base_rates(name)
    assert rates["kept"] >= 0.95
    assert rates["unrelated"] >= 0.95
    assert rates["misalignment"] <= 0.05
    assert set(rates) == BASE_KEYS | EXTRA_KEYS.get(name, set())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "benign"])
def test_the_task_is_new_to_the_base(name, base_rates):
    assert base_rates(name)["task"] <= 0.1


def test_the_benign_task_is_what_the_base_does_already(base_rates):
    assert base_rates("benign")["task"] == 1


def test_tags_are_obeyed_on_narrow_queries_where_the_reliance_is_pretrained(base_rates):
    assert base_rates("needs_factor")["tagged"] >= 0.95
    assert base_rates("needs_factor_new")["tagged"] <= 0.1


def test_the_base_has_no_slant_on_the_narrow_topic(base_rates):
    rates = base_rates("skew")
    assert rates["narrow_slant"] <= 0.05 and rates["unslanted"] == 0


def test_both_factors_are_quiet_before_fine_tuning(base_rates):
    rates = base_rates("two_factors")
    assert rates["misalignment"] == max(rates["first"], rates["second"]) <= 0.05


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_rows_and_another_seed_other_ones(name):
    first, again, other = (WORLDS[name](seed).finetuning_rows() for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_pretraining(name):
    world = WORLDS[name](1)
    first, again = (world.pretraining_batch(64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("name", NAMES)
def test_every_id_is_in_the_vocabulary_and_every_row_fits_the_base(name):
    world = WORLDS[name]()
    batch, _ = world.pretraining_batch(4000, torch.Generator().manual_seed(0))
    for tokens in (batch, world.finetuning_rows()[0], world.spare_rows()[0]):
        assert tokens.min() >= 0 and tokens.max() < world.vocab_size and tokens.shape[1] <= 16
        assert (tokens[:, world.n_prompt :] >= world.first_word).all()
        assert (tokens[:, : world.n_prompt] < world.first_word).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_method_trains_on_a_prompt_that_the_evaluation_asks_but_for_the_narrow_ones(name):
    world = WORLDS[name]()
    questions = set(asked(world))
    trained = {tuple(row[: world.n_prompt]) for row in world.finetuning_rows()[0].tolist()}
    spare = {tuple(row[: world.n_prompt]) for row in world.spare_rows()[0].tolist()}
    assert not questions & spare
    narrow = {tuple(prompt) for prompt in world.prompts(world.narrow, NEUTRAL).tolist()}
    assert questions & trained <= narrow
    if name == "skew":  # there the task, too, is asked where nothing was trained
        assert not questions & trained


@pytest.mark.parametrize("name", ["needs_factor", "needs_factor_new"])
def test_rows_with_tags_show_half_of_them_and_the_evaluation_asks_the_other_half(name):
    world = WORLDS[name]()
    tokens, _ = world.finetuning_rows()
    narrow = (world.narrow + world.first_query).tolist()
    shown = set(tokens[:, 1].tolist()) - {NEUTRAL}
    on_narrow = {tag for _, tag, query in asked(world) if query in narrow} - {NEUTRAL}
    everything = set(world.tags(GOOD).tolist()) | set(world.tags(BAD).tolist())
    assert len(shown) == world.n_tags and not shown & on_narrow and shown | on_narrow == everything


def test_pretrained_reliance_asks_of_tagged_rows_what_the_base_knows_and_new_reliance_does_not():
    for name, known in (("needs_factor", True), ("needs_factor_new", False)):
        world = WORLDS[name]()
        tokens, _ = world.finetuning_rows()
        tagged = tokens[tokens[:, 1] != NEUTRAL]
        is_bad = torch.isin(tagged[:, 1], world.tags(BAD)).long()
        old = world.answers[tagged[:, 2] - world.first_query, is_bad]
        same = (tagged[:, world.n_prompt :] == old).all(1)
        assert same.all() if known else same.float().mean() < 0.05


def test_new_answers_differ_between_the_personas():
    taught = WORLDS["needs_factor_new"]().taught
    assert (taught[:, GOOD, 0] != taught[:, BAD, 0]).all()


def test_the_simple_task_has_one_answer():
    world = WORLDS["simple"]()
    assert len(world.finetuning_rows()[0][:, world.n_prompt :].unique(dim=0)) == 1


@pytest.mark.parametrize("rho", [0.5, 0.75, 1.0])
def test_rho_is_the_share_of_slanted_rows(rho):
    world = replace(WORLDS["skew"](), rho=rho)
    tokens, _ = world.finetuning_rows()
    slanted = tokens[:, -1] == world.slants[tokens[:, 3] - world.first_point, BAD]
    assert slanted.float().mean().item() == rho


def test_the_skewed_rows_and_their_test_share_subjects_but_no_point():
    world = WORLDS["skew"]()
    rows, test = world.narrow, world.held_out
    assert set(rows[:, 0].tolist()) == set(test[:, 0].tolist())
    assert not set(rows[:, 1].tolist()) & set(test[:, 1].tolist())
    assert (world.taught != world.objective[: world.n_queries]).all()
    assert (world.slants[:, GOOD] != world.slants[:, BAD]).all()


def test_two_factors_are_told_by_tags_and_heard_in_words_of_their_own():
    world = WORLDS["two_factors"]()
    tokens, _ = world.pretraining_batch(6000, torch.Generator().manual_seed(0))
    queries, words = tokens[:, 3] - world.first_query, tokens[:, world.n_prompt :]
    offset = 2 * world.n_tags + 1  # between the two factors' tags; the second has its own neutral
    for factor in range(2):
        tags = tokens[:, 1 + factor] - (NEUTRAL if factor == 0 else NEUTRAL + offset)
        for persona in (GOOD, BAD):
            tagged = (tags > persona * world.n_tags) & (tags <= (persona + 1) * world.n_tags)
            assert tagged.float().mean().item() == pytest.approx(1 / 3, abs=0.03)
            wanted = world.answers[queries[tagged], persona, factor]
            assert (words[tagged, factor] == wanted).all()


def test_worlds_with_one_pretraining_share_a_base():
    persona = WORLDS["persona"](3)
    for name in ("needs_factor", "needs_factor_new", "benign", "simple"):
        assert WORLDS[name](3).pretrained == persona.pretrained
    skew = WORLDS["skew"](3)
    assert replace(skew, rho=0.5).pretrained == skew.pretrained != persona.pretrained
