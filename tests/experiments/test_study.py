"""The study: the input side that lives there, what a variant adds, rows that are kept."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from data.synthetic import World
from experiments import study
from experiments.runs import Finished, attach, start, train
from experiments.study import BOTH, INPUT, ONCE, ONLINE, WATCHING, InputSide, NaiveRuns, Variant
from grasp import Toy
from identify import spectra
from lora import lora_modules
from support.errors import UserError
from train import Recipe

TINY = Toy(d_model=32, pretrain_steps=3, steps=12, longer=1, rank=4, lr=3e-3)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return start(World(0, n_topics=4, n_queries=8), TINY, tmp_path_factory.mktemp("base"))


def take_the_top_pair(step, svds):
    return {name: U[:, :1] for name, (U, _) in svds.items()}


@pytest.fixture
def looks_always_take(monkeypatch):
    def taking(method, model, batch, found=None, seed=0):
        assert method == "grasp_online"
        return Recipe(look=take_the_top_pair)

    monkeypatch.setattr(study, "recipe", taking)


@pytest.mark.parametrize("targets", study.TARGETS.values())
def test_under_the_input_side_the_update_never_listens_to_the_factor(bench, targets):
    variant = Variant("input", ONCE, INPUT, pairs=2)
    outputs, inputs = study.known_before(variant, targets, NaiveRuns(bench))
    _, side = study.fine_tune(variant, bench, targets, outputs, inputs, 12)
    assert outputs == {}
    assert set(side.bases) == set(lora_modules(bench.model))
    largest = max(m.lora_B.abs().max().item() for m in lora_modules(bench.model).values())
    assert largest > 1e-3, "nothing was learned, so nothing was tested"
    assert side.leak() <= 1e-5


def test_projecting_a_basis_once_at_the_start_would_not_hold(bench):
    modules = attach(bench)
    V = {name: torch.eye(m.lora_A.shape[1])[:, :1] for name, m in modules.items()}
    side = InputSide(modules, V)
    train(bench, Recipe(), 12)
    assert side.leak() > 1e-3


def test_what_is_heard_of_a_singular_pair_is_its_other_vector(bench):
    modules = attach(bench)
    train(bench, Recipe(), 6)
    svds = spectra(bench.model)
    found = {name: U[:, :2] for name, (U, _, _) in svds.items()}
    for name, V in study.heard(modules, found).items():
        expected = svds[name][2][:, :2]
        assert torch.allclose(V @ V.T, expected @ expected.T, atol=1e-3)


def test_a_pair_that_joins_on_both_sides_is_neither_said_nor_heard(bench, looks_always_take):
    variant = Variant("both", ONLINE, BOTH, look_every=5)
    fit, side = study.fine_tune(variant, bench, Toy.targets, {}, {}, 12)
    assert [look["step"] for look in fit.looks] == [5, 10]
    assert study.count(fit.factor) == study.count(side.bases) == 2 * len(side.modules)
    assert side.leak() <= 1e-5


def test_with_the_output_side_alone_no_input_direction_joins(bench, looks_always_take):
    fit, side = study.fine_tune(Variant("output", ONLINE), bench, Toy.targets, {}, {}, 12)
    assert study.count(fit.factor) > 0
    assert side.bases == {}


def test_looks_that_only_watch_change_no_bit_and_are_recorded(bench):
    study.fine_tune(Variant("naive"), bench, Toy.targets, {}, {}, 12)
    naive = [p.clone() for p in bench.model.parameters()]
    row = study.measure(Variant("watch", WATCHING, look_every=4), Toy.targets, NaiveRuns(bench))
    for p, other in zip(bench.model.parameters(), naive, strict=True):
        assert torch.equal(p, other)
    assert [look["step"] for look in row["looks"]] == [4, 8, 12]
    assert row["outputs"] == 0


def test_an_update_kept_off_the_mean_inputs_is_zero_there(bench):
    modules = attach(bench)
    inputs = study.mean_inputs(bench.model, modules, *bench.rows)
    side = InputSide(modules, inputs)
    for name, module in modules.items():
        assert inputs[name].shape[1] == bench.world.n_answer  # one a position that predicts
        assert (module.lora_A @ side.bases[name]).abs().max() <= 1e-6


def test_a_short_naive_run_is_compared_with_the_whole_one(bench):
    runs = NaiveRuns(bench)
    assert runs.cosine(Toy.targets, None, 1.0) == pytest.approx(1.0, abs=1e-5)
    assert 0 < runs.cosine(Toy.targets, None, 0.2) < 1
    assert len(runs.made) == 2  # each naive run is made once


def test_the_variants_have_names_of_their_own_and_name_every_choice():
    names = [variant.name for variant in study.VARIANTS]
    assert len(set(names)) == len(names)
    online = [variant for variant in study.VARIANTS if variant.looks == ONLINE]
    assert {variant.look_every for variant in online} == {5, 10, 20}
    assert {variant.rank for variant in online} == {None, 8, 32}
    once = [variant for variant in study.VARIANTS if variant.looks == ONCE]
    assert {variant.sides for variant in once} == {("output",), INPUT, BOTH}


def run_study(out, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(out), "--seeds", "1", *more])
    study.main()


def test_the_study_writes_rows_as_they_come_and_goes_on_where_it_stopped(
    tmp_path, monkeypatch, capsys
):
    names = ("naive", "one look, both sides", "online, output side", "looks that only watch")
    variants = tuple(variant for variant in study.VARIANTS if variant.name in names)
    tiny = replace(TINY, steps=6)
    measured, measure = [], study.measure

    def stops(variant, *rest):
        measured.append(variant.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(variant, *rest)

    monkeypatch.setattr(study, "VARIANTS", variants)
    monkeypatch.setattr(study, "Toy", lambda: tiny)
    monkeypatch.setattr(study, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, monkeypatch, "--targets", "writers")
    assert len(json.loads((tmp_path / "study.json").read_text())["rows"]) == 2
    run_study(tmp_path, monkeypatch, "--targets", "writers")
    assert measured == [*names[:3], *names[2:]]
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert set(rows) == {f"{name} | writers | seed 0" for name in names}
    assert rows["one look, both sides | writers | seed 0"]["inputs"] == 4
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def finished(path, rank):
    """The rows in `path`, each an object of numbers, under a configuration."""
    return Finished(path, {"rank": rank}, lambda key: dict[str, float], "rows")


def test_rows_of_other_settings_are_not_mixed_with_these(tmp_path):
    finished(tmp_path / "rows.json", 4).keep("a", {"task": 1.0})
    assert finished(tmp_path / "rows.json", 4).rows == {"a": {"task": 1.0}}
    with pytest.raises(UserError, match="other settings"):
        finished(tmp_path / "rows.json", 8)


def test_a_row_of_another_kind_is_named_before_any_work(tmp_path):
    finished(tmp_path / "rows.json", 4).keep("a", {"task": "good"})
    with pytest.raises(UserError, match="rows.json: 'rows.a.task' is 'good', expected a finite"):
        finished(tmp_path / "rows.json", 4)


@pytest.mark.parametrize("wrong", [["--only", "no such"], ["--targets", "readers"]])
def test_an_unknown_choice_is_named_before_any_work(wrong, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=wrong[1]):
        run_study(tmp_path, monkeypatch, *wrong)
    assert not list(tmp_path.iterdir())
