"""Files are whole or absent, and errors name them."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from support.errors import UserError
from support.files import (
    contents,
    open_safetensors,
    read_json,
    whole_file,
    write_json,
    write_torch,
)


def test_a_file_is_renamed_into_place(tmp_path):
    with whole_file(tmp_path / "new" / "file") as temporary:
        temporary.write_text("all of it")
        assert not (tmp_path / "new" / "file").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as error, whole_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.filename == str(tmp_path / "file")


def test_json_comes_back(tmp_path):
    value = {"a": [1, 2.5, None, "ü"]}
    write_json(tmp_path / "f.json", value)
    assert read_json(tmp_path / "f.json", "a value") == value


def test_a_tensor_comes_back(tmp_path):
    write_torch(tmp_path / "f.pt", {"a": torch.arange(3)})
    assert torch.load(tmp_path / "f.pt", weights_only=True)["a"].tolist() == [0, 1, 2]


BAD_JSON = {
    "empty": b"",
    "torn": b'{"a": [1, 2',
    "another text": b"hello",
    "not UTF-8": b'{"a": "\xff"}',
    "100,000 brackets": b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000,
    "a number of 5,000 digits": b"9" * 5000,
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_what_is_no_json_ends_in_one_line_that_names_the_file(content, tmp_path):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "f.json", "the results of a run")
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'f.json'}: not valid JSON (")
    assert text.endswith("expected the results of a run") and "\n" not in text


def test_an_absent_json_file_says_what_it_should_be(tmp_path):
    with pytest.raises(UserError, match="f.json: no such file, expected the results of a run"):
        read_json(tmp_path / "f.json", "the results of a run")


def test_safetensors_are_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "f")
    with open_safetensors(tmp_path / "f") as f:
        assert list(f.keys()) == ["a"]


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 64, json.dumps({"a": 1}).encode()])
def test_what_is_no_safetensors_file_ends_in_one_line(content, tmp_path):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match="f: not a whole safetensors file") as error:
        open_safetensors(tmp_path / "f")
    assert "\n" not in str(error.value)


def test_a_torn_safetensors_file_ends_in_one_line(tmp_path):
    save_file({"a": torch.ones(20)}, tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-4])
    with pytest.raises(UserError, match="f: not a whole safetensors file"):
        open_safetensors(tmp_path / "f")


def test_an_absent_safetensors_file_says_so(tmp_path):
    with pytest.raises(UserError, match="f: no such file, expected safetensors"):
        open_safetensors(tmp_path / "f")


def test_a_folder_is_no_safetensors_file(tmp_path):
    with pytest.raises(UserError, match="is a folder, expected a safetensors file"):
        open_safetensors(tmp_path)


def test_other_contents_have_another_fingerprint(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(10_000_000))
    found = {contents(file)}
    for at in (0, 9_999_999 // 2 // 9765 * 9765):  # where a block begins
        changed = bytearray(10_000_000)
        changed[at] = 1
        file.write_bytes(changed)
        found.add(contents(file))
    file.write_bytes(bytes(10_000_001))
    found.add(contents(file))
    assert len(found) == 4
    before = contents(tmp_path)
    (tmp_path / "more").write_text("x")
    assert contents(tmp_path) != before
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        contents(tmp_path / "nowhere")
