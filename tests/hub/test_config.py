"""config.json is read for four families, and what asks for another function is refused by name."""

import random

import pytest
from checkpoints import GPT2, KINDS, ROTARY, edit_config, make
from tokenizer_files import write_folder

from hub.config import read_config
from model import Config
from support.errors import UserError

LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    **ROTARY,
}
FAMILIES = {
    "gpt2": {"model_type": "gpt2", "activation_function": "gelu_new", **GPT2},
    "llama": LLAMA,
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 14},
}


def read(folder, fields, **changes):
    return read_config(write_folder(folder, {"config.json": {**fields, **changes}}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_transformers_writes_makes_a_config(kind, tmp_path):
    make(kind, tmp_path)
    config = Config(**read_config(tmp_path))
    assert config.model_type == kind.split("_")[0] and config.vocab_size == 97
    assert (config.n_layer, config.d_model, config.max_len) == (3, 36, 128)
    assert config.tied == (kind not in ("qwen2_untied", "qwen3"))


def test_each_family_is_what_it_is(tmp_path):
    configs = {name: read(tmp_path, fields) for name, fields in FAMILIES.items()}
    assert configs["llama"] == {
        "vocab_size": 97, "n_layer": 3, "n_head": 6, "n_kv_head": 2, "head_dim": 6, "d_model": 36,
        "d_mlp": 52, "max_len": 128, "norm_eps": 1e-5, "rope_theta": 5e4, "tied": True,
        "model_type": "llama", "norm": "rmsnorm", "mlp": "swiglu", "fused_qkv": False,
        "qkv_bias": False, "out_bias": False, "qk_norm": False,
    }  # fmt: skip
    biased = {**configs["llama"], "model_type": "qwen2", "qkv_bias": True}
    assert configs["qwen2"] == biased
    normed = {**configs["llama"], "model_type": "qwen3", "head_dim": 14, "qk_norm": True}
    assert configs["qwen3"] == normed
    assert configs["gpt2"] == {
        "vocab_size": 97, "n_layer": 3, "n_head": 3, "n_kv_head": 3, "head_dim": 12, "d_model": 36,
        "d_mlp": 44, "max_len": 128, "norm_eps": 3e-5, "rope_theta": None, "tied": True,
        "model_type": "gpt2", "norm": "layernorm", "mlp": "gelu", "fused_qkv": True,
        "qkv_bias": True, "out_bias": True, "qk_norm": False,
    }  # fmt: skip


def test_what_may_be_absent(tmp_path):
    assert read(tmp_path, FAMILIES["gpt2"], n_inner=None)["d_mlp"] == 4 * 36
    assert read(tmp_path, LLAMA, num_key_value_heads=None)["n_kv_head"] == 6
    assert read(tmp_path, LLAMA, head_dim=10)["head_dim"] == 10
    assert read(tmp_path, LLAMA, head_dim=10, hidden_size=35)["d_model"] == 35
    assert read(tmp_path, LLAMA, rope_parameters=None, rope_theta=10000)["rope_theta"] == 1e4
    both = read(tmp_path, LLAMA, rope_theta=7.0)
    assert both["rope_theta"] == 5e4  # the newer place counts
    assert read(tmp_path, LLAMA, rope_scaling=None, layer_types=["full_attention"] * 3)


def llama(**changes):
    return {**LLAMA, **changes}


def gpt2(**changes):
    return {**FAMILIES["gpt2"], **changes}


def qwen3(**changes):
    return {**FAMILIES["qwen3"], **changes}


WHOLE = "expected a whole number from 1 to "
BAD = [
    ("[]", "found [], expected an object"),
    ("null", "found None, expected an object"),
    ("{", "not valid JSON"),
    ("[" * 10**5, "not valid JSON"),
    ('{"model_type": ' + "7" * 5000 + "}", "not valid JSON"),
    ({}, "no 'model_type', expected 'gpt2' or 'llama' or 'qwen2' or 'qwen3'"),
    ({"model_type": "mistral"}, "'model_type' is 'mistral', expected 'gpt2' or 'llama' or"),
    ({"model_type": ["llama"]}, "'model_type' is ['llama'], expected"),
    ({"model_type": "llama"}, "no 'vocab_size', " + WHOLE),
    *(
        (llama(num_hidden_layers=wrong), f"'num_hidden_layers' is {shown}, {WHOLE}1000")
        for wrong, shown in (
            *(("8", "'8'"), (0, 0), (-1, -1), ([1], [1]), (2.5, 2.5), (True, True)),
            *((10**9, 10**9), (10**30, 10**30), ({}, {}), (8.0, 8.0)),
        )
    ),
    (llama(num_hidden_layers=None), "no 'num_hidden_layers'"),
    (llama(vocab_size=0), "'vocab_size' is 0"),
    (llama(hidden_size=-36), "'hidden_size' is -36"),
    (llama(hidden_size=10**12), "'hidden_size' is 1000000000000"),
    (llama(num_attention_heads=7), "7 heads do not divide the width 36"),
    (llama(num_attention_heads=0), "'num_attention_heads' is 0"),
    (llama(num_key_value_heads=4), "6 heads do not divide into 4 key/value heads"),
    (llama(num_key_value_heads=0), "'num_key_value_heads' is 0"),
    (llama(head_dim=0), "'head_dim' is 0"),
    (llama(head_dim=7), "a head's width is 7, expected an even number"),
    (llama(head_dim="64"), "'head_dim' is '64'"),
    (llama(intermediate_size="52"), "'intermediate_size' is '52'"),
    (llama(max_position_embeddings=0), "'max_position_embeddings' is 0"),
    (llama(rms_norm_eps=float("inf")), "'rms_norm_eps' is inf"),
    (llama(rms_norm_eps=float("nan")), "'rms_norm_eps' is nan"),
    (llama(rms_norm_eps=0), "'rms_norm_eps' is 0, expected a finite number above 0 and at most 1"),
    (llama(rms_norm_eps=-1e-5), "'rms_norm_eps' is -1e-05"),
    (llama(rms_norm_eps="1e-5"), "'rms_norm_eps' is '1e-5'"),
    (llama(rms_norm_eps=None), "no 'rms_norm_eps'"),
    (llama(rope_parameters=None), "no 'rope_theta', neither in 'rope_parameters' nor at the top"),
    (llama(rope_parameters=None, rope_theta=float("inf")), "'rope_theta' is inf"),
    (llama(rope_parameters=None, rope_theta=0), "'rope_theta' is 0"),
    (llama(rope_parameters=None, rope_theta=[1e4]), "'rope_theta' is [10000.0]"),
    (llama(rope_parameters={"rope_theta": "1e4"}), "'rope_parameters.rope_theta' is '1e4'"),
    (llama(rope_parameters=[1]), "'rope_parameters' is [1], expected an object"),
    (llama(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
     "'rope_parameters.rope_type' is 'yarn', expected 'default'"),
    (llama(rope_parameters={"type": "linear", "factor": 2, "rope_theta": 1e4}),
     "'rope_parameters.type' is 'linear'"),
    (llama(partial_rotary_factor=0.5), "'partial_rotary_factor' is 0.5"),
    (llama(is_causal=False), "'is_causal' is False"),
    (llama(rope_parameters={"full_attention": {"rope_theta": 1e4}, "rope_theta": 1e4}),
     "'rope_parameters.full_attention' is"),
    (llama(rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 1e4}),
     "'rope_parameters.partial_rotary_factor' is 0.5"),
    (llama(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
     "'rope_scaling' is {'factor': 8.0, 'rope_type': 'llama3'}, expected None"),
    (llama(rope_scaling=2.0), "'rope_scaling' is 2.0"),
    (llama(attention_bias=True), "'attention_bias' is True, expected False"),
    (llama(mlp_bias=True), "'mlp_bias' is True, expected False"),
    (llama(mlp_bias="no"), "'mlp_bias' is 'no'"),
    (llama(hidden_act="gelu"), "'hidden_act' is 'gelu', expected 'silu'"),
    (llama(hidden_act=None), "no 'hidden_act', expected 'silu'"),
    (llama(tie_word_embeddings="false"), "'tie_word_embeddings' is 'false', expected true or"),
    (llama(tie_word_embeddings=0), "'tie_word_embeddings' is 0"),
    (llama(tie_word_embeddings=None), "no 'tie_word_embeddings'"),
    (llama(use_sliding_window=True), "'use_sliding_window' is True, expected False"),
    (llama(layer_types=["sliding_attention"] * 3), "'layer_types[0]' is 'sliding_attention'"),
    (llama(quantization_config={"bits": 4}), "'quantization_config' is {'bits': 4}, expected"),
    (gpt2(quantization_config={"bits": 4}), "'quantization_config' is {'bits': 4}"),
    (qwen3(head_dim=None), "no 'head_dim'"),
    (qwen3(attention_bias=True), "'attention_bias' is True"),
    (gpt2(activation_function="gelu"), "'activation_function' is 'gelu', expected 'gelu_new'"),
    (gpt2(activation_function=None), "no 'activation_function'"),
    (gpt2(scale_attn_weights=False), "'scale_attn_weights' is False"),
    (gpt2(scale_attn_by_inverse_layer_idx=True), "'scale_attn_by_inverse_layer_idx' is True"),
    (gpt2(add_cross_attention=True), "'add_cross_attention' is True"),
    (gpt2(tie_word_embeddings=False), "'tie_word_embeddings' is False"),
    (gpt2(n_head=7), "7 heads do not divide the width 36"),
    (gpt2(n_inner=-1), "'n_inner' is -1"),
    (gpt2(n_layer=10**9), "'n_layer' is 1000000000"),
    (gpt2(layer_norm_epsilon=float("-inf")), "'layer_norm_epsilon' is -inf"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), BAD)
def test_a_bad_config_ends_in_one_line_that_names_the_field(config, message, tmp_path):
    with pytest.raises(UserError) as e:
        read_config(write_folder(tmp_path, {"config.json": config}))
    text = str(e.value)
    assert text.startswith(f"{tmp_path / 'config.json'}: ") and message in text
    assert "\n" not in text and len(text) < len(str(tmp_path)) + 300


def test_no_folder_and_no_file(tmp_path):
    with pytest.raises(UserError, match="absent: no such folder, expected a checkpoint folder"):
        read_config(tmp_path / "absent")
    with pytest.raises(UserError, match="config.json: no such file, expected a checkpoint's"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_value_of_any_field_gives_sane_numbers_or_one_line(name, tmp_path):
    """A property of the schema: what comes through can be built."""
    r = random.Random(0)
    wrong = ["8", 0, -1, 10**9, 10**40, [1], {}, 2.5, True, False, float("inf"), 1e-9, 12, "silu"]
    for _ in range(300):
        fields = dict(FAMILIES[name])
        fields[r.choice(sorted(fields))] = r.choice(wrong)
        write_folder(tmp_path, {"config.json": fields})
        try:
            config = Config(**read_config(tmp_path))
        except UserError as e:
            assert "\n" not in str(e)
            continue
        for number in (
            config.n_layer,
            config.n_head,
            config.head_dim,
            config.d_model,
            config.d_mlp,
        ):
            assert type(number) is int and 0 < number <= 2**20
        assert type(config.norm_eps) is float and 0 < config.norm_eps <= 1
        assert config.n_head % config.n_kv_head == 0 and type(config.tied) is bool


def test_a_changed_field_is_seen(tmp_path):
    make("llama", tmp_path)
    edit_config(tmp_path, attention_bias=True)
    with pytest.raises(UserError, match="'attention_bias' is True"):
        read_config(tmp_path)
