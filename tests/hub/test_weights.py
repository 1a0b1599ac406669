"""Every tensor of a checkpoint is checked: name, shape, dtype, values, and where it stands."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import KINDS, edit_tensors, make
from safetensors.torch import load_file, save_file

from hub.config import read_config
from hub.weights import read_tensors
from model import GPT
from support.errors import UserError

SMOLLM2 = Path(os.environ.get("GRASP_SMOLLM2", "absent"))
WHOLE, INDEX, NORM = "model.safetensors", "model.safetensors.index.json", "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
C_FC = "transformer.h.0.mlp.c_fc.weight"


def parameters_of(theirs):
    """transformers' parameters in our layout, {path: tensor}; a tied head is none of its own."""
    is_gpt2 = theirs.config.model_type == "gpt2"
    parameters = {}
    for path, p in theirs.named_parameters():
        conv1d = is_gpt2 and ".h." in path and p.dim() == 2
        parameters[path] = p.t() if conv1d else p
    return parameters


def read(folder, theirs, **options):
    kind, tied = theirs.config.model_type, theirs.config.tie_word_embeddings
    shapes = {path: p.shape for path, p in parameters_of(theirs).items()}
    return read_tensors(folder, shapes, kind, tied, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_tensors_are_those_of_transformers(kind, shard, tmp_path):
    theirs = make(kind, tmp_path, shard=shard)
    assert (tmp_path / INDEX).exists() == (shard == "20KB")
    ours, expected = read(tmp_path, theirs), parameters_of(theirs)
    assert ours.keys() == expected.keys()
    for path, tensor in ours.items():
        assert torch.equal(tensor, expected[path]) and tensor.is_contiguous(), path


def test_conv1d_is_transposed_though_it_be_square(tmp_path):
    theirs = make("gpt2", tmp_path)
    path = "transformer.h.1.attn.c_proj.weight"
    assert torch.equal(read(tmp_path, theirs)[path], theirs.get_parameter(path).t())


def test_hub_style_gpt2_without_prefix_and_with_mask_buffers_is_read(tmp_path):
    theirs = make("gpt2", tmp_path)
    before = read(tmp_path, theirs)
    tensors = load_file(tmp_path / WHOLE)
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    for i in range(3):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / WHOLE)
    after = read(tmp_path, theirs)
    assert all(torch.equal(before[path], after.pop(path)) for path in before) and not after


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_is_the_stored_one_unless_asked_otherwise(stored, tmp_path):
    theirs = make("llama", tmp_path).to(stored)
    theirs.save_pretrained(tmp_path)
    assert {t.dtype for t in read(tmp_path, theirs).values()} == {stored}
    tensors = read(tmp_path, theirs, dtype=torch.float32)
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_weights_of_two_dtypes_are_refused_unless_converted(tmp_path):
    theirs = make("llama", tmp_path).to(torch.bfloat16)
    theirs.model.norm.to(torch.float32)
    theirs.save_pretrained(tmp_path)
    message = "model.norm.weight is torch.float32, expected torch.bfloat16 as model.embed_tokens"
    with pytest.raises(UserError, match=message):
        read(tmp_path, theirs)
    assert {t.dtype for t in read(tmp_path, theirs, dtype=torch.float32).values()} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("kind", "embedding"),
    [("qwen2_tied", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")],
)
def test_a_tied_file_may_carry_a_copy_of_the_embedding(kind, embedding, tmp_path):
    theirs = make(kind, tmp_path)
    edit_tensors(tmp_path / WHOLE, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    tensors = read(tmp_path, theirs)
    assert "lm_head.weight" not in tensors and embedding in tensors


def test_a_whole_file_goes_before_an_index_that_was_left_behind_as_in_transformers(tmp_path):
    make("qwen2_tied", tmp_path, shard="20KB")
    theirs = make("qwen2_tied", tmp_path / "new", seed=1)
    (tmp_path / "new" / WHOLE).rename(tmp_path / WHOLE)
    assert torch.equal(read(tmp_path, theirs)[NORM], theirs.get_parameter(NORM))


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def whole(change):
    """A change of the tensors of model.safetensors."""
    return lambda folder: edit_tensors(folder / WHOLE, change)


def retyped(name, dtype):
    """The tensor stored as another dtype."""
    return whole(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def second(change):
    """A change of the tensors of the second shard."""
    return lambda folder: edit_tensors(shard_of(folder, 1), change)


def shard_of(folder, i):
    return sorted(folder.glob("model-*"))[i]


def index(**changes):
    """Other file names in the index."""

    def apply(folder):
        listing = json.loads((folder / INDEX).read_text())
        listing["weight_map"].update(changes)
        (folder / INDEX).write_text(json.dumps(listing))

    return apply


def index_text(text):
    return lambda folder: (folder / INDEX).write_text(text)


def outside(folder):
    """An index that names a good file, but one of another folder."""
    first = shard_of(folder, 0)
    (folder.parent / first.name).write_bytes(first.read_bytes())
    text = (folder / INDEX).read_text().replace(first.name, f"../{first.name}")
    (folder / INDEX).write_text(text)


def absolute(folder):
    first = shard_of(folder, 0)
    text = (folder / INDEX).read_text().replace(first.name, str(first))
    (folder / INDEX).write_text(text)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def filled(name, number):
    return lambda tensors: tensors[name][7:8].fill_(number)


BROKEN = [
    ("no weights", lambda f: (f / WHOLE).unlink(), f"{INDEX}: no such file, expected an index"),
    ("empty file", lambda f: (f / WHOLE).write_bytes(b""), "not a whole safetensors"),
    ("truncated", lambda f: cut(f / WHOLE), "not a whole safetensors"),
    ("no safetensors", lambda f: (f / WHOLE).write_bytes(b"[" * 10**6), "not a whole safetensors"),
    ("missing", whole(lambda t: t.pop(NORM)), f"1 missing tensors, the first '{NORM}'"),
    ("unexpected", whole(put("extra\n", torch.ones(1))), "1 unexpected tensors, the first 'extra"),
    ("misshapen", whole(put(NORM, torch.ones(35))), f"{NORM} is (35,), expected (36,)"),
    ("scalar", whole(put(NORM, torch.tensor(1.0))), f"{NORM} is (), expected (36,)"),
    ("empty", whole(put(NORM, torch.ones(0))), f"{NORM} is (0,), expected (36,)"),
    ("broadcastable", whole(put(Q, torch.ones(1, 36))), f"{Q} is (1, 36), expected (36, 36)"),
    ("NaN", whole(filled(NORM, float("nan"))), f"{NORM} has values that are not finite"),
    ("infinity", whole(filled(NORM, float("-inf"))), f"{NORM} has values that are not finite"),
    ("int8", retyped(Q, torch.int8), f"{Q} is of the dtype I8, expected one of F64, F32, F16"),
    ("int64", retyped(Q, torch.int64), f"{Q} is of the dtype I64"),
    ("bool", retyped(Q, torch.bool), f"{Q} is of the dtype BOOL"),
    ("fp8", retyped(Q, torch.float8_e4m3fn), f"{Q} is of the dtype F8_E4M3"),
    ("fp8 e5m2", retyped(Q, torch.float8_e5m2), f"{Q} is of the dtype F8_E5M2"),
    ("another head", whole(put("lm_head.weight", torch.zeros(97, 36))), "lm_head.weight differs"),
    ("head's shape", whole(put("lm_head.weight", torch.zeros(7, 36))), "lm_head.weight is (7, 36)"),
]
BROKEN_SHARDS = [
    ("index a list", index_text("[]"), f"{INDEX}: found [], expected an object"),
    ("index null", index_text("null"), f"{INDEX}: found None, expected an object"),
    ("index not JSON", index_text("{"), f"{INDEX}: not valid JSON"),
    ("index deep", index_text("[" * 10**5), f"{INDEX}: not valid JSON"),
    ("no map", index_text("{}"), f"{INDEX}: no 'weight_map', expected an object"),
    ("map a list", index_text('{"weight_map": []}'), "'weight_map' is [], expected an object"),
    ("map empty", index_text('{"weight_map": {}}'), "'weight_map' is empty"),
    ("map of numbers", index_text('{"weight_map": {"a": 1}}'), "'weight_map.a' is 1, expected"),
    ("map of null", index_text('{"weight_map": {"a": null}}'), "'weight_map.a' is None"),
    ("another folder's", outside, "names the file '../model-00001-of-"),
    ("absolute", absolute, "expected files of this folder alone"),
    ("parent", index(a=".."), "names the file '..', expected files of this folder alone"),
    ("itself", index(a="."), "names the file '.', expected files of this folder alone"),
    ("nothing", index(a=""), "names the file '', expected files of this folder alone"),
    ("NUL", index(a="a\0b"), "names the file 'a\\x00b', expected files of this folder alone"),
    ("Windows", index(a="..\\a"), "expected files of this folder alone"),
    ("long name", index(a="a" * 5000), "expected files of this folder alone"),
    ("absent shard", lambda f: shard_of(f, 1).unlink(), "model-00002-of-"),
    ("truncated shard", lambda f: cut(shard_of(f, 1)), "not a whole safetensors"),
    ("another shard", lambda f: save_file({"x": torch.ones(1)}, shard_of(f, 1)), "missing tensors"),
    ("not in the index", second(put("extra", torch.ones(1))), "unexpected tensors, the first"),
    ("in two shards", second(put("model.embed_tokens.weight", torch.ones(97, 36))),
     "'model.embed_tokens.weight' is in model-0000"),
]  # fmt: skip
BROKEN_GPT2 = [
    ("another head", whole(put("lm_head.weight", torch.zeros(97, 36))), "lm_head.weight differs"),
    ("untransposed", whole(lambda t: t.update({C_FC: t[C_FC].t()})),
     f"{C_FC} is (44, 36), expected (36, 44)"),
    ("with and without prefix", whole(lambda t: t.update({"wte.weight": t["transformer.wte.weight"]
     .clone()})), "is in model.safetensors too, expected each tensor once"),
]  # fmt: skip
BROKEN_QWEN3 = [
    ("no head", whole(lambda t: t.pop("lm_head.weight")), "missing tensors, the first 'lm_head"),
]
TABLE = [
    pytest.param(kind, shard, break_it, message, id=f"{kind}-{name}")
    for kind, shard, cases in (
        ("qwen2_tied", "50GB", BROKEN),
        ("llama", "20KB", BROKEN_SHARDS),
        ("gpt2", "50GB", BROKEN_GPT2),
        ("qwen3", "50GB", BROKEN_QWEN3),
    )
    for name, break_it, message in cases
]


@pytest.mark.parametrize(("kind", "shard", "break_it", "message"), TABLE)
def test_a_bad_checkpoint_ends_in_one_line_that_names_the_tensor(
    kind, shard, break_it, message, tmp_path
):
    folder = tmp_path / "checkpoint"
    theirs = make(kind, folder, shard=shard)
    break_it(folder)
    with pytest.raises(UserError) as e:
        read(folder, theirs)
    assert message in str(e.value) and str(folder) in str(e.value)
    assert "\n" not in str(e.value)


def test_what_needs_no_conversion_stays_mapped(tmp_path):
    """The file's own bytes, so that loading takes no memory: seen by writing into the file."""
    theirs = make("llama", tmp_path)
    tensors = read(tmp_path, theirs)
    path = tmp_path / WHOLE
    before = tensors[NORM].clone()
    with open(path, "r+b") as f:
        header = int.from_bytes(f.read(8), "little")
        f.seek(8 + header)
        f.write(bytes(path.stat().st_size - 8 - header))
    assert before.any() and not tensors[NORM].any()


@pytest.fixture(scope="module")
def smollm2():
    if not SMOLLM2.is_dir():
        pytest.skip("GRASP_SMOLLM2 names no folder that get_smollm2.py has made")
    return transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()


def test_the_real_smollm2_has_the_references_logits(smollm2):
    config = read_config(SMOLLM2)
    assert (config["model_type"], config["n_layer"], config["d_model"]) == ("llama", 30, 576)
    assert len(read(SMOLLM2, smollm2)) == 272
    tokens = torch.randint(49152, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = GPT.from_pretrained(SMOLLM2)(tokens)
        assert (ours - smollm2(tokens).logits).abs().max() < 1e-4
