"""What the front pages promise: links lead somewhere, the examples of new things still fit the code."""

import inspect
import re
import xml.etree.ElementTree
from types import SimpleNamespace

import numpy as np
import pytest

from research import config, experiment
from research.model import balance
from research.precision import recipe
from tests.training import runs

ROOT = runs.ROOT
PAGES = sorted(path.relative_to(ROOT).as_posix() for folder in (".", "launch", "research", "results")
               for path in (ROOT / folder).glob("README.md" if folder == "." else "**/README.md"))


def examples() -> list[str]:
    """The Python of "Adding one thing", in order: a rule, a recipe, a table."""
    section = (ROOT / "README.md").read_text().split("\n## Adding one thing\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def requests() -> list[tuple[str, list[str]]]:
    """The experiments of all pages but README's examples of new ones, each with the fields that a command changes."""
    page = "\n".join((ROOT / name).read_text().split("\n## Adding one thing\n")[0] for name in PAGES)
    page = page.replace("\\\n", " ")
    modules = r"research\.(?:main|account|lowering|accounting\.memory)"
    commands = re.findall(rf"^(?:\$ |env \S+ | {{4}})?python -m {modules} (.*--config=.*)$", page, re.MULTILINE)
    return [(re.search(r"--config=(\S+)", words)[1], re.findall(r"--config\.(\S+=\S+)", words))
            for words in dict.fromkeys(commands)]


@pytest.mark.parametrize("file, fields", requests())
def test_a_request_is_a_right_one(file, fields):
    config.check(experiment.change(experiment.load(f"{ROOT / file}"), fields))


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings of plain words."""
    return {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "COMPARISON.md"])
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", (ROOT / name).read_text()):
        file, _, anchor = link.partition("#")
        page = (ROOT / name).parent / file if file else ROOT / name
        assert page.exists(), link
        assert not anchor or anchor in anchors(page.read_text()), link


def test_readme_leads_to_every_page():
    links = set(re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text()))
    assert {*PAGES} - {"README.md"} <= links and len(PAGES) == 10


def test_the_picture_names_files_that_are_there():
    text = "".join(xml.etree.ElementTree.parse(ROOT / "architecture.svg").getroot().itertext())
    files = re.findall(r"\w+/\w+\.py", text)
    assert len(files) == 9 and all((ROOT / "research" / file).is_file() for file in files)


def test_the_rule_fits_where_it_is_put():
    source, before = inspect.getsource(balance.update_bias), "    else:\n"
    assert source.count(before) == 1
    exec(source.replace(before, examples()[0] + before), names := dict(vars(balance)))
    moved = names["update_bias"](np.zeros(3), np.array([0.0, 4, 20]), SimpleNamespace(bias_update="root"), 0.1)
    np.testing.assert_allclose(moved, [0.1, 0.1 * 0.5**0.5, -0.1 * 1.5**0.5], rtol=1e-6)


def test_the_recipe_is_one():
    made, = eval(f"({examples()[1]})", dict(vars(recipe)))
    assert made.quantized and made.input_gradient.left.kind == "e5m2" and made.name not in recipe.RECIPES
    assert {made.forward.right, made.input_gradient.right} == {recipe.BLOCK}


def test_the_table_gives_what_is_printed():
    exec(examples()[2], names := {})
    rows = names["analytic"]()
    same = sum(row.difference() == "equal" for row in rows)
    printed = f"\ndeepseek_parameters   {same} of {len(rows)} of the paper's figures equal"
    assert printed in (ROOT / "README.md").read_text()
