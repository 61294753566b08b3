"""`make parity`, with a Python that only pretends: what pip is asked for, and what is said where it fails."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
mkdir -p $3/bin
printf '#!/bin/sh\\nexit %s\\n' {code} >$3/bin/pip
chmod +x $3/bin/pip
"""


@pytest.mark.parametrize("words, torch", [((), "torch==2.13.0+cpu "), (("PARITY_BUILD=",), "torch==2.13.0 ")])
@pytest.mark.parametrize("code", [0, 1])
def test_the_build_of_torch_can_be_chosen_and_a_failure_says_so(tmp_path, words, torch, code):
    for name in ("Makefile", "requirements-parity.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON.format(code=code))
    python.chmod(0o755)
    done = subprocess.run(["make", "parity", "PYTHON=./python", *words], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / ".venv-parity/ready").exists() is (code == 0) is (done.returncode == 0)
    asked = (tmp_path / ".venv-parity/requirements.txt").read_text().splitlines()
    assert next(line for line in asked if "linux" in line).startswith(torch)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == code and all("PARITY_BUILD=" in line and "CUDA build" in line for line in said)
