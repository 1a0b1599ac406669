"""Every statement of docs/theory.md on random instances, and each assumption violated alone."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from experiments import theory
from experiments.theory import Instance, draw, flow, normal, sine, sine_bound
from identify import thin_svd
from train import project_

TINY = 1e-9  # rounding in double precision
norm = torch.linalg.matrix_norm


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pick(*choices):
    return choices[torch.randint(len(choices), ()).item()]


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def unit(size, off=None):
    vector = normal(size)
    if off is not None:
        vector -= off * (off @ vector)
    return vector / vector.norm()


def gaussian(rank, d_in):
    return normal(rank, d_in) / d_in**0.5


def tangent(sine):
    return sine / math.sqrt(1 - sine**2)


def any_instance():
    """(Instance, K, rho, mu); in every third one m is anything in [0, 1]."""
    K, mu = pick(2, 3, 5, 8, 13, 24, 40), pick(0.0, uniform(0, 0.4))
    d_out, d_in = (K + 1 + pick(0, 5, 30) for _ in range(2))
    instance = draw(K, pick(1.0, 1.0, 0.75, 0.5), mu, d_out, d_in)
    if pick(True, False, False):
        instance = replace(instance, m=torch.rand(K, dtype=torch.float64))
    return instance, K, instance.m.mean().item(), mu


def first_sine(instance, rank):
    A = gaussian(rank, len(instance.v))
    return sine(thin_svd(A, instance.M @ A.T)[0][:, 0], instance.u)


def test_lemma_1_bounds_the_angles_of_both_vectors():
    for _ in range(2000):
        u, q = unit(pick(2, 5, 20)), normal(pick(2, 7, 30))
        E = normal(len(u), len(q))
        E -= torch.outer(u, u @ E)
        E *= uniform(0.01, 1.5) * q.norm() / norm(E, 2)
        U, _, Vh = torch.linalg.svd(torch.outer(u, q) + E)
        left, right = sine(U[:, 0], u), sine(Vh[0], q)
        eta, epsilon = (E @ q).norm() / q.norm() ** 2, norm(E, 2) / q.norm()
        assert left <= sine_bound(eta, epsilon) + TINY  # (a)
        if epsilon < 1:
            kappa = norm(E - torch.outer(E @ q, q) / q.norm() ** 2, 2) / q.norm()
            assert tangent(left) <= epsilon + 1e-7  # (b)
            assert tangent(right) <= kappa * tangent(left) + 1e-7  # (c)


@pytest.mark.parametrize("delta", [0.05, 0.5])
def test_theorem_1_a_and_b_fail_in_at_most_a_share_delta_of_the_draws(delta):
    failures = said = 0
    for _ in range(1500):
        K, d_in = pick(8, 16, 32, 48), pick(50, 100)
        rank, rho = pick(2, 4, 8, 16, 32), pick(1.0, 0.75, 0.5)
        instance = draw(K, rho, uniform(0, 0.2), 50, d_in)
        A = gaussian(rank, d_in)
        U, _, V = thin_svd(A, instance.M @ A.T)
        measured = sine(U[:, 0], instance.u)
        bound = theory.first_step_bound(theory.rest_parts(instance), rank, d_in, delta)
        if bound < 1:
            said += 1
            if measured > bound + 2e-5:  # thin_svd is in single precision
                failures += 1
            else:
                seen = A.T @ (A @ (instance.M.T @ instance.u))
                assert sine(V[:, 0], seen) <= tangent(measured) + 2e-5
    assert said > 400 and failures <= delta * said


def test_corollary_1_bounds_what_theorem_1_needs():
    for _ in range(1000):
        instance, K, rho, mu = any_instance()
        if rho * math.sqrt(K) > mu:
            bounds = theory.parts_bound(K, rho, mu)
            for part, bound in zip(theory.rest_parts(instance), bounds, strict=True):
                assert part <= bound + TINY
    for K in (2, 5, 16, 40):  # an equality for orthonormal parts at rho = 1
        parts = theory.rest_parts(draw(K, 1.0, 0.0, K + 3, K + 9))
        assert parts == pytest.approx(theory.parts_bound(K, 1.0, 0.0))


@pytest.mark.parametrize(("d_in", "expected"), [(128, 0.459), (256, 0.401)])
def test_in_the_toys_regime_theorem_1_says_something(d_in, expected):
    bound = theory.first_step_bound(theory.parts_bound(16, 1.0, 0.0), 16, d_in)
    instance = draw(16, 1.0, 0.0, d_in, d_in)
    sines = [first_sine(instance, 16) for _ in range(50)]
    assert bound == pytest.approx(expected, abs=5e-4)
    assert max(sines) < bound < 2 * statistics.median(sines)


@pytest.mark.parametrize(("rank", "d_in"), [(1, 50), (16, 256)])
def test_theorem_1_c_the_first_steps_input_vector_cannot_point_at_the_factor(rank, d_in):
    log, v, failures = math.log(1 / 0.05), unit(d_in), 0
    bound = math.sqrt((rank + 2 * math.sqrt(rank * log) + 2 * log) / d_in)
    for _ in range(700):
        basis = torch.linalg.qr(gaussian(rank, d_in).T)[0]
        failures += (basis.T @ v).norm().item() > bound  # the most in A0's row space
    assert failures <= 0.05 * 700


def spectrum(Y, inputs, t):
    """(sigma1/sigma2, top left vector) of the flow's solution at time t, in double precision."""
    left, right = torch.linalg.qr(flow(Y, inputs, t)), torch.linalg.qr(inputs)
    U, S, _ = torch.linalg.svd(left.R @ right.R.T)
    return (S[0] / S[1]).item(), left.Q @ U[:, 0]


