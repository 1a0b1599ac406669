"""The theorems of docs/theory.md, computed: random instances, each bound beside what is measured.

`python -m experiments.theory [--seed S] [--out DIR]` prints the tables and writes theory.json,
theory_bound.png and theory_window.png. Symbols are the document's; a function's docstring names the
statement that it computes. All in double precision, except thin_svd, which is the method's own.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from identify import null_quantile, spike, thin_svd
from real.settings import SEED
from support.files import whole_file, writable_folder, write_json
from support.options import option, parse
from support.program import run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: safe for the colour-blind
DELTA = 0.05


@dataclass(frozen=True)
class Instance:
    """K examples x_k = v + z_k -> y_k = m_k u + w_k that satisfy A2 and A3, as columns."""

    v: torch.Tensor  # (d_in,), unit: the factor's input direction
    Z: torch.Tensor  # (d_in, K): each example's own input z_k
    u: torch.Tensor  # (d_out,), unit: the factor's output direction
    own: torch.Tensor  # (d_out, K): each example's own answer w_k; Omega in the document
    m: torch.Tensor  # (K,), in [0, 1]: how far an answer has the factor

    @property
    def X(self):
        """The inputs (d_in, K)."""
        return self.v[:, None] + self.Z

    @property
    def Y(self):
        """The answers (d_out, K)."""
        return torch.outer(self.u, self.m) + self.own

    @property
    def M(self):
        """Minus the gradient at dW = 0, (d_out, d_in)."""
        return self.Y @ self.X.T / len(self.m)

    @property
    def loads(self):
        """How far each answer says u: Y'u, (K,)."""
        return self.Y.T @ self.u


def normal(*shape, generator):
    """Independent N(0, 1) in double precision."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def frame(size, count, mu, generator):
    """`count` vectors in R^size as columns, the first of length 1; ||Gram - I|| = mu exactly."""
    basis = torch.linalg.qr(normal(size, count, generator=generator))[0]
    deviation = normal(count, count, generator=generator)
    deviation = deviation + deviation.T
    deviation[0, 0] = 0
    deviation /= torch.linalg.matrix_norm(deviation, 2)
    values, vectors = torch.linalg.eigh(mu * deviation)
    return basis @ (vectors * (1 + values).sqrt()) @ vectors.T


def draw(K, rho, mu, d_out, d_in, generator):
    """A random Instance; round(rho K) of its examples, at least one, have the factor."""
    inputs, answers = frame(d_in, K + 1, mu, generator), frame(d_out, K + 1, mu, generator)
    m = (torch.arange(K) < max(round(rho * K), 1)).double()
    return Instance(inputs[:, 0], inputs[:, 1:], answers[:, 0], answers[:, 1:], m)


def gaussian(rank, d_in, generator):
    """A0 (rank, d_in) as A4 has it: independent N(0, 1/d_in)."""
    return normal(rank, d_in, generator=generator) / d_in**0.5


def first_step(instance, A):
    """B after one gradient step from B = 0, up to its positive factor: M A', (d_out, rank)."""
    return instance.Y @ (instance.X.T @ A.T) / len(instance.m)


def sine(found, direction):
    """The sine of the angle between the lines of two vectors."""
    found, direction = found.double() / found.double().norm(), direction / direction.norm()
    return (found - direction * (direction @ found)).norm().item()


# ---------------------------------------------------------------- Theorem 1: the first step


def sine_bound(eta, rest):
    """S(eta, rest) of Lemma 1: sin(theta) for tan(2 theta) = 2 eta / (1 - rest^2).

    1, which says nothing, where the rest is not smaller than the factor.
    """
    return math.sin(math.atan2(2 * eta, 1 - rest**2) / 2) if rest < 1 else 1.0


