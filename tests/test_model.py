"""The transformer against transformers' own, and the loader's strictness."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints import KINDS, edit_config, make
from cli import UserError
from model import GPT, Cache, response_loss
from test_identify import tiny

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_logits_equal_transformers(kind, shard, tmp_path):
    theirs = make(kind, tmp_path, shard=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    tokens = torch.randint(97, (3, 41))
    with torch.no_grad():
        assert (GPT.from_pretrained(tmp_path)(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind,changes", [
    ("gpt2", {"n_inner": None}), ("qwen2_tied", {"num_key_value_heads": 1}), ("qwen2_tied", {"num_key_value_heads": 6}),
    ("qwen2_untied", {"hidden_size": 60, "num_attention_heads": 10, "num_key_value_heads": 5}),
    ("qwen3", {"head_dim": 4, "num_key_value_heads": 3}), ("qwen3", {"tie_word_embeddings": True})])
def test_other_shapes_equal_transformers(kind, changes, tmp_path):
    theirs, tokens = make(kind, tmp_path, **changes), torch.randint(97, (2, 9))
    with torch.no_grad():
        assert (GPT.from_pretrained(tmp_path)(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_hub_style_gpt2_without_prefix_and_with_mask_buffers_loads(tmp_path):
    theirs, path, tokens = make("gpt2", tmp_path), tmp_path / "model.safetensors", torch.randint(97, (2, 9))
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    for i in range(3):
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril(), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, path)
    with torch.no_grad():
        assert (GPT.from_pretrained(tmp_path)(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_rope_theta_is_read_from_both_places_and_never_assumed(tmp_path):
    theirs, tokens = make("qwen2_tied", tmp_path), torch.randint(97, (2, 30))
    edit_config(tmp_path, rope_parameters=None, rope_theta=5e4)
    with torch.no_grad():
        assert (GPT.from_pretrained(tmp_path)(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    edit_config(tmp_path, rope_theta=None)
    with pytest.raises(UserError, match="no 'rope_theta'"):
        GPT.from_pretrained(tmp_path)


def test_dtype_is_the_stored_one_unless_asked_otherwise(tmp_path):
    make("qwen3", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    ours = GPT.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    theirs, tokens = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), torch.randint(97, (2, 9))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_bf16_logits_are_as_near_to_fp32_as_transformers(tmp_path):
    theirs, tokens = make("qwen2_untied", tmp_path), torch.randint(97, (2, 20))
    exact = theirs(tokens).logits
    gap = lambda logits: (logits.float() - exact).abs().mean().item()
    assert gap(GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)(tokens)) < 1.5 * gap(theirs.to(torch.bfloat16)(tokens).logits)


def test_kept_positions_have_the_full_runs_logits_and_later_tokens_change_nothing_before():
    model, tokens, keep = tiny(), torch.randint(50, (4, 12)), torch.rand(4, 12) > 0.5
    full = model(tokens)
    assert torch.allclose(model(tokens, keep=keep), full[keep], atol=1e-6)
    changed = tokens.clone()
    changed[:, 7:] = torch.randint(50, (4, 5))
    assert torch.allclose(model(changed)[:, :7], full[:, :7], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_equal_uncached_and_greedy_equals_transformers_for_prompts_of_different_lengths(kind, tmp_path):
    theirs = make(kind, tmp_path)
    model, prompts = GPT.from_pretrained(tmp_path), [[5], [7, 8, 9, 10, 11], [3, 2], list(range(20, 32))]
    ours, width = model.generate(prompts, 10, temperature=0), max(map(len, prompts))
    padded, real = (torch.tensor([[0] * (width - len(p)) + row for p, row in zip(prompts, rows)])
                    for rows in (prompts, [[1] * len(p) for p in prompts]))
    batched = theirs.generate(padded, attention_mask=real, max_new_tokens=10, do_sample=False, pad_token_id=0)
    if kind != "gpt2":  # it would stop at its end of text, 0
        assert batched[:, width:].tolist() == ours
    for prompt, new in zip(prompts, ours):
        assert model.generate([prompt], 10, temperature=0) == [new]  # without padding there is no mask
        uncached = list(prompt)
        for _ in range(10):
            uncached.append(model(torch.tensor([uncached]))[0, -1].argmax().item())
        assert new == uncached[len(prompt):]
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, pad_token_id=0)[0, len(prompt):]
        assert new == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_fed_in_pieces_gives_the_logits_of_the_whole(kind, tmp_path):
    make(kind, tmp_path)
    model, tokens = GPT.from_pretrained(tmp_path), torch.randint(97, (3, 12))
    valid = torch.ones(3, 12, dtype=torch.bool)
    for padding in (0, 4):  # of the last row, on the left
        valid[2, :padding] = False
        cache = Cache(12, valid)
        pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split([5, 1, 4, 2], 1)], 1)
        assert torch.allclose(pieces[:2], model(tokens)[:2], atol=1e-5)
        assert torch.allclose(pieces[2, padding:], model(tokens[2:, padding:])[0], atol=1e-5) and pieces.isfinite().all()
    model.checkpointing, cache = True, Cache(12, valid)  # recomputing a block with a cache would append twice
    assert torch.allclose(torch.cat([model(piece, cache=cache) for piece in tokens.split([6, 6], 1)], 1), pieces, atol=1e-5)


class Rigged(GPT):
    """Always the same next-token distribution: probabilities .5, .3, .15, .05 on tokens 3, 1, 0, 2."""

    def forward(self, tokens, keep=None, cache=None):
        return torch.tensor([0.15, 0.3, 0.05, 0.5] + [0.0] * 46).log().expand(int(keep.sum()), 50)


@pytest.mark.parametrize("top_p,support", [
    (1.0, {0, 1, 2, 3}), (0.9, {0, 1, 3}), (0.8, {1, 3}), (0.51, {1, 3}), (0.5, {3}), (0.01, {3})])
def test_top_p_keeps_the_smallest_set_of_at_least_that_probability(top_p, support):
    model = Rigged(tiny().config)
    new = model.generate([[1]] * 600, 4, top_p=top_p, seed=1)
    tokens = torch.tensor(new).flatten()
    assert set(tokens.tolist()) == support
    if top_p == 1.0:
        assert (tokens == 3).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_temperature_sharpens_and_the_seed_repeats():
    model = Rigged(tiny().config)
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for t in (0.5, 1.0, 2.0):
        share = sum(row.count(3) for row in model.generate([[1]] * 1000, 4, temperature=t, seed=0)) / 4000
        assert share == pytest.approx((probs ** (1 / t) / (probs ** (1 / t)).sum())[0].item(), abs=0.03)
    assert model.generate([[1]] * 9, 9, seed=5) == model.generate([[1]] * 9, 9, seed=5) != model.generate([[1]] * 9, 9, seed=6)


def test_ids_that_are_not_allowed_are_never_sampled_and_stop_ids_end_a_row():
    model = Rigged(tiny().config)
    assert {t for row in model.generate([[1]] * 100, 8, allowed=[0, 2]) for t in row} == {0, 2}
    assert model.generate([[1]], 2, temperature=0, allowed=[0, 2]) == [[0, 0]]
    for row in model.generate([[1]] * 50, 8, stop=[3], seed=2):
        assert (row[-1] == 3 and row.count(3) == 1) or (len(row) == 8 and 3 not in row)


def test_activation_checkpointing_gives_the_same_gradients():
    from lora import add_lora, lora_modules
    grads = []
    for checkpointing in (False, True):
        model = add_lora(tiny(), 2, 2, "all-linear")
        for m in lora_modules(model).values():
            torch.nn.init.ones_(m.lora_B)
        model.checkpointing = checkpointing
        tokens = torch.arange(40).view(4, 10)
        response_loss(model, tokens, tokens > 3).backward()
        grads.append(torch.cat([m.lora_A.grad.flatten() for m in lora_modules(model).values()]))
    assert grads[0].abs().max() > 0 and torch.allclose(*grads, atol=1e-6)


def test_too_many_tokens_no_prompt_and_senseless_options_are_refused():
    for call in (lambda: tiny()(torch.zeros(1, 33, dtype=torch.long)), lambda: tiny().generate([[1], [2] * 31], 3)):
        with pytest.raises(UserError, match="33 tokens, but the model's positions end at 32"):
            call()
    for prompts in ([], [[1], []]):
        with pytest.raises(UserError, match="at least one"):
            tiny().generate(prompts, 2)
    for options in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(UserError, match="expected at least 1, at least 0"):
            tiny().generate([[1]], **{"max_new_tokens": 2, **options})


def test_loading_does_not_start_torchs_compiler(tmp_path):
    make("qwen2_tied", tmp_path)
    code = f"import sys; from model import GPT; GPT.from_pretrained({str(tmp_path)!r}); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("kind,shape", [
    ("qwen2_untied", dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=6, vocab_size=9000)),
    ("gpt2", dict(n_embd=768, n_head=12, n_inner=3072, n_layer=6, vocab_size=9000))])
def test_loading_never_holds_the_weights_twice(kind, shape, tmp_path):
    make(kind, tmp_path, **shape)
    size = (tmp_path / "model.safetensors").stat().st_size
    code = ("import sys, resource, torch; sys.path.insert(0, '.'); from model import GPT\n"
            "m = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
            f"a = m(); model = GPT.from_pretrained({str(tmp_path)!r}); print(m() - a)")
    peak = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert size > 1.9e8 and peak < 1.1 * size, (peak, size)


INDEX, NORM = "model.safetensors.index.json", "model.norm.weight"


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def add(path, **tensors):
    save_file({**load_file(path), **tensors}, path)


def rewrite(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return apply


BROKEN = [
    ("no folder", lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "no such folder"),
    ("no config", lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    ("config not JSON", lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    ("config a list", lambda f: (f / "config.json").write_text("[]"), "config.json: model_type is None"),
    ("another architecture", lambda f: edit_config(f, model_type="llama"), "'llama', supported: 'gpt2', 'qwen2', 'qwen3'"),
    ("missing field", lambda f: edit_config(f, rms_norm_eps=None), "no 'rms_norm_eps'"),
    ("sliding window", lambda f: edit_config(f, use_sliding_window=True), "'use_sliding_window' is True"),
    ("sliding layers", lambda f: edit_config(f, layer_types=["sliding_attention"] * 3), "layer_types"),
    ("rope scaling", lambda f: edit_config(f, rope_scaling={"type": "yarn"}), "'rope_scaling'"),
    ("rope type", lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
     "'rope_parameters' is {'rope_type': 'yarn'"),
    ("old rope type", lambda f: edit_config(f, rope_parameters={"type": "linear", "factor": 2, "rope_theta": 1e4}), "linear"),
    ("activation", lambda f: edit_config(f, hidden_act="gelu"), "'hidden_act' is 'gelu'"),
    ("no activation", lambda f: edit_config(f, hidden_act=None), "no 'hidden_act'"),
    ("heads", lambda f: edit_config(f, num_attention_heads=7), "7 heads"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "model.safetensors.index.json: no such file"),
    ("empty file", lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole safetensors"),
    ("truncated", lambda f: cut(f / "model.safetensors"), "not a whole safetensors"),
    ("missing tensor", rewrite(lambda t: t.pop(NORM)), "1 missing tensors, the first model.norm.weight"),
    ("unexpected tensor", rewrite(lambda t: t.update(extra=torch.ones(1))), "1 unexpected tensors, the first extra"),
    ("misshapen", rewrite(lambda t: t.update({NORM: torch.ones(35)})), "model.norm.weight is (35,), expected (36,)"),
    ("NaN", rewrite(lambda t: t[NORM][7:8].fill_(float("nan"))), "model.norm.weight has values that are not finite"),
    ("infinity", rewrite(lambda t: t[NORM][7:8].fill_(float("-inf"))), "model.norm.weight has values that are not finite"),
    ("another head", rewrite(lambda t: t.update({"lm_head.weight": torch.zeros(97, 36)})), "lm_head.weight differs from")]
BROKEN_SHARDS = [
    ("index a list", lambda f: (f / INDEX).write_text("[]"), f"{INDEX}: no 'weight_map'"),
    ("index not JSON", lambda f: (f / INDEX).write_text("{"), f"{INDEX}: not valid JSON"),
    ("index of numbers", lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), "1: no such file"),
    ("absent shard", lambda f: sorted(f.glob("model-*"))[1].unlink(), "model-00002-of-"),
    ("truncated shard", lambda f: cut(sorted(f.glob("model-*"))[1]), "not a whole safetensors"),
    ("another shard", lambda f: save_file({"extra": torch.ones(1)}, sorted(f.glob("model-*"))[1]), "missing tensors, the first"),
    ("not in the index", lambda f: add(sorted(f.glob("model-*"))[1], extra=torch.ones(1)), "unexpected tensors, the first extra")]
BROKEN_GPT2 = [
    ("activation", lambda f: edit_config(f, activation_function="gelu"), "'gelu', supported: 'gelu_new'"),
    ("no activation", lambda f: edit_config(f, activation_function=None), "no 'activation_function'"),
    ("unscaled attention", lambda f: edit_config(f, scale_attn_weights=False), "'scale_attn_weights' is False"),
    ("scaled by layer", lambda f: edit_config(f, scale_attn_by_inverse_layer_idx=True), "'scale_attn_by_inverse_layer_idx' is"),
    ("cross-attention", lambda f: edit_config(f, add_cross_attention=True), "'add_cross_attention' is True"),
    ("untied", lambda f: edit_config(f, tie_word_embeddings=False), "'tie_word_embeddings' is False"),
    ("another head", rewrite(lambda t: t.update({"lm_head.weight": torch.zeros(97, 36)})), "lm_head.weight differs from"),
    ("untransposed", rewrite(lambda t: t.update({(n := "transformer.h.0.mlp.c_fc.weight"): t[n].t()})),
     "transformer.h.0.mlp.c_fc.weight is (36, 44), expected (44, 36)")]
BROKEN_QWEN3 = [
    ("attention bias", lambda f: edit_config(f, attention_bias=True), "'attention_bias' is True"),
    ("no head_dim", lambda f: edit_config(f, head_dim=None), "no 'head_dim'"),
    ("no head", rewrite(lambda t: t.pop("lm_head.weight")), "missing tensors, the first lm_head.weight")]


@pytest.mark.parametrize("kind,shard,break_it,message", [
    pytest.param(kind, shard, *case[1:], id=f"{kind}-{case[0]}") for kind, shard, cases in (
        ("qwen2_tied", "50GB", BROKEN), ("qwen2_tied", "20KB", BROKEN_SHARDS), ("gpt2", "50GB", BROKEN_GPT2),
        ("qwen3", "50GB", BROKEN_QWEN3)) for case in cases])
def test_a_bad_checkpoint_ends_in_one_line_that_names_the_thing(kind, shard, break_it, message, tmp_path):
    folder = tmp_path / "checkpoint"
    make(kind, folder, shard=shard)
    break_it(folder)
    with pytest.raises(UserError) as error:
        GPT.from_pretrained(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind,embedding", [("qwen2_tied", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")])
def test_a_tied_file_may_carry_a_copy_of_the_embedding(kind, embedding, tmp_path):
    theirs, tokens = make(kind, tmp_path), torch.randint(97, (1, 5))
    rewrite(lambda t: t.update({"lm_head.weight": t[embedding].clone()}))(tmp_path)
    assert torch.allclose(GPT.from_pretrained(tmp_path)(tokens), theirs(tokens).logits, atol=1e-4)


def test_a_whole_file_goes_before_an_index_that_was_left_behind_as_in_transformers(tmp_path):
    make("qwen2_tied", tmp_path, shard="20KB")
    theirs, tokens = make("qwen2_tied", tmp_path / "new", seed=1), torch.randint(97, (1, 5))
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert (GPT.from_pretrained(tmp_path)(tokens) - theirs(tokens).logits).abs().max() < 1e-4
