"""The theorems of docs/theory.md, asserted on random instances, and each assumption on its own."""

import math
import statistics

import pytest
import torch

from experiments.theory import (
    Instance,
    chi_square,
    draw,
    ends,
    eta_kappa,
    first_step,
    first_step_bound,
    flow,
    frame,
    full_strength_ratio,
    gaussian,
    input_cosine_bound,
    later_rate,
    look_rates,
    lora_error,
    lora_flow,
    lost_answers_bound,
    lost_gradient_bound,
    minimum_norm,
    normal,
    null_gaps,
    parts_bound,
    planted_spike,
    random_constants,
    rest_parts,
    rotated,
    sine,
    sine_bound,
    window_bound,
    window_uniform,
)
from identify import standing_out, thin_svd
from train import project_

TINY = 1e-9  # rounding in double precision
SINGLE = 2e-5  # rounding in thin_svd, which computes in single precision


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def pick(generator, *choices):
    return choices[torch.randint(len(choices), (), generator=generator).item()]


def uniform(generator, low, high):
    return low + (high - low) * torch.rand((), generator=generator).item()


def unit(size, generator, off=None):
    """A random unit vector, orthogonal to `off`."""
    vector = normal(size, generator=generator)
    if off is not None:
        vector -= off * (off @ vector)
    return vector / vector.norm()


def any_instance(generator, rhos=(1.0, 0.75, 0.5, 0.25), most=0.4):
    """A random Instance of random shapes, rho, mu; in every second one m is anything in [0, 1]."""
    K = pick(generator, 2, 3, 5, 8, 13, 24, 40)
    d_out, d_in = (K + 1 + pick(generator, 0, 5, 30) for _ in range(2))
    mu = pick(generator, 0.0, uniform(generator, 0, most))
    instance = draw(K, pick(generator, *rhos), mu, d_out, d_in, generator)
    if rhos != (1.0,) and pick(generator, True, False):
        m = torch.rand(K, generator=generator, dtype=torch.float64)
        instance = Instance(instance.v, instance.Z, instance.u, instance.own, m)
    return instance, instance.m.mean().item(), mu


def found_output(A, B):
    return thin_svd(A, B)[0][:, 0].double()


def tightness(name, ratios):
    """Print the median of bound / measured; it has to be a number, at least 1."""
    median = statistics.median(ratios)
    print(f"{name}: bound / measured, median of {len(ratios)}: {median:.3f}")
    assert 1 - 1e-6 <= median < math.inf


# ---------------------------------------------------------------- Lemma 1


def spiked(generator):
    """(C, u, q, E): C = u q' + E with u'E = 0."""
    d_out, d_in = pick(generator, 2, 5, 20), pick(generator, 2, 7, 30)
    u = unit(d_out, generator)
    q = normal(d_in, generator=generator)
    E = normal(d_out, d_in, generator=generator)
    E -= torch.outer(u, u @ E)
    E *= uniform(generator, 0.01, 1.5) * q.norm() / torch.linalg.matrix_norm(E, 2)
    return torch.outer(u, q) + E, u, q, E


def lemma(q, E):
    """(eta, rest) of Lemma 1."""
    return ((E @ q).norm() / q.norm() ** 2).item(), (
        torch.linalg.matrix_norm(E, 2) / q.norm()
    ).item()


def test_lemma_1_bounds_the_angle_of_the_left_vector(generator):
    ratios = []
    for _ in range(3000):
        C, u, q, E = spiked(generator)
        eta, rest = lemma(q, E)
        measured, bound = sine(torch.linalg.svd(C)[0][:, 0], u), sine_bound(eta, rest)
        assert measured <= bound + TINY
        if rest < 1:
            assert measured / math.sqrt(1 - measured**2) <= rest + 1e-7
            ratios.append(bound / measured)
    tightness("Lemma 1", ratios)


def test_lemma_1_is_an_equality_on_one_plane(generator):
    for _ in range(300):
        u, q = unit(9, generator), normal(7, generator=generator)
        n, y = unit(9, generator, off=u), unit(7, generator, off=q / q.norm())
        E = torch.outer(
            n, uniform(generator, 0, 0.6) * q + uniform(generator, 0, 0.6) * q.norm() * y
        )
        found = torch.linalg.svd(torch.outer(u, q) + E)[0][:, 0]
        assert sine(found, u) == pytest.approx(sine_bound(*lemma(q, E)), abs=1e-9)


