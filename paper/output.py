"""Files of JSON lines that we have written, read back."""

import json
from pathlib import Path

from support.errors import UserError


def read_jsonl(path, what):
    """Yield ("file:line", value) of each line of a JSONL file that we have written.

    UserError where a line is no JSON; `what` says what it should have been.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: not valid JSON ({e}), expected {what}") from None
        yield where, value