@cache
def chi_square(n, probability):
    """The quantile of chi-square with n degrees of freedom, by bisection; 0 for n = 0."""
    if n == 0:
        return 0.0
    low, high = 0.0, n + 200 + 60 * math.sqrt(n)
    half = torch.tensor(n / 2, dtype=torch.float64)
    for _ in range(100):
        middle = torch.tensor((low + high) / 2, dtype=torch.float64)
        if torch.special.gammainc(half, middle / 2) < probability:
            low = middle.item()
        else:
            high = middle.item()
    return low


def random_constants(rank, d_in, delta):
    """(zeta, g_-, lambda_1, lambda_2) of Theorem 1."""
    rest = delta / 12
    zeta = math.sqrt(2 * math.log(1 / rest))
    g = math.sqrt(chi_square(rank, delta / 2))
    b2 = chi_square(d_in, rest)
    c2 = chi_square(rank - 1, 1 - rest)
    e2 = chi_square(d_in - 2, 1 - rest)
    lambda_1 = math.sqrt((1 + c2 / b2) ** 2 + c2 * e2 / b2**2)
    lambda_2 = (math.sqrt(d_in - 1) + math.sqrt(rank - 1) + zeta) / math.sqrt(b2)
    return zeta, g, lambda_1, lambda_2


def rest_parts(instance):
    """(alpha, nu, phi): the rest R of M against the factor's row p; see Theorem 1."""
    K = len(instance.m)
    p = instance.X @ instance.loads / K
    size, unit = p.norm(), p / p.norm()
    answers = instance.own - torch.outer(instance.u, instance.u @ instance.own)
    along = answers @ (instance.X.T @ unit) / K
    inputs = instance.X - torch.outer(unit, unit @ instance.X)
    # the singular values of answers @ inputs.T / K, from the triangles of two QR decompositions
    core = torch.linalg.qr(answers).R @ torch.linalg.qr(inputs).R.T / K
    S = torch.linalg.svdvals(core)
    return (along.norm() / size).item(), (S[0] / size).item(), (S.norm() / size).item()


def parts_bound(K, rho, mu):
    """Corollary 1: upper bounds of (alpha, nu, phi) from K, rho and mu alone."""
    load = rho - mu / math.sqrt(K)
    if load <= 0:
        return math.inf, math.inf, math.inf
    omega = (math.sqrt(rho) + mu / math.sqrt(K)) / load
    beta = (1 + mu) / (math.sqrt((1 - mu) * K) * load)
    nu = beta * omega / math.sqrt(K + 1)
    return beta, nu, beta * math.sqrt((K - 2 + omega**2) / (K + 1))


def eta_kappa(parts, rank, d_in, delta):
    """(eta_delta, kappa_delta) of Theorem 1: the rest along q and across it, over the factor."""
    alpha, nu, phi = parts
    zeta, g, lambda_1, lambda_2 = random_constants(rank, d_in, delta)
    noise = lambda_1 / g
    eta = math.hypot(alpha, noise * phi) + zeta * noise * nu
    kappa = lambda_2 * (nu * (math.sqrt(rank - 1) + zeta) + phi) / g if rank > 1 else 0.0
    return eta, kappa


def first_step_bound(parts, rank, d_in, delta):
    """Theorem 1: with probability at least 1 - delta, the sine is at most this."""
    eta, kappa = eta_kappa(parts, rank, d_in, delta)
    return sine_bound(eta, math.hypot(eta, kappa))


def input_cosine_bound(rank, d_in, delta):
    """Theorem 1 (c): |cos| of v with any vector of A0's row space; probability >= 1 - delta."""
    log = math.log(1 / delta)
    return math.sqrt(min((rank + 2 * math.sqrt(rank * log) + 2 * log) / d_in, 1.0))


# ---------------------------------------------------------------- Theorem 2: the window


def kernel(inputs):
    """(eigenvalues, eigenvectors) of H = X'X / K in descending order; inputs (d, K)."""
    values, vectors = torch.linalg.eigh(inputs.T @ inputs / inputs.shape[1])
    return values.flip(0).clamp(min=0), vectors.flip(1)