def test_lemma_1_bounds_the_angle_of_the_right_vector(generator):
    ratios = []
    for _ in range(2000):
        C, u, q, E = spiked(generator)
        U, _, Vh = torch.linalg.svd(C)
        left, right = sine(U[:, 0], u), sine(Vh[0], q)
        if lemma(q, E)[1] >= 1:
            continue
        rest = E - torch.outer(E @ q, q) / q.norm() ** 2
        bound = (
            torch.linalg.matrix_norm(rest, 2).item()
            / q.norm().item()
            * left
            / math.sqrt(1 - left**2)
        )
        assert right / math.sqrt(1 - right**2) <= bound + 1e-7
        ratios.append((bound + 1e-12) / (right + 1e-12))
    tightness("Lemma 1, right", ratios)


# ---------------------------------------------------------------- Theorem 1


def test_chi_square_is_the_quantile(generator):
    for n in (1, 3, 16, 127):
        squares = normal(20000, n, generator=generator).square().sum(1)
        for probability in (0.01, 0.3, 0.99):
            share = (squares < chi_square(n, probability)).double().mean().item()
            spread = math.sqrt(probability * (1 - probability) / 20000)
            assert abs(share - probability) < 4 * spread


def test_the_closed_forms_of_the_quantiles_are_on_the_safe_side():
    for n in (1, 3, 16, 127):
        for delta in (0.001, 0.05, 0.4):
            log = math.log(1 / delta)
            assert chi_square(n, 1 - delta) <= n + 2 * math.sqrt(n * log) + 2 * log
            assert chi_square(n, delta) >= n - 2 * math.sqrt(n * log)
            assert chi_square(n, delta) >= n / math.e * delta ** (2 / n)


@pytest.mark.parametrize("delta", [0.05, 0.5])
def test_theorem_1_fails_in_at_most_a_share_delta_of_the_draws(delta, generator):
    failures, ratios, draws = 0, [], 1500
    for _ in range(draws):
        K, d_in = pick(generator, 8, 16, 32, 48), pick(generator, 50, 100)
        rank, rho, mu = pick(generator, 2, 4, 8, 16, 32), pick(generator, 1.0, 0.75, 0.5), 0.2
        instance = draw(K, rho, uniform(generator, 0, mu), 50, d_in, generator)
        A = gaussian(rank, d_in, generator)
        measured = sine(found_output(A, first_step(instance, A)), instance.u)
        bound = first_step_bound(rest_parts(instance), rank, d_in, delta)
        if bound < 1:
            failures += measured > bound + SINGLE
            ratios.append(bound / measured)
    print(f"Theorem 1, delta {delta}: {failures} failures in {len(ratios)} that say something")
    tightness("Theorem 1", ratios)
    assert len(ratios) > 400
    assert failures <= delta * len(ratios)


def test_theorem_1s_eta_and_kappa_bound_the_rest_along_and_across_the_factor(generator):
    failures, along, across, draws = 0, [], [], 600
    for _ in range(draws):
        K, rank = pick(generator, 8, 16, 32), pick(generator, 2, 4, 8, 16)
        instance, A = draw(K, 1.0, 0.1, 40, 60, generator), gaussian(rank, 60, generator)
        C = instance.M @ A.T @ A
        q = C.T @ instance.u
        E = C - torch.outer(instance.u, q)
        eta = ((E @ q).norm() / q.norm() ** 2).item()
        E = E - torch.outer(E @ q, q) / q.norm() ** 2
        kappa = (torch.linalg.matrix_norm(E, 2) / q.norm()).item()
        bounds = eta_kappa(rest_parts(instance), rank, 60, 0.9)
        failures += eta > bounds[0] or kappa > bounds[1]
        along.append(bounds[0] / eta)
        across.append(bounds[1] / kappa)
    tightness("Theorem 1, eta", along)
    tightness("Theorem 1, kappa", across)
    assert failures <= 0.9 * draws


def test_theorem_1s_kappa_is_within_a_factor_of_2_where_the_rest_is_one_line(generator):
    # M = u p' + n e' with e orthogonal to p: only the first two columns of A0'A0 matter
    ratios = []
    for _ in range(60):
        A = gaussian(64, 1500, generator)
        q, e = (A.T @ A[:, :2]).T
        kappa = (e - q * (e @ q) / q.norm() ** 2).norm() / q.norm()
        ratios.append(eta_kappa((0.0, 1.0, 1.0), 64, 1500, 0.9)[1] / kappa.item())
    assert sum(ratio < 1 for ratio in ratios) <= 0.9 * len(ratios)
    tightness("Theorem 1, kappa, one line", ratios)


def test_theorem_1_fails_in_at_most_a_share_delta_at_one_instance(generator):
    instance, draws = draw(40, 1.0, 0.1, 64, 64, generator), 1500
    bound = first_step_bound(rest_parts(instance), 4, 64, 0.3)
    failures = 0
    for _ in range(draws):
        A = gaussian(4, 64, generator)
        failures += sine(found_output(A, first_step(instance, A)), instance.u) > bound
    assert bound < 1
    assert failures <= 0.3 * draws


