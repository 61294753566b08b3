"""Executes notebooks in their FAST form and writes their outputs back: `python -m colabs [NAME ...]`.

From top to bottom; without names, all. A notebook whose cell fails is left as it was; the exit code is then 1. What is
written is the same for the same outputs: no times, no metadata but the language, cells numbered in order. The last
picture of each goes to `colabs/pictures/` too.
"""

import os
import sys
import time
from pathlib import Path

from colabs import REPOSITORY
from colabs.form import badge, first_cell, last_picture, sign, strip

FOLDER = Path(__file__).resolve().parent
SECONDS = 1800  # of one cell, on a machine that does other things too


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def execute(path: Path) -> str | None:
    """Runs the notebook in place; what went wrong, or None."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = badge(path.stem, notebook.cells[0].source, REPOSITORY)
    notebook.cells[1].source = first_cell(REPOSITORY)
    made = provenance()
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(FOLDER)}})
    try:
        client.execute(env=quiet_environment())
    except (CellExecutionError, CellTimeoutError) as error:
        return str(error)
    sign(notebook, made)
    strip(notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    (FOLDER / "pictures").mkdir(exist_ok=True)
    (FOLDER / "pictures" / f"{path.stem}.png").write_bytes(last_picture(notebook))
    return None


def provenance() -> str:
    """Commit, machine and how busy it was: what a time in the outputs depends on."""
    from research.environment import describe

    about = describe()
    busy = f", a load of {os.getloadavg()[1]:.0f} when it began" if hasattr(os, "getloadavg") else ""
    commit, cores = about["commit"] or "no commit", os.cpu_count()
    return (f"at {commit[:8]}{'+' * commit.endswith('+')}; {about['processor']}, {cores} cores{busy}; "
            f"{about['device']}, JAX {about['packages']['jax']}.")


def quiet_environment() -> dict:
    """The kernel's: no sliders, which nobody would move, but pictures of a few of their places."""
    from research.studies.notebook import STATIC

    return os.environ | {STATIC: "1", "PYTHONPATH": str(FOLDER.parent), "TQDM_DISABLE": "1"}


def main(asked: list[str]) -> int:
    if {"-h", "--help"} & set(asked):
        print(__doc__)
        return 0
    if unknown := [name for name in asked if name not in names()]:
        print(f"error: {unknown[0]!r} is no notebook; there are {', '.join(names())}", file=sys.stderr)
        return 2
    failed = 0
    for name in asked or names():
        start = time.perf_counter()
        problem = execute(FOLDER / f"{name}.ipynb")
        print(f"{name:<16}{time.perf_counter() - start:>7.0f} s  {'failed' if problem else ''}".rstrip(), flush=True)
        if problem:
            failed = 1
            print(problem, file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
