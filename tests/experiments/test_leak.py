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
from lora import lora_modules
from model import response_loss
from support.errors import UserError
from train import Recipe, keep_off_, project_

TINY = Toy(d_model=32, pretrain_steps=3, steps=8, rank=4, lr=3e-3)
SMALL = partial(World, n_topics=4, n_queries=8)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return start(SMALL(0), TINY, tmp_path_factory.mktemp("base"))


def test_the_signed_leak_is_one_for_naive_and_taken_out_none_and_moved_none(bench):
    modules = attach(bench)
    train(bench, Recipe(), 8)
    svds = spectra(bench.model)
    factor = top_directions(svds)
    leaks = {name: U.T @ modules[name].lora_B.data for name, U in factor.items()}
    assert leak.signed_leaks(modules, svds) == pytest.approx([1.0] * len(svds), abs=1e-4)
    keep_off_(modules, factor)
    assert leak.signed_leaks(modules, svds) == pytest.approx([0.0] * len(svds), abs=1e-4)
    left = {name: m.lora_B.data.clone() for name, m in modules.items()}
    leak.put_back(modules, leaks, factor, 0)
    assert leak.signed_leaks(modules, svds) == pytest.approx([0.0] * len(svds), abs=1e-4)
    for name, m in modules.items():
        moved = m.lora_B - left[name]
        assert moved.norm().item() == pytest.approx(leaks[name].norm().item(), rel=1e-4)


def test_the_first_steps_are_adamws(bench):
    attach(bench)
    train(bench, Recipe(), 8)
    svds = spectra(bench.model)
    modules = attach(bench)
    found = leak.first_steps(bench, modules, svds)
    for projected, expected in zip((True, False), found, strict=True):
        response_loss(bench.model, *bench.rows).backward()
        parts = []
        for name, (U, _, V) in svds.items():
            B, v = modules[name].lora_B, V[:, 0]
            if projected:
                project_(B.grad, U[:, :1])
            torch.optim.AdamW([B], lr=1e-3, eps=1e-30).step()  # from B = 0
            heard = modules[name].lora_A @ v
            parts.append((U[:, 0] @ B @ heard / (B.norm() * heard.norm())).item())
            B.data.zero_()
        bench.model.zero_grad()
        assert expected == pytest.approx(sum(parts) / len(parts), abs=1e-3)


def test_a_row_measures_the_model_after_each_change(bench, monkeypatch):
    seen = []

    def what_is_left(model, world):
        svds = spectra(model)
        seen.append({name: m.lora_B.data.clone() for name, m in lora_modules(model).items()})
        return {"task": 0, "misalignment": len(seen), "kept": len(svds)}

    monkeypatch.setattr(leak, "evaluate", what_is_left)
    row = leak.measure(bench, Toy.targets)
    assert [row[name]["misalignment"] for name in leak.RUNS] == [1, 2, 3, 4, 5, 6]
    _, _, gradient, removed, turned, moved = seen
    for name, B in gradient.items():
        gone = B - removed[name]  # the leak
        assert gone.norm() > 0.01 * B.norm()
        assert torch.linalg.matrix_rank(gone, rtol=1e-3) == 1
        assert torch.allclose(turned[name], removed[name] - gone, atol=1e-6)
        assert (moved[name] - removed[name]).norm().item() == pytest.approx(
            gone.norm().item(), rel=1e-3
        )


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
