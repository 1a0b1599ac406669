"""What is read from a checkpoint's tokenizer files, and what ends in one line."""

import pytest
from tokenizer_files import BYTES, SPECIAL, files_of, ids_of, reference, write_folder
from transformers import AutoTokenizer

from data.tokenizer import Tokenizer
from support.errors import UserError

QWEN2_SYSTEM = "You are a helpful assistant."
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_special_tokens_are_found_wherever_they_are_named(tmp_path):
    names = [*SPECIAL, "stop"]  # the last one no pattern would cut
    ids = {name: 256 + i for i, name in enumerate(names)}
    decoder = {str(i): {"content": name} for name, i in ids.items()}
    added = [{"content": name, "id": i} for name, i in ids.items()]
    ways = [
        {"vocab.json": BYTES | ids, "added_tokens.json": {"stop": 259}},
        {"vocab.json": BYTES, "added_tokens.json": ids},
        {"vocab.json": BYTES, "tokenizer_config.json": {"added_tokens_decoder": decoder}},
        {"tokenizer.json": {"model": {"vocab": BYTES}, "added_tokens": added}},
    ]
    for i, files in enumerate(ways):
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path / str(i), files))
        assert tokenizer.specials == ids and tokenizer.known_ids == list(range(260))
        assert not set(tokenizer.encode("".join(names))) & set(ids.values())


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "names",
    [
        {"eos_token": "<think>"},
        {"pad_token": {"content": "<think>", "__type": "AddedToken"}},
        {"additional_special_tokens": ["<tool>", "<think>"]},
        {"extra_special_tokens": ["<think>"]},
        {"mask_token": "<think>"},
    ],
    ids=str,
)
def test_a_token_with_a_part_to_play_is_special_whatever_its_flag(tmp_path, file, names):
    files = with_think()
    files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files[file] = {**files.get(file, {}), **names}
    ours = Tokenizer.from_folder(write_folder(tmp_path, files))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "a<think>b"
    assert ours.encode(text) == ids_of(theirs, text) == ids_of(reference("qwen2"), text)


def test_special_ids_are_assumed_for_qwens_vocabulary_alone(tmp_path):
    """And there only where no file names one."""
    filler = {f"À{i}": i for i in range(256, 151643)}
    none = write_folder(tmp_path / "a", {"vocab.json": BYTES})
    assert Tokenizer.from_folder(none).specials == {}
    assumed = write_folder(tmp_path / "b", {"vocab.json": BYTES | filler})
    ids = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    assert Tokenizer.from_folder(assumed).specials == ids
    write_folder(assumed, {"added_tokens.json": {"<|im_end|>": 151650}})
    assert Tokenizer.from_folder(assumed).specials == {"<|im_end|>": 151650}


def test_the_pattern_is_the_files_own_whatever_the_model_type(tmp_path):
    files = files_of(reference("llama"), "tokenizer.json")
    kinds = {
        t: Tokenizer.from_folder(write_folder(tmp_path / t, files, t)) for t in ("llama", "qwen2")
    }
    assert {t.pattern for t in kinds.values()} == {"digits"} and not kinds["qwen2"].nfc


def with_parts(model_type, **changes):
    whole = files_of(reference(model_type), "tokenizer.json")["tokenizer.json"]
    return {"tokenizer.json": {**whole, **changes}}


def with_model(model_type, **changes):
    whole = files_of(reference(model_type), "tokenizer.json")["tokenizer.json"]
    return {"tokenizer.json": {**whole, "model": {**whole["model"], **changes}}}


def with_think(**flags):
    """An added token that is not special."""
    added = files_of(reference("qwen2"), "tokenizer.json")["tokenizer.json"]["added_tokens"]
    think = {"content": "<think>", "id": 2503, "special": False, **flags}
    return with_parts("qwen2", added_tokens=[*added, think])


def settings(**values):
    return {"vocab.json": BYTES, "tokenizer_config.json": values}


LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}
MERGES = files_of(reference("qwen2"), "tokenizer.json")["tokenizer.json"]["model"]["merges"]

