"""The transformer against the reference library's own; its cache; sampling."""

import pytest
import torch
from checkpoints import KINDS, make
from toys import randomise, rows, tiny

from lora import add_lora, lora_modules
from model import GPT, Cache, response_loss

PROMPTS = [[5], [7, 8, 9, 10, 11], [3, 2], list(range(20, 32))]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(Our model, the transformers model) of one random checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param, folder)
    return GPT.from_pretrained(folder), theirs


def test_logits_equal_transformers(pair):
    (ours, theirs), tokens = pair, torch.randint(97, (3, 41))
    assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)


def test_greedy_generation_equals_transformers(pair):
    ours, theirs = pair
    stop = (0,) if theirs.config.model_type == "gpt2" else ()  # where the reference stops
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, pad_token_id=0
        )
        new = ours.generate([prompt], 10, temperature=0, stop=stop)
        assert new == [expected[0, len(prompt) :].tolist()]


def test_a_padded_batch_answers_as_each_prompt_alone_without_a_cache(pair):
    ours, _ = pair
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(10):
            ids.append(ours(torch.tensor([ids]))[0, -1].argmax().item())
        expected.append(ids[len(prompt) :])
    assert ours.generate(PROMPTS, 10, temperature=0) == expected


@pytest.mark.parametrize("padding", [0, 4])
def test_a_cache_fed_in_pieces_gives_the_logits_of_the_whole(pair, padding):
    """With one row that is padded on the left."""
    (model, _), tokens = pair, torch.randint(97, (3, 12))
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[2, :padding] = False
    cache = Cache(12, valid)
    pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split([5, 1, 4, 2], 1)], 1)
    assert torch.allclose(pieces[:2], model(tokens)[:2], atol=1e-5)
    assert torch.allclose(pieces[2, padding:], model(tokens[2:, padding:])[0], atol=1e-5)
    assert pieces.isfinite().all()


def test_response_loss_counts_marked_tokens_alone():
    model, (tokens, mask) = tiny(), rows()
    logp = model(tokens).log_softmax(-1)
    losses = []
    for b, t in mask.nonzero().tolist():
        if t > 0:  # nothing stands before the first token
            losses.append(-logp[b, t - 1, tokens[b, t]])
    expected = torch.stack(losses).mean().item()
    assert response_loss(model, tokens, mask).item() == pytest.approx(expected, rel=1e-5)


class Rigged(GPT):
    """The same next token always: probabilities .5, .3, .15, .05 of tokens 3, 1, 0, 2."""

    def forward(self, tokens, keep=None, cache=None):
        probabilities = torch.tensor([0.15, 0.3, 0.05, 0.5] + [0.0] * 46)
        return probabilities.log().expand(int(keep.sum()), 50)


@pytest.fixture
def rigged():
    return Rigged(tiny().config)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_takes_the_power_of_the_probabilities_and_repeats_with_its_seed(
    rigged, temperature
):
    new, again, other = (
        torch.tensor(rigged.generate([[1]] * 1000, 4, temperature, seed=seed)) for seed in (5, 5, 6)
    )
    powers = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** (1 / temperature)
    expected = (powers / powers.sum())[0].item()
    assert (new == 3).float().mean().item() == pytest.approx(expected, abs=0.03)
    assert torch.equal(new, again) and not torch.equal(new, other)


def test_only_allowed_ids_are_generated(rigged):
    new = rigged.generate([[1]] * 100, 8, allowed=[0, 2])
    assert {token for row in new for token in row} == {0, 2}
    assert rigged.generate([[1]], 2, temperature=0, allowed=[0, 2]) == [[0, 0]]


def test_a_row_ends_at_its_first_stop_id_and_no_later(rigged):
    for row in rigged.generate([[1]] * 50, 8, stop=[3], seed=2):
        assert (row[-1] == 3 and row.count(3) == 1) or (len(row) == 8 and 3 not in row)


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = randomise(add_lora(tiny(), 2, 2, "all-linear"))
        model.checkpointing = checkpointing
        response_loss(model, *rows()).backward()
        gradients.append(torch.cat([m.lora_A.grad.flatten() for m in lora_modules(model).values()]))
    assert gradients[0].abs().max() > 0 and torch.allclose(*gradients, atol=1e-6)


def test_a_token_beyond_the_last_position_is_refused():
    message = "33 tokens, but the model has 32 positions"
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        tiny().generate([[1], [2] * 31], 3)
