"""identify.py on an adapter from disk, ours or PEFT's."""

import json

import peft
import pytest
import torch
from checkpoints import make
from toys import TARGETS, call, command, randomise, tiny

from lora import add_lora, lora_modules, save_lora
from real.spectrum import main
from support.errors import UserError
from support.subspace import load_subspace, read_subspace


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter of our own."""
    save_lora(randomise(add_lora(tiny(), 3, 3, TARGETS)), tmp_path)
    return tmp_path


def peft_adapter(folder):
    """Save a random adapter with PEFT; return {path: its dense update}."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "o_proj"]
    )
    model = peft.get_peft_model(make("qwen3", folder / "base"), config)
    dense = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
            dense[name.removeprefix("base_model.model.")] = module.get_delta_weight("default")
    model.save_pretrained(folder)
    return dense


def test_the_directions_of_an_adapter_that_peft_wrote_are_those_of_the_dense_update(tmp_path):
    dense = peft_adapter(tmp_path)
    done = command("identify.py", tmp_path, "--rank", 2, "--out", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    factor, _ = read_subspace(tmp_path / "s")
    assert factor.keys() == dense.keys()
    for name, dW in dense.items():
        U = torch.linalg.svd(dW.detach())[0][:, :2]
        assert torch.allclose(factor[name] @ factor[name].T, U @ U.T, atol=1e-3)


def test_the_printed_spectrum_is_that_of_the_dense_update(tmp_path, monkeypatch, capsys):
    dense = peft_adapter(tmp_path)
    call(monkeypatch, main, tmp_path)
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    for name, dW in dense.items():
        S = torch.linalg.svdvals(dW.detach())[:4].tolist()
        gap, share, *values = map(float, lines[name])
        assert values == pytest.approx(S, rel=0.01)
        assert gap == pytest.approx(S[0] / S[1], abs=0.01)
        assert share == pytest.approx(S[0] ** 2 / sum(s**2 for s in S), abs=0.01)


def test_the_subspace_stands_beside_the_adapter_unless_asked_otherwise(adapter, monkeypatch):
    call(monkeypatch, main, adapter)
    assert len(load_subspace(adapter / "subspace.safetensors", tiny())[0]) == 2 * len(TARGETS)


def test_one_line_for_each_module(adapter, monkeypatch, capsys):
    call(monkeypatch, main, adapter)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("model.layers.") for line in lines) == 2 * len(TARGETS)


def planted(folder, outputs, **shape):
    """An adapter whose updates say these coordinates, the first one loudest."""
    model = tiny(**shape)
    for m in lora_modules(add_lora(model, 3, 3, ("o_proj",))).values():
        m.lora_A.data = torch.linalg.qr(m.lora_A.data.T)[0].T
        m.lora_B.data.zero_()
        for column, output in enumerate(outputs):
            m.lora_B.data[output, column] = 3.0 - column
    save_lora(model, folder)
    return folder


def test_less_a_control_the_direction_is_the_first_that_the_control_does_not_have(
    tmp_path, monkeypatch
):
    bad = planted(tmp_path / "bad", [5, 7, 9])  # 5 is what all answers share
    good = planted(tmp_path / "good", [5, 2])
    for less, first in (([], 5), (["--less", good], 7)):
        call(monkeypatch, main, bad, *less, "--out", tmp_path / "s")
        factor, stream = load_subspace(tmp_path / "s", tiny())
        for U in factor.values():
            assert U[first, 0].abs() == pytest.approx(1, abs=1e-4)
        assert stream[5, 0].abs() == pytest.approx(1, abs=1e-4)  # of the whole update


def test_an_adapter_that_cannot_be_taken_off_is_named(adapter, tmp_path, monkeypatch):
    bad = planted(tmp_path / "bad", [5, 7, 9])
    out = ["--out", tmp_path / "s"]
    cases = (
        ("wide", [5, 7], {"d_model": 32}, 1, "wide: no update of model.layers.0.* of width 16, as"),
        ("same", [9, 7, 5], {}, 3, "layers.0.self_attn.o_proj says nothing that .*same does not"),
        ("poor", [5], {}, 2, "poor: the update of .* has not 2 directions above 0"),
    )
    for name, outputs, shape, rank, message in cases:
        other = planted(tmp_path / name, outputs, **shape)
        with pytest.raises(UserError, match=message):
            call(monkeypatch, main, bad, "--less", other, "--rank", rank, *out)
    with pytest.raises(UserError, match="bad: no update of model.layers.0.*down_proj"):
        call(monkeypatch, main, adapter, "--less", bad, *out)
    with pytest.raises(UserError, match="--less needs --out FILE"):
        call(monkeypatch, main, bad, "--less", bad)
    assert not (tmp_path / "s").exists()


def test_a_rank_that_the_adapter_does_not_have_is_refused(adapter, monkeypatch):
    with pytest.raises(UserError, match="subspace rank 4, but the LoRA on .* has rank 3") as error:
        call(monkeypatch, main, adapter, "--rank", 4)
    assert str(adapter) in str(error.value)
    assert not (adapter / "subspace.safetensors").exists()


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("adapter_config.json", None, "no such file"),
        ("adapter_config.json", b"{", "not valid JSON"),
        ("adapter_config.json", json.dumps({"peft_type": "IA3"}).encode(), "'LORA'"),
        ("adapter_model.safetensors", None, "no such file"),
        ("adapter_model.safetensors", b"12345678", "not a whole safetensors file"),
    ],
)
def test_a_bad_adapter_ends_in_one_line_that_names_the_file(
    adapter, name, content, message, monkeypatch
):
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        call(monkeypatch, main, adapter)
    text = str(error.value)
    assert str(adapter / name) in text and message in text and "\n" not in text


def test_an_absent_folder_ends_the_command_in_one_line(tmp_path):
    done = command("identify.py", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path / 'nowhere'}: no such folder, expected a PEFT adapter\n"
    )
