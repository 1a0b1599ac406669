"""What a look at a real model sees where nothing is shared: its inputs have a common part."""

import torch

from lora import lora_modules


@torch.no_grad()
def input_nulls(model, tokens, mask):
    """{module name: S (r,)}: B's singular values if every response token had an answer of its own.

    tokens, mask (B, T), a batch. With orthonormal answers g_t and inputs x_t, one gradient step
    makes B the sum of g_t (A x_t)', up to its scale: the singular values are those of the matrix of
    all A x_t (docs/theory.md, section 8). Where the inputs have a common part, the first one stands
    out although no answer is shared.
    """
    grams, hooks = {}, []
    for name, module in lora_modules(model).items():
        rank = len(module.lora_A)
        grams[name] = torch.zeros(rank, rank, device=module.lora_A.device)

        def collect(module, inputs, output, name=name):
            low = inputs[0][predicts].float() @ module.lora_A.T  # (marked tokens, r)
            grams[name] += low.T @ low

        hooks.append(module.register_forward_hook(collect))
    try:
        for row, marked in zip(tokens.split(1), mask.split(1), strict=True):
            predicts = marked[:, 1:]  # the positions that predict a marked token
            model(row[:, :-1], keep=predicts)
    finally:
        for hook in hooks:
            hook.remove()
    eigenvalues = {name: torch.linalg.eigvalsh(gram).flip(0) for name, gram in grams.items()}
    return {name: values.clamp(min=0).sqrt() for name, values in eigenvalues.items()}
