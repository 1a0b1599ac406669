"""A checkpoint's tokenizer files: tokenizer.json or vocab.json, and the small ones beside them.

What is read is a byte-level BPE in GPT-2's alphabet, of one of the kinds that data/tokenizer.py has
a pattern for; anything else is refused by name.
"""

from dataclasses import dataclass, fields
from os.path import lexists
from pathlib import Path

from hub.template import default_system
from support.errors import UserError
from support.files import named
from support.schema import Limits, read_file, show, value

QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # as Qwen's tokenizer.json writes it
QWEN_SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
QWEN_VOCABULARY = 151643  # tokens, before the special ones
QWEN2_SYSTEM = "You are a helpful assistant."  # of Qwen2's base models, which have no template

IDS = Limits(low=0, high=2**32 - 1)
# Bytes that are or begin no letter, digit or space: control characters, what stands for the planes
# from 4 on, and what UTF-8 never has. A vocabulary can do without them.
EXPENDABLE = frozenset({*range(0x09), *range(0x0E, 0x20), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)})
# The pre-tokenizers of tokenizer.json that are known, as _step writes each of their steps.
KNOWN_STEPS = {
    "gpt2": [("ByteLevel", False, True)],
    "digits": [("Digits", True), ("ByteLevel", False, True)],
    "qwen": [("Split", QWEN_REGEX, "Isolated", False), ("ByteLevel", False, False)],
}


@dataclass(frozen=True, kw_only=True)
class _Config:
    model_type: str = value(choices=("gpt2", "llama", "qwen2", "qwen3"))


@dataclass(frozen=True, kw_only=True)
class _Model:
    """tokenizer.json's `model`: a BPE without the options that change what is merged."""

    type: str = value("BPE", choices=("BPE",))
    vocab: dict[str, int] | None = value(None, low=IDS.low, high=IDS.high)
    merges: list = value([])  # of pairs, looked at by _made_by_merges
    dropout: float | None = value(None, choices=(0.0,))
    unk_token: str | None = None
    continuing_subword_prefix: str = value("", choices=("",))
    end_of_word_suffix: str = value("", choices=("",))
    byte_fallback: bool = value(False, choices=(False,))


@dataclass(frozen=True, kw_only=True)
class _Added:
    """An added token, as tokenizer_config.json has it."""

    content: str = value()
    special: bool | None = None
    normalized: bool = False  # whether it is looked for in the normalised text
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, kw_only=True)
class _AddedToken(_Added):
    """The same, as tokenizer.json has it."""

    id: int = value(low=IDS.low, high=IDS.high)


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """tokenizer.json."""

    model: _Model = _Model()
    added_tokens: list[_AddedToken] = value([])
    normalizer: object = None
    pre_tokenizer: object = None


@dataclass(frozen=True, kw_only=True)
class _Template:
    name: str = value()
    template: str = value()


@dataclass(frozen=True, kw_only=True)
class _Roles:
    """special_tokens_map.json: the tokens with a part to play, as text or as {"content": text}."""

    bos_token: object = None
    eos_token: object = None
    unk_token: object = None
    pad_token: object = None
    sep_token: object = None
    cls_token: object = None
    mask_token: object = None
    additional_special_tokens: object = None
    extra_special_tokens: object = None

    def names(self):
        """The tokens that are named."""
        for field in fields(_Roles):
            found = getattr(self, field.name)
            for token in found if isinstance(found, list) else [found]:
                name = token.get("content") if isinstance(token, dict) else token
                if isinstance(name, str):
                    yield name


@dataclass(frozen=True, kw_only=True)
class _Settings(_Roles):
    """tokenizer_config.json."""

    added_tokens_decoder: dict[str, _Added] = value({})
    chat_template: str | list[_Template] | None = None
    add_prefix_space: bool = value(False, choices=(False,))


def read_tokenizer(folder):
    """The keyword arguments of data.tokenizer.Tokenizer for a checkpoint folder.

    The vocabulary is vocab.json's or, where there is none, tokenizer.json's; special tokens come
    from whichever file names them; the pattern and whether text is normalised from tokenizer.json
    or, where it does not say, from the model type; the default system turn from the chat template.
    UserError where no file is there, or it is no byte-level BPE of one of the known kinds.
    """
    folder = Path(folder)
    config = read_file(_Config, folder / "config.json", "a checkpoint's configuration")
    whole = _read_if_there(_Whole, folder / "tokenizer.json") or _Whole()
    settings = _read_if_there(_Settings, folder / "tokenizer_config.json") or _Settings()

    path, vocab = _vocabulary(folder, whole)
    roles = _read_if_there(_Roles, folder / "special_tokens_map.json") or _Roles()
    specials = _special_tokens(folder, vocab, whole, settings)
    plain, late = _flags(folder, whole, settings, {*settings.names(), *roles.names()})
    made = _made_by_merges(*_merges(folder, whole), vocab, specials)
    ranks = _ranks(path, vocab, specials, made)
    pattern, nfc = _pattern(folder / "tokenizer.json", whole, config.model_type)
    _check_bytes(path, ranks, pattern, whole)
    return {
        "ranks": ranks,
        "specials": specials,
        "plain": plain,
        "late": late,
        "model_type": config.model_type,
        "pattern": pattern,
        "nfc": nfc,
        "system": _system(folder, settings, roles, config.model_type),
    }


