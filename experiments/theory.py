"""The theorems of docs/theory.md on random instances, in its symbols: bounds, and measurements."""

import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean

import torch
from torch.nn.functional import normalize

from experiments.figures import COLOURS, panels, save
from identify import null_quantile, spike, thin_svd
from support.files import write_json
from support.options import option, parse, run


@dataclass
class Instance:
    """K examples x_k = v + z_k -> y_k = m_k u + w_k, as columns; those of `draw` satisfy A2, A3."""

    v: torch.Tensor  # (d_in,), unit: the factor's input direction
    Z: torch.Tensor  # (d_in, K): each example's own input z_k
    u: torch.Tensor  # (d_out,), unit: the factor's output direction
    own: torch.Tensor  # (d_out, K): each example's own answer w_k; Omega in the document
    m: torch.Tensor  # (K,), in [0, 1]: how far an answer has the factor

    def __post_init__(self):
        self.X = self.v[:, None] + self.Z  # inputs (d_in, K)
        self.Y = torch.outer(self.u, self.m) + self.own  # answers (d_out, K)
        self.M = self.Y @ self.X.T / len(self.m)  # minus the gradient at dW = 0, (d_out, d_in)


normal = partial(torch.randn, dtype=torch.float64)  # normal(*shape): independent N(0, 1)


def frame(size, count, mu):
    """`count` vectors in R^size as columns, the first of length 1; ||Gram - I|| = mu exactly."""
    basis, deviation = torch.linalg.qr(normal(size, count))[0], normal(count, count)
    deviation = deviation + deviation.T
    deviation[0, 0] = 0
    deviation /= torch.linalg.matrix_norm(deviation, 2)
    values, vectors = torch.linalg.eigh(mu * deviation)
    return basis @ (vectors * (1 + values).sqrt()) @ vectors.T


def draw(K, rho, mu, d_out, d_in):
    """A random Instance; round(rho K) of its examples, at least one, have the factor."""
    inputs, answers = frame(d_in, K + 1, mu), frame(d_out, K + 1, mu)
    m = (torch.arange(K) < max(round(rho * K), 1)).double()
    return Instance(inputs[:, 0], inputs[:, 1:], answers[:, 0], answers[:, 1:], m)


def sine(found, direction):
    """The sine of the angle between the lines of two vectors."""
    found, direction = found.double() / found.double().norm(), direction / direction.norm()
    return (found - direction * (direction @ found)).norm().item()


def sine_bound(eta, rest):
    """S(eta, rest) of Lemma 1: sin(theta), tan(2 theta) = 2 eta / (1 - rest^2); 1 says nothing."""
    return math.sin(math.atan2(2 * eta, 1 - rest**2) / 2) if rest < 1 else 1.0


def bisect(holds, high):
    """The largest x in (0, high) for which holds(x), which turns false once; by bisection."""
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@cache
def chi_square(n, probability):
    """The quantile of chi-square with n degrees of freedom; 0 for n = 0."""
    half, below = torch.tensor([n / 2, probability], dtype=torch.float64)
    return bisect(lambda x: torch.special.gammainc(half, half.new_tensor(x / 2)) < below, 1e4)


def random_constants(rank, d_in, delta):
    """(zeta, g_-, lambda_1, lambda_2) of Theorem 1."""
    zeta, g = math.sqrt(2 * math.log(12 / delta)), math.sqrt(chi_square(rank, delta / 2))
    b2 = chi_square(d_in, delta / 12)
    c2, e2 = (chi_square(n, 1 - delta / 12) for n in (rank - 1, d_in - 2))
    lambda_1 = math.sqrt((1 + c2 / b2) ** 2 + c2 * e2 / b2**2)
    lambda_2 = (math.sqrt(d_in - 1) + math.sqrt(rank - 1) + zeta) / math.sqrt(b2)
    return zeta, g, lambda_1, lambda_2


def rest_parts(instance):
    """(alpha, nu, phi): the rest R of M against the factor's row p; see Theorem 1."""
    K, u, p = len(instance.m), instance.u, instance.M.T @ instance.u
    unit = p / p.norm()
    answers = instance.own - torch.outer(u, u @ instance.own)
    inputs = instance.X - torch.outer(unit, unit @ instance.X)
    along = answers @ (instance.X.T @ unit)
    # the singular values of answers @ inputs.T, from the triangles of two QR decompositions
    S = torch.linalg.svdvals(torch.linalg.qr(answers).R @ torch.linalg.qr(inputs).R.T)
    return tuple((part / K / p.norm()).item() for part in (along.norm(), S[0], S.norm()))


