"""Subspace files: they come back, and one that would constrain wrongly is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import TARGETS, randomise, tiny

from baselines.stream import stream_subspace
from identify import identify, spectra
from lora import add_lora
from support.errors import UserError
from support.subspace import load_subspace, read_subspace, save_subspace

KEY = "outputs.model.layers.0.self_attn.o_proj"


def found(rank=2, seed=0):
    """(factor, stream) of a random update."""
    model = randomise(add_lora(tiny(seed), 3, 3, TARGETS))
    return identify(model, rank), stream_subspace(spectra(model), rank)[0]


@pytest.fixture
def path(tmp_path):
    factor, stream = found()
    save_subspace(tmp_path / "s", factor, stream, tiny().path_in_transformers)
    return tmp_path / "s"


def same_space(Q, W):
    return torch.allclose(Q @ Q.T, W @ W.T, atol=1e-5)


def test_a_file_comes_back(path):
    factor, stream = load_subspace(path, tiny())
    expected, expected_stream = found()
    assert factor.keys() == expected.keys()
    assert all(same_space(factor[name], U) for name, U in expected.items())
    assert same_space(stream, expected_stream)


def test_a_file_has_the_modules_paths_in_transformers(path):
    names = read_subspace(path)[0]
    assert all(name.startswith("model.layers.") for name in names)


def test_it_fits_a_model_with_and_without_a_lora(path):
    for model in (tiny(), add_lora(tiny(), 2, 2, TARGETS)):
        assert len(load_subspace(path, model)[0]) == len(TARGETS) * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_point_is_read_as_exactly_orthonormal_fp32(path, dtype):
    save_file({name: t.to(dtype).contiguous() for name, t in load_file(path).items()}, path)
    factor, stream = load_subspace(path, tiny())
    for Q in (stream, *factor.values()):
        assert Q.dtype == torch.float32
        assert (Q.T @ Q - torch.eye(Q.shape[1])).abs().max() < 1e-6


def rewrite(**changes):
    """A change of the file's tensors; None takes one out."""

    def apply(path):
        tensors = {**load_file(path), **changes}
        save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, path)

    return apply


def scale(factor, name=KEY):
    return lambda path: rewrite(**{name: factor * load_file(path)[name]})(path)


E = torch.eye(16)
UNUSABLE = [
    ("twice a basis", scale(2.0), f"{KEY} is not orthonormal, Q'Q is off by 3"),
    ("zero", scale(0.0), f"{KEY} is not orthonormal"),
    ("NaN", scale(float("nan")), f"{KEY} has values that are not finite"),
    ("infinity", scale(float("inf"), "stream"), "stream has values that are not finite"),
    ("one direction twice", rewrite(**{KEY: E[:, [0, 0]]}), f"{KEY} is not orthonormal"),
    ("skew", rewrite(**{KEY: E[:, :2] + 0.1 * E[:, 1:3]}), f"{KEY} is not orthonormal"),
    ("another width", rewrite(**{KEY: torch.eye(17)[:, :1]}), "is 17 wide, expected 16"),
    ("another stream", rewrite(stream=torch.eye(9)[:, :1]), "stream is 9 wide, expected 16"),
    ("whole numbers", rewrite(**{KEY: E[:, :1].long()}), f"{KEY} is torch.int64, expected float"),
    ("8 bits", rewrite(**{KEY: E[:, :1].to(torch.int8)}), f"{KEY} is torch.int8, expected float"),
    ("truths", rewrite(**{KEY: E[:, :1] > 0}), f"{KEY} is torch.bool, expected float"),
    ("a vector", rewrite(**{KEY: E[:, 0]}), f"{KEY} is (16,), expected (width, directions)"),
    ("no direction", rewrite(**{KEY: E[:, :0]}), f"{KEY} is (16, 0), expected"),
    ("more directions than outputs", rewrite(**{KEY: torch.ones(16, 17)}), f"{KEY} is (16, 17)"),
    ("no stream", rewrite(stream=None), "no subspace file, expected 'stream' and"),
    ("another file", lambda p: save_file({"x": E[:, :1].contiguous()}, p), "no subspace file"),
    ("the stream alone", lambda p: save_file({"stream": E[:, :1].contiguous()}, p), "no subspace"),
    ("another tensor", rewrite(inputs=E[:, :1]), "unexpected inputs"),
    ("another model's", rewrite(**{"outputs.x": E[:, :1]}), "x is not a module of this qwen2"),
    ("a norm", rewrite(**{"outputs.model.norm": E[:, :1]}), "is 16 wide, expected None"),
    ("torn", lambda p: p.write_bytes(p.read_bytes()[:-4]), "not a whole safetensors file"),
    ("absent", lambda p: p.unlink(), "no such file, expected safetensors"),
]


@pytest.mark.parametrize("change,message", [c[1:] for c in UNUSABLE], ids=[c[0] for c in UNUSABLE])
def test_a_file_that_would_constrain_wrongly_ends_in_one_line(path, change, message):
    change(path)
    with pytest.raises(UserError) as error:
        load_subspace(path, tiny())
    text = str(error.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text


def test_a_file_of_a_deeper_model_is_refused(path):
    with pytest.raises(UserError, match="layers.1.* is not a module of this qwen2 model"):
        load_subspace(path, tiny(n_layer=1))