def _read_if_there(kind, path, limits=IDS):
    return read_file(kind, path, "a tokenizer file", limits) if lexists(path) else None


def _vocabulary(folder, whole):
    """The file that has the vocabulary, and the vocabulary: {token in GPT-2's alphabet: id}."""
    path = folder / "vocab.json"
    vocab = _read_if_there(dict[str, int], path)
    if vocab is not None:
        theirs = whole.model.vocab or {}
        for token, i in vocab.items():
            if theirs.get(token, i) != i:
                raise UserError(
                    f"{path}: token {show(token)} has id {i}, in tokenizer.json {theirs[token]}"
                )
        return path, vocab
    path = folder / "tokenizer.json"
    if not lexists(path):
        raise UserError(
            f"{folder}: neither vocab.json nor tokenizer.json, expected the checkpoint's tokenizer"
        )
    if whole.model.vocab is None:
        raise UserError(f"{path}: no 'model.vocab', expected tokens and their ids")
    return path, whole.model.vocab


def _special_tokens(folder, vocab, whole, settings):
    """{special token: id}, from whichever of the files name them."""
    pairs = [(token.content, token.id) for token in whole.added_tokens]
    pairs += (_read_if_there(dict[str, int], folder / "added_tokens.json") or {}).items()
    for number, token in settings.added_tokens_decoder.items():
        if not number.isdecimal() or len(number) > 10 or int(number) > IDS.high:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: 'added_tokens_decoder' has the id "
                f"{show(number)}, expected a whole number"
            )
        pairs.append((token.content, int(number)))
    specials = {name: vocab[name] for name in QWEN_SPECIAL if name in vocab}
    for name, i in pairs:
        if specials.setdefault(name, i) != i:
            raise UserError(
                f"{folder}: its tokenizer files give {show(name)} the ids {specials[name]} and {i}"
            )
        try:
            name.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            raise UserError(f"{folder}: the special token {show(name)} is no text") from None
    if not specials and len(vocab) == QWEN_VOCABULARY:
        return dict(QWEN_SPECIAL)  # Qwen's own vocabulary, whose file ends where these begin
    return specials


def _flags(folder, whole, settings, with_a_role):
    """The added tokens that are not special, and those that are looked for in normalised text.

    A token is special unless a file says that it is not; one with a role always is, and so are
    ChatML's own: text from a row must never end a turn.
    """
    is_special = dict.fromkeys((*QWEN_SPECIAL, *with_a_role), True)
    always = frozenset(is_special)
    late = set()
    tokens = [*whole.added_tokens, *settings.added_tokens_decoder.values()]
    for token in tokens:
        if token.normalized:
            late.add(token.content)
        if token.content in always or token.special is None:
            continue
        if is_special.setdefault(token.content, token.special) != token.special:
            raise UserError(
                f"{folder}: its tokenizer files differ in whether {show(token.content)} is special"
            )
    plain = {name for name, said in is_special.items() if not said}
    for token in tokens:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.content in plain and getattr(token, flag):
                raise UserError(
                    f"{folder}: the added token {show(token.content)} has '{flag}', which is "
                    "supported for special tokens alone"
                )
    return plain, late


def _ranks(path, vocab, specials, made):
    """{bytes: id} of the ordinary tokens: the lower its id, the earlier a token is merged.

    An added token is one where it is a word of the vocabulary that text can reach: a character, or
    made by merges.
    """
    byte_of = byte_of_character()
    ranks, owners = {}, {}
    for token, i in (vocab | specials).items():
        if owners.setdefault(i, token) != token:
            raise UserError(
                f"{path}: token {show(token)} has id {i}, expected one that no other token has"
            )
        reached = token in vocab and (len(token) == 1 or token in made)
        if token in specials and not reached:
            continue
        try:
            ranks[bytes(byte_of[c] for c in token)] = i
        except KeyError:
            raise UserError(
                f"{path}: token {show(token)} is not written in GPT-2's byte alphabet; expected "
                "a byte-level BPE"
            ) from None
    return ranks


