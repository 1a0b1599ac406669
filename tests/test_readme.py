"""The README's claims about the files themselves."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHOD_FILES = ("grasp.py", "lora.py", "model.py", "identify.py", "train.py", "eval.py")
lines = lambda path: len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_line_counts_in_the_readme_are_true():
    rows = re.findall(r"^\| (`[^|]+) \| (\d+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    told = {tuple(re.findall(r"`([^`]+)`", files)): int(count) for files, count in rows}
    assert {files: sum(map(lines, files)) for files in told} == told
    assert {name for files in told for name in files} == {str(p.relative_to(ROOT)) for folder in (".", "data")
                                                          for p in (ROOT / folder).glob("*.py")}


def test_the_six_method_files_stay_within_1300_lines():
    assert sum(map(lines, METHOD_FILES)) <= 1300


def test_imports_go_one_way():
    order = ["cli", "parallel", "checkpoint", "data", "model", "lora", "identify", "baselines", "train", "judge", "answers", "figures", "eval",
             "paper", "grasp", "study", "phase", "bench"]
    for path in ROOT.glob("*.py"):
        names = [n.name if isinstance(node, ast.Import) else node.module for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, (ast.Import, ast.ImportFrom)) for n in node.names]
        ours = {name.split(".")[0] for name in names} & set(order)
        assert all(order.index(name) < order.index(path.stem) for name in ours), (path.name, ours)


def test_no_file_reaches_into_anothers_privates():
    for path in (*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not any(n.name.startswith("_") for n in node.names), path.name
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                assert not node.attr.startswith("_") or node.attr.startswith("__"), (path.name, node.attr)
