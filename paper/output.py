"""Results on disk: their folder, tried before there is work to lose, and files of JSON lines."""

import json
import tempfile
from pathlib import Path

from support.errors import UserError


def writable_folder(folder, names=()):
    """`folder` as a Path, made where there was none.

    UserError where no file can be written in it, or one of the file `names` is a folder there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(
            f"--out {folder}: {e.strerror}, expected a folder that files can be written to"
        ) from None
    for name in names:
        if (folder / name).is_dir():
            raise UserError(f"{folder / name}: is a folder, expected room for a file of that name")
    return folder


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
