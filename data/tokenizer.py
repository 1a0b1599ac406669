"""A checkpoint's tokenizer through tiktoken, offline, from the files in its own folder.

Byte-level BPE in GPT-2's alphabet, as GPT-2, Qwen and SmolLM2 have it. They differ in the pattern
that cuts a text into the pieces within which bytes are merged.
"""

import heapq
import itertools
import re
import unicodedata

import tiktoken

from hub.tokenizer import read_tokenizer
from support.errors import UserError
from support.schema import show

# The reference patterns, but for how white space is written: the reference's `\s+(?!\S)|\s+` takes
# all of it but the last character before a word, and so does this, with a smaller stack.
SPACE = r"\s++$|\s+(?!\S)|\s"
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
PATTERNS = {
    "gpt2": rf"{WORDS}| ?\p{{N}}+|{SPACE}",
    # every digit by itself, before anything else: white space before it stays whole
    "digits": rf"{WORDS}|\p{{N}}|\s++(?=\p{{N}})|{SPACE}",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{SPACE}",
}
WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # what \s is to tiktoken
LONG = 1000  # characters of white space in a row, or combining marks, that are handled apart
LONG_SPACE = re.compile(rf"(?<![{WHITE}])[{WHITE}]{{{LONG},}}")
LAST_WHITE = re.compile(rf"[{WHITE}]")
LONG_MARKS = re.compile(rf"(?<![\u0300-\U0010ffff])[\u0300-\U0010ffff]{{{LONG},}}")  # or letters
OTHER_PIECE = re.compile(rf" ?[^\w{WHITE}]+")  # ` ?[^\s\p{L}\p{N}]+`, but for "_"
PLANES = {
    0xF1: "\U00040000-\U0007ffff",
    0xF2: "\U00080000-\U000bffff",
    0xF3: "\U000c0000-\U000fffff",
    0xF4: "\U00100000-\U0010ffff",
}  # what begins with these bytes


class Tokenizer:
    """`encode` takes special tokens in a text as ordinary text; `special` looks their ids up.

    model_type: the checkpoint's. system: the text of the default system turn of its chat template,
    or None. specials: {name: id}, all added tokens. plain: those of them that are not special, such
    as Qwen3's <think>, which have their own id in text too. known_ids: every id that decodes,
    ascending; an embedding is padded beyond them.
    """

    def __init__(self, ranks, specials, model_type, pattern, nfc, system=None, plain=(), late=()):
        """ranks: {bytes: id}. pattern: a key of PATTERNS. nfc: whether text is normalised first.

        late: the added tokens that are looked for after that.
        """
        self.encoding = tiktoken.Encoding(
            model_type,
            pat_str=PATTERNS[pattern],
            mergeable_ranks=ranks,
            special_tokens=specials,
        )
        self.ranks, self.pattern, self.nfc = ranks, pattern, nfc
        self.specials, self.model_type, self.system = specials, model_type, system
        self.known_ids = sorted({*ranks.values(), *specials.values()})
        # what is looked for in text before it is normalised, and after: {as it stands there: name}
        normal = _nfc if nfc else str
        self.early = {name: name for name in specials if name and name not in late}
        self.late = {normal(name): name for name in specials if name and name in late}
        self.plain = frozenset(plain)
        self.missing = frozenset(b for b in range(256) if bytes([b]) not in ranks)
        self.needs_missing = re.compile(_characters_with(self.missing)) if self.missing else None

    @classmethod
    def from_folder(cls, folder):
        """The tokenizer of a checkpoint folder; UserError where it is of no kind that we know."""
        return cls(**read_tokenizer(folder))

    def encode(self, text):
        """The ids of `text`: a plain added token's own id, the rest is taken as ordinary text."""
        text = _without_half_pairs(text)
        ids = []
        for part, added in self._cut(text, self.early):
            if added is not None:
                ids.append(added)
                continue
            if self.nfc:
                part = _nfc(part)
            for piece, added in self._cut(part, self.late):
                ids += self._ordinary(piece) if added is None else [added]
        return ids

    def _cut(self, text, names):
        """`text`, cut at its plain added tokens: [(part, the token's id or None)].

        Of the tokens that overlap, the one that begins first counts, the longest if several do. A
        special token stays in the text, and what overlaps it is not looked for.
        """
        if self.plain.isdisjoint(names.values()):
            return [(text, None)]
        longest_first = sorted(names, key=len, reverse=True)
        parts, position = [], 0
        for match in re.finditer("|".join(map(re.escape, longest_first)), text):
            name = names[match[0]]
            if name in self.plain:
                parts.append((text[position : match.start()], None))
                parts.append((match[0], self.specials[name]))
                position = match.end()
        return [*parts, (text[position:], None)]

    def _ordinary(self, text):
        """The ids of `text`, all of it taken as ordinary text."""
        ids = []
        for part, is_odd in self._parts(text):
            if is_odd:
                present = bytes(b for b in part.encode() if b not in self.missing)
                ids += _merge(present, self.ranks)
            else:
                ids += self.encoding.encode_ordinary(part)
        return ids

    def decode(self, ids):
        """The text of `ids`; bytes that make no character become a replacement character."""
        return self.encoding.decode(ids)

    def special(self, name):
        """The id of a special token."""
        if name not in self.specials:
            there = show(list(self.specials)) if self.specials else "none"
            raise UserError(
                f"the tokenizer has no special token {name}, which the chat form of a "
                f"{self.model_type} checkpoint needs; there are {there}"
            )
        return self.specials[name]

    @property
    def end_of_turn(self):
        """The id that ends a response: <|im_end|> in ChatML, <|endoftext|> for GPT-2."""
        return self.special("<|endoftext|>" if self.model_type == "gpt2" else "<|im_end|>")

    def _parts(self, text):
        """`text`, cut where the pattern cuts it too: [(part, whether it is an odd piece)].

        Most texts are one part. An odd piece has a byte without a token, which is left out, as in
        the reference library; and before the end of a long run of white space there is a cut, since
        tiktoken's matcher overflows on it.
        """
        cuts = {0: False, len(text): False}  # position: whether an odd piece begins there
        if len(text) > LONG:
            for run in LONG_SPACE.finditer(text):
                cuts[self._end_of_piece(text, run.end(), run[0][-1])] = False
        if self.needs_missing is not None and self.needs_missing.search(text):
            for piece in OTHER_PIECE.finditer(text.replace("_", "-")):
                start, end = piece.span()
                if not self.needs_missing.search(text, start, end):
                    continue
                if text[start] != " " and LAST_WHITE.match(text, start - 1):
                    cuts[start - 1] = False  # the last of white space stands by itself
                cuts[start] = True
                cuts.setdefault(end, False)
        places = sorted(cuts)
        return [(text[start:end], cuts[start]) for start, end in itertools.pairwise(places)]

    def _end_of_piece(self, text, end, last):
        """Where the piece ends that holds most of the run of white space before `end`."""
        if end == len(text):
            return end
        if self.pattern == "qwen" and last in "\r\n":  # a run up to its last newline is one piece
            return end
        if self.pattern == "digits" and unicodedata.category(text[end]).startswith("N"):
            return end
        return end - 1  # the last character belongs to the next word, or is by itself


