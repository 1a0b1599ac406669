"""LoRA against PEFT: the same adapters, the same gradients; the base stays as it is."""

import peft
import pytest
import torch
from checkpoints import KINDS, make
from toys import randomise, rows, tiny

from lora import LoRALinear, add_lora, load_lora, lora_modules, remove_lora, save_lora, without_lora
from model import GPT, response_loss

GPT2_ALL = ["c_attn", "c_proj", "c_fc"]
GPT2_TARGETS = (["c_attn"], ["attn.c_proj", "c_fc"], GPT2_ALL)
OTHER_TARGETS = (["q_proj", "v_proj"], ["o_proj", "down_proj"], "all-linear")
CASES = [
    (kind, targets, rslora)
    for kind in KINDS
    for targets, rslora in zip(
        GPT2_TARGETS if kind == "gpt2" else OTHER_TARGETS, (True, False, True), strict=True
    )
]


def with_peft(model, targets, rslora, **options):
    """The transformers model with PEFT's LoRA, its B random."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=model.config.model_type == "gpt2",
        lora_dropout=0.0,
        **options,
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    return model.eval()


def both(kind, folder, targets, rslora, **options):
    """A PEFT model, and ours with the adapter that PEFT saved."""
    theirs = with_peft(make(kind, folder / "base"), targets, rslora, **options)
    theirs.save_pretrained(folder / "adapter")
    return theirs, load_lora(GPT.from_pretrained(folder / "base"), folder / "adapter")


def n_adapted(theirs):
    return sum(name.endswith("lora_A.default") for name, _ in theirs.named_modules())


def largest_difference(ours, theirs):
    tokens = torch.randint(97, (2, 15))
    with torch.no_grad():
        return (ours(tokens) - theirs(tokens).logits).abs().max().item()


@pytest.mark.parametrize("kind,targets,rslora", CASES)
def test_an_adapter_written_by_peft_gives_the_same_logits_here(kind, targets, rslora, tmp_path):
    theirs, ours = both(kind, tmp_path, targets, rslora)
    assert largest_difference(ours, theirs) < 1e-4
    with without_lora(ours):
        assert largest_difference(ours, theirs) > 1e-2  # the adapter does something


@pytest.mark.parametrize("kind,targets,rslora", CASES)
def test_an_adapter_written_here_gives_the_same_logits_in_peft(kind, targets, rslora, tmp_path):
    base = make(kind, tmp_path / "base")
    ours = add_lora(GPT.from_pretrained(tmp_path / "base"), 5, 7, targets, rslora, seed=1)
    save_lora(randomise(ours), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert n_adapted(theirs) == len(lora_modules(ours))
    assert largest_difference(ours, theirs) < 1e-4


PATTERNS = [
    (
        "qwen2_tied",
        ["q_proj", "up_proj"],
        {"model.layers.2.self_attn.q_proj": 3, "q_proj": 2, "up_proj": 5},
        {"layers.2.self_attn.q_proj": 11, "up_proj|q_proj": 9},
    ),  # the first that matches counts, in the order of PEFT's sorted file
    (
        "gpt2",
        ["c_attn", "c_fc"],
        {"h.[01].attn.c_attn": 2, "h.2.attn.c_attn": 3, "c_fc": 5},
        {"h.2.attn.c_attn": 11},
    ),
]


@pytest.mark.parametrize("kind,targets,ranks,alphas", PATTERNS)
def test_patterns_and_subsets_of_the_layers_are_read(kind, targets, ranks, alphas, tmp_path):
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    theirs, ours = both(kind, tmp_path, targets, True, layers_to_transform=[0, 2], **patterns)
    assert sorted(len(m.lora_A) for m in lora_modules(ours).values()) == [2, 3, 5, 5]
    assert largest_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("kind,targets,ranks,alphas", PATTERNS)
def test_patterns_and_subsets_of_the_layers_are_written(kind, targets, ranks, alphas, tmp_path):
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    _, ours = both(kind, tmp_path, targets, True, layers_to_transform=[0, 2], **patterns)
    save_lora(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(make(kind, tmp_path / "base"), tmp_path / "again")
    assert n_adapted(again) == 4
    assert largest_difference(ours, again) < 1e-4


def test_a_rank_above_a_layers_sides_is_read_as_peft_writes_it(tmp_path):
    rank = {"k_proj": 20}  # the layer is 12 x 36
    theirs, ours = both("qwen2_tied", tmp_path, ["k_proj"], False, rank_pattern=rank)
    assert largest_difference(ours, theirs) < 1e-4


def test_a_loaded_adapter_does_not_change_with_its_file(tmp_path):
    save_lora(add_lora(tiny(), 2, 2, ["q_proj"]), tmp_path)
    model, path = load_lora(tiny(), tmp_path), tmp_path / "adapter_model.safetensors"
    with open(path, "r+b") as file:  # in place, as another program's save may do it
        file.write(bytes(path.stat().st_size))
    assert all(m.lora_A.all() for m in lora_modules(model).values())


def step_of_both(kind, folder):
    """(our loss, theirs, our model, their gradients by name) of one batch, after backward."""
    targets = GPT2_ALL if kind == "gpt2" else "all-linear"
    theirs, ours = both(kind, folder, targets, True)
    tokens, mask = rows(3, 14, vocab=97)
    loss = response_loss(ours, tokens, mask)
    loss.backward()
    expected = theirs(tokens, labels=tokens.masked_fill(~mask, -100)).loss
    expected.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    return loss.item(), expected.item(), ours, gradients


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_has_the_loss_of_transformers_and_peft(kind, tmp_path):
    loss, expected, _, _ = step_of_both(kind, tmp_path)
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_has_every_gradient_of_transformers_and_peft(kind, tmp_path):
    _, _, ours, gradients = step_of_both(kind, tmp_path)
    modules = lora_modules(ours)
    assert len(gradients) == 2 * len(modules)
    for name, m in modules.items():
        for matrix in ("lora_A", "lora_B"):
            path = f"base_model.model.{ours.path_in_transformers(name)}.{matrix}.default.weight"
            theirs = gradients[path]
            error = (getattr(m, matrix).grad - theirs).abs().max()
            assert error < 2e-4 * theirs.abs().max(), (name, matrix)


def test_training_leaves_every_bit_of_the_base_alone():
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, 3, 3, "all-linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        response_loss(model, *rows()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(m.lora_B.any() for m in lora_modules(model).values())
    remove_lora(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_fresh_lora_changes_nothing():
    model, (tokens, _) = tiny(), rows()
    base = model(tokens)
    assert torch.equal(add_lora(model, 3, 3, "all-linear")(tokens), base)


def test_without_lora_is_the_base_while_it_lasts():
    model, (tokens, _) = tiny(), rows()
    base = model(tokens)
    randomise(add_lora(model, 3, 3, "all-linear"))
    adapted = model(tokens)
    with without_lora(model):
        assert torch.equal(model(tokens), base)
    assert torch.equal(model(tokens), adapted)
    assert not torch.allclose(adapted, base)


def test_an_error_inside_brings_the_lora_back_too():
    model, (tokens, _) = randomise(add_lora(tiny(), 3, 3, "all-linear")), rows()
    adapted = model(tokens)
    with pytest.raises(ZeroDivisionError), without_lora(model):
        1 / 0  # noqa: B018 - it is here to raise
    assert torch.equal(model(tokens), adapted)


def test_only_the_lora_takes_gradients():
    model = add_lora(tiny(), 3, 3, "all-linear")
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_A_starts_uniform_as_in_peft_and_B_at_zero():
    model = add_lora(tiny(d_model=64, n_head=8), 8, 8, "all-linear")
    for m in lora_modules(model).values():
        bound = m.lora_A.shape[1] ** -0.5  # kaiming_uniform with a = sqrt 5
        assert 0.9 * bound < m.lora_A.abs().max() <= bound
        assert m.lora_A.mean().abs() < 0.2 * bound
        assert not m.lora_B.any()


@pytest.mark.parametrize("seed,same", [(3, True), (4, False)])
def test_A_hangs_on_the_seed(seed, same):
    first = lora_modules(add_lora(tiny(), 3, 3, "all-linear", seed=3))
    second = lora_modules(add_lora(tiny(), 3, 3, "all-linear", seed=seed))
    assert all(torch.equal(first[name].lora_A, second[name].lora_A) == same for name in first)


@pytest.mark.parametrize("rslora,scaling", [(False, 1.5), (True, 3.0)])
def test_scaling_is_alpha_by_rank_or_by_its_root(rslora, scaling):
    assert LoRALinear(torch.nn.Linear(8, 8), 4, 6, rslora).scaling == scaling


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
def test_what_cannot_be_attached_is_refused_in_one_line(rank, targets, message):
    model = tiny()
    with pytest.raises(ValueError, match=".") as error:
        add_lora(model, rank, 4, targets)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not lora_modules(model)  # never half attached


def test_a_second_lora_is_refused(tmp_path):
    model = add_lora(tiny(), 2, 2, ["q_proj"])
    save_lora(model, tmp_path)
    with pytest.raises(ValueError, match="has a LoRA already"):
        add_lora(model, 2, 2, ["v_proj"])
    with pytest.raises(ValueError, match="has a LoRA already"):
        load_lora(model, tmp_path)


def test_a_model_without_a_lora_has_none_to_save(tmp_path):
    with pytest.raises(ValueError, match="no LoRA to save"):
        save_lora(tiny(), tmp_path)


@pytest.mark.parametrize(
    "other,message",
    [
        ({}, "adapts model.layers.2.self_attn.q_proj, no linear layer of this qwen2 model"),
        ({"n_layer": 3, "d_model": 32}, "is (16, 16) in the adapter, (16, 32) in the model"),
    ],
)
def test_an_adapter_for_another_model_is_refused(other, message, tmp_path):
    save_lora(add_lora(tiny(n_layer=3), 2, 2, ["q_proj"]), tmp_path)
    model = tiny(**other)
    with pytest.raises(ValueError, match=".") as error:
        load_lora(model, tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert not lora_modules(model)