def learned(h, t):
    """f_t(h) = (1 - exp(-t h)) / sqrt(h), 0 at h = 0."""
    return torch.where(h > 0, -torch.expm1(-t * h) / h.clamp(min=1e-300).sqrt(), 0.0)


def flow(Y, inputs, t):
    """Gradient flow on ||Y - Delta X||^2 / 2K from 0: the left factor of Delta(t) = (...) X'."""
    h, vectors = kernel(inputs)
    speed = torch.where(h > 0, -torch.expm1(-t * h) / h.clamp(min=1e-300), t)
    return (Y @ vectors * speed) @ vectors.T / len(h)


def window_bound(instance, inputs, t, mu):
    """Theorem 2 (a): (lower bound of sigma1/sigma2, upper bound of the sine) at time t."""
    h, vectors = kernel(inputs)
    f, loads = learned(h, t), vectors.T @ instance.loads
    row = (f * loads).norm().item()
    rest = math.sqrt(1 + mu) * f.max().item() / row
    eta = math.sqrt(1 + mu) * (f**2 * loads).norm().item() / row**2
    return 1 / rest, sine_bound(eta, rest)


def window_uniform(K, rho, mu, tau):
    """Corollary 2: the same from K, rho, mu alone, for all t up to tau K; (0, 1) says nothing."""
    load = rho - mu / math.sqrt(K)
    gap = (1 - mu) * K - 2 * mu
    if load <= 0 or gap <= 0:
        return 0.0, 1.0
    omega = (math.sqrt(rho) + mu / math.sqrt(K)) / load
    tilt = math.atan(2 * mu * math.sqrt(K + 1) / gap) / 2
    psi = tilt + math.acos(1 / omega)
    if psi >= math.pi / 2:
        return 0.0, 1.0
    others, first = -math.expm1(-(1 + mu) * tau), -math.expm1(-(1 - mu) * (K + 1) * tau)
    j = math.sqrt((1 + mu) * (K + 1) / (1 - mu)) * others / first
    along = math.sqrt(K) * load * omega * math.cos(psi)
    rest = math.sqrt(1 + mu) * max(1, j) / along
    eta = math.sqrt(1 + mu) * (1 + j**2 * math.tan(psi)) / along
    return 1 / rest, sine_bound(eta, rest)


def full_strength_ratio(K, mu, t):
    """Theorem 2 (b): (lower, upper) bound of sigma1/sigma2 at time t where rho = 1."""
    spread = (1 + mu) / (1 - mu)

    def ratio(fast, slow):
        return math.expm1(-fast * (K + 1) / K * t) / math.expm1(-slow * t / K)

    return ratio(1 - mu, 1 + mu) / spread, ratio(1 + mu, 1 - mu) * spread


def ends(K, mu, threshold):
    """The window's two ends at rho = 1: sigma1/sigma2 > threshold before, < threshold after."""

    def crossing(side):
        low, high = 1e-9, 1e9
        for _ in range(200):
            middle = math.sqrt(low * high)
            if full_strength_ratio(K, mu, middle)[side] >= threshold:
                low = middle
            else:
                high = middle
        return low

    return crossing(0), crossing(1)


def lora_flow(instance, A, scaling, times):
    """[(A, B)] at `times`: gradient flow of both from (A, 0), by Runge and Kutta's fourth order.

    B stays in the span of Y and A - A0 in that of X: B = Y b and A = A0 + c X'.
    """
    X, Y, K = instance.X, instance.Y, len(instance.m)
    inputs, answers, start, now, found = X.T @ X, Y.T @ Y, A @ X, 0.0, []
    state = torch.zeros(2, K, len(A), dtype=torch.float64)  # b and c'

    def slope(state):
        b, c = state
        heard = start.T + inputs @ c  # X'A'
        left = scaling / K * (torch.eye(K, dtype=torch.float64) - scaling * heard @ b.T)
        return torch.stack((left.T @ heard, left @ (answers @ b)))

    for time in times:
        while now < time:
            b, c = state
            size = torch.linalg.matrix_norm(start.T + inputs @ c, 2) ** 2
            size += torch.linalg.matrix_norm(inputs, 2) * torch.linalg.matrix_norm(Y @ b, 2) ** 2
            dt = min(time - now, 0.5 / (scaling**2 * size.item() / K + scaling))
            k1 = slope(state)
            k2 = slope(state + dt / 2 * k1)
            k3 = slope(state + dt / 2 * k2)
            k4 = slope(state + dt * k3)
            state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            now += dt
        found.append((A + state[1].T @ X.T, Y @ state[0]))
    return found