def test_corollary_1_bounds_what_theorem_1_needs(generator):
    ratios = []
    for _ in range(2000):
        instance, rho, mu = any_instance(generator)
        parts, bounds = rest_parts(instance), parts_bound(len(instance.m), rho, mu)
        for measured, bound in zip(parts, bounds, strict=True):
            assert measured <= bound + TINY
        ratios.append(bounds[0] / parts[0])
    tightness("Corollary 1, alpha", ratios)


def test_corollary_1_is_an_equality_for_orthonormal_parts_at_rho_1(generator):
    for K in (2, 5, 16, 40):
        instance = draw(K, 1.0, 0.0, K + 3, K + 9, generator)
        assert rest_parts(instance) == pytest.approx(parts_bound(K, 1.0, 0.0))


def test_in_the_toys_regime_theorem_1_says_something(generator):
    for d_in in (128, 256):
        bound = first_step_bound(parts_bound(16, 1.0, 0.0), 16, d_in, 0.05)
        instance = draw(16, 1.0, 0.0, d_in, d_in, generator)
        sines = []
        for _ in range(50):
            A = gaussian(16, d_in, generator)
            sines.append(sine(found_output(A, first_step(instance, A)), instance.u))
        assert max(sines) < bound < 0.46
        assert bound < 2 * statistics.median(sines)


def test_the_random_constants_bound_their_random_variables(generator):
    rank, d_in, delta, draws = 6, 40, 0.6, 4000
    zeta, g, lambda_1, lambda_2 = random_constants(rank, d_in, delta)
    tail = (normal(20000, generator=generator) > zeta).double().mean().item()
    assert tail <= delta / 12  # the rest can be one Gaussian along R p
    small = stretched = wide = 0
    for _ in range(draws):
        first, rest = (
            normal(d_in, generator=generator),
            normal(rank - 1, d_in - 1, generator=generator),
        )
        row, own = first.norm() ** 2, first[1:]
        noise = own + rest.T @ (rest @ own) / row
        stretched += (noise.norm() / own.norm()).item() > lambda_1
        wide += (torch.linalg.matrix_norm(rest, 2) / row.sqrt()).item() > lambda_2
        small += (normal(rank, generator=generator).norm() < g).item()
    assert abs(small / draws - delta / 2) < 4 * math.sqrt(0.25 / draws)
    assert stretched <= 3 * delta / 12 * draws
    assert wide <= 2 * delta / 12 * draws


def test_the_first_steps_input_vector_cannot_point_at_the_factor(generator):
    for rank, d_in in ((1, 50), (8, 100), (16, 256)):
        v, failures, cosines = unit(d_in, generator), 0, []
        for _ in range(700):
            A = gaussian(rank, d_in, generator)
            basis = torch.linalg.qr(A.T)[0]
            cosines.append(
                (basis.T @ v).norm().item()
            )  # the most that any vector of the row space has
            failures += cosines[-1] > input_cosine_bound(rank, d_in, 0.05)
        assert failures <= 0.05 * 700
        tightness(
            "Theorem 1 (c)", [input_cosine_bound(rank, d_in, 0.5) / statistics.median(cosines)]
        )


def test_the_first_steps_input_vector_is_the_factor_seen_through_a(generator):
    for _ in range(300):
        instance = draw(24, 1.0, 0.1, 64, 64, generator)
        A = gaussian(16, 64, generator)
        U, _, V = thin_svd(A, first_step(instance, A))
        seen = A.T @ (A @ (instance.M.T @ instance.u))
        left = sine(U[:, 0], instance.u)
        assert sine(V[:, 0], seen) <= left / math.sqrt(1 - left**2)


# ---------------------------------------------------------------- Theorem 2


def spectrum(Y, inputs, t):
    """(sigma1/sigma2, top left vector) of the flow's solution at time t, in double precision."""
    left, right = torch.linalg.qr(flow(Y, inputs, t)), torch.linalg.qr(inputs)
    U, S, _ = torch.linalg.svd(left.R @ right.R.T)
    return (S[0] / S[1]).item(), left.Q @ U[:, 0]


def test_theorem_2_a_holds_at_every_time(generator):
    ratios, sines = [], []
    for _ in range(1600):
        instance, _, mu = any_instance(generator)
        t = len(instance.m) * 10 ** uniform(generator, -3, 1)
        ratio, found = spectrum(instance.Y, instance.X, t)
        lower, upper = window_bound(instance, instance.X, t, mu)
        assert ratio >= lower * (1 - TINY)
        assert sine(found, instance.u) <= upper + TINY
        ratios.append(ratio / lower)
        if upper < 1:
            sines.append(upper / sine(found, instance.u))
    tightness("Theorem 2 (a), ratio", ratios)
    tightness("Theorem 2 (a), sine", sines)