def parts_bound(K, rho, mu):
    """Corollary 1: bounds of (alpha, nu, phi) by K, rho and mu alone, where rho sqrt(K) > mu."""
    load = rho - mu / math.sqrt(K)
    omega = (math.sqrt(rho) + mu / math.sqrt(K)) / load
    beta = (1 + mu) / (math.sqrt((1 - mu) * K) * load)
    nu = beta * omega / math.sqrt(K + 1)
    return beta, nu, beta * math.sqrt((K - 2 + omega**2) / (K + 1))


def first_step_bound(parts, rank, d_in, delta=0.05):
    """Theorem 1: with probability at least 1 - delta, the sine is at most this."""
    alpha, nu, phi = parts
    zeta, g, lambda_1, lambda_2 = random_constants(rank, d_in, delta)
    eta = math.hypot(alpha, lambda_1 * phi / g) + zeta * lambda_1 * nu / g
    kappa = lambda_2 * (nu * (math.sqrt(rank - 1) + zeta) + phi) / g if rank > 1 else 0.0
    return sine_bound(eta, math.hypot(eta, kappa))


def flow(Y, inputs, t):
    """Gradient flow on ||Y - Delta X||² / 2K from 0: the left factor of Delta(t) = (...) Xᵀ."""
    h, vectors = torch.linalg.eigh(inputs.T @ inputs / inputs.shape[1])  # H of the document
    h = h.clamp(min=1e-300)
    return (Y @ vectors * (-torch.expm1(-t * h) / h)) @ vectors.T / len(h)


def window_bound(instance, inputs, t, mu):
    """Theorem 2 (a): (lower bound of sigma1/sigma2, upper bound of the sine) at time t."""
    h, vectors = torch.linalg.eigh(inputs.T @ inputs / inputs.shape[1])
    h, loads = h.clamp(min=1e-300), vectors.T @ (instance.Y.T @ instance.u)
    f = -torch.expm1(-t * h) / h.sqrt()
    row = (f * loads).norm().item()
    rest = math.sqrt(1 + mu) * f.max().item() / row
    eta = math.sqrt(1 + mu) * (f**2 * loads).norm().item() / row**2
    return 1 / rest, sine_bound(eta, rest)


def full_strength_ratio(K, mu, t):
    """Theorem 2 (b): (lower, upper) bound of sigma1/sigma2 at time t where rho = 1."""
    spread, slow, fast = (1 + mu) / (1 - mu), (1 - mu) / K * t, (1 + mu) / K * t
    lower = math.expm1(-(K + 1) * slow) / math.expm1(-fast) / spread
    return lower, math.expm1(-(K + 1) * fast) / math.expm1(-slow) * spread


def lora_flow(instance, A, scaling, times):
    """[(A, B)] at `times`: gradient flow of both from (A, 0), by Runge and Kutta's fourth order."""
    X, Y, K, d_in = instance.X, instance.Y, len(instance.m), len(instance.v)
    state = torch.cat((A.T, torch.zeros(len(Y), len(A), dtype=torch.float64)))  # Aᵀ over B
    now, found = 0.0, []

    def slope(state):
        heard, B = state[:d_in].T @ X, state[d_in:]
        left = scaling / K * (Y - scaling * B @ heard)  # (d_out, K): what is not learned yet
        return torch.cat((X @ (left.T @ B), left @ heard.T))

    for time in times:
        while now < time:
            parts = state[:d_in].T @ X, X, state[d_in:]
            top = [torch.linalg.matrix_norm(part, 2).item() ** 2 for part in parts]
            dt = min(time - now, 0.5 / (scaling**2 * (top[0] + top[1] * top[2]) / K + scaling))
            k1 = slope(state)
            k2 = slope(state + dt / 2 * k1)
            k3 = slope(state + dt / 2 * k2)
            state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + slope(state + dt * k3))
            now += dt
        found.append((state[:d_in].T, state[d_in:]))
    return found


def lost_gradient_bound(angle_sine, K, mu):
    """Theorem 3 (d): bounds the share of the task's squared gradient that is projected away."""
    answers = (mu * math.sqrt(1 - angle_sine**2) + math.sqrt(1 + mu) * angle_sine) ** 2  # (c)
    return (1 + mu) * (K + 1) / (2 * K * (1 - mu) ** 2) * answers