def lora_error(instance, A, scaling, t):
    """Theorem 2 (d): bounds || dW(t) / (s^2 t) - M A0'A0 || for a LoRA whose A is trained too."""
    K, X = len(instance.m), instance.X
    a = torch.linalg.matrix_norm(A, 2).item()
    top, pull = (
        torch.linalg.matrix_norm(X, 2).item(),
        torch.linalg.matrix_norm(instance.M, 2).item(),
    )
    xi = scaling * instance.Y.norm().item() * top / K * t
    grown = top**2 / K * scaling * a**3 * (math.cosh(xi) ** 3 - 1) / 3
    drift = pull * a * (math.sinh(xi) - xi)
    return a * math.cosh(xi) / xi * (grown + drift) + pull * a**2 * (math.cosh(xi) - 1)


# ---------------------------------------------------------------- Theorem 3: removal, preservation


def lost_answers_bound(angle_sine, mu):
    """Theorem 3 (c): bounds the squared part of all own answers along the found direction."""
    cosine = math.sqrt(1 - angle_sine**2)
    return (mu * cosine + math.sqrt(1 + mu) * angle_sine) ** 2


def lost_gradient_bound(angle_sine, K, mu):
    """Theorem 3 (d): bounds the share of the task's squared gradient that is projected away."""
    return (1 + mu) * (K + 1) / (2 * K * (1 - mu) ** 2) * lost_answers_bound(angle_sine, mu)


# ---------------------------------------------------------------- the statistic under the null


def null_gaps(K, rank, d_in, draws, generator, update=True):
    """sigma1/sigma2 of dW (or of B alone), first step, K orthonormal, unrelated parts."""
    gaps = []
    for _ in range(draws):
        inside, outside = (
            normal(rank, K, generator=generator),
            normal(rank, d_in - K, generator=generator),
        )
        core = inside.T
        if update:  # dW = Omega (inside)' A0, and A0 A0' = inside inside' + outside outside'
            core = core @ torch.linalg.cholesky(inside @ inside.T + outside @ outside.T)
        S = torch.linalg.svdvals(core)
        gaps.append((S[0] / S[1]).item())
    return torch.tensor(gaps, dtype=torch.float64)


# ---------------------------------------------------------------- the experiments


def rotated(instance, generator):
    """The counterexample (rho = 1, mu = 0): another factor, the same minimum-norm solution.

    Inputs turn by a random rotation of the span of X, answers by the one that goes with it.
    """
    K = len(instance.m)
    inputs = torch.linalg.qr(instance.X)[0]
    turn = torch.linalg.qr(normal(K, K, generator=generator))[0]
    answers = instance.Y @ torch.linalg.solve(instance.X.T @ instance.X, instance.X.T @ inputs)

    def move(basis, vectors):
        return vectors + basis @ ((turn - torch.eye(K, dtype=torch.float64)) @ (basis.T @ vectors))

    v, Z = move(inputs, instance.v[:, None])[:, 0], move(inputs, instance.Z)
    u, own = move(answers, instance.u[:, None])[:, 0], move(answers, instance.own)
    return Instance(v, Z, u, own, instance.m)


