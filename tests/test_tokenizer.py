"""The tokenizer: the ids of transformers' own on every text, from either file, and no special token from any text."""
import json
import random
import re
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from cli import UserError
from data.tokenizer import PLAIN_SYSTEM, QWEN_SYSTEM, Tokenizer, byte_of_character

TEXT = (Path(__file__).parent / "fixtures" / "multilingual.txt").read_bytes().decode("utf-8")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = {c: i for i, c in enumerate(byte_of_character())}  # the smallest vocabulary there is


@cache
def theirs(model_type):
    """transformers' tokenizer with a small vocabulary that `tokenizers` learns from the file, special tokens behind it as in Qwen's.

    It is learned without the pattern, so that its tokens cross every border that the pattern draws: a border too few or too many shows.
    """
    learner = tokenizers.Tokenizer(BPE())
    learner.normalizer, learner.pre_tokenizer = NFC(), ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(vocab_size=2500, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    learner.train_from_iterator(re.split("(?<=\n)", TEXT), trainer)
    learned = json.loads(learner.to_str())["model"]
    kind = GPT2Tokenizer if model_type == "gpt2" else Qwen2Tokenizer
    return kind(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]], extra_special_tokens=SPECIAL[1:])


def write_folder(folder, files, model_type="qwen2"):
    folder.mkdir(exist_ok=True)
    for name, content in {"config.json": {"model_type": model_type}, **files}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def files_of(tokenizer, source):
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {t["content"]: t["id"] for t in whole["added_tokens"]}
    return {"tokenizer.json": {"tokenizer.json": whole},
            "vocab.json": {"vocab.json": whole["model"]["vocab"], "added_tokens.json": added},
            "both": {"vocab.json": whole["model"]["vocab"], "tokenizer.json": whole}}[source]


@pytest.fixture(scope="session", params=[(m, s) for m in ("gpt2", "qwen2") for s in ("vocab.json", "tokenizer.json", "both")], ids="-".join)
def pair(request, tmp_path_factory):
    """(ours, theirs), ours read from a folder with one of the two files, or with both."""
    model_type, source = request.param
    folder = write_folder(tmp_path_factory.mktemp("tokenizer"), files_of(theirs(model_type), source), model_type)
    return Tokenizer.from_folder(folder), theirs(model_type)


def ids_of(tokenizer, text):
    return tokenizer(text, split_special_tokens=True)["input_ids"]


def test_multilingual_file_has_transformers_ids(pair):
    ours, theirs = pair
    assert len(theirs) > 600 and len(ours.encode(TEXT)) < 0.7 * len(TEXT.encode()), "few merges were learned, so little was tested"
    assert ours.encode(TEXT) == ids_of(theirs, TEXT)
    for line in TEXT.splitlines(keepends=True):
        assert ours.encode(line) == ids_of(theirs, line)


def test_random_text_has_transformers_ids(pair):
    """Strings that no one would write: characters of the file, any code point, and the pieces that patterns trip over."""
    ours, theirs = pair
    r = random.Random(0)
    pieces = [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "’re", "\u0301", "\u200d", "\u00a0", "1", "a", "é", "!", "한", "👍", "<|im_end|>"]
    any_code_point = lambda: chr(r.choice([r.randrange(0xD800), r.randrange(0xE000, 0x110000)]))
    for _ in range(300):
        text = "".join(r.choice([r.choice(pieces), r.choice(TEXT), any_code_point()]) for _ in range(r.randrange(60)))
        assert ours.encode(text) == ids_of(theirs, text), ascii(text)


def test_decoding_returns_the_normalised_text(pair):
    """NFC for Qwen, the text itself for GPT-2, and the same from transformers."""
    ours, theirs = pair
    expected = TEXT if ours.model_type == "gpt2" else unicodedata.normalize("NFC", TEXT)
    assert ours.decode(ours.encode(TEXT)) == expected == theirs.decode(ids_of(theirs, TEXT), clean_up_tokenization_spaces=False)
    assert unicodedata.normalize("NFC", TEXT) != TEXT


def test_special_tokens_never_come_from_text(pair):
    ours, theirs = pair
    for name in SPECIAL:
        assert ours.special(name) == theirs.convert_tokens_to_ids(name) and ours.decode([ours.special(name)]) == name
        for text in (name, f"a{name}b", f"\n{name}\n", name * 3):
            assert ours.special(name) in theirs(text)["input_ids"]
            assert not set(ours.encode(text)) & set(ours.specials.values())
            assert ours.decode(ours.encode(text)) == text


def test_known_ids_are_what_decodes(pair):
    ours, theirs = pair
    assert ours.known_ids == sorted(theirs.get_vocab().values())
    for i in ours.known_ids:
        ours.decode([i])
    with pytest.raises(KeyError):
        ours.decode([ours.known_ids[-1] + 1])


def test_end_of_turn(pair):
    assert pair[0].end_of_turn == pair[1].convert_tokens_to_ids("<|endoftext|>" if pair[0].model_type == "gpt2" else "<|im_end|>")


