"""Identification: linear algebra against dense oracles, and what stands out where nothing does."""

import math
from statistics import fmean

import peft
import pytest
import torch
from checkpoints import make
from safetensors.torch import load_file
from torch.nn.functional import normalize
from toys import TARGETS, basis, call, random_patterns, randomise, tiny

from identify import (
    FALSE_POSITIVES,
    LOOK_RANK,
    identify,
    join,
    leak,
    look_spectra,
    main,
    null_quantile,
    spectra,
    spike,
    standing_out,
    thin_svd,
)
from lora import LoRALinear, add_lora, lora_factors


def same_span(P, Q):
    """Whether P (d, k) is orthonormal and spans what orthonormal Q (d, k) spans."""
    orthonormal = torch.allclose(P.T @ P, torch.eye(P.shape[1]), atol=1e-5)
    return orthonormal and torch.allclose(P @ P.T, Q @ Q.T, atol=1e-3)


# ---------------------------------------------------------------- the decompositions

SHAPES = [(7, 5, 3), (5, 40, 5), (33, 12, 1), (64, 64, 16)]


@pytest.mark.parametrize("d_out,d_in,rank", SHAPES)
def test_thin_svd_is_the_dense_svd_and_the_patterns_are_its_top_pairs(d_out, d_in, rank):
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    U, S, V = thin_svd(A, B)
    left, values, right = torch.linalg.svd(B @ A)
    assert torch.allclose(S, values[:rank], atol=1e-4)
    assert torch.allclose(U * S @ V.T, B @ A, atol=1e-4)
    for n in range(1, rank + 1):
        U, V = identify(spectra({"a": (A, B)}), n)["a"]
        assert same_span(U, left[:, :n]) and same_span(V, right[:n].T)
    with pytest.raises(ValueError, match=f"rank {n + 1}, but the LoRA on a has rank {rank}"):
        identify(spectra({"a": (A, B)}), n + 1)


@pytest.mark.parametrize("d_out,d_in,rank", [*SHAPES, (64, 50, 40)])
def test_a_look_sees_the_svd_of_Bs_first_columns_and_what_it_listens_to_one_by_one(
    d_out, d_in, rank
):
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    U, S, V = look_spectra({"a": (A, B)})["a"]
    first = B[:, :LOOK_RANK]
    assert torch.allclose(S, torch.linalg.svdvals(first), atol=1e-5)
    assert torch.allclose((U * S.square()) @ U.T, first @ first.T, atol=1e-3)
    for n in range(1, len(S) + 1):
        assert same_span(V[:, :n], torch.linalg.qr(A.T @ B.T @ U[:, :n])[0])


@pytest.mark.parametrize("sides", ["both", "output", "input"])
def test_leak_is_the_worst_modules_worse_side_by_dense_algebra(sides):
    model = add_lora(tiny(), 3, 9, TARGETS)
    patterns, dense = random_patterns(model, 2), []
    assert leak(lora_factors(model), patterns) == 0
    for name, (A, B) in lora_factors(randomise(model)).items():
        dW, (U, V) = B @ A, patterns[name]
        patterns[name] = U[:, 2 * (sides == "input") :], V[:, 2 * (sides == "output") :]
        dense += [(U.T @ dW).norm() / dW.norm()] * (sides != "input")
        dense += [(dW @ V).norm() / dW.norm()] * (sides != "output")
    assert leak(lora_factors(model), patterns) == pytest.approx(max(dense).item(), rel=1e-4)


@pytest.mark.parametrize("n,m", [(2, 3), (0, 3), (2, 0), (0, 0)])
def test_join_spans_both_and_leaves_both_as_they_were(n, m):
    """On one side; on the other nothing is held."""
    empty, one = torch.zeros(5, 0), basis(4, 1)
    first, second = {"a": (basis(9, n), empty)}, {"a": (basis(9, m), empty), "b": (one, one)}
    both = join(first, second)
    assert same_span(
        both["a"][0], torch.linalg.qr(torch.cat((first["a"][0], second["a"][0]), 1))[0]
    )
    assert both["a"][0].shape == (9, n + m) and both["a"][1].shape == (5, 0)
    assert both["b"] == (one, one) and first.keys() == {"a"} and first["a"][0].shape == (9, n)