def minimum_norm(instance):
    """Delta at convergence of the flow: Y X^+, (d_out, d_in)."""
    return instance.Y @ torch.linalg.solve(instance.X.T @ instance.X, instance.X.T)


def summary(values):
    """Median and 95 % quantile."""
    values = torch.tensor(values, dtype=torch.float64)
    return {"median": values.median().item(), "q95": values.quantile(0.95).item()}


def cell(K, rho, mu, rank, generator, d=256, draws=200):
    """Measured sines of the first step against Theorem 1 and Corollary 1, over random instances."""
    measured, bounds, signs, peft, failures = [], [], [], [], 0
    for _ in range(draws):
        instance = draw(K, rho, mu, d, d, generator)
        A = gaussian(rank, d, generator)
        B = first_step(instance, A)
        measured.append(sine(thin_svd(A, B)[0][:, 0], instance.u))
        signs.append(sine(thin_svd(A, B.sign())[0][:, 0], instance.u))
        A = (torch.rand(rank, d, generator=generator, dtype=torch.float64) * 2 - 1) / d**0.5
        peft.append(sine(thin_svd(A, first_step(instance, A))[0][:, 0], instance.u))
        bounds.append(first_step_bound(rest_parts(instance), rank, d, DELTA))
        failures += measured[-1] > bounds[-1]
    corollary = first_step_bound(parts_bound(K, instance.m.mean().item(), mu), rank, d, DELTA)
    found = {
        "K": K,
        "rho": rho,
        "mu": mu,
        "rank": rank,
        "d": d,
        "draws": draws,
        "failures": failures,
    }
    found |= {
        "measured": summary(measured),
        "sign_step": summary(signs),
        "uniform_A": summary(peft),
    }
    return found | {"theorem": summary(bounds)["median"], "corollary": corollary}


def window(K, generator, mu=0.1, d=256, rank=16):
    """Ratio and sine over time at rho = 1: the full matrix, and a LoRA whose A is trained.

    The LoRA's clock is the full matrix's: times its first rate along the factor.
    """
    instance, A = draw(K, 1.0, mu, d, d, generator), gaussian(rank, d, generator)
    times = [10 ** (e / 8) for e in range(-8, 1 + math.ceil(8 * math.log10(10 * K)))]
    curve = {
        "K": K,
        "mu": mu,
        "times": times,
        "ratio": [],
        "sine": [],
        "bound": [],
        "guaranteed": [],
    }
    for t in times:
        U, S, _ = thin_svd(instance.X.T, flow(instance.Y, instance.X, t))
        curve["ratio"].append((S[0] / S[1]).item())
        curve["sine"].append(sine(U[:, 0], instance.u))
        ratio, bound = window_bound(instance, instance.X, t, mu)
        curve["bound"].append(bound)
        curve["guaranteed"].append(max(ratio, full_strength_ratio(K, mu, t)[0]))
    scaling = 2.0
    rate = scaling**2 * (A @ instance.X.mean(1)).norm().item() ** 2
    curve["lora_ratio"], curve["lora_sine"] = [], []
    early = [t / rate for t in times if t <= 40]  # long enough to see it close
    for A_t, B_t in lora_flow(instance, A, scaling, early):
        U, S, _ = thin_svd(A_t, B_t)
        curve["lora_ratio"].append((S[0] / S[1]).item())
        curve["lora_sine"].append(sine(U[:, 0], instance.u))
    return curve | {"ends": ends(K, mu, 2.0)}


def counterexample(K, generator, d=256):
    """Two instances with different factors and one solution; its singular values."""
    one = draw(K, 1.0, 0.0, d, d, generator)
    two = rotated(one, generator)
    first, second = minimum_norm(one), minimum_norm(two)
    S = torch.linalg.svdvals(first)
    return {
        "K": K,
        "sigma_1": S[0].item(),
        "sigma_K": S[K - 1].item(),
        "difference": (first - second).norm().item(),
        "cosine_of_factors": (one.u @ two.u).abs().item(),
    }