def window_uniform(K, rho, mu, tau):
    """Corollary 2: (ratio, sine) from K, rho, mu alone for all t up to tau K; (0, 1): nothing."""
    load, gap = rho - mu / math.sqrt(K), (1 - mu) * K - 2 * mu
    if load <= 0 or gap <= 0:
        return 0.0, 1.0
    omega = (math.sqrt(rho) + mu / math.sqrt(K)) / load
    psi = math.atan(2 * mu * math.sqrt(K + 1) / gap) / 2 + math.acos(1 / omega)
    if psi >= math.pi / 2:
        return 0.0, 1.0
    others, first = -math.expm1(-(1 + mu) * tau), -math.expm1(-(1 - mu) * (K + 1) * tau)
    j = math.sqrt((1 + mu) * (K + 1) / (1 - mu)) * others / first
    along = math.sqrt(K) * load * omega * math.cos(psi)
    rest = math.sqrt(1 + mu) * max(1, j) / along
    eta = math.sqrt(1 + mu) * (1 + j**2 * math.tan(psi)) / along
    return 1 / rest, sine_bound(eta, rest)


def test_theorem_2_a_and_b_and_corollary_2_hold_at_every_time():
    said = 0
    for _ in range(1000):
        instance, K, rho, mu = any_instance()
        tau, X = 10 ** uniform(-3, 1), instance.X
        frozen = 2 * gaussian(pick(2, 8, 16), len(X)) @ X  # a LoRA whose A is frozen
        uniform_bound = window_uniform(K, rho, mu, tau * uniform(1, 3))
        bounds = [theory.window_bound(instance, inputs, tau * K, mu) for inputs in (frozen, X)]
        for inputs, (lower, upper) in zip((frozen, X, X), [*bounds, uniform_bound], strict=True):
            ratio, found = spectrum(instance.Y, inputs, tau * K)
            assert ratio >= lower * (1 - TINY)
            assert sine(found, instance.u) <= upper + TINY
        said += uniform_bound[1] < 1
        if rho == 1:
            lower, upper = theory.full_strength_ratio(K, mu, tau * K)
            assert lower * (1 - 1e-7) <= ratio <= upper * (1 + 1e-7)
    assert said > 150


def converged(instance):
    return instance.Y @ torch.linalg.pinv(instance.X)


