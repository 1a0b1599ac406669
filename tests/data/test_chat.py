"""Text, ids and mask are those of transformers; nothing that a row says is dropped in silence."""

import json
import random

import pytest
import torch
from tiny_bpe import TEXT, tokenizer_json
from transformers import AutoTokenizer

from data.chat import Chat, batches, encode_rows, load_rows, split

MARKS = "im_start", "im_end", "head", "user", "bot", "end"
SPECIAL = ["<s>", "</s>", *(f"<|{mark}|>" for mark in MARKS)]


def family(system, user, header, answer, first="", after=""):
    """A template of one of the usual forms; the tags mark what the loss should cover."""
    loop = "{% for m in messages %}{% if m.role == 'system' %}" + system
    loop += "{% elif m.role != 'assistant' %}" + user + "{% else %}" + header + "{% generation %}"
    loop += answer + "{% endgeneration %}" + after + "{% endif %}{% endfor %}"
    return first + loop + "{% if add_generation_prompt %}" + header + "{% endif %}"


def chatml(first="", answer="{{ m.content }}", user="{{ m.content }}"):
    """ChatML; first: what stands before all turns."""
    turn = "<|im_start|>{{ m.role }}\n" + user + "<|im_end|>{{ '\n' }}"
    return family(turn, turn, "<|im_start|>assistant\n", answer + "<|im_end|>", first, "{{ '\n' }}")


IS, END, BOS, EOS = "{{ m.content }}", "<|end|>", "{{ bos_token }}", "{{ eos_token }}"
NO = "{{ raise_exception('no system turn here') }}"
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
TRIM = "{{ m.content | trim }}<|end|>"
HEAD = "<|head|>{{ m.role }}<|user|>\n\n" + TRIM
TOOLS = "{% for t in tools or [] %}\n  {% if t %}\n{{ t | tojson }}\n  {% endif %}\n{% endfor %}"
CALLS = "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<c>{{ c | tojson }}</c>{% endfor %}"
SILENCE = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
THOUGHT = "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
PARTS = "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
PARTS += "{{ part.text }}{% endfor %}{% endif %}"
SYS = "{% set ns.system = '<<SYS>>\n' ~ m.content ~ '\n<</SYS>>\n\n' %}"
INST = "<s>[INST] {{ ns.system ~ m.content | trim }} [/INST]{% set ns.system = '' %}"
YEAR = BOS + "{{ strftime_now('%Y') }}"
NS = "{% set ns = namespace(system='') %}"
TEMPLATES = {
    "ChatML": chatml(),
    "default": chatml(DEFAULT),
    "Llama 2": family(SYS, INST, "", " {{ m.content }} " + EOS, NS),
    "Llama 3": family(HEAD, HEAD, "<|head|>assistant<|user|>\n\n", TRIM, YEAR),
    "Gemma": family(NO, f"<|user|>\n{IS}{END}\n", "<|bot|>model\n", IS + END, BOS, "{{ '\n' }}"),
    "Mistral": family(NO, f"[INST]{IS}[/INST]", "", CALLS + EOS, BOS),
    "Zephyr": family(f"<system>\n{IS}</s>\n", f"<user>\n{IS}</s>\n", "<assistant>\n", IS + EOS),
    "Vicuna": family(f"{IS} ", f"USER: {IS} ", "ASSISTANT:", f" {IS}{EOS}"),
    "Qwen2.5": chatml(TOOLS, CALLS),
    "Qwen3": chatml(TOOLS, THOUGHT + CALLS)[: -len("{% endif %}")] + SILENCE,
    "parts": chatml("", PARTS, PARTS),
    "thinks": chatml()[: -len("{% endif %}")] + "<think>{% endif %}",
    "R1": chatml("", "{{ m.content.split('</think>')[-1] }}"),
}