def removal(K, mu, generator, d=256, rank=16):
    """Theorem 3 with the direction found at the first step: measured, bound."""
    instance, A = draw(K, 1.0, mu, d, d, generator), gaussian(rank, d, generator)
    found = thin_svd(A, first_step(instance, A))[0][:, 0].double()
    found = found / found.norm()
    naive = flow(instance.Y, instance.X, float(K)) @ instance.X.T
    kept = naive - torch.outer(found, found @ naive)
    task = instance.own @ instance.X.T / K
    angle = sine(found, instance.u)
    return {
        "K": K,
        "mu": mu,
        "sine": angle,
        "says_naive": (instance.u @ naive).norm().item(),
        "says": (instance.u @ kept).norm().item(),
        "says_bound": angle * torch.linalg.matrix_norm(kept, 2).item(),
        "reliance_naive": (instance.u @ naive @ instance.v).abs().item(),
        "reliance": (instance.u @ kept @ instance.v).abs().item(),
        "lost_gradient": ((found @ task).norm() / task.norm()).item() ** 2,
        "lost_gradient_bound": lost_gradient_bound(angle, K, mu),
        "lost_answers": (found @ instance.own).square().mean().item(),
        "lost_answers_bound": lost_answers_bound(angle, mu) / K,
    }


def null(K, rank, d, generator, draws=2000):
    """Quantiles of sigma1/sigma2 where nothing is shared, for dW and for B alone."""
    levels = torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)
    found = {"K": K, "rank": rank, "d": d}
    for name, update in (("dW", True), ("B", False)):
        found[name] = null_gaps(K, rank, d, draws, generator, update).quantile(levels).tolist()
    return found


def look_rates(K, generator, rank=16, d=128, batches=10, batch=2000):
    """The share of looks that pass the rule of grasp_online though nothing is shared.

    gaussian_core: B of K orthonormal parts seen through a Gaussian A, Proposition 2 (iii).
    unit_parts: K random unit answers and inputs, which overlap, seen through PEFT's uniform A.
    """
    cut = null_quantile(rank)
    passed = {"gaussian_core": 0, "unit_parts": 0}
    for _ in range(batches):
        core = normal(batch, K, rank, generator=generator)
        own, inputs = (normal(batch, d, K, generator=generator) for _ in range(2))
        own, inputs = own / own.norm(dim=1, keepdim=True), inputs / inputs.norm(dim=1, keepdim=True)
        A = torch.rand(batch, rank, d, generator=generator, dtype=torch.float64) * 2 - 1
        for name, B in (("gaussian_core", core), ("unit_parts", own @ (A @ inputs).mT)):
            passed[name] += (spike(torch.linalg.svdvals(B)) > cut).sum().item()
    return {"K": K, **{name: count / (batches * batch) for name, count in passed.items()}}


def later_rate(left, generator, rank=16, draws=20_000):
    """The share that passes the same cut once rank - left directions have joined (mere noise)."""
    S = torch.linalg.svdvals(normal(draws, left, left, generator=generator))
    return {"left": left, "passed": (spike(S) > null_quantile(rank)).double().mean().item()}


def planted_spike(rho, generator, K=16, rank=16, d=128, draws=200):
    """The median of the rule's statistic T where a factor is planted, and the share that passes."""
    found = []
    for _ in range(draws):
        instance, A = draw(K, rho, 0.0, d, d, generator), gaussian(rank, d, generator)
        found.append(spike(torch.linalg.svdvals(instance.M @ A.T)))
    found = torch.stack(found)
    passed = (found > null_quantile(rank)).double().mean().item()
    return {"rho": rho, "median": found.median().item(), "passed": passed}