UNUSABLE = [
    ({}, ": neither vocab.json nor tokenizer.json"),
    ({"config.json": {"model_type": "bert"}}, "config.json: 'model_type' is 'bert', expected"),
    ({"config.json": {"model_type": ["qwen2"]}}, "config.json: 'model_type' is ['qwen2'],"),
    ({"config.json": {}}, "config.json: no 'model_type', expected 'gpt2' or 'llama' or"),
    ({"config.json": []}, "config.json: found [], expected an object"),
    ({"config.json": "{"}, "config.json: not valid JSON"),
    ({"config.json": "[" * 10**5}, "config.json: not valid JSON"),
    ({"vocab.json": '{"a": 0,'}, "vocab.json: not valid JSON"),
    ({"vocab.json": '{"a": ' + "7" * 5000 + "}"}, "vocab.json: not valid JSON"),
    ({"vocab.json": []}, "vocab.json: found [], expected an object"),
    ({"vocab.json": "null"}, "vocab.json: found None, expected an object"),
    ({"tokenizer.json": []}, "tokenizer.json: found [], expected an object"),
    ({"vocab.json": BYTES, "tokenizer_config.json": "7"}, "tokenizer_config.json: found 7,"),
    ({"vocab.json": BYTES, "added_tokens.json": ["x"]}, "added_tokens.json: found ['x'],"),
    ({"tokenizer.json": {}}, "tokenizer.json: no 'model.vocab'"),
    ({"tokenizer.json": {"model": None}}, "tokenizer.json: no 'model.vocab'"),
    ({"tokenizer.json": {"model": 7}}, "tokenizer.json: 'model' is 7, expected an object"),
    ({"tokenizer.json": {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}},
     "'model.type' is 'Unigram', expected 'BPE'"),
    ({"tokenizer.json": {"model": {"type": "WordPiece", "vocab": BYTES}}},
     "'model.type' is 'WordPiece', expected 'BPE'"),
    (with_model("qwen2", byte_fallback=True), "'model.byte_fallback' is True, expected False"),
    (with_model("qwen2", dropout=0.1), "'model.dropout' is 0.1"),
    (with_model("qwen2", continuing_subword_prefix="##"), "'model.continuing_subword_prefix' is"),
    (with_model("qwen2", merges=MERGES[::-1]), "is out of order"),
    (with_model("qwen2", merges=["a b c"]), "the merge 'a b c' is out of order"),
    (with_model("qwen2", merges=[7]), "the merge 7 is out of order"),
    (with_model("qwen2", merges=[]), "no merge makes the token"),
    ({**with_model("qwen2"), "vocab.json": {**BYTES, "a": 77_777}}, "has id 77777, in tokenizer"),
    ({"vocab.json": {**BYTES, "ab": 300}, "merges.txt": "#version: 0.2\n"}, "no merge makes the"),
    (with_model("qwen2", merges=MERGES[:-1]), "no merge makes the token"),
    (with_parts("qwen2", pre_tokenizer=LLAMA3), "'pre_tokenizer' is [('Split', "),
    (with_parts("qwen2", pre_tokenizer={"type": "Metaspace"}), "is [('Metaspace'"),
    (with_parts("qwen2", pre_tokenizer=7), "'pre_tokenizer' is [7], supported"),
    (with_parts("gpt2", pre_tokenizer={"type": "ByteLevel"}), "[('ByteLevel', True, True)]"),
    (with_parts("qwen2", normalizer={"type": "Lowercase"}), "'normalizer' is {'type': 'Low"),
    ({"vocab.json": BYTES | {"▁the": 256}}, "vocab.json: token '▁the' is not written in GPT-2's"),
    ({"vocab.json": dict(list(BYTES.items())[:-3])}, "vocab.json: 3 of the 256 single bytes are"),
    ({"vocab.json": BYTES | {"ab": "256"}}, "vocab.json: 'ab' is '256', expected a whole number"),
    ({"vocab.json": BYTES | {"ab": 256.0}}, "vocab.json: 'ab' is 256.0"),
    ({"vocab.json": BYTES | {"ab": True}}, "vocab.json: 'ab' is True"),
    ({"vocab.json": BYTES | {"ab": [1]}}, "vocab.json: 'ab' is [1]"),
    ({"vocab.json": BYTES | {"ab": None}}, "vocab.json: 'ab' is None"),
    ({"vocab.json": BYTES | {"ab": -1}}, "vocab.json: 'ab' is -1"),
    ({"vocab.json": BYTES | {"ab": 2**40}}, "vocab.json: 'ab' is 1099511627776"),
    ({"vocab.json": BYTES | {"ab": 7}}, "vocab.json: token 'ab' has id 7, expected one that no"),
    ({"vocab.json": BYTES, "added_tokens.json": {"<|im_end|>": 7}}, "'<|im_end|>' has id 7"),
    ({"vocab.json": BYTES, "tokenizer.json": {"added_tokens": [{"id": 256}]}},
     "tokenizer.json: no 'added_tokens[0].content', expected text"),
    ({"vocab.json": BYTES, "tokenizer.json": {"added_tokens": [7]}}, "'added_tokens[0]' is 7"),
    (with_think(lstrip=True), "the added token '<think>' has 'lstrip', which is supported"),
    (with_think(rstrip=True), "the added token '<think>' has 'rstrip', which is supported"),
    (with_think(single_word=True), "the added token '<think>' has 'single_word', which is"),
    (with_think() | {"tokenizer_config.json": {
        "added_tokens_decoder": {"2503": {"content": "<think>", "special": True}}}},
     "its tokenizer files differ in whether '<think>' is special"),
    (settings(added_tokens_decoder={"x": {"content": "y"}}), "has the id 'x'"),
    (settings(added_tokens_decoder={"9" * 5000: {"content": "y"}}), "has the id '999"),
    (settings(added_tokens_decoder=[]), "'added_tokens_decoder' is [], expected an object"),
    (settings(chat_template=7), "'chat_template' is 7, expected text or a list"),
    (settings(chat_template=[{"name": "tool_use", "template": CHATML}]), "no template 'default'"),
    (settings(chat_template=[7]), "'chat_template[0]' is 7, expected an object"),
    (settings(chat_template="{{ bos_token }}" + CHATML, bos_token="<s>"), "writes the bos_token"),
    (settings(chat_template="{{ bos_token }}" + CHATML)
     | {"special_tokens_map.json": {"bos_token": "<s>"}}, "writes the bos_token"),
    (settings(chat_template="{{ messages }}"), "the chat template is no ChatML"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), UNUSABLE)