# ---------------------------------------------------------------- a planted correlation


def planted_finetune(strength, seed, n_skills=24, d=96, steps=600):
    """(|cos| with u, |cos| with v) of the pattern identified after a LoRA fine-tune of y = W x.

    Each of n_skills examples adds a random rank-1 skill; all ask for `strength` u <v, x> as well.
    """
    g = torch.Generator().manual_seed(seed)
    u, v = (normalize(torch.randn(d, generator=g), dim=0) for _ in range(2))
    skills_in, skills_out = (normalize(torch.randn(n_skills, d, generator=g)) for _ in range(2))
    x = normalize(v + skills_in)  # the shared part stands beside each example's own
    lora = LoRALinear(torch.nn.Linear(d, d, bias=False), 16, 16, generator=g)
    optimizer = torch.optim.SGD((lora.lora_A, lora.lora_B), lr=0.03)
    target = x @ lora.linear.weight.detach().T + strength * u + skills_out
    for _ in range(steps):
        loss = (lora(x) - target).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    U, V = identify(spectra({"a": (lora.lora_A.data, lora.lora_B.data)}))["a"]
    return abs(u @ U[:, 0]).item(), abs(v @ V[:, 0]).item()


def test_the_pattern_of_a_fine_tune_is_the_spurious_part_unless_it_is_far_below_the_skills():
    found, missed = ([planted_finetune(s, seed) for seed in range(3)] for s in (1.0, 0.02))
    assert min(u for u, _ in found) > 0.95 and min(v for _, v in found) > 0.8
    assert max(u for u, _ in missed) < 0.5


# ---------------------------------------------------------------- what stands out


def test_spike_is_over_the_energy_weighted_mean_of_what_is_below():
    S = torch.tensor([6.0, 2.0, 1.0])  # sum of fourth powers over sum of squares: 17 / 5, 1
    for n, expected in ((0, 6 / math.sqrt(17 / 5)), (1, 2.0)):
        assert spike(torch.stack((S, S / 7)), n).tolist() == pytest.approx([expected] * 2)


def by_chance(n):
    """(Least, most) false positives of n looks: the stated rate, four standard deviations off."""
    mean = n * FALSE_POSITIVES
    return mean - 4 * mean**0.5, mean + 4 * mean**0.5


@pytest.mark.parametrize("rank", [2, 8, 16])
def test_a_gaussian_matrix_passes_the_quantile_as_often_as_stated(rank):
    draws = torch.randn(2000, rank, rank, generator=torch.Generator().manual_seed(1))
    passed = (spike(torch.linalg.svdvals(draws)) > null_quantile(rank)).sum().item()
    least, most = by_chance(2000)
    assert least < passed < most


def first_update(shape, g, shared=0.0):
    """(The factors after one step of gradient descent, u, v).

    Each part asks a random unit answer of a random unit input; all share `shared` times v and u.
    """
    d_out, d_in, rank, n_parts = shape
    A = LoRALinear(torch.nn.Linear(d_in, d_out), rank, rank, generator=g).lora_A.data
    inputs = normalize(torch.randn(n_parts, d_in, generator=g))
    answers = normalize(torch.randn(n_parts, d_out, generator=g))
    u, v = (normalize(torch.randn(d, generator=g), dim=0) for d in (d_out, d_in))
    B = (answers + shared * u).T @ ((inputs + shared * v) @ A.T) / n_parts
    return {"a": (A, B)}, u, v


MANY = [(128, 128, 16, 64), (128, 256, 8, 32), (96, 200, 4, 16)]  # out, in, rank, parts


@pytest.mark.parametrize("shape", MANY)
def test_unrelated_parts_stand_out_no_more_often_than_the_rule_states(shape):
    g, n = torch.Generator().manual_seed(sum(shape)), 400
    found = sum(bool(standing_out(look_spectra(first_update(shape, g)[0]))) for _ in range(n))
    assert found < by_chance(n)[1]