def everything(seed):
    """All tables, as one dictionary."""
    generator = torch.Generator().manual_seed(seed)
    over_K = [
        cell(K, rho, 0.1, 16, generator)
        for rho in (1.0, 0.5, 0.25)
        for K in (4, 8, 16, 32, 64, 128)
    ]
    over_rank = [
        cell(K, 1.0, 0.1, r, generator) for K in (16, 64) for r in (1, 2, 4, 8, 16, 32, 64)
    ]
    over_mu = [
        cell(16, 1.0, mu, 16, generator, d) for d in (128, 256) for mu in (0.0, 0.1, 0.2, 0.3)
    ]
    return {
        "seed": seed,
        "delta": DELTA,
        "torch": torch.__version__,
        "over_K": over_K,
        "over_rank": over_rank,
        "over_mu": over_mu,
        "window": [window(K, generator) for K in (8, 32, 128)],
        "counterexample": [counterexample(K, generator) for K in (4, 16, 64)],
        "removal": [removal(K, mu, generator) for K in (16, 64) for mu in (0.0, 0.1)],
        "null": [null(K, 16, d, generator) for d in (128, 256) for K in (16, 64)],
        "looks": [look_rates(K, generator) for K in (2, 4, 8, 16, 32, 64)],
        "later": [later_rate(left, generator) for left in (15, 12, 8, 4)],
        "planted": [planted_spike(rho, generator) for rho in (0.25, 0.5, 1.0)],
    }


def print_cells(title, cells):
    """A table of first-step cells."""
    print(f"\n{title}: the sine of the found output direction, {cells[0]['draws']} draws a row")
    print(
        "   d    K   rho   mu   r |  median     95% | theorem  corollary  failures |"
        " uniform A  sign step"
    )
    for c in cells:
        print(
            f"{c['d']:4} {c['K']:4} {c['rho']:5} {c['mu']:4} {c['rank']:3} |"
            f" {c['measured']['median']:7.3f} {c['measured']['q95']:7.3f} |"
            f" {c['theorem']:7.3f}  {c['corollary']:9.3f}  {c['failures']:8} |"
            f" {c['uniform_A']['median']:9.3f}  {c['sign_step']['median']:9.3f}"
        )


def print_rows(title, rows):
    """A table of dictionaries with the same keys."""
    print(f"\n{title}\n" + "  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value:{max(len(name), 1)}.4g}" for name, value in row.items()))


def print_all(found):
    """Every table."""
    print_cells("Theorem 1 over K and rho", found["over_K"])
    print_cells("Theorem 1 over r", found["over_rank"])
    print_cells("Theorem 1 over mu", found["over_mu"])
    print("\nTheorem 2, rho = 1: sigma1/sigma2 > 2 up to the first end, < 2 from the second")
    for curve in found["window"]:
        above = [t for t, ratio in zip(curve["times"], curve["ratio"], strict=True) if ratio > 2]
        first, second = curve["ends"]
        print(
            f"K {curve['K']:3}  mu {curve['mu']}  {first:7.2f} <= {above[-1]:7.2f} <= {second:7.2f}"
        )
    print_rows("Theorem 2, the counterexample", found["counterexample"])
    print_rows("Theorem 3, under the found direction, at time K", found["removal"])
    print("\nThe null, sigma1/sigma2: median, 95 %, 99 %")
    for row in found["null"]:
        quantiles = "  ".join(
            f"{name} " + " ".join(f"{q:.2f}" for q in row[name]) for name in ("dW", "B")
        )
        print(f"d {row['d']}  K {row['K']:3}  r {row['rank']}  {quantiles}")
    print_rows("A look where nothing is shared: the share that passes, r 16", found["looks"])
    print_rows("... the next direction, with so many values left", found["later"])
    print_rows("A look where a factor is planted, K 16: its T", found["planted"])


