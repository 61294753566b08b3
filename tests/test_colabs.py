"""The notebooks as they are committed: what each holds, and that what it calls exists. None is executed here."""

import ast
import base64
import importlib
import inspect
import io
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colabs import REPOSITORY
from colabs.__main__ import main
from colabs.form import KEPT, SIGNED, badge, first_cell, is_noise, merged, slim

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "colabs").glob("*.ipynb"))
LARGEST = 450_000  # bytes of a notebook: what a reader of its diff can bear
OURS = ("research", "kernels", "experiments", "colabs")
HOST = ("IPython",)  # of the kernel's environment, which the tests' lacks


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return request.param.stem, json.loads(request.param.read_text())


def code(cells) -> str:
    """The notebook as one program: what IPython alone understands is left out, the names it reads are kept."""
    lines = []
    for cell in cells:
        if cell["cell_type"] == "code":
            for line in "".join(cell["source"]).splitlines():
                lines.append("; ".join(re.findall(r"(?<=\{)[\w.]+(?=\})", line)) if line.startswith("!") else line)
    return "\n".join(lines)


def missing(source: str) -> list[str]:
    """What the program imports, reads of our modules or passes to our functions that does not exist."""
    tree, names, wrong = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module, top = importlib.import_module(alias.name), alias.name.split(".")[0]
                names[alias.asname or top] = module if alias.asname else importlib.import_module(top)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] not in HOST:
            module = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    names[alias.asname or alias.name] = getattr(module, alias.name, None) or importlib.import_module(
                        f"{node.module}.{alias.name}")
                except ImportError:
                    wrong.append(f"{node.module}.{alias.name}")
    held = instances(tree, names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id)
            if owner is not None and is_ours(owner) and not hasattr(owner, node.attr):
                wrong.append(f"{node.value.id}.{node.attr}")
            kind = held.get(node.value.id)
            if kind and node.attr not in {*dir(kind), *re.findall(r"self\.(\w+)", inspect.getsource(kind))}:
                wrong.append(f"{node.value.id}.{node.attr} of {kind.__name__}")
        elif isinstance(node, ast.Call):
            function = target(node.func, names, held)
            if function is not None and is_ours(function) and callable(function):
                wrong += unfit(function, node)
    return wrong


def instances(tree, names) -> dict[str, type]:
    """{name: class} of what is assigned from a call of one of our classes."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
            kind = target(node.value.func, names, {})
            if inspect.isclass(kind) and is_ours(kind):
                found[node.targets[0].id] = kind
    return found


def target(node, names, held):
    """The object that an expression names, where it is a name or an attribute of one; None elsewhere."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if kind := held.get(node.value.id):
            method = inspect.getattr_static(kind, node.attr, None)
            return method.__get__(object()) if inspect.isfunction(method) else None
        return getattr(names.get(node.value.id), node.attr, None)
    return None


def is_ours(thing) -> bool:
    name = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", None) or ""
    return name.split(".")[0] in OURS


def unfit(function, call) -> list[str]:
    """Why a call does not fit the function's parameters; nothing where it may unpack anything."""
    if any(isinstance(argument, ast.Starred) for argument in call.args) or any(k.arg is None for k in call.keywords):
        return []
    try:
        inspect.signature(function).bind(*call.args, **{word.arg: word.value for word in call.keywords})
    except TypeError as error:
        return [f"{function.__name__}: {error}"]
    return []


def test_there_are_notebooks():
    assert {"cost", "distillation", "fp8", "mla", "multi_token", "paper_tables", "quickstart", "routing"} <= {
        path.stem for path in PATHS}


def test_imports_and_calls_exist(notebook):
    assert not missing(code(notebook[1]["cells"]))


@pytest.mark.parametrize("source, said", [
    ("from research.studies import nothing", "research.studies.nothing"),
    ("from research.studies import mla\nmla.draw_caches(1, 2)", "mla.draw_caches"),
    ("from research.studies import mla\nmla.compare(slot=1)", "compare: missing a required argument: 'slots'"),
    ("from research.studies import mla\nmla.compare(1, 2, 3)", "compare: too many positional arguments"),
    ("from research.studies import routing\nx = routing.Routed('a')\nx.texts(1, 2)", "x.texts of Routed"),
    ("from research.studies import routing\nx = routing.Routed('a')\nx.text(1)", "text: missing a required argument"),
])
def test_the_check_sees_what_does_not_exist(source, said):
    assert any(problem.startswith(said) for problem in missing(source)), missing(source)