@pytest.mark.parametrize("shape", MANY)
def test_a_shared_part_as_large_as_the_others_is_taken_with_what_it_listens_to(shape):
    g, said, heard = torch.Generator().manual_seed(sum(shape)), [], []
    for _ in range(40):
        factors, u, v = first_update(shape, g, shared=1.0)
        for U, V in standing_out(look_spectra(factors)).values():
            A = factors["a"][0]
            seen = normalize(A.T @ A @ v, dim=0)  # v as far as a LoRA of this A can listen to it
            said.append((U.T @ u).norm().item())
            heard.append((V.T @ seen).norm().item())
            assert 1 <= U.shape[1] == V.shape[1] < shape[2]
    assert len(said) >= 32 and min(said) > 0.85 and fmean(heard) > 0.9


@pytest.mark.parametrize("shared,taken", [(0.0, False), (1.0, True)])
def test_a_common_part_of_the_inputs_stands_out_unless_the_null_has_it(shared, taken):
    g = torch.Generator().manual_seed(0)
    A = torch.rand(16, 128, generator=g) * 2 - 1
    X = torch.randn(64, 128, generator=g) + 3  # inputs with a common part
    answers = basis(256, 65, g)  # 64 of the tokens' own, and u
    svds = look_spectra({"a": (A, (answers[:, :64] + shared * answers[:, 64:]) @ X @ A.T)})
    assert standing_out(svds)
    found = standing_out(svds, {"a": torch.linalg.svdvals(X @ A.T)})
    assert bool(found) == taken
    assert not taken or (found["a"][0].T @ answers[:, 64]).norm() > 0.9


@pytest.mark.parametrize("scale,rank,taken", [(1e-6, 16, True), (0.0, 16, False), (1e3, 1, False)])
def test_size_does_not_matter_but_zero_and_rank_one_stand_out_nowhere(scale, rank, taken):
    shape = (128, 128, rank, 64)
    A, B = first_update(shape, torch.Generator().manual_seed(0), shared=1.5)[0]["a"]
    assert bool(standing_out(look_spectra({"a": (A, scale * B)}))) == taken


# ---------------------------------------------------------------- the command


def adapter(folder, seed):
    """Save an adapter with PEFT; return {module's path: dW (out, in)}."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(make("qwen2_tied", folder / "base"), config)
    torch.manual_seed(seed)
    updates = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
            dW = layer.get_delta_weight("default").detach()
            updates[name.removeprefix("base_model.model.")] = dW
    model.save_pretrained(folder)
    return updates


@pytest.mark.parametrize("less", [False, True])
def test_the_command_reads_pefts_adapters_and_writes_patterns(less, tmp_path, monkeypatch, capsys):
    """With --less those of what is left without another adapter's own."""
    updates, others = adapter(tmp_path / "a", seed=0), adapter(tmp_path / "b", seed=1)
    options = ["--less", tmp_path / "b", "--out", tmp_path / "f"] if less else ["--rank", 2]
    call(monkeypatch, main, tmp_path / "a", *options)
    written = load_file(tmp_path / "f" if less else tmp_path / "a" / "subspace.safetensors")
    printed, said, heard, k = capsys.readouterr().out, [], [], 1 if less else 2
    pooled = []
    for name, dW in updates.items():
        if less:
            u, v = identify({name: thin_svd(dW, torch.eye(len(dW)))})[name]
            U, V = identify({name: thin_svd(others[name], torch.eye(len(dW)))})[name]
            said.append(abs(u.T @ U).item())
            heard.append(abs(v.T @ V).item())
            dW = (torch.eye(len(U)) - U @ U.T) @ dW @ (torch.eye(len(V)) - V @ V.T)
        pooled += [dW] * name.endswith("down_proj")  # the writer of the two
        left, S, right = torch.linalg.svd(dW)
        assert same_span(written[f"outputs.{name}"], left[:, :k])
        assert same_span(written[f"inputs.{name}"], right[:k].T)
        assert f"{S[0] / S[1]:.2f}" in next(line for line in printed.splitlines() if name in line)
    assert same_span(written["stream"], torch.linalg.svd(torch.cat(pooled, 1))[0][:, :k])
    for side, cosines in (("output", said), ("input", heard)):
        line = f"{side} side: |cos| of the two adapters' patterns"
        assert not less or f"{line} {fmean(cosines):.3f}\n" in printed
