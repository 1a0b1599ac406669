"""The house: its sizes, its one way of imports, and what a program has to say of itself."""

import ast
import graphlib
import importlib
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pytest
from toys import ROOT, command, parser_of

SIX = ("grasp.py", "model.py", "lora.py", "identify.py", "train.py", "eval.py")
ROOMS = ("baselines", "data", "real", "paper", "experiments", "support")
LATE = ("tiktoken", "jinja2", "requests", "transformers", "matplotlib", "yaml", "paper", "real")


def files(*folders):
    """Every Python file of these folders, as a path from the root."""
    return [path.relative_to(ROOT) for name in folders for path in (ROOT / name).rglob("*.py")]


def module_name(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OWN = {module_name(path): path for path in (*map(Path, SIX), *files(*ROOMS))}


def text_of(path):
    return (ROOT / path).read_text(encoding="utf-8")


def lines(paths):
    """Lines of all these files: docstrings, comments and blank ones included."""
    return sum(len(text_of(path).splitlines()) for path in paths)


@cache
def loaded():
    """{module: what is loaded once it is, too}: one after another in one fresh process."""
    modules = ("lora", "model", "grasp", "experiments.report")
    done = command("-c", "\n".join(f"import sys, {name}; print(*sys.modules)" for name in modules))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {name: set(line.split()) for name, line in zip(modules, lines, strict=True)}


def test_the_six_the_rooms_and_the_tests_keep_their_budgets():
    found = lines(SIX), lines(files(*ROOMS)), lines(files("tests"))
    assert found[0] <= 1100 and found[1] <= 4000 and found[2] <= 5000


def test_a_quick_run_loads_at_most_1700_lines_of_the_project():
    assert lines(OWN[name] for name in OWN.keys() & loaded()["experiments.report"]) <= 1700


def test_every_python_file_is_one_of_the_six_or_in_a_room():
    assert {path.name for path in ROOT.glob("*.py")} == set(SIX)
    folders = {path.parts[0] for path in files(".") if len(path.parts) > 1}
    assert {name for name in folders if name[0] != "." and name != "out"} == {*ROOMS, "tests"}
    assert all(len(path.parts) <= 2 for path in OWN.values())


@pytest.mark.parametrize("arguments", [("format", "--check"), ("check",)])
def test_every_file_is_formatted_and_the_linter_finds_nothing(arguments):
    program = shutil.which("ruff", path=sysconfig.get_path("scripts")) or shutil.which("ruff")
    assert program, "expected ruff, which requirements-test.txt names"
    done = subprocess.run([program, *arguments, "--no-cache", "."], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def imports(path):
    """The project's modules that a file imports at its top level."""
    names = set()
    for node in ast.parse(text_of(path)).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & OWN.keys() - {module_name(path)}


def test_imports_form_no_circle():
    edges = {name: imports(path) for name, path in OWN.items()}
    assert "lora" in edges["train"] and "data.base" in edges["grasp"]
    graphlib.TopologicalSorter(edges).prepare()  # its error names the circle


def test_the_experiment_loads_nothing_that_it_may_not_need():
    extra = loaded()["grasp"] - loaded()["model"]  # torch has some of these
    assert "train" in extra and not {name.split(".")[0] for name in extra} & set(LATE)


def test_the_model_and_its_lora_can_be_copied_alone():
    assert loaded()["model"] & OWN.keys() == {"model", "lora"}


PROGRAMS = [(name,) for name, path in OWN.items() if 'if __name__ == "__main__"' in text_of(path)]


@pytest.mark.parametrize("program", [*PROGRAMS, ("grasp", "--model", "DIR")], ids=" ".join)
def test_every_program_says_what_it_does_and_what_each_option_is_for(program, monkeypatch):
    module, *arguments = program
    assert text_of(OWN[module]).endswith('if __name__ == "__main__":\n    run(main)\n')
    parser = parser_of(monkeypatch, importlib.import_module(module).main, *arguments)
    assert "usage:" in parser.format_help() and len(parser.description.split()) > 4
    assert not [action.dest for action in parser._actions if not action.help]