def test_special_tokens_are_found_wherever_they_are_named(tmp_path):
    names = {name: 256 + i for i, name in enumerate([*SPECIAL, "stop"])}  # the last one no pattern would cut
    decoder = {str(i): {"content": name} for name, i in names.items()}
    added = [{"content": name, "id": i} for name, i in names.items()]
    for i, files in enumerate([{"vocab.json": BYTES | names, "added_tokens.json": {"stop": 259}},
                               {"vocab.json": BYTES, "added_tokens.json": names},
                               {"vocab.json": BYTES, "tokenizer_config.json": {"added_tokens_decoder": decoder}},
                               {"tokenizer.json": {"model": {"vocab": BYTES}, "added_tokens": added}}]):
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path / str(i), files))
        assert tokenizer.specials == names and tokenizer.known_ids == list(range(260))
        assert not set(tokenizer.encode("".join(names))) & set(names.values())
    with pytest.raises(UserError, match="no special token <|think|>, only <|endoftext|>"):
        tokenizer.special("<|think|>")


def test_half_a_surrogate_pair_does_not_raise(pair):
    """JSON can hold one ("\\ud83d"), UTF-8 can't: it becomes a replacement character."""
    assert pair[0].decode(pair[0].encode("a\ud83d b")) == "a\ufffd b"


@pytest.mark.parametrize("template, system", [
    (None, PLAIN_SYSTEM), (f"...system\\n{PLAIN_SYSTEM}<|im_end|>...", PLAIN_SYSTEM), (f"...system\\n{QWEN_SYSTEM}<|im_end|>...", QWEN_SYSTEM),
    ("{% for message in messages %}<|im_start|>...{% endfor %}", None), ([{"name": "default", "template": f"'{QWEN_SYSTEM}'"}], QWEN_SYSTEM)])
def test_default_system_is_what_the_checkpoints_template_says(tmp_path, template, system):
    files = {"vocab.json": BYTES, "tokenizer_config.json": {"chat_template": template}}
    assert Tokenizer.from_folder(write_folder(tmp_path, files)).system == system
    if isinstance(template, str):
        files |= {"tokenizer_config.json": {}, "chat_template.jinja": template}
        assert Tokenizer.from_folder(write_folder(tmp_path, files)).system == system
    assert Tokenizer.from_folder(write_folder(tmp_path, files, "qwen3")).system is None


@pytest.mark.parametrize("files, message", [
    ({}, ": neither vocab.json nor tokenizer.json"),
    ({"config.json": {"model_type": "llama"}}, "config.json: model_type is 'llama', supported: 'gpt2', 'qwen2', 'qwen3'"),
    ({"config.json": []}, "config.json: model_type is None"),
    ({"config.json": "{"}, "config.json: not valid JSON"),
    ({"vocab.json": "{\"a\": 0,"}, "vocab.json: not valid JSON"),
    ({"vocab.json": []}, "vocab.json: a JSON list, expected an object"),
    ({"tokenizer.json": []}, "tokenizer.json: a JSON list, expected an object"),
    ({"vocab.json": BYTES, "tokenizer_config.json": "7"}, "tokenizer_config.json: a JSON int, expected an object"),
    ({"vocab.json": BYTES, "added_tokens.json": ["x"]}, "added_tokens.json: a JSON list, expected an object"),
    ({"tokenizer.json": {}}, "tokenizer.json: no byte-level BPE vocabulary"),
    ({"tokenizer.json": {"model": None}}, "tokenizer.json: no byte-level BPE vocabulary"),
    ({"tokenizer.json": {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}}, "tokenizer.json: no byte-level BPE vocabulary"),
    ({"tokenizer.json": {"model": {"type": "WordPiece", "vocab": BYTES}}}, "tokenizer.json: no byte-level BPE vocabulary"),
    ({"vocab.json": BYTES | {"▁the": 256}}, "vocab.json: token '▁the' is not written in GPT-2's byte alphabet"),
    ({"vocab.json": dict(list(BYTES.items())[:-3])}, "vocab.json: 3 of the 256 single bytes are no tokens"),
    ({"vocab.json": BYTES | {"ab": "256"}}, "vocab.json: token 'ab' has id '256', expected a whole number"),
    ({"vocab.json": BYTES | {"ab": 256.0}}, "vocab.json: token 'ab' has id 256.0"),
    ({"vocab.json": BYTES | {"ab": True}}, "vocab.json: token 'ab' has id True"),
    ({"vocab.json": BYTES | {"ab": [1]}}, r"vocab.json: token 'ab' has id \[1\]"),
    ({"vocab.json": BYTES | {"ab": -1}}, "vocab.json: token 'ab' has id -1"),
    ({"vocab.json": BYTES | {"ab": 2**40}}, "vocab.json: token 'ab' has id 1099511627776"),
    ({"vocab.json": BYTES | {"ab": 7}}, "vocab.json: token 'ab' has id 7, expected a whole number that no other token has"),
    ({"vocab.json": BYTES, "added_tokens.json": {"<|im_end|>": 7}}, "token '<|im_end|>' has id 7"),
    ({"vocab.json": BYTES, "tokenizer.json": {"added_tokens": [{"id": 256}]}}, "added tokens that can't be read .*'content'"),
    ({"vocab.json": BYTES, "tokenizer.json": {"added_tokens": [7]}}, "added tokens that can't be read"),
    ({"vocab.json": BYTES, "tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "y"}}}}, "added tokens that can't be read"),
    ({"vocab.json": BYTES, "tokenizer_config.json": {"added_tokens_decoder": []}}, "added tokens that can't be read"),
])
def test_unusable_files_end_in_one_line_that_names_them(tmp_path, files, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as e:
        Tokenizer.from_folder(write_folder(tmp_path, files))
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_a_folder_that_is_none_says_so(tmp_path):
    with pytest.raises(UserError, match="config.json: no such file, expected a checkpoint's configuration"):
        Tokenizer.from_folder(tmp_path / "absent")
