"""Files are whole or absent; what is wrong with somebody else's file ends in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file

from support.files import reading, whole_file, write_json


def test_a_file_is_whole_or_as_it_was_and_nothing_stands_beside_it(tmp_path):
    path = tmp_path / "new" / "file"
    write_json(path, {"a": [1, 2.5, None, "ü"]})
    with pytest.raises(TypeError):
        write_json(path, {"a": torch.ones(1)})
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == path.parent
        raise KeyboardInterrupt
    assert json.loads(path.read_text("utf-8")) == {"a": [1, 2.5, None, "ü"]}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("reader", [lambda path: json.loads(path.read_text("utf-8")), load_file])
@pytest.mark.parametrize(
    "content", [b"", b"hello\n\xff", b"[" * 100_000], ids=["", "bytes", "deep"]
)
def test_whatever_is_wrong_with_a_file_ends_in_one_line_that_names_it(reader, content, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error, reading(path, "a chat row"):
        reader(path)
    start, text = f"{path}: not a chat row: ", str(error.value)
    assert text.startswith(start) and len(text) > len(start) and "\n" not in text


@pytest.mark.parametrize(
    "raised,text",
    [
        (KeyError("messages"), "f: not a row: no 'messages'"),
        (TypeError("one\n  two"), "f: not a row: one two"),
        (RecursionError(), "f: not a row: RecursionError"),
        (FileNotFoundError(2, "No such file", "f"), "[Errno 2] No such file: 'f'"),
    ],
)
def test_what_is_wrong_is_told_and_a_file_that_cannot_be_opened_keeps_its_error(raised, text):
    with pytest.raises((ValueError, FileNotFoundError)) as error, reading("f", "a row"):
        raise raised
    assert str(error.value) == text