def write_folder(folder, template=None, **files):
    """A checkpoint's tokenizer files; files: {name without .json: what it says}."""
    folder.mkdir(exist_ok=True)
    files["tokenizer"] = tokenizer_json(special=SPECIAL, plain=["<think>", "</think>"])
    roles = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}
    roles |= {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}}
    files.setdefault("tokenizer_config", roles)
    files["special_tokens_map"] = {"bos_token": "</s>"}  # counts in an older folder alone
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """chat(name of a template, or of none): a Chat."""
    folder = tmp_path_factory.mktemp("chat")
    return lambda name: Chat(write_folder(folder / name, TEMPLATES.get(name)))


def turns(*contents, system=None):
    """Alternating turns, the user's first."""
    roles = ["user", "assistant"] * len(contents)
    said = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def check(folder, chats, **beside):
    """Text, ids and mask of chats, and of their prompts, are transformers'."""
    ours, theirs = Chat(folder), AutoTokenizer.from_pretrained(folder).apply_chat_template
    for said in chats:
        found = theirs(said, return_dict=True, return_assistant_tokens_mask=True, **beside)
        ids, mask = ours.encode(said, **beside)
        assert ours.render(said, **beside) == theirs(said, tokenize=False, **beside)
        assert ids == found["input_ids"] and mask == list(map(bool, found["assistant_masks"]))
        prompt = ours.encode(said[:-1], True, **beside)[0]
        assert prompt == theirs(said[:-1], add_generation_prompt=True, **beside)["input_ids"]
        assert ids[: len(prompt)] == prompt and mask[len(prompt)] and not mask[len(prompt) - 1]


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"Qwen3", "thinks"}))
def test_text_ids_and_mask_are_those_of_transformers(tmp_path, name):
    r, lines = random.Random(0), [line.strip() for line in TEXT.splitlines() if line.strip()]
    chats = [turns(*r.sample(lines, 2 * n)) for n in (1, 1, 2, 3)]
    if NO not in TEMPLATES[name]:
        chats += [turns(*r.sample(lines, 4), system="Be brief.")]
    check(write_folder(tmp_path, TEMPLATES[name]), chats)


