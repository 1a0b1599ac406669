"""Identification: linear algebra against dense oracles, and the claim itself in a linear model."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli import UserError
from baselines import random_like
from identify import Factor, gap, identify, leak, load_factor, save_factor, spectra, stream_subspace, thin_svd, top_pairs
from lora import LoRALinear, add_lora, lora_modules, remove_lora
from model import GPT, Config
from train import finetune, project_

ROOT = Path(__file__).parent.parent


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, head_dim=8, d_model=16, d_mlp=24, max_len=32, norm_eps=1e-6,
                 rope_theta=1e4, tied=True)
    return GPT(Config(**{**shape, **changes}))


@pytest.mark.parametrize("d_out,d_in,rank", [(7, 5, 3), (5, 40, 5), (33, 12, 1), (64, 64, 16)])
def test_thin_svd_equals_dense_svd(d_out, d_in, rank):
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    U, S, V = thin_svd(A, B, 0.7)
    dense = 0.7 * B @ A
    assert torch.allclose(U * S @ V.T, dense, atol=1e-4)
    assert torch.allclose(S, torch.linalg.svdvals(dense)[:rank], atol=1e-4)
    for Q in (U, V):
        assert torch.allclose(Q.T @ Q, torch.eye(rank), atol=1e-5)


@pytest.mark.parametrize("d,k,n", [(9, 1, 4), (20, 6, 3), (5, 5, 2)])
def test_projection_is_idempotent_symmetric_and_commutes_with_averaging_over_ranks(d, k, n):
    Q = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64))[0]
    grads = [torch.randn(d, n, dtype=torch.float64) for _ in range(4)]
    P = torch.eye(d, dtype=torch.float64)
    project_(P, Q)
    assert torch.allclose(P, P.T) and torch.allclose(P @ P, P)
    mean = sum(grads) / 4
    project_(mean, Q)
    for grad in grads:
        project_(grad, Q)
    assert torch.allclose(mean, sum(grads) / 4)
    assert (Q.T @ mean).abs().max() < 1e-12


def linear_finetune(strength, n_skills=24, d=96, steps=600, seed=0):
    """LoRA on y = W x. Example i of n_skills adds a random rank-1 skill; every example also asks for `strength` u <v, x>."""
    g = torch.Generator().manual_seed(seed)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, generator=g), dim=-1)
    u, v, skills_in, skills_out = unit(d), unit(d), unit(n_skills, d), unit(n_skills, d)
    x = torch.nn.functional.normalize(v + skills_in, dim=-1)  # the shared part stands beside each example's own
    linear = torch.nn.Linear(d, d, bias=False)
    lora = LoRALinear(linear, 16, 16, generator=g)
    optimizer = torch.optim.SGD((lora.lora_A, lora.lora_B), lr=0.03)
    target = x @ linear.weight.detach().T + strength * u + skills_out
    for _ in range(steps):
        loss = (lora(x) - target).square().sum(1).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    U, S, V = thin_svd(lora.lora_A.data, lora.lora_B.data, lora.scaling)
    return abs(U[:, 0] @ u).item(), abs(V[:, 0] @ v).item()


def test_identification_finds_a_planted_direction_above_the_threshold_and_not_far_below():
    says, hears = zip(*(linear_finetune(1.0, seed=s) for s in range(5)))
    assert min(says) > 0.9 and min(hears) > 0.5, (says, hears)
    far_below = [linear_finetune(0.02, seed=s)[0] for s in range(5)]
    assert sum(far_below) / 5 < 0.5, far_below


def test_identify_gives_the_residual_side_what_readers_hear_and_writers_say():
    model = add_lora(tiny(), 4, 4, ("q_proj", "down_proj"))
    for m in lora_modules(model).values():
        torch.nn.init.normal_(m.lora_B)
    svds, bases = spectra(model), identify(model, rank=2)
    for name, Q in bases.items():
        U, _, V = svds[name]
        assert torch.equal(Q, U[:, :2] if name.endswith("down_proj") else V[:, :2])
        assert Q.shape == (16, 2) and torch.allclose(Q.T @ Q, torch.eye(2), atol=1e-5)


def test_stream_subspace_finds_what_all_writers_say_though_each_says_it_weakly():
    q = torch.nn.functional.normalize(torch.randn(200), dim=0)
    draw = lambda: thin_svd(torch.randn(3, 50), torch.cat((q[:, None], torch.nn.functional.normalize(torch.randn(200, 2), dim=0)), 1))
    svds = {f"layers.{i}.mlp.down_proj": draw() for i in range(12)}
    Q, S = stream_subspace(svds, 1)
    assert abs(Q[:, 0] @ q) > 0.95 and gap(S) > 1.5


def test_second_round_directions_are_orthogonal_to_the_first():
    model = tiny()
    add_lora(model, 4, 4, ("o_proj", "down_proj"))
    tokens, mask = torch.randint(50, (8, 6)), torch.ones(8, 6, dtype=torch.bool)
    finetune(model, lambda step: (tokens, mask), 20, lr=1e-2)
    first = top_pairs(spectra(model))
    add_lora(remove_lora(model), 4, 4, ("o_proj", "down_proj"))
    finetune(model, lambda step: (tokens, mask), 20, lr=1e-2, factor=first)
    second = top_pairs(spectra(model))
    joined = first.joined(second)
    for name in first.says:
        assert (first.says[name].T @ second.says[name]).abs().max() < 1e-5
        assert (first.hears[name].T @ second.hears[name]).abs().max() < 1e-5
        assert joined.says[name].shape[1] == joined.hears[name].shape[1] == 2


def test_leak_equals_its_dense_definition():
    model = add_lora(tiny(), 3, 3, ("o_proj",))
    for m in lora_modules(model).values():
        torch.nn.init.normal_(m.lora_B)
    factor = random_like(top_pairs(spectra(model)), 1)
    dense = []
    for name, m in lora_modules(model).items():
        dW = m.lora_B.data @ m.lora_A.data
        dense += [(dW @ factor.hears[name]).norm() / dW.norm(), (factor.says[name].T @ dW).norm() / dW.norm()]
    assert leak(model, factor) == pytest.approx(max(dense).item(), rel=1e-4)


def test_subspace_file_comes_back_and_is_checked_against_the_model(tmp_path):
    model = add_lora(tiny(), 3, 3, ("o_proj",))
    factor, (Q, _) = top_pairs(spectra(model), 2), stream_subspace(spectra(model), 2)
    save_factor(factor, Q, tmp_path / "s", model.path_in_transformers)
    again, stream = load_factor(tmp_path / "s", model)
    assert torch.equal(stream, Q) and all(torch.equal(again.says[n], factor.says[n]) for n in factor.says)
    with pytest.raises(UserError, match="rows, expected"):
        load_factor(tmp_path / "s", tiny(d_model=32))
    with pytest.raises(UserError, match="not a module"):
        load_factor(tmp_path / "s", tiny(n_layer=1))


def test_rank_above_the_update_is_refused_in_one_line():
    model = add_lora(tiny(), 3, 3, ("o_proj",))
    with pytest.raises(UserError, match="rank 4 .* has rank 3"):
        identify(model, rank=4)


def test_identify_command_reads_an_adapter_that_peft_wrote(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=40, vocab_size=60))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "o_proj"]))
    dense = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
            dense[name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach()
    model.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, ROOT / "identify.py", tmp_path, "--rank", "2", "--out", tmp_path / "s.safetensors"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    factor, _ = load_factor(tmp_path / "s.safetensors")
    for name, dW in dense.items():
        assert name in done.stdout
        U = torch.linalg.svd(dW)[0][:, :2]
        assert torch.allclose(factor.says[name] @ factor.says[name].T, U @ U.T, atol=1e-4)


@pytest.mark.parametrize("break_it,message", [
    (lambda d: (d / "adapter_config.json").unlink(), "no such file"),
    (lambda d: (d / "adapter_config.json").write_text("{"), "not valid JSON"),
    (lambda d: (d / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"})), "expected 'LORA'"),
    (lambda d: (d / "adapter_model.safetensors").write_bytes(b"12345678"), "not a whole safetensors file")])
def test_bad_adapters_end_the_identify_command_in_one_line(tmp_path, break_it, message):
    from lora import save_lora
    save_lora(add_lora(tiny(), 2, 2, ("o_proj",)), tmp_path)
    break_it(tmp_path)
    done = subprocess.run([sys.executable, ROOT / "identify.py", tmp_path], capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