def test_theorem_2_a_holds_for_a_lora_whose_a_is_frozen(generator):
    ratios = []
    for _ in range(1500):
        instance, _, mu = any_instance(generator)
        A = gaussian(pick(generator, 2, 8, 16), len(instance.v), generator)
        inputs, t = 2 * A @ instance.X, len(instance.m) * 10 ** uniform(generator, -3, 1)
        ratio, found = spectrum(instance.Y, inputs, t)
        lower, upper = window_bound(instance, inputs, t, mu)
        assert ratio >= lower * (1 - TINY)
        assert sine(found, instance.u) <= upper + TINY
        ratios.append(ratio / lower)
    tightness("Theorem 2 (a), A frozen", ratios)


def test_theorem_2_a_is_nearly_an_equality_for_orthonormal_parts(generator):
    for K in (16, 32):
        instance = draw(K, 1.0, 0.0, 40, 40, generator)
        for t in (K / 3, K / 2, K):
            ratio, found = spectrum(instance.Y, instance.X, t)
            lower, _ = window_bound(instance, instance.X, t, 0.0)
            assert lower == pytest.approx(ratio * math.sqrt(K / (K + 1)))
        _, upper = window_bound(instance, instance.X, 1e-3, 0.0)
        assert upper == pytest.approx(sine(found, instance.u), rel=0.01)


def test_corollary_2_holds_until_tau_k(generator):
    said, ratios = 0, []
    for _ in range(1600):
        instance, rho, mu = any_instance(generator, most=0.2)
        K, tau = len(instance.m), uniform(generator, 0.05, 0.8)
        ratio, found = spectrum(instance.Y, instance.X, tau * K * uniform(generator, 0.02, 1))
        lower, upper = window_uniform(K, rho, mu, tau)
        assert ratio >= lower * (1 - TINY)
        assert sine(found, instance.u) <= upper + TINY
        said += upper < 1
        if lower > 0:
            ratios.append(spectrum(instance.Y, instance.X, tau * K)[0] / lower)
    assert said > 300
    tightness("Corollary 2, at tau K", ratios)


def test_corollary_2_is_tight_for_orthonormal_parts(generator):
    instance = draw(32, 1.0, 0.0, 40, 40, generator)
    for tau in (0.3, 0.5, 0.8):
        lower, _ = window_uniform(32, 1.0, 0.0, tau)
        assert lower == pytest.approx(spectrum(instance.Y, instance.X, 32 * tau)[0], rel=0.02)
    _, upper = window_uniform(32, 1.0, 0.0, 0.05)
    assert upper == pytest.approx(1 / math.sqrt(33), rel=0.01)  # exact at mu = 0, rho = 1


def test_theorem_2_b_holds_at_full_strength_from_both_sides(generator):
    tops, bottoms = [], []
    for _ in range(1600):
        instance, _, mu = any_instance(generator, rhos=(1.0,))
        K = len(instance.m)
        t = K * 10 ** uniform(generator, -3, 1)
        ratio, _ = spectrum(instance.Y, instance.X, t)
        lower, upper = full_strength_ratio(K, mu, t)
        assert lower * (1 - 1e-7) <= ratio <= upper * (1 + 1e-7)
        bottoms.append(ratio / lower)
        tops.append(upper / ratio)
    tightness("Theorem 2 (b), lower", bottoms)
    tightness("Theorem 2 (b), upper", tops)


def test_the_window_closes_between_its_two_ends_which_grow_with_k(generator):
    for K in (8, 16, 40):
        for mu in (0.0, 0.1):
            instance = draw(K, 1.0, mu, 64, 64, generator)
            first, last = ends(K, mu, 2.0)
            assert spectrum(instance.Y, instance.X, first * 0.999)[0] >= 2
            assert spectrum(instance.Y, instance.X, last * 1.001)[0] <= 2
            closed = K / (1 - mu) * math.log(2 / (2 - (1 + mu) / (1 - mu)))
            assert last <= closed * (1 + TINY)
            assert first >= 0.4 * K


def test_at_convergence_all_singular_values_are_equal(generator):
    for K in (2, 8, 40):
        instance = draw(K, 1.0, 0.0, K + 4, K + 9, generator)
        S = torch.linalg.svdvals(minimum_norm(instance))[:K]
        torch.testing.assert_close(S, torch.ones_like(S))