def test_theorem_2_c_at_convergence_another_factor_has_the_same_weights():
    for K in (3, 16):
        one = draw(K, 1.0, 0.0, 30, 30)
        weights, Q = converged(one), torch.linalg.qr(one.X)[0]
        turn = Q @ (torch.linalg.qr(normal(K, K))[0] - torch.eye(K)) @ Q.T + torch.eye(30)
        other = torch.eye(30) + weights @ (turn - torch.eye(30)) @ weights.T
        two = Instance(turn @ one.v, turn @ one.Z, other @ one.u, other @ one.own, one.m)
        for side in ((two.v[:, None], two.Z), (two.u[:, None], two.own)):  # A3 holds
            gram = torch.cat(side, 1).T @ torch.cat(side, 1)
            torch.testing.assert_close(gram, torch.eye(K + 1, dtype=torch.float64))
        assert sine(two.u, one.u) > 0.5
        torch.testing.assert_close(weights, converged(two))
        torch.testing.assert_close(weights, flow(one.Y, one.X, 1e9) @ one.X.T)
        S = torch.linalg.svdvals(weights)[:K]
        torch.testing.assert_close(S, torch.ones_like(S))


def lora_error(instance, A, scaling, t):
    """Theorem 2 (d): bounds || dW(t) / (s² t) - M A0ᵀ A0 ||."""
    K, a, pull = len(instance.m), norm(A, 2).item(), norm(instance.M, 2).item()
    top = norm(instance.X, 2).item()
    xi = scaling * instance.Y.norm().item() * top / K * t
    grown = top**2 / K * scaling * a**3 * (math.cosh(xi) ** 3 - 1) / 3
    drift = pull * a * (math.sinh(xi) - xi)
    return a * math.cosh(xi) / xi * (grown + drift) + pull * a**2 * (math.cosh(xi) - 1)


def lora_update(instance, A, scaling, t):
    """dW(t) / (s² t)."""
    A_t, B_t = theory.lora_flow(instance, A, scaling, [t])[0]
    return B_t @ A_t / (scaling * t)


def test_theorem_2_d_bounds_how_far_a_lora_is_from_its_first_step_and_from_its_direction():
    ratios = []
    for _ in range(200):
        instance = pick(any_instance()[0], draw(16, 1.0, 0.1, 40, 40))
        A, t = gaussian(pick(2, 8, 16), len(instance.v)), 10 ** uniform(-4, -1)
        first, update = instance.M @ A.T @ A, lora_update(instance, A, 2.0, t)
        error, measured = lora_error(instance, A, 2.0, t), norm(update - first, 2).item()
        assert measured <= error * (1 + 1e-6) + TINY
        ratios.append(error / measured)
        q = first.T @ instance.u
        size, rest = q.norm().item(), norm(first - torch.outer(instance.u, q), 2).item()
        if error < size - rest:
            U, S, _ = torch.linalg.svd(update)
            angle = sine(U[:, 0], torch.linalg.svd(first)[0][:, 0])
            assert angle <= error / (size - rest - error) + TINY
            assert S[0] / S[1] >= (size - error) / (rest + error) * (1 - TINY)
    assert 25 < statistics.median(ratios) < 100  # docs/theory.md: about 50


@pytest.mark.parametrize(("size", "t"), [(1e-3, 0.8), (30.0, 1e-5)])
def test_theorem_2_d_is_tight_for_one_example(size, t):
    # a small A0: the error is that A grows; a large one: it is that the answer is reached
    x, y, zero = unit(5), unit(6), torch.zeros(1, dtype=torch.float64)
    instance = Instance(x, zero.expand(5, 1), y, zero.expand(6, 1), zero + 1)
    A = size * x[None]
    measured = norm(lora_update(instance, A, 1.0, t) - instance.M @ A.T @ A, 2).item()
    assert measured == pytest.approx(lora_error(instance, A, 1.0, t), rel=0.01)


def test_the_rates_of_a_frozen_a_are_apart_by_about_the_rank():
    failures, delta = 0, 0.6
    for _ in range(400):
        K, rank = pick(16, 40), pick(4, 16, 32)
        h = torch.linalg.svdvals(gaussian(rank, 64) @ draw(K, 1.0, 0.0, 41, 64).X) ** 2
        zeta, g, _, _ = theory.random_constants(rank, 64, delta)
        bound = (K + 1) * g**2 / (math.sqrt(K) + math.sqrt(rank) + zeta) ** 2
        failures += (h[0] / h[1]).item() < bound
    assert failures <= 7 / 12 * delta * 400