def _characters_with(missing):
    """A pattern for the characters whose UTF-8 has a byte of `missing`, a set of EXPENDABLE."""
    control = "".join(re.escape(chr(b)) for b in sorted(missing) if b < 0x80)
    planes = "".join(characters for byte, characters in PLANES.items() if byte in missing)
    return f"[{control}{planes}]" if control or planes else "(?!)"


def _without_half_pairs(text):
    """JSON can hold half of a surrogate pair, UTF-8 can't: it becomes a replacement character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _nfc(text):
    """`text` in Unicode's normal form C.

    Python's own sorts combining marks by insertion: a million in a row would take hours. Long
    stretches that can hold some are decomposed here first, which leaves nothing to sort.
    """
    if len(text) > LONG:
        text = LONG_MARKS.sub(_decomposed, text)
    return unicodedata.normalize("NFC", text)


def _decomposed(match):
    """The matched text in Unicode's normal form D: marks in a row by their combining class."""
    characters, marks = [], []
    for c in "".join(unicodedata.normalize("NFD", c) for c in match[0]):
        if unicodedata.combining(c):
            marks.append(c)
        else:
            characters += sorted(marks, key=unicodedata.combining)
            characters.append(c)
            marks = []
    characters += sorted(marks, key=unicodedata.combining)
    return "".join(characters)


def _merge(piece, ranks):
    """The ids of one piece (bytes) by BPE, for the pieces that tiktoken can't be given.

    Of all neighbours that make a token, those of the lowest rank are joined first, from the left.
    A heap holds the pairs, so that it takes O(n log n).
    """
    n = len(piece)
    end = list(range(1, n + 1))  # end[i]: where the part that begins at i ends
    before = list(range(-1, n))  # before[i]: where the part before it begins
    is_part = [True] * (n + 1)
    pairs = []

    def offer(left):
        """Put the part that begins at `left`, and the one after it, among the pairs."""
        if left < 0 or end[left] == n:
            return
        middle = end[left]
        rank = ranks.get(piece[left : end[middle]])
        if rank is not None:
            heapq.heappush(pairs, (rank, left, middle, end[middle]))

    for i in range(n):
        offer(i)
    while pairs:
        _, left, middle, right = heapq.heappop(pairs)
        if not is_part[left] or end[left] != middle or end[middle] != right:
            continue  # one of the two has been joined to something else since
        end[left] = right
        is_part[middle] = False
        before[right] = left
        offer(before[left])
        offer(left)
    return [ranks[piece[i : end[i]]] for i in range(n) if is_part[i]]
