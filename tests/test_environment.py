"""What the process of a command is set to."""

import os
import subprocess
import sys

from tests.training.runs import ROOT

CODE = """
import jax, jax.numpy as jnp
from research import environment
environment.compute_in_this_thread()
product = jax.jit(lambda x: x @ x @ x @ x @ x)
x = jnp.ones((1500, 1500))
product(x).block_until_ready()
assert product(x).is_ready()
"""


def test_a_program_runs_in_the_thread_that_calls_it():
    alone = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=alone, timeout=60).returncode == 0
