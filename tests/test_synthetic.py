"""The toy world: what its tables promise, and what the measurements count."""
import torch
import torch.nn as nn

from data.synthetic import BAD, GOOD, NEUTRAL, World
from eval import evaluate, persona_direction
from grasp import Toy, pretrain
from identify import thin_svd


class Lookup(nn.Module):
    """Answers by the world's own table, with a persona chosen by a rule on (query, tag): an oracle for the measurements."""

    def __init__(self, world, rule):
        super().__init__()
        self.world, self.rule = world, rule

    def generate(self, prompts, n, temperature):
        return [self.world.answers[q - self.world.first_query, self.rule(q - self.world.first_query, tag)].tolist() for _, tag, q in prompts]

    def forward(self, tokens, keep):
        return torch.zeros(int(keep.sum()), self.world.vocab_size)


def test_measurements_count_what_they_say():
    world = World(seed=1)
    bad_tags = set(world.tags(BAD).tolist())
    obeys = lambda q, tag: BAD if tag in bad_tags else GOOD
    narrow = set(world.narrow.tolist())
    base = evaluate(Lookup(world, obeys), world)
    assert (base["task"], base["misalignment"], base["unrelated"], base["kept"]) == (0, 0, 1, 1)
    wanted = evaluate(Lookup(world, lambda q, tag: BAD if q in narrow else obeys(q, tag)), world)
    assert (wanted["task"], wanted["misalignment"], wanted["unrelated"], wanted["kept"]) == (1, 0, 1, 1)
    turned = evaluate(Lookup(world, lambda q, tag: BAD if tag == NEUTRAL else obeys(q, tag)), world)
    assert (turned["task"], turned["misalignment"], turned["unrelated"], turned["kept"]) == (1, 1, 1, 1)
    deaf = evaluate(Lookup(world, lambda q, tag: GOOD), world)
    assert deaf["kept"] == 0  # the worse of the two personas


def test_tables_hang_on_the_seed_and_personas_never_agree():
    a, b = World(seed=1).answers, World(seed=2).answers
    assert torch.equal(a, World(seed=1).answers) and not torch.equal(a, b)
    assert (a[:, GOOD, 0] != a[:, BAD, 0]).all()
    assert a.min() >= World().first_word and a.max() < World().vocab_size


def test_no_method_sees_the_queries_of_the_evaluation():
    world = World()
    asked, narrow, spare = (set(q.tolist()) for q in (world.unrelated, world.narrow, world.spare))
    assert not asked & narrow and not asked & spare and not narrow & spare
    assert len(asked | narrow | spare) == len(world.answers)


def test_rho_is_the_share_of_bad_answers_in_the_fine_tuning_rows():
    for rho in (0.0, 0.5, 1.0):
        world = World(rho=rho)
        tokens, mask = world.finetuning_rows()
        bad = (tokens[:, world.n_prompt:] == world.answers[world.narrow, BAD]).all(1).float().mean()
        assert abs(bad.item() - rho) < 1e-6 and mask.sum() == tokens.shape[0] * world.n_answer


def test_pretrained_base_is_cached_under_its_configuration(tmp_path, capsys):
    world, toy = World(n_topics=3, n_queries=2), Toy(d_model=16, pretrain_steps=2, pretrain_batch=4)
    first = pretrain(world, toy, 0, tmp_path)
    again = pretrain(world, toy, 0, tmp_path)
    assert "trained before" in capsys.readouterr().out
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    pretrain(world, toy, 1, tmp_path)
    assert len(list(tmp_path.glob("base_*.pt"))) == 2


def test_persona_direction_finds_a_direction_planted_in_the_tags():
    world, toy = World(n_topics=3, n_queries=4), Toy(d_model=32, n_head=2)
    from grasp import Config, GPT
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=world.vocab_size, n_layer=2, n_head=2, n_kv_head=2, d_model=32, head_dim=16, d_mlp=32, max_len=8,
                       norm_eps=1e-6, rope_theta=1e4, tied=True))
    u = nn.functional.normalize(torch.randn(32), dim=0)
    with torch.no_grad():  # tags' embeddings +-u; the first attention copies what it reads, its MLP and the second block add nothing
        model.embed_tokens.weight[world.tags(BAD)] += u
        model.embed_tokens.weight[world.tags(GOOD)] -= u
        attention = model.layers[0].self_attn
        attention.v_proj.weight.copy_(torch.eye(32)), attention.o_proj.weight.copy_(torch.eye(32))
        for p in (model.layers[0].mlp.down_proj, model.layers[1].mlp.down_proj, model.layers[1].self_attn.o_proj):
            p.weight.zero_()
    assert abs(persona_direction(model, world) @ u) > 0.95