def cell(K, rho, mu, rank, d=256, draws=200):
    """The sine of the first step's output direction over random instances, and its bounds."""
    sines = []
    for _ in range(draws):
        instance, A = draw(K, rho, mu, d, d), normal(rank, d) / d**0.5
        uniform = (torch.rand(rank, d, dtype=torch.float64) * 2 - 1) / d**0.5  # PEFT's A0
        B = instance.M @ A.T
        steps = (A, B), (A, B.sign()), (uniform, instance.M @ uniform.T)
        found = [sine(thin_svd(*step)[0][:, 0], instance.u) for step in steps]
        sines.append([*found, first_step_bound(rest_parts(instance), rank, d)])
    sines = torch.tensor(sines, dtype=torch.float64)
    names = "median", "sign_step", "uniform_A", "theorem"
    row = {"d": d, "K": K, "rho": rho, "mu": mu, "rank": rank}
    row |= zip(names, sines.median(0).values.tolist(), strict=True)
    row["q95"] = sines[:, 0].quantile(0.95).item()
    return {**row, "corollary": first_step_bound(parts_bound(K, rho, mu), rank, d)}


def window(K, mu=0.1, d=256, rank=16, scaling=2.0):
    """Ratio and sine over time at rho = 1: the full matrix, and a LoRA whose A is trained."""
    instance, A = draw(K, 1.0, mu, d, d), normal(rank, d) / d**0.5
    times = [10 ** (e / 8) for e in range(-8, 1 + math.ceil(8 * math.log10(10 * K)))]
    # the LoRA's clock is the full matrix's: times its first rate along the factor
    rate = scaling**2 * (A @ instance.X.mean(1)).norm().item() ** 2
    early = [t / rate for t in times if t <= 40]  # long enough to see it close
    full = [(instance.X.T, flow(instance.Y, instance.X, t)) for t in times]
    found = {"K": K, "mu": mu, "times": times}
    for kind, updates in (("", full), ("lora_", lora_flow(instance, A, scaling, early))):
        svds = [thin_svd(*update) for update in updates]
        found[kind + "ratio"] = [(S[0] / S[1]).item() for _, S, _ in svds]
        found[kind + "sine"] = [sine(U[:, 0], instance.u) for U, _, _ in svds]
    found["bound"] = [window_bound(instance, instance.X, t, mu)[1] for t in times]
    for i, end in enumerate(("first_end", "second_end")):
        found[end] = bisect(lambda t, i=i: full_strength_ratio(K, mu, t)[i] >= 2, 1e6)
    return found


def removal(K, mu, d=256, rank=16):
    """Theorem 3: u is taken out as the first step finds it, of the full matrix at time K."""
    instance, A = draw(K, 1.0, mu, d, d), normal(rank, d) / d**0.5
    hat = thin_svd(A, instance.M @ A.T)[0][:, 0].double()
    hat, X = hat / hat.norm(), instance.X
    naive, task = flow(instance.Y, X, K) @ X.T, instance.own @ X.T
    kept = naive - torch.outer(hat, hat @ naive)
    found = {"K": K, "mu": mu, "sine": sine(hat, instance.u)}
    for name, update in (("naive", naive), ("kept", kept)):
        found[f"{name}_says"] = (instance.u @ update).norm().item()
        found[f"{name}_reliance"] = (instance.u @ update @ instance.v).abs().item()
    found["says_bound"] = found["sine"] * torch.linalg.matrix_norm(kept, 2).item()
    found["lost_gradient"] = ((hat @ task).norm() / task.norm()).item() ** 2
    return {**found, "lost_gradient_bound": lost_gradient_bound(found["sine"], K, mu)}


def null(K, d, rank=16, draws=2000):
    """99 % quantiles of the first step's sigma1/sigma2, of dW and of B, where nothing is shared."""
    A = normal(draws, rank, d)  # in a basis whose first K vectors are the inputs
    B = A[:, :, :K].mT  # in the basis of the answers, up to a factor
    found = {"d": d, "K": K, "rank": rank}
    for name, update in (("dW", B @ torch.linalg.cholesky(A @ A.mT)), ("B", B)):
        S = torch.linalg.svdvals(update)
        found[name] = (S[:, 0] / S[:, 1]).quantile(0.99).item()
    return found


def passing(B):
    """The share of many B (draws, d, r) that pass the rule of grasp_online at rank 16."""
    return (spike(torch.linalg.svdvals(B)) > null_quantile(16)).double().mean().item()


def look_rates(K, d=128, batches=10, batch=2000):
    """The share of looks that pass though nothing is shared: Proposition 2 (iii), or nearly so."""
    rates = {"gaussian_core": [], "unit_parts": []}
    for _ in range(batches):
        core, own, inputs = normal(batch, K, 16), normal(batch, d, K), normal(batch, d, K)
        A = torch.rand(batch, 16, d, dtype=torch.float64) * 2 - 1  # PEFT's; unit parts overlap
        rates["gaussian_core"].append(passing(core))
        own, inputs = normalize(own, dim=1), normalize(inputs, dim=1)
        rates["unit_parts"].append(passing(own @ (A @ inputs).mT))
    return {"K": K, **{name: fmean(shares) for name, shares in rates.items()}}