def tilted(u, angle_sine):
    return math.sqrt(1 - angle_sine**2) * u + angle_sine * unit(len(u), off=u)


def test_theorem_3_a_bounds_what_the_update_says_of_the_factor():
    for _ in range(1000):
        u, rank = unit(pick(3, 10, 40)), pick(1, 2, 3)
        hat = tilted(u, uniform(0, 1))
        A, B = normal(rank, pick(3, 20)), normal(len(u), rank)
        project_(B, hat[:, None])
        assert (u @ B @ A).norm() <= sine(hat, u) * norm(B @ A, 2) + TINY


def test_theorem_3_c_and_d_bound_what_the_task_loses_and_e_is_its_least_loss():
    for _ in range(500):
        instance, K, _, mu = any_instance()
        hat = tilted(instance.u, uniform(0.01, 1))
        found = sine(hat, instance.u)
        answers = (mu * math.sqrt(1 - found**2) + math.sqrt(1 + mu) * found) ** 2
        gradient = theory.lost_gradient_bound(found, K, mu)
        task = instance.own @ instance.X.T
        assert (hat @ instance.own).square().sum() <= answers + TINY
        assert ((hat @ task).norm() / task.norm()) ** 2 <= gradient + TINY
        best = converged(instance)
        best = best - torch.outer(hat, hat @ best)
        loss = (best @ instance.X - instance.Y).square().sum()
        torch.testing.assert_close(loss, (hat @ instance.Y).square().sum())


@pytest.mark.parametrize(("d_in", "median"), [(128, 0.28), (256, 0.21), (896, 0.12)])
def test_proposition_3_is_what_the_lora_still_hears_of_the_factor(d_in, median):
    ratios = []
    for _ in range(200):
        A0, p = torch.rand(16, d_in, dtype=torch.float64) * 2 - 1, unit(d_in)
        v = A0.T @ A0 @ p
        v /= v.norm()
        A, G, a = A0 - torch.outer(A0 @ v, v), A0 @ A0.T, A0 @ p
        ratios.append(((A @ p).norm() / a.norm()).item())
        formula = (G @ a).norm() ** 2 * a.norm() ** 2 / (a @ G @ a) ** 2 - 1
        chi = torch.linalg.cond(G, 2).item()
        assert ratios[-1] == pytest.approx(formula.sqrt().item())
        assert ratios[-1] <= (chi - 1) / (2 * math.sqrt(chi))
    assert statistics.median(ratios) == pytest.approx(median, abs=0.015)


# Each assumption, violated alone: the bound is Corollary 1's, as if all of them held.
BOUND = theory.first_step_bound(theory.parts_bound(64, 1.0, 0.0), 16, 128)
ROWS = torch.arange(64)
TWO = ROWS % 2
VIOLATIONS = {  # what each changes in an instance where all hold
    "A2: one row in 64": lambda one: {"m": (ROWS == 0).double()},
    "A2: in both senses": lambda one: {"m": 1.0 - 2.0 * TWO.double()},
    "A3: answers share a direction": lambda one: {"own": one.own + unit(128, one.u)[:, None]},
    "A3: one input dominates": lambda one: {"Z": one.Z * torch.where(ROWS == 0, 300, 1)},
    "A3: two parts in 64 rows": lambda one: {"Z": one.Z[:, TWO], "own": one.own[:, TWO]},
}


def test_with_all_assumptions_the_bound_holds_and_a_sign_step_without_a1_breaks_it():
    instance = draw(64, 1.0, 0.0, 128, 128)
    for _ in range(20):
        A = gaussian(16, 128)
        B = instance.M @ A.T
        plain, sign = (sine(thin_svd(A, step)[0][:, 0], instance.u) for step in (B, B.sign()))
        assert plain < BOUND < 0.2
        assert sign > 2 * BOUND  # AdamW's first step, up to its epsilon


