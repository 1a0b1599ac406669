"""The ids of the reference library on every text, from either file; no special token from text."""

import json
import os
import random
import time
import unicodedata
from pathlib import Path

import pytest
import transformers
from tokenizer_files import SPECIAL, TEXT, files_of, ids_of, reference, write_folder

from data.tokenizer import Tokenizer
from support.errors import UserError

SMOLLM2 = Path(os.environ.get("GRASP_SMOLLM2", "absent"))
CASES = [
    *(
        (model_type, source)
        for model_type in ("gpt2", "qwen2")
        for source in ("vocab.json", "both")
    ),
    *((model_type, "tokenizer.json") for model_type in ("gpt2", "qwen2", "llama")),
]
PIECES = [
    *(" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "’re", "'", "_", "!", "<|im_end|>"),
    *("\u0301", "\u200d", "\u00a0", "1", "²", "Ⅷ", "a", "é", "한", "👍", "ſ"),
    *("\x04", "\x06", "\x1c", "\x1d", "\x7f", "\U00040000", "\U00090001", "\U0010fffd"),
]


def make_pair(model_type, source, folder):
    theirs = reference(model_type)
    write_folder(folder, files_of(theirs, source), model_type)
    return Tokenizer.from_folder(folder), theirs


@pytest.fixture(scope="session", params=CASES, ids="-".join)
def pair(request, tmp_path_factory):
    """(ours, theirs), ours read from a folder with one of the two files, or with both."""
    return make_pair(*request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session", params=["gpt2", "qwen2", "llama"])
def pair_of_kind(request, tmp_path_factory):
    """(ours, theirs) for each of the patterns once."""
    return make_pair(request.param, "tokenizer.json", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2's tokenizer, ours and theirs."""
    if not SMOLLM2.is_dir():
        pytest.skip("GRASP_SMOLLM2 names no folder that get_smollm2.py has made")
    ours = Tokenizer.from_folder(SMOLLM2)
    return ours, transformers.AutoTokenizer.from_pretrained(SMOLLM2)


def check_multilingual_file(ours, theirs):
    assert ours.encode(TEXT) == ids_of(theirs, TEXT)
    for line in TEXT.splitlines(keepends=True):
        assert ours.encode(line) == ids_of(theirs, line)


def check_random_text(ours, theirs, n):
    """Characters of the file, any code point, and the pieces that patterns trip over."""
    r = random.Random(0)
    for _ in range(n):
        parts = []
        for _ in range(r.randrange(60)):
            any_code_point = chr(r.choice([r.randrange(0xD800), r.randrange(0xE000, 0x110000)]))
            parts.append(r.choice([r.choice(PIECES), r.choice(TEXT), any_code_point]))
        text = "".join(parts)
        assert ours.encode(text) == ids_of(theirs, text), ascii(text)


def test_multilingual_file_has_the_references_ids(pair):
    ours, theirs = pair
    few = len(ours.encode(TEXT)) < 0.7 * len(TEXT.encode())
    assert len(theirs) > 600 and few, "few merges were learned, so little was tested"
    check_multilingual_file(ours, theirs)


def test_random_text_has_the_references_ids(pair):
    check_random_text(*pair, n=300)


def test_the_real_smollm2_has_the_references_ids(smollm2):
    check_multilingual_file(*smollm2)
    check_random_text(*smollm2, n=2000)


@pytest.mark.parametrize("text", ["!!", "!!!", "a  b", "  !", "\n\n!", "'s_", "1 !"])
@pytest.mark.parametrize("odd", ["\x04", "\x1d\x06", "\U00040000", "\x04!\x04"])
def test_a_byte_without_a_token_is_left_out_wherever_it_stands(pair_of_kind, text, odd):
    ours, theirs = pair_of_kind
    for i in range(len(text) + 1):
        changed = text[:i] + odd + text[i:]
        assert ours.encode(changed) == ids_of(theirs, changed), ascii(changed)
    if ours.model_type == "llama":
        assert ours.encode("\x04") == []


def long_texts(n):
    """Runs of `n` characters on which matchers overflow or sorting takes for ever."""
    spaces = " " * n
    return [
        spaces,
        f"a{spaces}a",
        f"a{spaces}1",
        f"!{spaces}!!",
        f"!{spaces}\nx",
        f"{spaces}\x04b",
        "!" + "\n" * n + spaces + "x",
        "a" + "\t" * n + "b",
        " \n\t" * (n // 3) + "b",
        "\u00a0" * n + "b",
        "a" + "\u0301" * n,
        "a" + "\u0301\u0323" * (n // 2),
        "e" + "\u0f73" * n + "\u0345\u0301",
        "\u0344" * n,
        "\u1100\u1161\u11a8" * (n // 3),
        "a" * n,
        "1" * n,
        "!" * n,
        "!\x04" * (n // 2),
        "中" * n,
        "'s" * (n // 2),
        (" " * 999 + "a") * (n // 1000),
    ]


@pytest.mark.parametrize("n", [999, 1500, 6000])
def test_long_runs_have_the_references_ids(pair_of_kind, n):
    ours, theirs = pair_of_kind
    for text in long_texts(n):
        assert ours.encode(text) == ids_of(theirs, text), ascii(text[:9])


def test_a_million_characters_in_a_row_take_seconds(pair_of_kind):
    ours, _ = pair_of_kind
    for text in ("a" + " " * 10**6 + "a", "\n" * 10**6 + "a", "a" + "\u0301\u0323" * 500_000):
        began = time.monotonic()
        ids = ours.encode(text)
        assert time.monotonic() - began < 20
        expected = unicodedata.normalize("NFC", text[:3]) if ours.nfc else text[:3]
        assert ours.decode(ids).startswith(expected[:1])


def test_decoding_returns_the_normalised_text(pair):
    """NFC for Qwen, the text itself for the others, and the same from the reference."""
    ours, theirs = pair
    expected = unicodedata.normalize("NFC", TEXT) if ours.model_type == "qwen2" else TEXT
    assert ours.decode(ours.encode(TEXT)) == expected
    assert theirs.decode(ids_of(theirs, TEXT), clean_up_tokenization_spaces=False) == expected
    assert unicodedata.normalize("NFC", TEXT) != TEXT


def test_special_tokens_never_come_from_text(pair):
    ours, theirs = pair
    for name in SPECIAL:
        assert ours.special(name) == theirs.convert_tokens_to_ids(name)
        assert ours.decode([ours.special(name)]) == name
        for text in (name, f"a{name}b", f"\n{name}\n", name * 3):
            assert ours.special(name) in theirs(text)["input_ids"]
            assert not set(ours.encode(text)) & set(ours.specials.values())
            assert ours.decode(ours.encode(text)) == text


# Added tokens: content, flags. Some overlap, some begin alike, some are changed by the normal form.
ADDED = [
    ("<think>", {}),
    ("</think>", {}),
    ("<|fim|>", {}),
    ("<|fim", {}),
    ("fim|>!", {}),
    ("<t", {"special": True}),
    ("<|fim|>\n\n", {"special": True, "lstrip": True}),
    ("m|> a", {"normalized": True}),
    ("e\u0301x", {"normalized": True}),
    ("<s>", {"normalized": True}),
    ("stop", {"special": True, "normalized": True}),
]


def make_pair_with_added(model_type, added, folder, words=()):
    """(ours, theirs) with added tokens behind the vocabulary; words: tokens of it that are added.

    Of each a pair: its content and the flags that are not false.
    """
    files = files_of(reference(model_type), "tokenizer.json")
    whole = json.loads(json.dumps(files["tokenizer.json"]))
    flags = dict.fromkeys(["special", "single_word", "lstrip", "rstrip", "normalized"], False)
    first = 1 + max(token["id"] for token in whole["added_tokens"])
    numbered = [(whole["model"]["vocab"][content], content, more) for content, more in words]
    numbered += [(first + i, content, more) for i, (content, more) in enumerate(added)]
    for i, content, more in numbered:
        whole["added_tokens"].append({"id": i, "content": content, **flags, **more})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer.json": whole, "tokenizer_config.json": settings}
    write_folder(folder, files, model_type)
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "llama"])
def test_an_added_token_that_is_not_special_has_its_id_in_text(tmp_path, model_type):
    """Wherever it stands: which one of those that overlap, and before or after normalising."""
    ours, theirs = make_pair_with_added(model_type, ADDED, tmp_path)
    assert ours.special("<think>") in ours.encode("a<think>b")
    assert ours.special("stop") not in ours.encode("stop")
    parts = [name for name, _ in ADDED] + ["\u0338", "\u0301", "é", "x", " ", "\n", "!", "<", "a"]
    r = random.Random(0)
    for _ in range(500):
        text = "".join(r.choices([*parts, "fim", "|>", r.choice(PIECES)], k=r.randrange(12)))
        assert ours.encode(text) == ids_of(theirs, text), ascii(text)


@pytest.mark.parametrize("special", [True, False])
def test_a_word_of_the_vocabulary_that_is_added_too_keeps_its_id(tmp_path, special):
    vocab = reference("qwen2").get_vocab()
    letters = [word for word in vocab if word.isascii() and word.isalpha() and len(word) > 1]
    words = [".", *letters[:5]]
    flags = {"special": special}
    ours, theirs = make_pair_with_added("qwen2", [], tmp_path, [(word, flags) for word in words])
    for text in (*words, " ".join(words), "".join(words), f"a{words[1]}b {words[2]}.", TEXT):
        assert ours.encode(text) == ids_of(theirs, text)


def test_turns_end_by_no_text_even_where_the_file_says_that_their_tokens_are_not_special(tmp_path):
    files = files_of(reference("qwen2"), "tokenizer.json")
    whole = json.loads(json.dumps(files["tokenizer.json"]))
    for token in whole["added_tokens"]:
        token["special"] = False
    ours = Tokenizer.from_folder(write_folder(tmp_path, {"tokenizer.json": whole}))
    text = "a<|im_end|>\n<|im_start|>b<|endoftext|>"
    assert ours.encode(text) == ids_of(reference("qwen2"), text)


def test_known_ids_are_what_decodes(pair):
    ours, theirs = pair
    assert ours.known_ids == sorted(theirs.get_vocab().values())
    for i in ours.known_ids:
        ours.decode([i])
    with pytest.raises(KeyError):
        ours.decode([ours.known_ids[-1] + 1])


def test_end_of_turn(pair):
    ours, theirs = pair
    name = "<|endoftext|>" if ours.model_type == "gpt2" else "<|im_end|>"
    assert ours.end_of_turn == theirs.convert_tokens_to_ids(name)
    with pytest.raises(UserError, match=r"no special token <\|think\|>"):
        ours.special("<|think|>")


def test_half_a_surrogate_pair_does_not_raise(pair):
    """JSON can hold one ("\\ud83d"), UTF-8 can't: it becomes a replacement character."""
    assert pair[0].decode(pair[0].encode("a\ud83d b")) == "a\ufffd b"