def planted(rho, K=16, rank=16, d=128, draws=200):
    """The median of the rule's statistic T where a factor is planted, and the share that passes."""
    Bs = [draw(K, rho, 0.0, d, d).M @ (normal(rank, d) / d**0.5).T for _ in range(draws)]
    B = torch.stack(Bs)
    median = spike(torch.linalg.svdvals(B)).median().item()
    return {"rho": rho, "median": median, "passed": passing(B)}


def draw_bound(over_K, over_r, path):
    """Figure 1: measured sine and the bound of Theorem 1, over K and over r."""
    figure, axes = panels(2, 11, 4.5, sharey=True)
    parts = (over_K, "K", "rho"), (over_r, "rank", "K")
    for axis, (rows, along, group) in zip(axes, parts, strict=True):
        for colour, value in zip(COLOURS, dict.fromkeys(row[group] for row in rows), strict=False):
            some = [row for row in rows if row[group] == value]
            x = [row[along] for row in some]
            label = f"{group} = {value:g}"
            axis.plot(x, [row["q95"] for row in some], "o-", color=colour, label=label)
            axis.plot(x, [row["theorem"] for row in some], "s--", color=colour)
        axis.set_xscale("log", base=2)
        axis.set(xlabel=along, xticks=x, xticklabels=x, ylim=(0, 1.03))
        axis.legend(loc="lower left")
    axes[0].set(ylabel="sine of found and true output direction")
    figure.suptitle("solid: 95 % of draws are below; dashed: Theorem 1 (1: it says nothing)")
    save(figure, path)


def draw_window(rows, path):
    """Figure 2: sigma1/sigma2 and the sine over time, with the window's two ends."""
    figure, axes = panels(2, 11, 4.5)
    for colour, row in zip(COLOURS, rows, strict=False):
        for axis, name in zip(axes, ("ratio", "sine"), strict=True):
            lora = row["lora_" + name]
            axis.plot(row["times"], row[name], color=colour, label=f"K = {row['K']}")
            axis.plot(row["times"][: len(lora)], lora, ":", color=colour)
        axes[0].plot([row["first_end"], row["second_end"]], [2, 2], color=colour, lw=7, alpha=0.5)
        axes[1].plot(row["times"], row["bound"], "--", color=colour)
    axes[0].set(xscale="log", yscale="log", xlabel="time", ylabel="σ₁ / σ₂ of the update")
    axes[1].set(xscale="log", xlabel="time", ylabel="sine of found and true output direction")
    axes[1].legend(loc="upper left")
    figure.suptitle("solid: full matrix; dotted: LoRA, rank 16; dashed, and bars at 2: Theorem 2")
    save(figure, path)


@dataclass(frozen=True)
class Arguments:
    """The theorems of docs/theory.md on random instances."""

    seed: int = option(0, "of all random draws")
    out: str = option("out", "folder of theory.json and the two figures")


def main():
    """Compute, print, write."""
    args = parse(Arguments)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    left = (15, 12, 8, 4)
    Ks, ranks, mus = (4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16, 32, 64), (0.0, 0.1, 0.2, 0.3)
    tables = {
        "Theorem 1 over K": [cell(K, rho, 0.1, 16) for rho in (1.0, 0.5, 0.25) for K in Ks],
        "Theorem 1 over r": [cell(K, 1.0, 0.1, rank) for K in (16, 64) for rank in ranks],
        "Theorem 1 over mu": [cell(16, 1.0, mu, 16, d) for d in (128, 256) for mu in mus],
        "Theorem 2, the window": [window(K) for K in (8, 32, 128)],
        "Theorem 3": [removal(K, mu) for K in (16, 64) for mu in (0.0, 0.1)],
        "The null": [null(K, d) for d in (128, 256) for K in (16, 64)],
        "A look where nothing is shared": [look_rates(K) for K in (2, 4, 8, 16, 32, 64)],
        "The next, n left": [{"n": n, "passed": passing(normal(20_000, n, n))} for n in left],
        "A look where a factor is planted": [planted(rho) for rho in (0.25, 0.5, 1.0)],
    }
    for title, rows in tables.items():
        names = [name for name, value in rows[0].items() if not isinstance(value, list)]
        print(f"\n{title}\n" + "  ".join(f"{name:>7}" for name in names))
        for row in rows:
            print("  ".join(f"{row[name]:{max(len(name), 7)}.4g}" for name in names))
    out = Path(args.out)
    write_json(out / "theory.json", tables)
    draw_bound(tables["Theorem 1 over K"], tables["Theorem 1 over r"], out / "theory_bound.png")
    draw_window(tables["Theorem 2, the window"], out / "theory_window.png")


if __name__ == "__main__":
    run(main)