@pytest.mark.parametrize("assumption", VIOLATIONS)
def test_without_an_assumption_on_the_rows_the_factor_is_not_found(assumption):
    instance = draw(64, 1.0, 0.0, 128, 128)
    instance = replace(instance, **VIOLATIONS[assumption](instance))
    assert statistics.median(first_sine(instance, 16) for _ in range(20)) > 2 * BOUND


def test_without_a4_an_a_that_does_not_hear_the_factor_finds_nothing():
    instance, A = draw(64, 1.0, 0.0, 128, 128), gaussian(16, 128)
    row = instance.M.T @ instance.u
    project_(A.T, (row / row.norm())[:, None])
    assert sine(thin_svd(A, instance.M @ A.T)[0][:, 0], instance.u) > 0.99


def test_without_a5_a_late_look_finds_nothing():
    instance = draw(32, 1.0, 0.1, 64, 64)
    early, late = (spectrum(instance.Y, instance.X, t) for t in (32 / 4, 32 * 30))
    assert early[0] > 2 > 1.25 > late[0]
    assert sine(early[1], instance.u) < 0.2 < 0.9 < sine(late[1], instance.u)


def test_a_task_whose_answers_share_a_direction_has_the_weights_of_a_factor():
    # world 1: a factor u beside answers w_k; world 2: no factor, its own answers are u + w_k
    one = draw(16, 1.0, 0.0, 32, 32)
    two = replace(one, u=unit(32), own=one.u[:, None] + one.own, m=0 * one.m)
    A = gaussian(8, 32)
    first, second = (theory.lora_flow(instance, A, 1.0, [9.0]) for instance in (one, two))
    torch.testing.assert_close(first, second)
    # taking u away costs world 2 this much of its answers for good
    lost = (one.u @ two.own).square().sum() / two.own.square().sum()
    assert lost.item() == pytest.approx(0.5)


@pytest.mark.parametrize("with_mean", [False, True])
def test_the_null_is_that_of_unrelated_parts_unless_inputs_share_a_mean(with_mean):
    quantiles, passed, draws = theory.null(16, 40), torch.zeros(2), 1000
    for _ in range(draws):
        inputs, answers = (theory.frame(40, 17, 0.0) for _ in range(2))
        X = inputs[:, 1:] + (inputs[:, :1] if with_mean else 0)
        A = gaussian(16, 40)
        B = answers[:, 1:] @ X.T @ A.T
        for i, update in enumerate((B @ A, B)):
            S = torch.linalg.svdvals(update)
            passed[i] += S[0] / S[1] > quantiles["dW" if i == 0 else "B"]
    low, high = (0.5, 1.0) if with_mean else (0.002, 0.023)  # of 1,000 draws
    assert all(low < share < high for share in (passed / draws).tolist())


def test_the_numbers_of_section_8():
    rates = theory.look_rates(2, batches=5)
    assert rates == pytest.approx({"K": 2, "gaussian_core": 0.140, "unit_parts": 0.173}, abs=0.02)
    for left, rate in ((15, 0.017), (12, 0.044), (8, 0.143), (4, 0.480)):
        error = 4 * math.sqrt(rate / 20_000)
        assert theory.passing(normal(20_000, left, left)) == pytest.approx(rate, abs=error)
    for rho, median in ((0.25, 4.2), (0.5, 6.4), (1.0, 11.9)):
        found = theory.planted(rho, draws=50)
        assert found == {"rho": rho, "median": pytest.approx(median, rel=0.1), "passed": 1.0}


def test_the_tables_hold_their_bounds_and_the_figures_are_drawn(tmp_path):
    cells = [theory.cell(8, 1.0, 0.1, rank, d=24, draws=3) for rank in (4, 8)]
    found = theory.removal(8, 0.0, d=24, rank=8)
    assert all(row["median"] <= row["theorem"] for row in cells)
    assert found["kept_says"] <= found["says_bound"] < found["naive_says"]
    assert found["lost_gradient"] <= found["lost_gradient_bound"]
    theory.draw_bound(cells, cells, tmp_path / "bound.png")
    theory.draw_window([theory.window(4, d=24, rank=4)], tmp_path / "window.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes()[:4] == b"\x89PNG"
