r"""The default system turn of a checkpoint, read from its own chat template.

A chat template is a Jinja program. It is not run here (it comes with somebody's weights, and Jinja
is no requirement of ours): its text is searched for the two forms in which ChatML templates write
down a default system turn,

    '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n'       a whole turn, as a string
                                                                         or as plain text
    {% set system_message = 'You are a helpful assistant.' %}            a variable for its text

which cover Qwen2, Qwen2.5, SmolLM2 and what fine-tuning tools write. With none of them there is no
default system turn, as in Qwen3. A template is refused where that cannot be told: it is no ChatML,
it has two different defaults, or one in a form that is neither of these; and where it strips
contents or writes other special tokens. What else it may do to a turn's text is not seen.
"""

import re
from dataclasses import dataclass

from support.errors import UserError
from support.schema import show

STRING = r"'(?:[^'\\]|\\.)*'" + r'|"(?:[^"\\]|\\.)*"'
OPENING = re.compile(r"\{[{%#]")
CLOSING = {"{{": "}}", "{%": "%}", "{#": "#}"}
LITERAL = re.compile(STRING, re.DOTALL)
IN_CODE = re.compile(rf"{STRING}|\}}\}}|%\}}|['\"]", re.DOTALL)  # the last: of no whole string
JOINED = re.compile(r"\s*[+~]\s*")  # between two strings that make one
SYSTEM_TURN = re.compile(r"<\|im_start\|>system\n((?:(?!<\|im_).)*)<\|im_end\|>", re.DOTALL)
OTHER_TOKEN = re.compile(r"<\|(?!im_start\|>|im_end\|>)\w+\|>")
NO_NEWLINE = re.compile(r"<\|im_end\|>[^\n]")
NOT_PLAIN = re.compile(r"\beos_token\b|\|\s*trim\b|\.[lr]?strip\(\s*\)")
OPENING_TURN = "<|im_start|>system\n"
# From there to what is written next: in the same expression, or in the next one.
GOES_ON = re.compile(r"\s*(?:[+~]|(?:-?\}\})?\s*(?:\{%[^%]*%\}\s*)*\{\{-?)\s*")
ITS_TEXT = re.compile(r"[\w.\[\]'\"]*?(?:content|system)")
SET = re.compile(r"[-+]?\s*set\s+(\w+)\s*=\s*[-+]?\s*$")


@dataclass(frozen=True)
class _Piece:
    """Plain text, or a string of the code: the text, and from where to where it stands."""

    text: str
    start: int
    end: int


def default_system(template, where):
    """The text of the system turn that a chat without one begins with, or None.

    template: the Jinja source. where: its file, for the UserError.
    """
    if "<|im_start|>" not in template:
        raise UserError(
            f"{where}: the chat template is no ChatML (<|im_start|>role ... <|im_end|>), "
            "the one form that is supported"
        )
    try:
        texts, strings, variables = _parts(template)
    except ValueError as e:
        raise UserError(f"{where}: the chat template can't be read ({e})") from None

    turns = [turn for piece in texts + strings for turn in SYSTEM_TURN.findall(piece.text)]
    defaults = sorted({*turns, *variables})
    if len(defaults) > 1:
        raise UserError(
            f"{where}: the chat template has {len(defaults)} default system turns "
            f"({show(defaults)}), expected at most one"
        )
    sayings = [piece.text for piece in strings if piece.text.startswith("You are")]
    unexplained = [saying for saying in sayings if saying.strip() not in defaults]
    if unexplained or "" in variables:
        text = unexplained[0] if unexplained else ""
        raise UserError(
            f"{where}: the chat template says {show(text)} in a form that is not supported, "
            "expected the default system turn as one string or none"
        )
    for piece in texts + strings:
        _check_system_turn(piece, template, defaults, where)
    written = [piece.text for piece in texts + strings]
    odd = [OTHER_TOKEN.search(text) or NO_NEWLINE.search(text) for text in written]
    for found in (*odd, NOT_PLAIN.search(template)):
        if found:
            raise UserError(
                f"{where}: the chat template has {show(found[0])}, expected plain ChatML: "
                "<|im_start|>role, a newline, the content as it is, <|im_end|>, a newline"
            )
    return defaults[0] if defaults else None


def _check_system_turn(piece, template, defaults, where):
    """UserError where the piece opens a system turn whose text can't be told."""
    _, opening, rest = SYSTEM_TURN.sub("", piece.text).partition(OPENING_TURN)
    if not opening:
        return
    if not rest:  # what follows in the template must be the text
        link = GOES_ON.match(template, piece.end)
        begin = link.end() if link else piece.end
        literal = LITERAL.match(template, begin)
        if ITS_TEXT.match(template, begin):
            return
        if literal and _unescaped(literal[0][1:-1]) in defaults:
            return
        rest = template[begin : begin + 40]
    raise UserError(
        f"{where}: the chat template opens a system turn and goes on with {show(rest)}, expected a "
        "message's content, or the default turn as one string"
    )


def _parts(template):
    """A template's stretches of plain text, its strings, and the strings set as a system variable.

    Strings are joined where the code adds them up.
    """
    texts, strings, variables = [], [], []
    position = 0
    while (opening := OPENING.search(template, position)) is not None:
        texts.append(_Piece(template[position : opening.start()], position, opening.start()))
        position = opening.end()
        if opening[0] == "{#":
            position = _end_of_comment(template, position)
            continue
        inside, end = _strings(template, position, CLOSING[opening[0]])
        variable = SET.match(template[position : inside[0].start]) if inside else None
        if variable and "system" in variable[1]:
            rest = template[inside[0].end : end - len("%}")]
            if rest.strip(" \t\r\n-+"):
                raise ValueError("a system variable is set to more than a string")
            variables.append(inside[0].text)
        strings += inside
        position = end
    texts.append(_Piece(template[position:], position, len(template)))
    return texts, strings, variables


def _end_of_comment(template, position):
    end = template.find("#}", position)
    if end < 0:
        raise ValueError("a comment has no end")
    return end + 2


def _strings(template, position, closing):
    """The strings of the code that begins at `position`, and where the code ends."""
    found = []
    while True:
        match = IN_CODE.search(template, position)
        if match is None:
            raise ValueError(f"a statement has no {closing}")
        position = match.end()
        if match[0] == closing:
            return found, position
        if match[0] in ("'", '"'):
            raise ValueError("a string has no end")
        if match[0] in CLOSING.values():  # two braces of the code's own
            continue
        text = _unescaped(match[0][1:-1])
        if found and JOINED.fullmatch(template, found[-1].end, match.start()):
            found[-1] = _Piece(found[-1].text + text, found[-1].start, match.end())
        else:
            found.append(_Piece(text, *match.span()))


def _unescaped(literal):
    r"""A string's text, its \n and the like resolved, as Jinja does it."""
    return literal.encode("ascii", "backslashreplace").decode("unicode-escape")
