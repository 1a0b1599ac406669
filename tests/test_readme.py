"""README, pages and notebook: counts, links, spreads are true; commands and code are possible."""

import ast
import importlib
import json
import re

import nbformat
import pytest
from nbclient import NotebookClient
from test_house import OWN, SIX, lines, text_of
from toys import ROOT, parser_of

README = text_of("README.md")
PAGES = [path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))]


def test_line_counts_in_the_readme_are_true():
    counts = dict(re.findall(r"^\| *`?([\w/]+\.py)`? *\| *(\d+) *\|", README, re.M))
    assert counts.keys() == {*SIX}
    assert all(abs(int(counts[name]) - lines([name])) <= 10 for name in SIX)  # a fork adds a few


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_to_a_file(page):
    names = re.findall(r"\]\((?!https?:)([^)#]+)", text_of(page))
    if page.name == "README.md":
        names += re.findall(r"`([a-z_]+/|[a-z_/]+\.(?:py|md|ipynb))`", README)
        assert len(names) > len(SIX)
    assert not [name for name in names if not (ROOT / page.parent / name).exists()]


def spreads(value):
    """Every mean ± standard deviation in a results file, as the tables write it: .123 ± .045."""
    if isinstance(value, dict) and {"mean", "sd"} <= value.keys():
        return {f"{value['mean']:.3f} ± {value['sd']:.3f}".replace("0.", ".")}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(spreads, parts))


def test_every_spread_in_the_readme_is_of_a_committed_result():
    files = sorted(ROOT.glob("docs/results/**/*.json"))
    measured = set().union(*(spreads(json.loads(path.read_text())) for path in files))
    written = re.findall(r"\.\d{3} ± \.\d{3}", README.replace("0.", "."))
    assert written and not [spread for spread in written if spread not in measured]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_commands_of_a_page_have_the_options_that_they_use(page, monkeypatch):
    text = text_of(page).replace("\\\n", " ")
    for program, arguments in set(re.findall(r"\bpython (?:-m )?([\w./]+)([^#&|`\n]*)", text)):
        name = program.removesuffix(".py").replace("/", ".")
        name = f"{name}.__main__" if f"{name}.__main__" in OWN else name
        used = set(re.findall(r"(?<!\S)--[\w-]+", arguments))
        if name in OWN and used:
            two = name == "grasp" and "--model" in used  # it has two parsers
            kind = ["--model", "DIR"] if two else []
            parser = parser_of(monkeypatch, importlib.import_module(name).main, *kind)
            assert used <= parser._option_string_actions.keys(), (program, arguments)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_code_of_a_page_imports_what_is_there(page):
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module in OWN:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_walkthrough_runs_and_its_outputs_are_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "walkthrough.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