def draw_bound(found, path):
    """Figure 1: measured sine and the bound of Theorem 1, over K and over r."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 6.4), sharey=True)
    panels = ((left, "over_K", "K", "rho", "ρ"), (right, "over_rank", "rank", "K", "K"))
    for axes, table, along, group, label in panels:
        for colour, value in zip(
            COLOURS, dict.fromkeys(c[group] for c in found[table]), strict=False
        ):
            cells = [c for c in found[table] if c[group] == value]
            x = [c[along] for c in cells]
            bounds = [c["theorem"] if c["theorem"] < 1 else math.nan for c in cells]
            axes.plot(
                x,
                [c["measured"]["q95"] for c in cells],
                "o-",
                color=colour,
                lw=2,
                label=f"{label} = {value:g}",
            )
            axes.plot(x, bounds, "s--", color=colour, lw=2)
        axes.plot([], [], "o-", color="grey", lw=2, label="measured, 95 % of draws below")
        axes.plot(
            [], [], "s--", color="grey", lw=2, label="Theorem 1, δ = .05 (none: says nothing)"
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, x)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=12, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    left.set_xlabel("K, parts of the task", fontsize=14)
    left.set_title("rank 16", fontsize=14)
    right.set_xlabel("rank of the LoRA", fontsize=14)
    right.set_title("ρ = 1", fontsize=14)
    left.set_ylabel("sine of found and true output direction", fontsize=14)
    save(figure, path)


def draw_window(found, path):
    """Figure 2: sigma1/sigma2 and the sine over time, with the window's two ends."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 6.6))
    for colour, curve in zip(COLOURS, found["window"], strict=False):
        t = curve["times"]
        left.plot(t, curve["ratio"], color=colour, lw=2.5, label=f"K = {curve['K']}")
        left.plot(t[: len(curve["lora_ratio"])], curve["lora_ratio"], ":", color=colour, lw=2.5)
        left.plot(curve["ends"], [2, 2], "|-", color=colour, ms=22, mew=3, lw=5, alpha=0.6)
        right.plot(t, curve["sine"], color=colour, lw=2.5, label=f"K = {curve['K']}")
        right.plot(t[: len(curve["lora_sine"])], curve["lora_sine"], ":", color=colour, lw=2.5)
        bound = [b if b < 1 else math.nan for b in curve["bound"]]
        right.plot(t, bound, "--", color=colour, lw=2)
    left.plot(
        [],
        [],
        "|-",
        color="grey",
        ms=14,
        mew=3,
        lw=5,
        alpha=0.6,
        label="Theorem 2: the end lies here",
    )
    right.plot([], [], "--", color="grey", lw=2, label="Theorem 2, upper bound")
    for axes in (left, right):
        axes.plot([], [], color="grey", lw=2.5, label="full matrix")
        axes.plot([], [], ":", color="grey", lw=2.5, label="LoRA, rank 16 (measured only)")
        axes.set_xscale("log")
        axes.set_xlabel("time (1: the factor is learned to 1 − 1/e)", fontsize=14)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=12, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    left.axhline(2, color="black", lw=1)
    left.set_yscale("log")
    left.set_ylabel("σ₁ / σ₂ of the update", fontsize=14)
    right.set_ylabel("sine of found and true output direction", fontsize=14)
    right.set_ylim(0, 1.02)
    save(figure, path)


def save(figure, path):
    """Write a figure with labels that can be read from the last row."""
    for axes in figure.axes:
        axes.tick_params(labelsize=12)
    figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


@dataclass(frozen=True)
class Arguments:
    """The theorems of docs/theory.md on random instances."""

    seed: int = option(0, "of all random draws", **SEED)
    out: str = option("out", "folder of theory.json and the two figures")


def main():
    """Compute, print, write."""
    args = parse(Arguments)
    torch.set_num_threads(1)
    out = writable_folder(args.out, ["theory.json", "theory_bound.png", "theory_window.png"])
    found = everything(args.seed)
    print_all(found)
    write_json(out / "theory.json", found)
    draw_bound(found, out / "theory_bound.png")
    draw_window(found, out / "theory_window.png")
    print(f"\nwrote {out}/theory.json, theory_bound.png, theory_window.png")


if __name__ == "__main__":
    run(main)