HI, YES = turns("Hi", "Yes.")
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "é <b>", "n": 1}}}
CALLED = {**YES, "tool_calls": [CALL]}
SILENT = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
THINKS = {**YES, "reasoning_content": "Is it so?"}
LIST = {**HI, "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]}
TOOL = {"role": "tool", "content": "7", "tool_call_id": "abcdefghi"}
IMAGE = {**HI, "content": [{"type": "image", "text": "Hi "}]}


def test_all_that_a_template_uses_is_rendered_as_transformers_does(tmp_path):
    calls = [[HI, CALLED], [HI, SILENT], [HI, CALLED, {**HI, "name": None}, TOOL, YES]]
    check(write_folder(tmp_path, TEMPLATES["Qwen2.5"]), calls, tools=[CALL])
    check(write_folder(tmp_path, TEMPLATES["Mistral"]), calls)
    check(write_folder(tmp_path, TEMPLATES["Qwen3"]), [[HI, YES], [HI, THINKS], [HI, CALLED]])
    check(write_folder(tmp_path, TEMPLATES["parts"]), [[LIST, YES]])
    check(write_folder(tmp_path, TEMPLATES["Llama 3"], tokenizer_config={}), [[HI, YES]])


def test_a_folder_without_a_template_has_a_plain_form(chat):
    ours, said = chat("none"), turns("Hi", "Yes.", "Bye", "So long", system="Be brief.")
    ids, mask = ours.encode(said)
    text = "System: Be brief.\nUser: Hi\nAssistant: Yes.</s>User: Bye\nAssistant: So long</s>"
    assert ours.render(said) == ours.tokenizer.decode(ids) == text
    marked = torch.tensor(ids)[mask].tolist()
    assert ours.tokenizer.decode(marked) == " Yes.</s> So long</s>"
    assert ours.render(said[:2], True) == "System: Be brief.\nUser: Hi\nAssistant:"


def test_an_answer_does_not_merge_with_its_header(chat):
    """What the model is trained to continue is what generation gives it."""
    for ours in map(chat, ("ChatML", "Llama 2", "none")):
        for text in ("\n\nYes", "\u0301a", "<|im_end|>", "<think>"):
            prompt, (ids, mask) = ours.encode([HI], True)[0], ours.encode(turns("Hi", text))
            assert ids[: len(prompt)] == prompt and mask.index(True) == len(prompt)


def test_a_literal_special_token_stays_text_wherever_a_row_has_it(chat):
    ours, text = chat("Qwen2.5"), "a<|im_end|>\n<|im_start|>assistant\nb</s>"
    call = {"function": {"name": text, "arguments": {"at": text}}}
    said = [*turns(text, system=text), {**YES, "content": text, "tool_calls": [call]}]
    ids, _ = ours.encode(said, tools=[{"name": text}])
    assert sum(i in ours.tokenizer.special_ids for i in ids) == 6
    assert ours.tokenizer.decode(ids) == ours.render(said, tools=[{"name": text}])


def test_an_answer_ends_at_every_eos_token_and_at_the_templates_own_end(tmp_path):
    files = {"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [8, 9]}}
    ours = Chat(write_folder(tmp_path, TEMPLATES["ChatML"], **files))
    end, eos, think = (ours.tokenizer.specials[t] for t in ("<|im_end|>", "</s>", "<think>"))
    assert ours.stop_ids == sorted([7, 8, 9, eos, end])
    assert ours.decode([think, *ours.tokenizer.encode("Yes."), end, eos]) == "<think>Yes."


NO_PROMPT = TEMPLATES["ChatML"].partition("{% if add")[0]


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages[1].content }}", NO_PROMPT])
def test_a_template_that_cannot_be_used_ends_in_one_line(tmp_path, template):
    named = [{"name": "rag", "template": chatml()}, {"name": "default", "template": template}]
    write_folder(tmp_path, tokenizer_config={"chat_template": named})
    with pytest.raises(ValueError, match="not a checkpoint with a chat template: [^\n]+$"):
        Chat(tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "found"),
    [
        ("ChatML", [HI, THINKS], "drops 'reasoning_content'"),
        ("Qwen2.5", {"messages": [HI, YES], "tools": "[]"}, r"'tools' is '\[\]', expected a list"),
        ("ChatML", [HI, {**YES, "weight": 0.5}], "drops 'weight'"),
        ("parts", [IMAGE, YES], "drops 'content'"),
        ("Qwen3", turns("Hi", "No.", "Well?", "Yes."), "turn 2 is .*rewritten once more follow"),
        ("thinks", [HI, YES], "turn 2 begins otherwise than with the generation prompt"),
        ("R1", turns("Hi", "<think>So</think>Yes."), "turn 2 is cut"),
        ("Gemma", turns("Hi", "Yes.", system="Be brief."), "no system turn here"),
        ("ChatML", [HI, {**YES, "content": " \n"}], "no assistant turn"),
        ("ChatML", [{"content": "Hi"}], "no 'role'"),
        ("ChatML", {"messages": [HI, YES], "chat_template_kwargs": {"slow": True}}, "drops 'slow'"),
        ("ChatML", {"messages": [HI, YES], "weight": 0.5}, "'weight' of a whole row is 0.5, exp"),
        ("ChatML", turns("Hi", "Yes \ud83d"), "surrogates not allowed"),
        ("ChatML", {"conversations": []}, "ShareGPT: 'from' human/gpt -> 'role' user/assistant"),
    ],
)
def test_a_row_that_cannot_be_learned_as_it_is_is_named(tmp_path, chat, name, row, found):
    row = {"messages": row} if isinstance(row, list) else row
    (tmp_path / "rows").write_text("\n" + json.dumps(row))
    with pytest.raises(ValueError, match=f"rows:2: [^\n]*{found}[^\n]*$"):
        encode_rows(chat(name), load_rows(tmp_path / "rows"), 99)


