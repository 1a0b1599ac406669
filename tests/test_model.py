"""The transformer against the reference library's own; its cache; sampling."""

import subprocess
import sys

import pytest
import torch
import transformers
from checkpoints import KINDS, edit_config, make
from toys import ROOT, randomise, rows, tiny

from lora import add_lora, lora_modules
from model import GPT, Cache, response_loss
from support.errors import UserError


def largest_difference(ours, theirs, tokens):
    with torch.no_grad():
        return (ours(tokens) - theirs(tokens).logits).abs().max().item()


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind, shard, tmp_path):
    theirs = make(kind, tmp_path, shard=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours = GPT.from_pretrained(tmp_path)
    assert largest_difference(ours, theirs, torch.randint(97, (3, 41))) < 1e-4


@pytest.mark.parametrize(
    "kind,changes",
    [
        ("gpt2", {"n_inner": None}),
        ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": False}),
        ("qwen2_tied", {"num_key_value_heads": 1}),
        ("qwen2_tied", {"num_key_value_heads": 6}),
        ("qwen2_untied", {"hidden_size": 60, "num_attention_heads": 10, "num_key_value_heads": 5}),
        ("qwen3", {"head_dim": 4, "num_key_value_heads": 3}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_other_shapes_equal_transformers(kind, changes, tmp_path):
    theirs = make(kind, tmp_path, **changes)
    ours = GPT.from_pretrained(tmp_path)
    assert largest_difference(ours, theirs, torch.randint(97, (2, 9))) < 1e-4


def test_rope_theta_is_read_from_its_old_place_too(tmp_path):
    theirs = make("qwen2_tied", tmp_path)
    edit_config(tmp_path, rope_parameters=None, rope_theta=5e4)
    ours = GPT.from_pretrained(tmp_path)
    assert largest_difference(ours, theirs, torch.randint(97, (2, 30))) < 1e-4


def test_rope_theta_is_never_assumed(tmp_path):
    make("qwen2_tied", tmp_path)
    edit_config(tmp_path, rope_parameters=None, rope_theta=None)
    with pytest.raises(UserError, match="no 'rope_theta'"):
        GPT.from_pretrained(tmp_path)


def test_dtype_is_the_stored_one_unless_asked_otherwise(tmp_path):
    make("qwen3", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    stored = GPT.from_pretrained(tmp_path)
    asked = GPT.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in asked.parameters()} == {torch.float32}


def test_weights_stored_in_bf16_are_widened_exactly(tmp_path):
    make("qwen3", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = GPT.from_pretrained(tmp_path, dtype=torch.float32)
    assert largest_difference(ours, theirs, torch.randint(97, (2, 9))) < 1e-4


def test_bf16_logits_are_as_near_to_fp32_as_transformers(tmp_path):
    theirs = make("qwen2_untied", tmp_path)
    tokens = torch.randint(97, (2, 20))
    exact = theirs(tokens).logits

    def error(logits):
        return (logits.float() - exact).abs().mean().item()

    ours = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert error(ours(tokens)) < 1.5 * error(theirs.to(torch.bfloat16)(tokens).logits)


def test_a_loaded_model_is_frozen(tmp_path):
    make("llama", tmp_path)
    assert not any(p.requires_grad for p in GPT.from_pretrained(tmp_path).parameters())


def test_kept_positions_have_the_logits_of_the_full_run():
    model, tokens = tiny(), torch.randint(50, (4, 12))
    keep = torch.rand(4, 12) > 0.5
    assert torch.allclose(model(tokens, keep=keep), model(tokens)[keep], atol=1e-6)


def test_later_tokens_change_nothing_before_them():
    model, tokens = tiny(), torch.randint(50, (4, 12))
    changed = tokens.clone()
    changed[:, 7:] = torch.randint(50, (4, 5))
    assert torch.allclose(model(changed)[:, :7], model(tokens)[:, :7], atol=1e-6)


def test_response_loss_counts_marked_tokens_alone():
    model, (tokens, mask) = tiny(), rows()
    logp = model(tokens).log_softmax(-1)
    losses = []
    for b, t in mask.nonzero().tolist():
        if t > 0:  # nothing stands before the first token
            losses.append(-logp[b, t - 1, tokens[b, t]])
    expected = torch.stack(losses).mean().item()
    assert response_loss(model, tokens, mask).item() == pytest.approx(expected, rel=1e-5)


PROMPTS = [[5], [7, 8, 9, 10, 11], [3, 2], list(range(20, 32))]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_transformers(kind, tmp_path):
    theirs = make(kind, tmp_path)
    model = GPT.from_pretrained(tmp_path)
    stop = (0,) if kind == "gpt2" else ()  # its end of text, where the reference stops
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, pad_token_id=0
        )
        new = model.generate([prompt], 10, temperature=0, stop=stop)
        assert new == [expected[0, len(prompt) :].tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_prompts_of_any_length_gives_what_each_gives_alone(kind, tmp_path):
    make(kind, tmp_path)
    model = GPT.from_pretrained(tmp_path)
    together = model.generate(PROMPTS, 10, temperature=0)
    alone = [model.generate([prompt], 10, temperature=0)[0] for prompt in PROMPTS]
    assert together == alone


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_uncached(kind, tmp_path):
    make(kind, tmp_path)
    model = GPT.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        uncached = list(prompt)
        for _ in range(10):
            uncached.append(model(torch.tensor([uncached]))[0, -1].argmax().item())
        assert model.generate([prompt], 10, temperature=0) == [uncached[len(prompt) :]]


def fed_in_pieces(model, tokens, valid, sizes):
    cache = Cache(tokens.shape[1], valid)
    return torch.cat([model(piece, cache=cache) for piece in tokens.split(sizes, 1)], 1)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_fed_in_pieces_gives_the_logits_of_the_whole(kind, padding, tmp_path):
    """With one row that is padded on the left."""
    make(kind, tmp_path)
    model, tokens = GPT.from_pretrained(tmp_path), torch.randint(97, (3, 12))
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[2, :padding] = False
    pieces = fed_in_pieces(model, tokens, valid, [5, 1, 4, 2])
    assert torch.allclose(pieces[:2], model(tokens)[:2], atol=1e-5)
    assert torch.allclose(pieces[2, padding:], model(tokens[2:, padding:])[0], atol=1e-5)
    assert pieces.isfinite().all()


def test_a_cache_is_not_extended_twice_under_checkpointing():
    model, tokens = tiny(), torch.randint(50, (2, 12))
    valid = torch.ones(2, 12, dtype=torch.bool)
    expected = fed_in_pieces(model, tokens, valid, [6, 6])
    model.checkpointing = True
    assert torch.equal(fed_in_pieces(model, tokens, valid, [6, 6]), expected)


class Rigged(GPT):
    """The same next token always: probabilities .5, .3, .15, .05 of tokens 3, 1, 0, 2."""

    def forward(self, tokens, keep=None, cache=None):
        probabilities = torch.tensor([0.15, 0.3, 0.05, 0.5] + [0.0] * 46)
        return probabilities.log().expand(int(keep.sum()), 50)


@pytest.fixture
def rigged():
    return Rigged(tiny().config)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_the_power_of_the_probabilities(rigged, temperature):
    new = torch.tensor(rigged.generate([[1]] * 1000, 4, temperature=temperature))
    powers = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** (1 / temperature)
    expected = (powers / powers.sum())[0].item()
    assert (new == 3).float().mean().item() == pytest.approx(expected, abs=0.03)


def test_the_seed_repeats_what_is_sampled(rigged):
    first, again, other = (rigged.generate([[1]] * 9, 9, seed=seed) for seed in (5, 5, 6))
    assert first == again != other


def test_ids_that_are_not_allowed_are_never_sampled(rigged):
    new = rigged.generate([[1]] * 100, 8, allowed=[0, 2])
    assert {token for row in new for token in row} == {0, 2}


def test_greedy_takes_the_likeliest_of_the_allowed(rigged):
    assert rigged.generate([[1]], 2, temperature=0, allowed=[0, 2]) == [[0, 0]]


def test_a_row_ends_at_its_first_stop_id_and_no_later(rigged):
    for row in rigged.generate([[1]] * 50, 8, stop=[3], seed=2):
        assert (row[-1] == 3 and row.count(3) == 1) or (len(row) == 8 and 3 not in row)


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = randomise(add_lora(tiny(), 2, 2, "all-linear"))
        model.checkpointing = checkpointing
        torch.manual_seed(0)
        randomise(model)
        response_loss(model, *rows()).backward()
        parts = [m.lora_A.grad.flatten() for m in lora_modules(model).values()]
        gradients.append(torch.cat(parts))
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize(
    "beyond",
    [
        lambda: tiny()(torch.zeros(1, 33, dtype=torch.long)),
        lambda: tiny().generate([[1], [2] * 31], 3),
    ],
)
def test_a_token_beyond_the_last_position_is_refused(beyond):
    with pytest.raises(ValueError, match="33 tokens, but the model has 32 positions"):
        beyond()


def test_loading_does_not_start_torchs_compiler(tmp_path):
    make("qwen2_tied", tmp_path)
    code = (
        "import sys; from model import GPT\n"
        f"GPT.from_pretrained({str(tmp_path)!r})\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


LARGE = {
    "qwen2_untied": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "vocab_size": 9000,
    },
    "gpt2": {"n_embd": 768, "n_head": 12, "n_inner": 3072, "n_layer": 5, "vocab_size": 9000},
}


@pytest.mark.parametrize("kind", LARGE)
def test_loading_never_holds_the_weights_twice(kind, tmp_path):
    make(kind, tmp_path, **LARGE[kind])
    size = (tmp_path / "model.safetensors").stat().st_size
    code = f"""
import resource
import torch
from model import GPT

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
model = GPT.from_pretrained({str(tmp_path)!r})
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert size > 1.4e8
    assert int(done.stdout) < 1.1 * size
