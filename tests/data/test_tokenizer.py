"""Ids are those of `tokenizers`, whatever the pre-tokenizer; no special token comes from text."""

import json
import random
import unicodedata

import pytest
import tokenizers
import transformers
from tiny_bpe import BYTE_LEVEL, TEXT, tokenizer_json

from data.tokenizer import Tokenizer

BYTES = {**BYTE_LEVEL, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
NFC, EMPTY = {"type": "NFC"}, {"type": "Sequence", "normalizers": []}
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
STRING = {**SPLIT, "pattern": {"String": "e."}}
MATCHES = {**SPLIT, "pattern": {"Regex": LLAMA3}, "behavior": "Removed", "invert": True}


def steps(*parts):
    """A pre-tokenizer: regular expressions and other steps."""
    cuts = [{**SPLIT, "pattern": {"Regex": p}} if isinstance(p, str) else p for p in parts]
    return {"type": "Sequence", "pretokenizers": cuts}


KINDS = {  # pre-tokenizer, normalizer
    "gpt2": (BYTE_LEVEL, None),
    "qwen": (steps(QWEN, BYTES), NFC),
    "llama3": (steps(LLAMA3, BYTES), None),
    "gpt4o": (steps(rf"{CASED}|\p{{N}}{{1,3}}|{REST}", BYTES), None),
    "smollm2": (steps(DIGITS, BYTE_LEVEL), None),
    "numbers": (steps({**DIGITS, "individual_digits": False}, BYTE_LEVEL), NFC),
    "deepseek": (steps("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥]+", DIGITS, BYTES), EMPTY),
    "a string": (steps(STRING, BYTES), None),
    "gpt4": (steps(MATCHES, BYTES), None),
    "no pattern": (BYTES, None),
}
PIECES = [*" \n\t_!1²Ⅷaé한👍ſ\u0301\u00a0\u200d\x04\x1c\x7f\ue000", "  ", "\r\n", "'s", "'LL"]
PIECES += ["’re", "e.", "<|end|>"]
ASSIGNED = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]


def check(whole, texts, special=False):
    """Our ids of texts are those of `tokenizers`; special: special tokens' names are tokens."""
    ours, theirs = Tokenizer(whole), tokenizers.Tokenizer.from_str(json.dumps(whole))
    theirs.encode_special_tokens = not special
    for text in texts:
        assert ours.encode(text, special) == theirs.encode(text).ids, ascii(text)[:200]


def texts(n=150, pieces=PIECES):
    """The fixture, its lines, and random texts of what patterns trip over."""
    r = random.Random(0)
    sources = (pieces, TEXT, ASSIGNED)
    drawn = ("".join(r.choice(r.choice(sources)) for _ in range(r.randrange(60))) for _ in range(n))
    return [TEXT, *TEXT.splitlines(keepends=True), *drawn]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizers(kind):
    cut, normalizer = KINDS[kind]
    whole = tokenizer_json(cut, special=["<|end|>"], normalizer=normalizer)
    check(whole, texts())
    ids = Tokenizer(whole).encode(TEXT)
    assert len(ids) < 0.7 * len(TEXT.encode()), "few merges were used"
    expected = unicodedata.normalize("NFC", TEXT) if normalizer == NFC else TEXT
    assert Tokenizer(whole).decode(ids) == expected


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "smollm2"])
def test_long_runs_have_the_ids_of_tokenizers(kind):
    n = 10_000  # matchers overflow on them
    runs = [" " * n + "a", "a" + "\n" * n, " \n\t" * n, "a" * n, "!" * n, "1" * n, "'s" * n]
    check(tokenizer_json(KINDS[kind][0]), runs)


def test_added_tokens_are_found_as_tokenizers_finds_them():
    """Those that are not special in any text, the others in rendered text alone."""
    special, plain = ["<|end|>", "<|start|>"], ["<think>", "<think>!", "<|x", "stop"]
    whole = tokenizer_json(special=special, plain=plain)
    whole["added_tokens"][0]["lstrip"] = whole["added_tokens"][1]["rstrip"] = True
    whole["added_tokens"][5]["lstrip"] = True
    pieces = [*special, *plain, " ", "\n", "a", "<", "think>", "|end", "top"]
    check(whole, texts(300, pieces), special=True)
    check(whole, texts(300, pieces[2:]))
    ours, text = Tokenizer(whole, roles=["stop"]), "a<|end|>b <|start|><|end|>stop"
    assert ours.special_ids == {2000, 2001, 2005} and not ours.special_ids & {*ours.encode(text)}
    assert ours.decode(ours.encode(text)) == text


def test_a_byte_without_a_token_is_left_out_and_its_neighbours_merge():
    whole, odd = tokenizer_json(), {*"ĄĆñ"}  # bytes 04, 06 and f1
    model = whole["model"]
    model["merges"] = [pair for pair in model["merges"] if not odd & {*"".join(pair)}]
    model["vocab"] = {word: i for word, i in model["vocab"].items() if not odd & {*word}}
    check(whole, [*texts(), "th\x04e", " \x06the", "\U00050000"])


def test_merges_go_by_their_order_and_not_by_id():
    whole = tokenizer_json()
    ids = random.Random(0).sample(range(2000), 2000)
    whole["model"]["vocab"] = dict(zip(whole["model"]["vocab"], ids, strict=True))
    check(whole, texts(50))
    whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]  # as of old
    check(whole, texts(50))


def test_an_older_gpt2_folder_has_the_ids_of_transformers(tmp_path):
    model = tokenizer_json()["model"]
    vocab, merges = {**model["vocab"], "<|endoftext|>": 2000}, [*map(tuple, model["merges"])]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.GPT2Tokenizer(vocab, merges)
    for text in texts(50):
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
    assert ours.specials == {"<|endoftext|>": 2000} and ours.known_ids == [*range(2001)]


OTHERS = {
    "'Metaspace'": {"pre_tokenizer": {"type": "Metaspace"}},
    "'add_prefix_space': True": {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}},
    "normalised by NFC": {"normalizer": {"type": "Lowercase"}},
    "a byte-level BPE": {"model": {"vocab": {}, "byte_fallback": True}},
}


@pytest.mark.parametrize("message", OTHERS)
def test_another_tokenizer_ends_in_one_line_that_names_it(tmp_path, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer_json(), **OTHERS[message]}))
    with pytest.raises(ValueError, match=f"not a byte-level BPE: [^\n]*{message}[^\n]*$"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.json: .*hf download NAME"):
        Tokenizer.from_folder(tmp_path / "Qwen/Qwen3-0.6B")  # a name of the Hub