def test_at_convergence_two_factors_have_the_same_weights(generator):
    for K in (3, 16):
        one = draw(K, 1.0, 0.0, 30, 30, generator)
        two = rotated(one, generator)
        for inst in (one, two):  # both satisfy the assumptions
            for basis in (
                torch.cat((inst.v[:, None], inst.Z), 1),
                torch.cat((inst.u[:, None], inst.own), 1),
            ):
                torch.testing.assert_close(basis.T @ basis, torch.eye(K + 1, dtype=torch.float64))
        assert sine(two.u, one.u) > 0.5
        torch.testing.assert_close(minimum_norm(one), minimum_norm(two))
        early = [flow(i.Y, i.X, 0.5) @ i.X.T for i in (one, two)]
        assert (early[0] - early[1]).norm() > 0.1  # early, they differ


def lora_deviation(instance, A, scaling, t):
    """Theorem 2 (d), measured: || dW(t) / (s^2 t) - M A0'A0 ||."""
    A_t, B_t = lora_flow(instance, A, scaling, [t])[0]
    return torch.linalg.matrix_norm(B_t @ A_t / (scaling * t) - instance.M @ A.T @ A, 2).item()


def test_theorem_2_d_bounds_how_far_a_lora_is_from_its_first_step(generator):
    ratios = []
    for _ in range(400):
        instance, _, _ = any_instance(generator)
        A = gaussian(pick(generator, 2, 8), len(instance.v), generator)
        scaling, t = 10 ** uniform(generator, -1, 1), 10 ** uniform(generator, -3, -0.5)
        if scaling * t > 1:
            continue
        bound = lora_error(instance, A, scaling, t)
        measured = lora_deviation(instance, A, scaling, t)
        assert measured <= bound * (1 + 1e-6) + TINY
        ratios.append(bound / measured)
    tightness("Theorem 2 (d)", ratios)


def test_theorem_2_d_a_lora_keeps_the_first_steps_direction_at_the_start(generator):
    said, angles = 0, []
    for _ in range(150):
        instance = draw(16, 1.0, 0.1, 40, 40, generator)
        A, t = gaussian(16, 40, generator), 10 ** uniform(generator, -3, -1)
        first, error = instance.M @ A.T @ A, lora_error(instance, A, 1.0, t)
        q = first.T @ instance.u
        rest = torch.linalg.matrix_norm(first - torch.outer(instance.u, q), 2).item()
        if error >= q.norm().item() - rest:
            continue
        said += 1
        A_t, B_t = lora_flow(instance, A, 1.0, [t])[0]
        U, S, _ = torch.linalg.svd(B_t @ A_t)
        angle = sine(U[:, 0], torch.linalg.svd(first)[0][:, 0])
        assert angle <= error / (q.norm().item() - rest - error) + TINY
        assert S[0] / S[1] >= (q.norm() - error) / (rest + error) * (1 - TINY)
        angles.append(error / (q.norm().item() - rest - error) / angle)
    assert said > 30
    tightness("Theorem 2 (d), sine", angles)


def test_the_rates_of_a_frozen_a_are_apart_by_about_the_rank(generator):
    failures, ratios, delta = 0, [], 0.6
    for _ in range(400):
        K, rank, d_in = pick(generator, 16, 40), pick(generator, 4, 16, 32), 64
        instance, A = draw(K, 1.0, 0.0, 41, d_in, generator), gaussian(rank, d_in, generator)
        h = torch.linalg.svdvals(A @ instance.X) ** 2
        zeta, g, _, _ = random_constants(rank, d_in, delta)
        bound = (K + 1) * g**2 / (math.sqrt(K) + math.sqrt(rank) + zeta) ** 2
        failures += (h[0] / h[1]).item() < bound
        ratios.append((h[0] / h[1]).item() / bound)
    assert failures <= 7 / 12 * delta * 400
    tightness("Frozen A, rates", ratios)


@pytest.mark.parametrize(("size", "scaling", "t"), [(1e-3, 1.0, 0.8), (30.0, 1.0, 1e-5)])
def test_theorem_2_d_is_tight_for_one_example(size, scaling, t, generator):
    # a small A0: the error is that A grows; a large one: it is that the answer is reached
    x, y = unit(5, generator), unit(6, generator)
    instance = Instance(
        x,
        torch.zeros(5, 1, dtype=torch.float64),
        y,
        torch.zeros(6, 1).double(),
        torch.ones(1).double(),
    )
    A = size * x[None]
    measured = lora_deviation(instance, A, scaling, t)
    assert measured == pytest.approx(lora_error(instance, A, scaling, t), rel=0.01)


# ---------------------------------------------------------------- Theorem 3