def test_form(notebook):
    """Badge, first cell, FAST; outputs of a whole run in order and without errors; no metadata."""
    name, found = notebook
    cells = found["cells"]
    first, setup, last = ("".join(cells[place]["source"]) for place in (0, 1, -1))
    assert first == badge(name, first, REPOSITORY) and "\n# " in first
    assert setup == first_cell(REPOSITORY) and "FAST = True" in setup
    assert last.startswith(SIGNED)
    assert found["metadata"] == KEPT and all(cell["metadata"] == {} for cell in cells)
    assert [cell["id"] for cell in cells] == [f"cell-{place:02d}" for place in range(len(cells))]
    ran = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    outputs = [output for cell in ran for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum(map(len, (json.dumps(cell) for cell in cells))) < LARGEST
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert re.search(r"\$.+\$", text) and "**Take away.**" in text


def test_nothing_of_the_machine_is_told(notebook):
    source = json.dumps(notebook[1])
    assert str(Path.home()) not in source.replace("~", "") or str(Path.home()) == "/"
    assert not re.search(r"/(work|tmp|home)/", source)


def test_pictures_are_of_a_sane_size(notebook):
    """At the width that plots has, and the last picture comes late: the one that stays."""
    cells = [cell for cell in notebook[1]["cells"] if cell["cell_type"] == "code"]
    drawn = {place: output["data"]["image/png"] for place, cell in enumerate(cells) for output in cell["outputs"]
             if "image/png" in output.get("data", {})}
    assert drawn and max(drawn) >= len(cells) - 2
    assert (ROOT / f"colabs/pictures/{notebook[0]}.png").read_bytes() == base64.b64decode(drawn[max(drawn)])
    for picture in drawn.values():
        content = base64.b64decode(picture if isinstance(picture, str) else "".join(picture))
        width, height = struct.unpack(">II", content[16:24])
        assert content[:4] == b"\x89PNG" and 700 <= width <= 800 and height <= 1300 and len(content) < 120_000


def test_links_lead_somewhere(notebook):
    for cell in notebook[1]["cells"]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", "".join(cell["source"])):
            assert (ROOT / "colabs" / link).exists(), link


def test_the_readme_names_every_notebook():
    readme = (ROOT / "README.md").read_text()
    for path in PATHS:
        assert f"colabs/{path.name}" in readme, path.name
    assert set(re.findall(r"github\.com/([\w-]+/[\w-]+)/blob", readme.replace("colab.research.google.com/github",
                                                                             "github.com"))) <= {REPOSITORY}


def test_streams_are_joined_and_logs_left_out():
    class Output(dict):
        __getattr__, __setattr__ = dict.get, dict.__setitem__

    made = [Output(output_type="stream", name=name, text=text)
            for name, text in (("stdout", "a"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d"))]
    assert [(one.name, one.text) for one in merged(made)] == [("stdout", "ab"), ("stderr", "c"), ("stdout", "d")]
    assert [is_noise(one) for one in merged(made)] == [False, True, False]


def test_pictures_without_colours_get_smaller_and_stay_the_same():
    def png(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="png")
        return file.getvalue()

    rng = np.random.default_rng(0)
    grey_YX4 = np.repeat(rng.integers(0, 256, (40, 50, 1), np.uint8), 4, axis=-1)
    grey_YX4[..., 3] = 255
    before = png(grey_YX4)
    after = slim(before)
    assert len(after) < len(before)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(after)).convert("RGBA")), grey_YX4)
    for channel, value in ((0, 3), (3, 128)):  # a colour, and what shows the page through
        other = grey_YX4.copy()
        other[5, 5, channel] = value + (other[5, 5, channel] == value)
        assert slim(png(other)) == png(other)


def test_the_badge_replaces_the_old_one():
    once = badge("mla", "# Title\n\ntext", "a/b")
    assert badge("mla", once, "a/b") == once and badge("mla", once, "c/d").count("[![") == 1
    assert "github/c/d/blob/main/colabs/mla.ipynb" in badge("mla", once, "c/d") and once.endswith("# Title\n\ntext")


def test_help(capsys):
    assert main(["--help"]) == 0 and "python -m colabs" in capsys.readouterr().out
