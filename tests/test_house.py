"""The house: six files that can be read alone, rooms that know nothing of each other's business."""

import ast
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest
from toys import ROOT, command

SIX = ("grasp.py", "model.py", "lora.py", "identify.py", "train.py", "eval.py")
MOST_LINES = 1050  # of the six together
WIDTH = 100  # columns
MOST_STATEMENTS = 60  # lines of a function, its docstring included


def python_files():
    """Every Python file of the project, as a path from its root."""
    return sorted(
        path.relative_to(ROOT)
        for path in ROOT.rglob("*.py")
        if not any(part.startswith((".", "out")) for part in path.relative_to(ROOT).parts)
    )


@cache
def parsed(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def own_files():
    """The project's Python files without its tests."""
    return [path for path in python_files() if path.parts[0] != "tests"]


# ---------------------------------------------------------------- sizes


def test_no_python_file_but_the_six_stands_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == set(SIX)


def test_the_six_have_at_most_1050_lines():
    lines = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in SIX)
    assert lines <= MOST_LINES


def test_no_line_is_longer_than_100_columns():
    long = [
        f"{path}:{number}"
        for path in python_files()
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH
    ]
    assert not long


def test_no_function_is_longer_than_60_lines():
    long = [
        f"{path}: {node.name}"
        for path in python_files()
        for node in ast.walk(parsed(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > MOST_STATEMENTS
    ]
    assert not long


# ---------------------------------------------------------------- ruff


def ruff(*arguments):
    program = shutil.which("ruff", path=sysconfig.get_path("scripts")) or shutil.which("ruff")
    assert program, "expected ruff, which requirements-test.txt names"
    return subprocess.run(
        [program, *arguments, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )


def test_every_file_is_formatted():
    done = ruff("format", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_finds_nothing():
    done = ruff("check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_noqa_has_its_rule_and_a_reason_beside_it():
    mark = "# no" + "qa"  # in two parts, so that this line is none
    for path in python_files():
        for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
            if mark in line:
                rule, dash, reason = line.partition(mark)[2].partition(" - ")
                assert rule.startswith(": ") and dash and len(reason.split()) > 1, (path, line)


def test_no_file_reaches_into_anothers_privates():
    """The project's own; tests may look into what they test."""
    for path in own_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom):
                assert not any(alias.name.startswith("_") for alias in node.names), path


# ---------------------------------------------------------------- imports


def module_name(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_main_block(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported(node):
    """The modules that a tree imports, wherever in it, but for `if __name__ == "__main__"`."""
    names = set()
    for child in ast.iter_child_nodes(node):
        if is_main_block(child):
            continue
        if isinstance(child, ast.Import):
            names |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            names.add(child.module)
            names |= {f"{child.module}.{alias.name}" for alias in child.names}
        else:
            names |= imported(child)
    return names


@cache
def graph():
    """{module: the project's modules that it imports, at the top or in a function}."""
    modules = {module_name(path): path for path in own_files()}
    return {
        name: (imported(parsed(path)) & modules.keys()) - {name} for name, path in modules.items()
    }


def circle_from(module, edges, path=()):
    """A path of imports that comes back to where it was; None where there is none."""
    if module in path:
        return path[path.index(module) :] + (module,)
    for other in sorted(edges[module]):
        found = circle_from(other, edges, (*path, module))
        if found:
            return found
    return None


def test_imports_form_no_circle():
    for module in graph():
        found = circle_from(module, graph())
        assert not found, " -> ".join(found)


def test_the_search_for_circles_finds_one():
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set()}
    assert circle_from("a", edges) == ("b", "c", "b")


def reachable(module):
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph()[name]
    return seen


@pytest.mark.parametrize("name", [Path(name).stem for name in SIX])
def test_nothing_that_the_six_can_load_is_of_the_paper_tasks(name):
    assert not [module for module in reachable(name) if module.split(".")[0] == "paper"]


@pytest.mark.parametrize("room", ["hub", "support", "data", "baselines", "real"])
def test_no_room_but_experiments_needs_the_experiment(room):
    for module in graph():
        if module.split(".")[0] == room:
            assert "grasp" not in reachable(module), module


LATE = ("paper", "tiktoken", "urllib.request", "torch.distributed.fsdp", "matplotlib")


def loaded_by(*modules):
    """The names in sys.modules of a fresh process that imports these."""
    code = f"import {', '.join(modules)}, sys; print('\\n'.join(sys.modules))"
    done = command("-c", code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_experiment_loads_nothing_that_it_may_not_need():
    extra = loaded_by("grasp") - loaded_by("torch")
    late = [name for name in extra if name.startswith(LATE)]
    assert "train" in extra and not late


MODEL = """
import torch
from model import GPT, Config, response_loss

config = Config(
    vocab_size=11, n_layer=1, n_head=2, n_kv_head=1, head_dim=4, d_model=8, d_mlp=12,
    max_len=16, norm_eps=1e-6, rope_theta=1e4, tied=True,
)
model = GPT(config)
tokens = torch.randint(11, (2, 6))
response_loss(model, tokens, tokens >= 0).backward()
assert len(model.generate([[1, 2]], 3)[0]) == 3
"""
LORA = """
from lora import add_lora, lora_modules, remove_lora

add_lora(model, 2, 2, "all-linear")
response_loss(model, tokens, tokens >= 0).backward()
assert len(lora_modules(model)) == 7 and not lora_modules(remove_lora(model))
"""
IDENTIFY = """
import torch
from identify import identify
from lora import LoRALinear

model = torch.nn.ModuleDict({"a": LoRALinear(torch.nn.Linear(4, 3), 2, 2)})
assert identify(model)["a"].shape == (3, 1)
"""
ALONE = {"model.py": MODEL, "model.py lora.py": MODEL + LORA, "identify.py lora.py": IDENTIFY}


@pytest.mark.parametrize("files", ALONE)
def test_a_file_works_in_another_project_with_one_other_at_most(files, tmp_path):
    for name in files.split():
        shutil.copy(ROOT / name, tmp_path)
    code = "import sys; sys.path.insert(0, '.')\n" + ALONE[files]
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