def test_unusable_files_end_in_one_line_that_names_them(tmp_path, files, message):
    with pytest.raises(UserError) as e:
        Tokenizer.from_folder(write_folder(tmp_path, files))
    text = str(e.value)
    assert message in text and str(tmp_path) in text
    assert "\n" not in text and len(text) < len(str(tmp_path)) + 400


def test_a_byte_that_letters_need_may_not_be_missing_nor_one_with_an_unknown_token(tmp_path):
    whole = files_of(reference("llama"), "tokenizer.json")["tokenizer.json"]
    unk = {**whole, "model": {**whole["model"], "unk_token": SPECIAL[0]}}
    with pytest.raises(UserError, match="21 of the 256 single bytes.*'unk_token' is"):
        Tokenizer.from_folder(write_folder(tmp_path, {"tokenizer.json": unk}, "llama"))
    vocab = {token: i for token, i in whole["model"]["vocab"].items() if "Ã" not in token}
    merges = [merge for merge in whole["model"]["merges"] if "Ã" not in "".join(merge)]
    no_c3 = {**whole, "model": {**whole["model"], "vocab": vocab, "merges": merges}}
    with pytest.raises(UserError, match="22 of the 256 single bytes are no tokens"):
        Tokenizer.from_folder(write_folder(tmp_path, {"tokenizer.json": no_c3}, "llama"))


def test_a_llama_checkpoint_needs_its_pattern_and_chatml_its_tokens(tmp_path):
    with pytest.raises(UserError, match="no 'pre_tokenizer', which a llama checkpoint"):
        Tokenizer.from_folder(write_folder(tmp_path / "a", {"vocab.json": BYTES}, "llama"))
    whole = files_of(reference("llama"), "tokenizer.json")["tokenizer.json"]
    without = {"tokenizer.json": {**whole, "added_tokens": []}}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "b", without, "llama"))
    with pytest.raises(UserError, match=r"no special token <\|im_end\|>.*llama checkpoint needs"):
        tokenizer.end_of_turn  # noqa: B018 - the property raises


def test_a_folder_that_is_none_says_so(tmp_path):
    with pytest.raises(UserError, match="config.json: no such file, expected a checkpoint's"):
        Tokenizer.from_folder(tmp_path / "absent")


def test_the_template_may_stand_in_either_file(tmp_path):
    template = CHATML.replace("{% for", "<|im_start|>system\nBe kind.<|im_end|>\n{% for", 1)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    ways = [
        settings(chat_template=template),
        settings(chat_template=named),
        {"vocab.json": BYTES, "chat_template.jinja": template},
        settings(chat_template=CHATML) | {"chat_template.jinja": template},
    ]
    for i, files in enumerate(ways):
        folder = write_folder(tmp_path / str(i), files)
        assert Tokenizer.from_folder(folder).system == "Be kind."
    plain = {"vocab.json": BYTES}
    for model_type, system in (("qwen2", QWEN2_SYSTEM), ("qwen3", None), ("gpt2", None)):
        folder = write_folder(tmp_path / model_type, plain, model_type)
        assert Tokenizer.from_folder(folder).system == system
    write_folder(tmp_path / "gpt2", settings(chat_template="{{ messages }}"), "gpt2")
    assert Tokenizer.from_folder(tmp_path / "gpt2").system is None  # its chat form is ours


def test_a_json_value_that_is_no_number_of_the_right_kind_is_named(tmp_path):
    """A property of the whole file: any id, made any wrong value, is named."""
    for wrong in ("8", 1.5, True, None, [], {}, -1, 2**33):
        files = {"vocab.json": BYTES | {"!": wrong}}
        with pytest.raises(UserError, match="vocab.json: '!' is "):
            Tokenizer.from_folder(write_folder(tmp_path, files))