def byte_of_character():
    """GPT-2 writes each byte of a token as one printable character; the way back, {char: byte}."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def _pattern(path, whole, model_type):
    """(a key of PATTERNS, whether text is normalised) of tokenizer.json or else the model type."""
    if whole.normalizer not in (None, {"type": "NFC"}):
        raise UserError(
            f"{path}: 'normalizer' is {show(whole.normalizer)}, supported: none, or of the type NFC"
        )
    if whole.pre_tokenizer is None:
        if model_type == "llama":
            raise UserError(
                f"{path}: no 'pre_tokenizer', which a llama checkpoint's tokenizer needs"
            )
        return ("gpt2", False) if model_type == "gpt2" else ("qwen", True)
    pre = whole.pre_tokenizer
    steps = pre.get("pretokenizers") if isinstance(pre, dict) else None
    steps = [_step(step) for step in (steps if isinstance(steps, list) else [pre])]
    for name, known in KNOWN_STEPS.items():
        if steps == known:
            return name, whole.normalizer is not None
    raise UserError(
        f"{path}: 'pre_tokenizer' is {show(steps)}, supported: GPT-2's (ByteLevel), Qwen's (Split "
        "by its pattern, ByteLevel) and SmolLM2's (Digits, ByteLevel)"
    )


def _step(step):
    """A pre-tokenizer's step, less what does not change the pieces; comparable with KNOWN_STEPS."""
    if not isinstance(step, dict):
        return step
    kind = step.get("type")
    if kind == "ByteLevel":
        return kind, step.get("add_prefix_space", True), step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits", False)
    if kind == "Split" and isinstance(step.get("pattern"), dict):
        return kind, step["pattern"].get("Regex"), step.get("behavior"), step.get("invert", False)
    return (kind,)


def _merges(folder, whole):
    """The file that has the merges, and the merges; None for them where no file has any."""
    if whole.model.vocab is not None:
        return folder / "tokenizer.json", whole.model.merges
    path = folder / "merges.txt"
    if not lexists(path):
        return path, None
    with named(path):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return path, [line for line in lines if line and not line.startswith("#version")]


def _made_by_merges(path, merges, vocab, specials):
    """The tokens that merges make; none where no file has merges.

    tiktoken merges by id, the reference library by the list of merges: one order, or refused.
    """
    made = set()
    if merges is None:
        return made
    last = 0
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(parts, list) and [type(part) for part in parts] == [str, str]
        i = vocab.get("".join(parts), -1) if is_pair else -1
        if i < last:
            raise UserError(
                f"{path}: the merge {show(merge)} is out of order, expected pairs of tokens in "
                "the order of their ids"
            )
        last = i
        made.add("".join(parts))
    for token in vocab:
        if len(token) > 1 and token not in specials and token not in made:
            raise UserError(f"{path}: no merge makes the token {show(token)} of the vocabulary")
    return made


def _check_bytes(path, ranks, pattern, whole):
    """Every byte is a token, but for those that a byte-level BPE can do without."""
    missing = {b for b in range(256) if bytes([b]) not in ranks}
    left_out = pattern != "qwen" and whole.pre_tokenizer is not None and missing <= EXPENDABLE
    if missing and not left_out:
        raise UserError(
            f"{path}: {len(missing)} of the 256 single bytes are no tokens; expected a "
            "byte-level BPE"
        )
    if missing and whole.model.unk_token is not None:
        raise UserError(
            f"{path}: {len(missing)} of the 256 single bytes are no tokens, and 'unk_token' is "
            f"{show(whole.model.unk_token)}; supported there: none"
        )


def _system(folder, settings, roles, model_type):
    """The default system turn of the folder's chat template, or None."""
    if model_type == "gpt2":
        return None  # its chat form is ours
    where = folder / "chat_template.jinja"
    if lexists(where):
        template = where.read_text(encoding="utf-8", errors="replace")
    else:
        where = folder / "tokenizer_config.json"
        template = settings.chat_template
    if isinstance(template, list):
        named = {entry.name: entry.template for entry in template}
        if "default" not in named:
            raise UserError(f"{where}: 'chat_template' has no template 'default'")
        template = named["default"]
    if not template:
        return QWEN2_SYSTEM if model_type == "qwen2" else None
    has_bos = settings.bos_token is not None or roles.bos_token is not None
    if "bos_token" in template and has_bos:
        raise UserError(
            f"{where}: the chat template writes the bos_token, which is not supported in ChatML"
        )
    return default_system(template, where)
