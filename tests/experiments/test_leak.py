"""The leak of the gradient alone: what is measured of it is what a reader would take it to be."""

import json
from functools import partial

import pytest
import torch
from toys import call

from data.synthetic import World
from experiments import leak
from experiments.runs import attach, start, train
from grasp import Toy
from identify import spectra, top_directions
from model import response_loss
from support.errors import UserError
from train import Recipe, keep_off_, project_

TINY = Toy(d_model=32, pretrain_steps=3, steps=8, rank=4, lr=3e-3)
SMALL = partial(World, n_topics=4, n_queries=8)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return start(SMALL(0), TINY, tmp_path_factory.mktemp("base"))


def test_the_leak_of_the_naive_run_itself_is_one_and_turning_around_makes_it_minus_one(bench):
    modules = attach(bench)
    train(bench, Recipe(), 8)
    svds = spectra(bench.model)
    before = {name: m.lora_B.data.clone() for name, m in modules.items()}
    assert leak.leaked(modules, svds) == pytest.approx([1.0] * len(svds), abs=1e-4)
    keep_off_(modules, top_directions(svds))
    assert leak.leaked(modules, svds) == pytest.approx([0.0] * len(svds), abs=1e-4)
    kept = {name: m.lora_B.data.clone() for name, m in modules.items()}
    leak.turn_around(modules, before)
    assert leak.leaked(modules, svds) == pytest.approx([-1.0] * len(svds), abs=1e-4)
    keep_off_(modules, top_directions(svds))
    for name, m in modules.items():
        assert torch.allclose(m.lora_B, kept[name], atol=1e-6)  # what is not leak stays


def test_the_first_step_is_adamws(bench):
    attach(bench)
    train(bench, Recipe(), 8)
    svds = spectra(bench.model)
    modules = attach(bench)
    _, first_step = leak.first_step(bench, modules, svds)
    response_loss(bench.model, *bench.rows).backward()
    parts = []
    for name, (U, _, V) in svds.items():
        B, A = modules[name].lora_B, modules[name].lora_A
        project_(B.grad, U[:, :1])
        optimizer = torch.optim.AdamW([B], lr=1e-3, eps=1e-30)
        optimizer.step()  # from B = 0
        said = U[:, 0] @ B * (A @ V[:, 0]).sign()  # (r,)
        parts.append((said.sum() / (B.norm() * len(said) ** 0.5)).item())
    bench.model.zero_grad()
    assert first_step == pytest.approx(sum(parts) / len(parts), abs=1e-3)


def test_the_program_measures_each_seed_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leak, "Toy", lambda: TINY)
    monkeypatch.setattr(leak, "World", SMALL)
    arguments = ["--seeds", "2", "--targets", "writers", "--out", tmp_path]
    call(monkeypatch, leak.main, *arguments)
    assert "the gradient alone projected" in capsys.readouterr().out
    rows = json.loads((tmp_path / "leak.json").read_text())["rows"]
    assert list(rows) == ["writers, seed 0", "writers, seed 1"]
    monkeypatch.setattr(leak, "measure", lambda *_: pytest.fail("measured again"))
    call(monkeypatch, leak.main, *arguments)
    with pytest.raises(UserError, match="--targets has 'x', expected some of writers, all-linear"):
        call(monkeypatch, leak.main, "--targets", "x", "--out", tmp_path)