def tilted(u, angle_sine, generator):
    return math.sqrt(1 - angle_sine**2) * u + angle_sine * unit(len(u), generator, off=u)


def test_theorem_3_a_bounds_what_the_update_says_of_the_factor(generator):
    ratios = []
    for _ in range(2000):
        d_out, d_in, rank = (
            pick(generator, 3, 10, 40),
            pick(generator, 3, 20),
            pick(generator, 1, 2, 3),
        )
        u = unit(d_out, generator)
        found = tilted(u, uniform(generator, 0, 1), generator)
        A, B = normal(rank, d_in, generator=generator), normal(d_out, rank, generator=generator)
        project_(B, found[:, None])
        measured = (u @ B @ A).norm().item()
        bound = sine(found, u) * torch.linalg.matrix_norm(B @ A, 2).item()
        assert measured <= bound + TINY
        ratios.append(bound / measured)
    tightness("Theorem 3 (a)", ratios)


def test_theorem_3_a_is_an_equality_where_the_update_says_the_rest_of_u(generator):
    u = unit(9, generator)
    found = tilted(u, 0.3, generator)
    B = (u - found * (found @ u))[:, None]
    A = normal(1, 7, generator=generator)
    assert (u @ B @ A).norm().item() == pytest.approx(
        0.3 * torch.linalg.matrix_norm(B @ A, 2).item()
    )
    v = unit(7, generator)
    left = torch.outer(u, v)
    project_(left, found[:, None])
    assert torch.linalg.matrix_norm(left, 2).item() == pytest.approx(0.3)
    assert (u @ left @ v).item() == pytest.approx(0.3**2)


