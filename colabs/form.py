"""What every notebook has in common: badge, first cell, and the form in which it is committed."""

import base64
import io
import re

SERVICE = "https://colab.research.google.com"
KEPT = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}}

SIGNED = "*Outputs: `make colabs` in FAST form"

SETUP = '''# On Colab or Kaggle this fetches the repository and what it needs; in a clone it only finds its root.
import os
import shutil
import subprocess
import sys
from pathlib import Path

root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "research/main.py").is_file()), None)
if root is None:
    address, root = "https://github.com/{repository}", Path("parsimony").absolute()
    if not root.is_dir():
        subprocess.run(["git", "clone", "--depth=1", address, str(root)], check=True)
    lines = (root / "requirements.txt").read_text().splitlines()
    needs = [line for line in lines if "==" in line and "numpy" not in line]  # Colab's kernel has loaded its own
    needs += ["jax[cuda12]"] if shutil.which("nvidia-smi") else []  # of Colab's image; 13 asks for a newer driver
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *needs, "matplotlib"], check=True)
os.chdir(root)
sys.path.insert(0, str(root))

FAST = True  # False: the longer form, better models and more of them'''


def first_cell(repository: str) -> str:
    """The code with which every notebook begins."""
    return SETUP.replace("{repository}", repository)


def badge(name: str, source: str, repository: str) -> str:
    """The first cell's text with the badge of this repository as its first line."""
    link = f"{SERVICE}/github/{repository}/blob/main/colabs/{name}.ipynb"
    line = f"[![Open in Colab]({SERVICE}/assets/colab-badge.svg)]({link})"
    return f"{line}\n\n" + re.sub(r"\A\[!\[.*\n+", "", source)


def sign(notebook, made: str) -> None:
    """Says in a last cell of its own where the outputs come from."""
    from nbformat.v4 import new_markdown_cell

    if notebook.cells[-1].source.startswith(SIGNED):
        del notebook.cells[-1]
    notebook.cells.append(new_markdown_cell(f"{SIGNED} {made}*"))


def last_picture(notebook) -> bytes:
    """The PNG that the notebook ends with."""
    return base64.b64decode([output["data"]["image/png"] for cell in notebook.cells if cell.cell_type == "code"
                             for output in cell.outputs if "image/png" in output.get("data", {})][-1])


def strip(notebook) -> None:
    """Leaves of an executed notebook what a reader needs, in one form."""
    notebook.metadata = type(notebook.metadata)(KEPT)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    number = 0
    for place, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{place:02d}", type(cell.metadata)()
        if cell.cell_type != "code":
            continue
        number += 1
        cell.execution_count = number
        cell.outputs = [output for output in merged(cell.outputs) if not is_noise(output)]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "metadata" in output:
                output.metadata = type(cell.metadata)()
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = base64.b64encode(
                    slim(base64.b64decode(output["data"]["image/png"]))).decode()


def slim(picture: bytes) -> bytes:
    """The same PNG in less than half the bytes, where it has no colours: one number a pixel in place of four."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as shown:
        grey = shown.convert("L")
        if grey.convert("RGBA").tobytes() != shown.convert("RGBA").tobytes():
            return picture
    file = io.BytesIO()
    grey.save(file, format="png", optimize=True)
    return file.getvalue()


def merged(outputs: list) -> list:
    """Pieces of one stream that follow one another, as one."""
    joined = []
    for output in outputs:
        if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def is_noise(output) -> bool:
    """What a cell says beside its results: logs, progress and warnings."""
    return output.output_type == "stream" and output.name == "stderr"
