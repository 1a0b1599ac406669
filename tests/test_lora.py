"""LoRA against PEFT: the same start, logits and gradients; the base stays as it is."""

import peft
import pytest
import torch
from checkpoints import make
from toys import randomise, rows, tiny

from lora import LoRALinear, add_lora, lora_factors, lora_modules, remove_lora, without_lora
from model import GPT, response_loss


@pytest.mark.parametrize("rslora,scaling", [(False, 1.5), (True, 3.0)])
def test_an_update_is_scaled_B_A_and_merging_it_changes_nothing(rslora, scaling):
    lora = LoRALinear(torch.nn.Linear(7, 5), 4, 6, rslora)
    torch.nn.init.normal_(lora.lora_B)
    x = torch.randn(3, 7)
    merged = lora.linear.weight + scaling * lora.lora_B @ lora.lora_A
    assert torch.allclose(lora(x), x @ merged.T + lora.linear.bias, atol=1e-5)
    A, B = lora_factors(torch.nn.ModuleDict({"a": lora}))["a"]
    assert torch.allclose(lora.linear.weight + B @ A, merged)


def test_A_starts_as_in_peft_and_B_at_zero():
    linear, config = torch.nn.Linear(40, 30), peft.LoraConfig(r=8)
    theirs = peft.tuners.lora.Linear(linear, "default", config, r=8, lora_alpha=8)
    torch.manual_seed(0)
    theirs.reset_lora_parameters("default", init_lora_weights=True)
    torch.manual_seed(0)
    ours = LoRALinear(linear, 8, 8)
    assert torch.allclose(ours.lora_A, theirs.lora_A["default"].weight, atol=1e-6)
    assert not ours.lora_B.any() and not theirs.lora_B["default"].weight.any()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind,targets", [("qwen3", "all-linear"), ("gpt2", ["c_attn", "c_fc"])])
def test_logits_loss_and_gradients_equal_pefts(kind, targets, rslora, tmp_path):
    base = make(kind, tmp_path)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=kind == "gpt2",
    )
    theirs = peft.get_peft_model(base, config).eval()
    ours = randomise(add_lora(GPT.from_pretrained(tmp_path), 4, 6, targets, rslora))
    layers = {}
    for name, m in lora_modules(ours).items():
        path = ours.path_in_transformers(name)
        layers[name] = theirs.get_submodule("base_model.model." + path)
        layers[name].lora_A["default"].weight.data.copy_(m.lora_A)
        layers[name].lora_B["default"].weight.data.copy_(m.lora_B)
    assert len(layers) == sum(name.endswith("lora_A.default") for name, _ in theirs.named_modules())

    tokens, mask = rows(4, 11, vocab=97)
    mask[:, 0] = False  # nothing stands before it
    found, expected = ours(tokens), theirs(tokens).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - remove_lora(GPT.from_pretrained(tmp_path))(tokens)).abs().max() > 0.01
    loss = response_loss(ours, tokens, mask)
    reference = theirs(tokens, labels=tokens.masked_fill(~mask, -100)).loss
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    loss.backward()
    reference.backward()
    for name, m in lora_modules(ours).items():
        for factor in ("lora_A", "lora_B"):
            theirs_ = getattr(layers[name], factor)["default"].weight.grad
            assert torch.allclose(getattr(m, factor).grad, theirs_, rtol=1e-3, atol=1e-5)


def test_a_fresh_lora_changes_nothing_trains_alone_and_comes_off_bit_by_bit():
    model, (tokens, _) = tiny(), rows()
    before, logits = {name: p.clone() for name, p in model.named_parameters()}, model(tokens)
    assert torch.equal(add_lora(model, 3, 3, "all-linear")(tokens), logits)
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    after = dict(remove_lora(randomise(model)).named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[name]) for name, p in before.items())


def test_without_lora_is_the_base_until_the_context_ends_however_it_ends():
    model, (tokens, _) = tiny(), rows()
    base = model(tokens)
    adapted = randomise(add_lora(model, 3, 3, "all-linear"))(tokens)
    with pytest.raises(KeyboardInterrupt), without_lora(model):
        assert torch.equal(model(tokens), base)
        raise KeyboardInterrupt
    assert torch.equal(model(tokens), adapted) and not torch.allclose(adapted, base)


def test_the_lora_is_fp32_beside_a_bf16_layer():
    model = add_lora(tiny().to(torch.bfloat16), 2, 2, "all-linear")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(rows()[0]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "rank,targets,message",
    [
        (4, ["q_proj", "w_proj"], "target 'w_proj' matches no linear layer; there are down_proj,"),
        (4, [], "no targets; expected path endings"),
        (4, ["lm_head"], "target 'lm_head' matches no linear layer"),
        (17, ["down_proj", "q_proj"], "rank 17, expected 1 to 16, the most that layers.0."),
        (0, ["q_proj"], "rank 0"),
    ],
)
def test_what_cannot_be_attached_is_refused_and_leaves_no_half(rank, targets, message):
    model = tiny(tied=False)
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank, 4, targets)
    assert not lora_modules(model)


def test_targets_are_path_endings_and_a_second_lora_is_refused():
    model = add_lora(tiny(), 2, 2, ["self_attn.q_proj", "up_proj"])
    endings = {name.split(".", 2)[2] for name in lora_modules(model)}
    assert endings == {"self_attn.q_proj", "mlp.up_proj"} and len(lora_modules(model)) == 4
    with pytest.raises(ValueError, match="has a LoRA already"):
        add_lora(model, 2, 2, ["v_proj"])