def test_theorem_3_b_preserves_exactly_what_the_module_said_along_the_found_direction(generator):
    torch.manual_seed(0)
    W, found = normal(12, 20, generator=generator), unit(12, generator)[:, None]
    A = gaussian(4, 20, generator).requires_grad_()
    B = torch.zeros(12, 4, dtype=torch.float64, requires_grad=True)
    X, Y = normal(20, 8, generator=generator), normal(12, 8, generator=generator)
    optimizer = torch.optim.AdamW([A, B], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        ((W + B @ A) @ X - Y).square().mean().backward()
        project_(B.grad, found)
        optimizer.step()
        project_(B.data, found)
    x = normal(20, 100, generator=generator)
    torch.testing.assert_close(found.T @ (W + B @ A) @ x, found.T @ W @ x)
    assert (B @ A).norm() > 1


def test_theorem_3_b_the_constrained_flow_is_the_projected_flow(generator):
    instance, found = draw(8, 1.0, 0.1, 12, 12, generator), unit(12, generator)[:, None]
    free = constrained = torch.zeros(12, 12, dtype=torch.float64)
    for _ in range(50):
        free = free + 0.1 * (instance.Y - free @ instance.X) @ instance.X.T
        step = 0.1 * (instance.Y - constrained @ instance.X) @ instance.X.T
        project_(step, found)
        constrained = constrained + step
    torch.testing.assert_close(constrained, free - found @ (found.T @ free))


def test_theorem_3_c_and_d_bound_what_the_task_loses(generator):
    answers, gradients = [], []
    for _ in range(1600):
        instance, _, mu = any_instance(generator)
        found = tilted(instance.u, uniform(generator, 0.01, 1), generator)
        K, angle, task = len(instance.m), sine(found, instance.u), instance.own @ instance.X.T
        lost = (instance.own.T @ found).square().sum().item()
        share = ((task.T @ found).norm() / task.norm()).item() ** 2
        assert lost <= lost_answers_bound(angle, mu) + TINY
        assert share <= lost_gradient_bound(angle, K, mu) + TINY
        answers.append(lost_answers_bound(angle, mu) / lost)
        gradients.append(lost_gradient_bound(angle, K, mu) / share)
    tightness("Theorem 3 (c)", answers)
    tightness("Theorem 3 (d)", gradients)


def test_theorem_3_c_and_d_are_equalities_at_the_mean_answer(generator):
    for K in (4, 24):
        instance = draw(K, 1.0, 0.0, 30, 30, generator)
        mean = instance.own.sum(1)
        found = math.sqrt(1 - 0.3**2) * instance.u + 0.3 * mean / mean.norm()
        task = instance.own @ instance.X.T
        share = ((task.T @ found).norm() / task.norm()).item() ** 2
        assert share == pytest.approx(lost_gradient_bound(0.3, K, 0.0))
        lost = (instance.own.T @ found).square().sum().item()
        assert lost == pytest.approx(lost_answers_bound(0.3, 0.0))


def test_theorem_3_c_is_an_equality_for_the_worst_overlap(generator):
    mu = 0.3  # a single own answer: w = (1 + mu) long squared, or mu along u
    u = unit(9, generator)
    n = unit(9, generator, off=u)
    longest, slanted = math.sqrt(1 + mu) * n, mu * u + math.sqrt(1 - mu**2) * n
    assert (longest @ n).item() ** 2 == pytest.approx(lost_answers_bound(1.0, mu))
    assert (slanted @ u).item() ** 2 == pytest.approx(lost_answers_bound(0.0, mu))


def test_theorem_3_e_the_constrained_tasks_least_loss(generator):
    for _ in range(200):
        instance, _, _ = any_instance(generator)
        found = unit(len(instance.u), generator)
        best = minimum_norm(instance)
        best = best - torch.outer(found, found @ best)
        loss = (best @ instance.X - instance.Y).square().sum()
        torch.testing.assert_close(loss, (found @ instance.Y).square().sum())
        other = best + 0.01 * normal(*best.shape, generator=generator)
        other -= torch.outer(found, found @ other)
        assert (other @ instance.X - instance.Y).square().sum() >= loss


# ---------------------------------------------------------------- each assumption, violated alone


def sines_and_bound(instance, generator, rank=16, mu=0.0, rho=1.0, draws=20):
    """The first step's sines, and Corollary 1's bound as if the assumptions held."""
    d_in = len(instance.v)
    bound = first_step_bound(parts_bound(len(instance.m), rho, mu), rank, d_in, 0.05)
    sines = []
    for _ in range(draws):
        A = gaussian(rank, d_in, generator)
        sines.append(sine(found_output(A, first_step(instance, A)), instance.u))
    return sines, bound


def good(generator):
    """An Instance (K 64, rho 1, mu 0, d 128) where every assumption holds."""
    return draw(64, 1.0, 0.0, 128, 128, generator)


def test_with_all_assumptions_the_bound_holds(generator):
    sines, bound = sines_and_bound(good(generator), generator)
    assert max(sines) < bound < 0.2


def test_without_a1_a_sign_step_breaks_the_bound(generator):
    instance = good(generator)
    _, bound = sines_and_bound(instance, generator, draws=0)
    for _ in range(20):  # AdamW's first step, up to its epsilon
        A = gaussian(16, 128, generator)
        assert sine(found_output(A, first_step(instance, A).sign()), instance.u) > 2 * bound


def test_without_a2_a_correlation_of_one_row_is_not_found(generator):
    instance = good(generator)
    one = (torch.arange(64) == 0).double()  # the bound believes in rho = 1
    instance = Instance(instance.v, instance.Z, instance.u, instance.own, one)
    sines, bound = sines_and_bound(instance, generator)
    assert min(sines) > 2 * bound


def test_without_a2_a_factor_in_both_senses_is_not_found(generator):
    instance = good(generator)
    signs = 1 - 2.0 * (torch.arange(64) % 2).double()  # mean 0
    instance = Instance(instance.v, instance.Z, instance.u, instance.own, signs)
    sines, bound = sines_and_bound(instance, generator)
    assert statistics.median(sines) > 2 * bound


def test_without_a3_answers_that_share_a_direction_hide_the_factor(generator):
    instance = good(generator)
    own = instance.own + unit(128, generator, off=instance.u)[:, None]
    sines, bound = sines_and_bound(
        Instance(instance.v, instance.Z, instance.u, own, instance.m), generator
    )
    assert min(sines) > 2 * bound


def test_without_a3_one_dominating_input_hides_the_factor(generator):
    instance = good(generator)
    Z = instance.Z.clone()
    Z[:, 0] *= 300
    sines, bound = sines_and_bound(
        Instance(instance.v, Z, instance.u, instance.own, instance.m), generator
    )
    assert min(sines) > 2 * bound


def test_without_a3_a_simple_task_of_few_parts_breaks_the_bound_of_many(generator):
    # 64 rows, but only 2 different ones: what counts is the parts, not the rows
    two = draw(2, 1.0, 0.0, 128, 128, generator)
    repeated = Instance(
        two.v, two.Z.repeat(1, 32), two.u, two.own.repeat(1, 32), torch.ones(64).double()
    )
    sines, bound = sines_and_bound(repeated, generator)
    assert min(sines) > 2 * bound


def test_without_a4_an_a_that_does_not_hear_the_factor_finds_nothing(generator):
    instance = good(generator)
    _, bound = sines_and_bound(instance, generator, draws=0)
    row = instance.M.T @ instance.u
    A = gaussian(16, 128, generator)
    project_(A.T, (row / row.norm())[:, None])
    assert sine(found_output(A, first_step(instance, A)), instance.u) > 0.99 > bound


def test_without_a5_a_late_look_finds_nothing(generator):
    instance = draw(32, 1.0, 0.1, 64, 64, generator)
    early, late = (spectrum(instance.Y, instance.X, t) for t in (32 / 4, 32 * 30))
    assert early[0] > 2 > 1.25 > late[0]
    assert sine(early[1], instance.u) < 0.2 < 0.9 < sine(late[1], instance.u)


# ---------------------------------------------------------------- necessity, and the null


def test_a_task_whose_answers_share_a_direction_has_the_weights_of_a_factor(generator):
    # world 1: a factor u beside answers w_k; world 2: no factor, its own answers are u + w_k
    one = draw(16, 1.0, 0.0, 32, 32, generator)
    own = one.u[:, None] + one.own
    two = Instance(one.v, one.Z, unit(32, generator), own, torch.zeros(16, dtype=torch.float64))
    A = gaussian(8, 32, generator)
    for first, second in zip(
        lora_flow(one, A, 1.0, [1.0, 9.0]), lora_flow(two, A, 1.0, [1.0, 9.0]), strict=True
    ):
        torch.testing.assert_close(first[0], second[0])
        torch.testing.assert_close(first[1], second[1])
    # taking u away costs world 2 this much of its answers for good
    lost = (one.u @ two.own).square().sum() / two.own.square().sum()
    assert lost.item() == pytest.approx(0.5)


def test_a_shared_answer_turns_the_found_direction_by_its_strength(generator):
    one = draw(64, 0.5, 0.0, 128, 128, generator)
    other = unit(128, generator, off=one.u)
    found = torch.linalg.svd(torch.outer(0.5 * one.u + 0.5 * other, one.v))[0][:, 0]
    assert sine(found, one.u) == pytest.approx(math.sqrt(0.5))


def unrelated(K, d, with_mean, generator):
    """M of K orthonormal unrelated parts; with_mean: the inputs share v beside them."""
    inputs, answers = (frame(d, K + 1, 0.0, generator) for _ in range(2))
    X = inputs[:, 1:] + (inputs[:, :1] if with_mean else 0)
    return answers[:, 1:] @ X.T / K


@pytest.mark.parametrize(("K", "rank", "d"), [(16, 16, 40), (8, 4, 30), (24, 6, 64)])
def test_the_null_is_the_distribution_of_unrelated_parts(K, rank, d, generator):
    draws = 1000
    for update in (True, False):
        expected = null_gaps(K, rank, d, draws, generator, update).sort().values
        gaps = []
        for _ in range(draws):
            A = gaussian(rank, d, generator)
            B = unrelated(K, d, False, generator) @ A.T
            S = torch.linalg.svdvals(B @ A if update else B)
            gaps.append((S[0] / S[1]).item())
        gaps = torch.tensor(gaps, dtype=torch.float64).sort().values
        below = torch.searchsorted(expected, gaps).double() / draws
        distance = (below - torch.arange(draws).double() / draws).abs().max().item()
        assert distance < 1.95 * math.sqrt(2 / draws)  # Kolmogorov and Smirnov at .001


def test_the_null_does_not_hold_where_inputs_have_a_common_mean(generator):
    gaps = []
    for _ in range(100):
        A = gaussian(16, 40, generator)
        S = torch.linalg.svdvals(unrelated(16, 40, True, generator) @ A.T @ A)
        gaps.append((S[0] / S[1]).item())
    assert statistics.median(gaps) > null_gaps(16, 16, 40, 1000, generator).quantile(0.99).item()


def test_the_rates_of_a_look_are_those_of_the_rule_on_whole_updates(generator):
    # orthonormal answers around the core; the rule itself, module by module
    draws, svds = 1000, {}
    for i in range(draws):
        B = frame(24, 2, 0.0, generator) @ normal(2, 16, generator=generator)
        U, S, _ = torch.linalg.svd(B, full_matrices=False)
        svds[i] = U, S
    passed = len(standing_out(svds)) / draws
    expected = look_rates(2, generator, batches=2)["gaussian_core"]
    assert abs(passed - expected) < 4 * math.sqrt(0.25 / draws) and expected > 0.1


def test_the_fewer_values_are_left_the_more_often_the_next_direction_joins(generator):
    rates = [later_rate(left, generator, draws=2000)["passed"] for left in (16, 12, 8, 4)]
    assert rates == sorted(rates) and rates[0] < 0.03 < rates[1]


def test_a_planted_factor_stands_out_more_the_more_rows_have_it(generator):
    found = [planted_spike(rho, generator, draws=20) for rho in (0.25, 0.5, 1.0)]
    medians = [row["median"] for row in found]
    assert medians == sorted(medians) and {row["passed"] for row in found} == {1.0}
