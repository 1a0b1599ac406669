"""The null of a look on a real model, against B itself."""

import pytest
import torch
from toys import tiny

from identify import spike
from lora import add_lora, lora_modules
from real.null import input_nulls


def marked_inputs(model, tokens, mask):
    """{module: the inputs (tokens, in) at the positions that predict a marked token}."""
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: inputs[0][mask[:, 1:]]})

    hooks = [m.register_forward_hook(keep(name)) for name, m in lora_modules(model).items()]
    with torch.no_grad():
        model(tokens[:, :-1])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture
def case():
    """A model with a LoRA, and a batch."""
    torch.manual_seed(0)
    model = add_lora(tiny(), 4, 4, "all-linear")
    tokens = torch.randint(0, model.config.vocab_size, (3, 8))
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, 4:] = True
    return model, tokens, mask


def test_the_null_is_the_spectrum_of_b_with_an_answer_of_its_own_for_every_token(case):
    model, tokens, mask = case
    nulls = input_nulls(model, tokens, mask)
    for name, X in marked_inputs(model, tokens, mask).items():
        G = torch.linalg.qr(torch.randn(64, len(X)))[0]  # (64, tokens), orthonormal answers
        B = G @ X @ lora_modules(model)[name].lora_A.T  # (64, r)
        assert torch.allclose(nulls[name], torch.linalg.svdvals(B), rtol=1e-3, atol=1e-5)


def test_a_common_part_of_the_inputs_raises_the_null(case):
    model, tokens, mask = case
    before = input_nulls(model, tokens, mask)
    module = lora_modules(model)["layers.0.self_attn.o_proj"]
    common = 100 * torch.ones(module.lora_A.shape[1])
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + common,))
    after = input_nulls(model, tokens, mask)
    name = "layers.0.self_attn.o_proj"
    assert spike(after[name]) > 10 * spike(before[name])
