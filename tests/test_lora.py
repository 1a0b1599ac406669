"""LoRA against PEFT: the same adapters, the same gradients; merging is explicit and undone bit for bit."""
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import KINDS, make
from cli import UserError
from lora import LoRALinear, add_lora, load_lora, lora_modules, merge_lora, remove_lora, save_lora, unmerge_lora, without_lora
from model import GPT, response_loss
from test_identify import tiny

TARGETS = {"gpt2": [["c_attn"], ["attn.c_proj", "c_fc"], ["c_attn", "c_proj", "c_fc"]]}
QWEN_TARGETS = [["q_proj", "v_proj"], ["o_proj", "down_proj"], "all-linear"]
CASES = [(kind, *case) for kind in KINDS for case in zip(TARGETS.get(kind, QWEN_TARGETS), (True, False, True))]


def save(model, folder):
    save_lora(model, folder)
    return folder


def with_peft(model, targets, rslora, **options):
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=targets, task_type="CAUSAL_LM",
                             fan_in_fan_out=model.config.model_type == "gpt2", lora_dropout=0.0, **options)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("kind,targets,rslora", CASES)
def test_adapter_written_by_peft_gives_the_same_logits_here(kind, targets, rslora, tmp_path):
    theirs, tokens = with_peft(make(kind, tmp_path / "base"), targets, rslora), torch.randint(97, (2, 15))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_lora(GPT.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert (GPT.from_pretrained(tmp_path / "base")(tokens) - ours(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("kind,targets,rslora", CASES)
def test_adapter_written_here_gives_the_same_logits_in_peft(kind, targets, rslora, tmp_path):
    base, tokens = make(kind, tmp_path / "base"), torch.randint(97, (2, 15))
    ours = add_lora(GPT.from_pretrained(tmp_path / "base"), 5, 7, targets, rslora, seed=1)
    for m in lora_modules(ours).values():
        torch.nn.init.normal_(m.lora_B, std=0.2)
    save_lora(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert len(lora_modules(ours)) == sum(name.endswith("lora_A.default") for name, _ in theirs.named_modules())
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind,targets,ranks,alphas", [
    ("qwen2_tied", ["q_proj", "up_proj"], {"model.layers.2.self_attn.q_proj": 3, "q_proj": 2, "up_proj": 5},
     {"layers.2.self_attn.q_proj": 11, "up_proj|q_proj": 9}),  # the first that matches, in PEFT's sorted file
    ("gpt2", ["c_attn", "c_fc"], {"h.[01].attn.c_attn": 2, "h.2.attn.c_attn": 3, "c_fc": 5}, {"h.2.attn.c_attn": 11})])
def test_patterns_and_layer_subsets_of_peft_are_read_and_written(kind, targets, ranks, alphas, tmp_path):
    theirs = with_peft(make(kind, tmp_path / "base"), targets, True, layers_to_transform=[0, 2], rank_pattern=ranks,
                       alpha_pattern=alphas)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, tokens = load_lora(GPT.from_pretrained(tmp_path / "base"), tmp_path / "adapter"), torch.randint(97, (2, 15))
    assert sorted(len(m.lora_A) for m in lora_modules(ours).values()) == [2, 3, 5, 5]
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    save_lora(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(make(kind, tmp_path / "base"), tmp_path / "again")
    assert sum(name.endswith("lora_A.default") for name, _ in again.named_modules()) == 4
    assert (ours(tokens) - again(tokens).logits).abs().max() < 1e-4


def test_a_rank_above_a_layers_sides_is_read_as_peft_writes_it(tmp_path):
    theirs = with_peft(make("qwen2_tied", tmp_path / "base"), ["k_proj"], False, rank_pattern={"k_proj": 20})  # 12 x 36
    theirs.save_pretrained(tmp_path / "adapter")
    ours, tokens = load_lora(GPT.from_pretrained(tmp_path / "base"), tmp_path / "adapter"), torch.randint(97, (2, 15))
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_a_loaded_adapter_does_not_change_with_its_file(tmp_path):
    model, path = load_lora(tiny(), save(add_lora(tiny(), 2, 2, ["q_proj"]), tmp_path)), tmp_path / "adapter_model.safetensors"
    with open(path, "r+b") as f:  # in place, as another program's save may do it
        f.write(bytes(path.stat().st_size))
    assert all(m.lora_A.all() for m in lora_modules(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_one_training_step_has_the_loss_and_every_gradient_of_transformers_and_peft(kind, tmp_path):
    theirs = with_peft(make(kind, tmp_path / "base"), "all-linear" if kind != "gpt2" else ["c_attn", "c_proj", "c_fc"], True)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_lora(GPT.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    tokens, mask = torch.randint(97, (3, 14)), torch.rand(3, 14) > 0.5
    loss = response_loss(ours, tokens, mask)
    loss.backward()
    expected = theirs(tokens, labels=tokens.masked_fill(~mask, -100)).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, m in lora_modules(ours).items():
        for matrix in ("lora_A", "lora_B"):
            grad = grads[f"base_model.model.{ours.path_in_transformers(name)}.{matrix}.default.weight"]
            assert torch.allclose(getattr(m, matrix).grad, grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item()), (name, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(dtype):
    model, tokens = tiny().to(dtype), torch.randint(50, (2, 9))
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, 3, 3, "all-linear")
    for m in lora_modules(model).values():
        torch.nn.init.normal_(m.lora_B, std=0.05)
    apart = model(tokens)
    merge_lora(merge_lora(model))  # merging twice merges once
    assert (model(tokens) - apart).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)
    unmerge_lora(model)
    assert torch.equal(model(tokens), apart)
    remove_lora(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_pefts_merged(kind, tmp_path):
    theirs = with_peft(make(kind, tmp_path / "base"), TARGETS["gpt2"][2] if kind == "gpt2" else "all-linear", True)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, merged = merge_lora(load_lora(GPT.from_pretrained(tmp_path / "base"), tmp_path / "adapter")), theirs.merge_and_unload()
    for name, m in lora_modules(ours).items():
        weight = merged.get_submodule(ours.path_in_transformers(name)).weight
        assert torch.allclose(m.linear.weight, weight.t() if kind == "gpt2" else weight, atol=1e-5)


def test_training_leaves_every_bit_of_the_base_alone():
    model = tiny()
    before, tokens = {name: p.clone() for name, p in model.named_parameters()}, torch.randint(50, (4, 12))
    optimizer = torch.optim.AdamW(add_lora(model, 3, 3, "all-linear").parameters(), lr=1e-2)
    starts = [m.lora_A.clone() for m in lora_modules(model).values()]
    for _ in range(3):
        response_loss(model, tokens, tokens > 9).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(m.lora_B.any() and not torch.equal(m.lora_A, A) for m, A in zip(lora_modules(model).values(), starts))
    remove_lora(model)
    assert all(torch.equal(before.pop(name), p) for name, p in model.named_parameters()) and not before


def test_without_lora_is_the_base_while_it_lasts():
    model, tokens = tiny(), torch.randint(50, (2, 9))
    base = model(tokens)
    add_lora(model, 3, 3, "all-linear")
    assert torch.equal(model(tokens), base)  # B starts at zero
    for m in lora_modules(model).values():
        torch.nn.init.ones_(m.lora_B)
    with without_lora(model):
        assert torch.equal(model(tokens), base)
    assert not torch.allclose(model(tokens), base)
    with pytest.raises(ZeroDivisionError), without_lora(model):
        1 / 0
    assert not torch.allclose(model(tokens), base)  # an error inside brings it back too
    with pytest.raises(UserError, match="the LoRA is merged"), without_lora(merge_lora(model)):
        pass


def test_only_the_lora_takes_gradients_and_a_starts_as_in_peft():
    model = add_lora(tiny(d_model=64, n_head=8), 8, 8, "all-linear", seed=3)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    for m in lora_modules(model).values():
        bound = m.lora_A.shape[1] ** -0.5  # kaiming_uniform with a = sqrt 5
        assert 0.9 * bound < m.lora_A.abs().max() <= bound and m.lora_A.mean().abs() < 0.2 * bound and not m.lora_B.any()
    same = [[torch.equal(a.lora_A, b.lora_A) for a, b in zip(lora_modules(model).values(), lora_modules(other).values())]
            for other in (add_lora(tiny(d_model=64, n_head=8), 8, 8, "all-linear", seed=seed) for seed in (3, 4))]
    assert all(same[0]) and not any(same[1])


def test_rank_stabilised_scaling():
    linear = torch.nn.Linear(8, 8)
    assert LoRALinear(linear, 4, 6).scaling == 1.5 and LoRALinear(linear, 4, 6, rslora=True).scaling == 3.0


@pytest.mark.parametrize("call,message", [
    (lambda m: add_lora(m, 4, 4, ["q_proj", "w_proj"]), "target 'w_proj' matches no linear layer; there are down_proj, g"),
    (lambda m: add_lora(m, 4, 4, []), "target '' matches no linear layer"),
    (lambda m: add_lora(m, 4, 4, ["lm_head"]), "target 'lm_head' matches no linear layer"),
    (lambda m: add_lora(m, 17, 4, ["down_proj", "q_proj"]), "rank 17, expected 1 to 16, the most that layers.0."),
    (lambda m: add_lora(m, 0, 4, ["q_proj"]), "rank 0"),
    (lambda m: add_lora(add_lora(m, 2, 2, ["q_proj"]), 2, 2, ["q_proj"]), "has a LoRA already"),
    (lambda m: save_lora(m, "nowhere"), "no LoRA to save")])
def test_what_cannot_be_attached_is_refused_in_one_line(call, message):
    with pytest.raises(UserError) as error:
        call(model := tiny())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(lora_modules(model)) in (0, model.config.n_layer)  # never half attached


def rewrite(change):
    def apply(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    return apply


def configured(**changes):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return apply


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize("break_it,message", [
    (lambda f: (f / "adapter_model.safetensors").unlink(), "no such file"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"short"), "not a whole safetensors file"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-4]), "not a whole"),
    (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json: peft_type is None, expected 'LORA'"),
    (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "no such folder"),
    (configured(use_dora=True), "use_dora is True"), (configured(bias="all"), "bias is 'all'"),
    (configured(lora_bias=True), "lora_bias is True"), (configured(alora_invocation_tokens=[1]), "alora_invocation_tokens is"),
    (configured(layer_replication=[[0, 1], [0, 1]]), "layer_replication"), (configured(kasa_config={"a": 1}), "kasa_config"),
    (configured(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4', which may change W"),
    (configured(modules_to_save=["lm_head"]), "modules_to_save"), (configured(r=3), "expected rank 3"),
    (configured(peft_type="LOHA"), "peft_type is 'LOHA'"), (configured(lora_alpha=None), "no number 'lora_alpha'"),
    (rewrite(lambda t: t.update({KEY + "A.weight": torch.ones(2)})), "A (2,) and B (16, 2), expected rank 2"),
    (rewrite(lambda t: t.update({KEY + "B.weight": torch.ones(16, 3)})), "A (2, 16) and B (16, 3), expected rank 2"),
    (rewrite(lambda t: t.pop(KEY + "B.weight")), "expected lora_A and lora_B"),
    (rewrite(lambda t: t[KEY + "A.weight"].fill_(float("inf"))), "not finite"),
    (rewrite(lambda t: t.update({KEY + "magnitude": torch.ones(1)})), "unexpected tensor"),
    (rewrite(lambda t: t.clear()), "no LoRA tensors")])
def test_a_bad_adapter_ends_in_one_line(break_it, message, tmp_path):
    save_lora(add_lora(tiny(), 2, 2, ["q_proj"]), tmp_path)
    break_it(tmp_path)
    with pytest.raises(UserError) as error:
        load_lora(tiny(), tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_for_another_model_is_refused(tmp_path):
    save_lora(add_lora(tiny(n_layer=3), 2, 2, ["q_proj"]), tmp_path)
    with pytest.raises(UserError, match="layers.2.self_attn.q_proj, which is no linear layer of this qwen2 model"):
        load_lora(tiny(), tmp_path)
    with pytest.raises(UserError, match="is 16 x 16 in the adapter, 16 x 32 in the model"):
        load_lora(tiny(n_layer=3, d_model=32), tmp_path)