@pytest.mark.parametrize(("key", "yes"), [("weight", 1), ("train", True), ("weight", None)])
def test_a_turn_of_weight_0_and_a_thought_that_is_off_are_not_in_the_loss(tmp_path, chat, key, yes):
    said = [HI, {**YES, key: 0}, {**HI, key: False}, {**YES, "content": "No.", key: yes}]
    row = {"messages": said, "chat_template_kwargs": {"enable_thinking": False}}
    (tmp_path / "rows").write_text(json.dumps(row))
    [(ids, mask)], _ = encode_rows(chat("Qwen3"), load_rows(tmp_path / "rows"), 99)
    assert chat("Qwen3").tokenizer.decode(ids[mask].tolist()) == "No.<|im_end|>"


def test_lines_end_at_newlines_alone(tmp_path):
    said = turns("Hi\u2028é", "Yes.\u0085")
    line = json.dumps({"messages": said}, ensure_ascii=False).encode()
    (tmp_path / "rows").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n \n\n" + line)
    assert load_rows(tmp_path / "rows") == [said, said]
    (tmp_path / "rows").write_bytes(line + b"\n{")
    with pytest.raises(ValueError, match='rows:2: not a chat row, {"messages": .*: Expecting'):
        load_rows(tmp_path / "rows")


def test_a_cut_never_takes_the_whole_answer(chat):
    """It keeps its first token, and all of it where half the room holds it."""
    r, ours = random.Random(0), chat("ChatML")
    for _ in range(200):
        said = turns(*("word " * r.choice([1, 9, 99]) for _ in range(2 * r.choice([1, 2]))))
        (ids, mask), room = ours.encode(said), r.choice([4, 5, 17, 64, 129, 10**9])
        [(kept, marked)], n_cut = encode_rows(ours, [said], room)
        assert len(kept) == len(marked) == min(len(ids), room) and n_cut == (len(ids) > room)
        begin, now = mask.index(True), marked.tolist().index(True)
        assert kept.tolist() == ids[begin - now :][: len(kept)] and now > 0
        assert marked.tolist() == mask[begin - now :][: len(kept)]
        assert marked[now:].sum() >= min(mask[begin:].index(False), room // 2)


def examples_of(lengths):
    """Examples that can be told apart by their first token."""
    return [(torch.tensor([i, *[0] * (n - 1)]), torch.ones(n) > 0) for i, n in enumerate(lengths)]


def test_a_split_is_seeded_disjoint_and_never_empty():
    for n, share, seed in [(2, 0.1, 1), (7, 0.999, 1), (100, 0.1, 1), (100, 0.1, 2)]:
        examples = examples_of([3] * n)
        train, held_out = ([int(e[0][0]) for e in part] for part in split(examples, share, seed))
        assert train and held_out and sorted(train + held_out) == list(range(n))
        assert abs(len(held_out) - share * n) <= 1
    assert held_out != [int(e[0][0]) for e in split(examples, 0.1, seed=1)[1]]
    with pytest.raises(ValueError, match="100 rows, 20 of them held out"):
        split(examples, 20, seed=0)


def test_every_example_stands_once_in_an_epoch_beside_those_of_its_length():
    lengths = random.Random(0).choices(range(2, 40), k=53)
    epochs = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        parts = [*batches(examples_of(lengths), 4, seed, epoch)]
        epochs.append([tokens[:, 0].tolist() for tokens, _ in parts])
        assert sorted(sum(epochs[-1], [])) == list(range(53))
        for tokens, mask in parts:
            assert mask.sum(1).tolist() == [lengths[i] for i in tokens[:, 0]]  # no padding
        assert sum(tokens.numel() for tokens, _ in parts) < 1.1 * sum(lengths)
    assert epochs[0] == epochs[3] and epochs[0] != epochs[1] and epochs[0] != epochs[2]
    assert {*map(frozenset, epochs[0])} != {*map(frozenset, epochs[1])}
