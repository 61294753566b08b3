"""Checkpoints: bit for bit, atomic, checked before use, whatever happens to the process or to the disk."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.errors import RequestError, RunError
from research.training import checkpoint
from research.training.checkpoint import Checkpoints

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.partition({"adam": optax.adamw(1e-3), "plain": optax.sgd(1.0)}, {"layer": "adam", "head": "plain"}),
)


def make_state(step: int, width: int = 5, ema: bool = True):
    """A state with every kind of leaf and of node that a run has: bfloat16, ints, named tuples, masked nodes, None."""
    random_bits = jax.random.bits(jax.random.key(step), (4, width))
    params = {
        "layer": {"kernel": jax.random.normal(jax.random.key(step), (3, 4, width))},
        "head": jax.lax.bitcast_convert_type(random_bits, jnp.float32).astype(jnp.bfloat16),
    }
    return {
        "params": params,
        "routing": {"bias": jnp.arange(4, dtype=jnp.float32) * step, "dense": {}},
        "optimizer": jax.tree.map(lambda x: x + step, OPTIMIZER.init(params)),
        "ema": jax.tree.map(jnp.negative, params) if ema else None,
        "step": jnp.int32(step),
    }


def abstract_of(state):
    return jax.eval_shape(lambda: state)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def saved(directory, steps=(1, 2, 3), losses=None, keep_last=9, keep_best=1, make=make_state):
    checkpoints = Checkpoints(directory, keep_last, keep_best)
    for step in steps:
        checkpoints.save(step, make(step), {"at": step}, None if losses is None else losses[step])
    checkpoints.close()
    return Checkpoints(directory, keep_last, keep_best)


@pytest.mark.parametrize("ema", [True, False])
def test_round_trip_is_bitwise(tmp_path, ema):
    state, record = make_state(7, ema=ema), {"data": {"row": 12}, "timing": [0.1, None], "fingerprint": "ab"}
    with_loss = Checkpoints(tmp_path / "checkpoints", 2, 1)
    with_loss.save(7, state, record, loss=1.5)
    with_loss.close()

    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, 1)
    assert checkpoints.newest_intact() == 7
    restored, restored_record = checkpoints.restore(7, abstract_of(state))
    assert_same_bits(restored, state)
    assert restored_record == record


def test_weights_alone(tmp_path):
    checkpoints = saved(tmp_path, steps=[4])
    state = make_state(4)
    assert_same_bits(checkpoints.restore_weights(4), {"params": state["ema"], "routing": state["routing"]})
    checkpoints.save(5, make_state(5, ema=False), {})
    checkpoints.close()
    assert set(checkpoints.restore_weights(5)) == {"params", "routing"}


def test_reading_an_empty_directory_makes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, 1)
    assert checkpoints.newest_intact() is None and checkpoints.list() == []
    with pytest.raises(RequestError, match="3 does not exist: .* holds no checkpoint"):
        checkpoints.restore(3, abstract_of(make_state(3)))
    checkpoints.close()
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(RequestError, match=r"config\.checkpoint\.keep_last=0 is less than 1"):
        Checkpoints(tmp_path, 0, 1)


@pytest.mark.parametrize(
    "losses, last, best, kept",
    [
        ([None] * 6, 2, 1, [5, 6]),
        ([3.0, 1.0, 2.0, 4.0, 5.0, 6.0], 2, 1, [2, 5, 6]),
        ([3.0, 1.0, 2.0, 4.0, 5.0, 6.0], 1, 2, [2, 3, 6]),
        ([3.0, 1.0, 2.0, 4.0, 5.0, 6.0], 1, 0, [6]),
        ([9.0, None, float("nan"), float("inf"), None, 10.0], 1, 3, [1, 6]),
    ],
)
def test_keeps_the_last_and_the_best(tmp_path, losses, last, best, kept):
    losses = dict(enumerate(losses, 1))
    arguments = {"losses": losses, "keep_last": last, "keep_best": best, "make": lambda step: {"step": jnp.int32(step)}}
    saved(tmp_path, steps=[1, 2, 3], **arguments)
    assert saved(tmp_path, steps=[4, 5, 6], **arguments).list() == kept  # a new process knows the old losses


def test_a_loss_that_is_told_later_ranks_its_checkpoint(tmp_path):
    def run(steps, told):
        checkpoints = Checkpoints(tmp_path, 1, 1)
        for step, loss in told.items():
            checkpoints.rank(step, loss)
        for step in steps:
            checkpoints.save(step, {"step": jnp.int32(step)}, {}, None if step == 2 else float(step))
        checkpoints.close()
        assert all(checkpoint.damage(tmp_path / str(step)) == "" for step in checkpoints.list())
        return checkpoints.list()

    assert run([1, 2], {}) == [1, 2]
    assert run([3, 4], {2: 0.5, 4: 0.1}) == [2, 4]  # its own loss counts where a checkpoint has one
    assert run([5], {2: 0.5}) == [2, 5]
    assert run([6], {}) == [5, 6]


def test_a_step_that_stands_intact_is_not_written_again(tmp_path):
    checkpoints = saved(tmp_path)
    manifest = tmp_path / "3" / checkpoint.MANIFEST
    before = manifest.stat().st_mtime_ns
    checkpoints.save(3, make_state(3), {"at": 3})
    checkpoints.save(4, make_state(4), {"at": 4})
    checkpoints.save(4, make_state(4), {"at": 4})
    checkpoints.close()
    assert manifest.stat().st_mtime_ns == before and checkpoints.list() == [1, 2, 3, 4]


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def biggest(folder):
    return max(files_of(folder), key=lambda path: path.stat().st_size)


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda step: os.truncate(biggest(step / "state"), 100), "has 100 bytes instead of"),
    "emptied": (lambda step: os.truncate(biggest(step / "state"), 0), "has 0 bytes instead of"),
    "missing": (lambda step: biggest(step / "state").unlink(), "is missing"),
    "flipped in the arrays": (lambda step: flip(biggest(step / "state" / "ocdbt.process_0")), "has changed"),
    "flipped in the tree": (lambda step: flip(step / "state" / "_METADATA"), "state/_METADATA has changed"),
    "flipped in the record": (lambda step: flip(step / "record" / "metadata"), "record/metadata has changed"),
    "flipped in Orbax's own": (lambda step: flip(step / "_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA has changed"),
    "extra": (lambda step: (step / "state" / "d" / "0").touch(), "state/d/0 is not in manifest.json"),
    "no manifest": (lambda step: (step / checkpoint.MANIFEST).unlink(), "manifest.json is missing"),
    "bad manifest": (lambda step: (step / checkpoint.MANIFEST).write_text("[]"), "manifest.json cannot be read"),
    "cut manifest": (lambda step: os.truncate(step / checkpoint.MANIFEST, 99), "manifest.json cannot be read"),
    "empty": (lambda step: (shutil.rmtree(step), step.mkdir()), "manifest.json is missing"),
}


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("three")
    saved(directory)
    return directory


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_skipped_and_replaced(tmp_path, three_checkpoints, caplog, kind):
    directory = tmp_path / "checkpoints"
    shutil.copytree(three_checkpoints, directory)
    make_damage, words = DAMAGE[kind]
    make_damage(directory / "3")

    checkpoints = Checkpoints(directory, 2, 1)
    assert checkpoints.newest_intact() == 2
    assert checkpoints.newest_intact() == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and str(directory / "3") in warnings[0] and words in warnings[0]
    with pytest.raises(RequestError, match="is damaged"):
        checkpoints.restore(3, abstract_of(make_state(3)))
    assert checkpoints.list() == [1, 2, 3]  # reading has changed nothing

    state, _ = checkpoints.restore(2, abstract_of(make_state(2)))
    assert_same_bits(state, make_state(2))
    checkpoints.save(3, make_state(33), {"at": "again"})
    checkpoints.close()
    assert (directory / "3.damaged").is_dir()
    again = Checkpoints(directory, 2, 1)
    assert again.list() == [2, 3] and again.newest_intact() == 3
    assert_same_bits(again.restore(3, abstract_of(make_state(3)))[0], make_state(33))


def test_every_single_byte_counts(three_checkpoints):
    step = three_checkpoints / "3"
    names = [path for path in files_of(step) if path.name != checkpoint.MANIFEST]
    assert len(names) > 8 and checkpoint.damage(step) == ""
    for path in names:
        for position in (0, -1):
            flip(path, position)
            assert (
                checkpoint.damage(step)
                == f"{path.relative_to(step)} has changed: its SHA-256 is not the one in manifest.json"
            )
            flip(path, position)
    assert checkpoint.damage(step) == ""


def test_a_file_manager_may_look_at_a_checkpoint(tmp_path):
    checkpoints = saved(tmp_path, steps=[1])
    (tmp_path / "1" / ".DS_Store").write_text("x")
    assert checkpoints.newest_intact() == 1


def test_damage_before_and_after_the_newest_intact_one(tmp_path):
    """The damaged best one does not count as kept, nor do two damaged newer ones as the last two."""
    checkpoints = saved(tmp_path, steps=[1, 2, 3, 4, 5], losses={1: 1.0, 2: 3.0, 3: 2.0, 4: 4.0, 5: 5.0}, keep_best=2)
    flip(tmp_path / "1" / "metrics" / "metrics")
    biggest(tmp_path / "2").unlink()  # as when the process was killed while it removed this one
    flip(biggest(tmp_path / "4"))
    flip(biggest(tmp_path / "5"))
    checkpoints = Checkpoints(tmp_path, 2, 1)
    assert checkpoints.newest_intact() == 3
    checkpoints.save(4, make_state(4), {}, loss=3.0)
    checkpoints.save(6, make_state(6), {}, loss=6.0)
    checkpoints.close()
    assert sorted(os.listdir(tmp_path)) == ["1.damaged", "3", "4", "4.damaged", "5.damaged", "6"]


def test_damage_found_by_the_process_that_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, 1)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {})
    checkpoints.wait()
    assert checkpoints.newest_intact() == 2
    flip(biggest(tmp_path / "2"))
    assert checkpoints.newest_intact() == 1
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert checkpoints.newest_intact() == 2


def test_another_model_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    checkpoints, state = saved(tmp_path, steps=[1]), make_state(1)
    monkeypatch.setattr(checkpoint, "_read", lambda *_: pytest.fail("arrays were read"))

    def refused(other):
        with pytest.raises(RequestError) as error:
            checkpoints.restore(1, abstract_of(other))
        assert f"{tmp_path / '1'} belongs to another model: " in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    wider = refused(make_state(1, width=6))
    assert "params/head is bfloat16 (4, 5) in the checkpoint and bfloat16 (4, 6) in the model" in wider
    assert wider.endswith("(and 3 more)")
    assert refused({**state, "step": jnp.float32(1)}).endswith(
        "step is int32 () in the checkpoint and float32 () in the model"
    )
    assert "it lacks routing/mtp" in refused({**state, "routing": {**state["routing"], "mtp": jnp.ones(2)}})
    assert "the model lacks ema/head" in refused({**state, "ema": None})


def test_donated_buffers_are_saved_as_they_were(tmp_path):
    """On a CPU Orbax reads the very memory of the arrays: the step after save() must not get it."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    make = jax.jit(lambda: {"params": {str(i): jnp.arange(1 << 20, dtype=jnp.float32) + i for i in range(16)}})
    jax.block_until_ready(step(make()))
    state = jax.block_until_ready(make())
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    abstract = abstract_of(state)
    checkpoints = Checkpoints(tmp_path, 2, 1)
    checkpoints.save(1, state, {})
    state = step(state)
    donated, state = state, step(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))  # this step does donate
    jax.block_until_ready(state)
    checkpoints.close()
    assert_same_bits(checkpoints.restore(1, abstract)[0], expected)


def fail_the_seal(monkeypatch):
    def no_space(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "seal", no_space)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's other writes, cut too
@pytest.mark.parametrize("cause, words", [("seal", "No space left on device"), ("write", "File too large")])
def test_a_failed_save_names_what_is_safe(tmp_path, monkeypatch, caplog, cause, words):
    """The write is cut by the system itself, at a limit of the file size: an ordinary user cannot make a full disk."""
    checkpoints = saved(tmp_path)
    state = {**make_state(4), "ema": {"big": jnp.arange(1 << 18, dtype=jnp.float32)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if cause == "seal":
            fail_the_seal(patch)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
        try:
            checkpoints.save(4, state, {})
            with pytest.raises(RunError) as error:
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    expected = f"saving the checkpoint of step 4 failed: {words}; the last good one is {tmp_path / '3'}"
    assert str(error.value) == expected and not caplog.records
    checkpoints.close()  # it is said once
    assert cause == "write" or not list(tmp_path.glob("*tmp*"))  # a writer cut short may end a little later
    assert Checkpoints(tmp_path, 2, 1).newest_intact() == 3

    checkpoints.save(4, state, {})  # once there is room again
    checkpoints.close()
    assert checkpoints.list() == [1, 2, 3, 4] and checkpoints.newest_intact() == 4
    assert not list(tmp_path.glob("*tmp*"))


def test_a_failed_save_is_told_by_the_next_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 2, 1)
    fail_the_seal(monkeypatch)
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(RunError, match="step 1 failed: No space left on device; no checkpoint is on disk"):
        checkpoints.save(2, make_state(2), {})


CHILD = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from research.training import checkpoint

directory, moment = sys.argv[1:]

def state_of(step):
    weights = {str(i): jnp.full((1 << 18,), step * 100 + i, jnp.float32) for i in range(8)}
    return {"params": weights, "step": jnp.int32(step)}

checkpoints = checkpoint.Checkpoints(directory, 2, 1)
newest = checkpoints.newest_intact() or 0
if newest:
    state, record = checkpoints.restore(newest, jax.eval_shape(lambda: state_of(0)))
    assert record == {"at": newest}
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(*map(jax.tree.leaves, (state, state_of(newest)))))
if moment == "check":
    print(newest)
    sys.exit()
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
for step in range(newest + 1, 10000):
    if step == newest + 3:
        seal, sync = checkpoint.seal, checkpoint._sync
        if moment == "before the seal":
            checkpoint.seal = kill
        if moment == "after the seal":
            checkpoint.seal = lambda folder: (seal(folder), kill())
        if moment == "after the rename":
            checkpoint._sync = lambda path: kill() if str(path) == directory else sync(path)
    checkpoints.save(step, state_of(step), {"at": step}, loss=float(step))
    if step == newest + 2:
        checkpoints.wait()
        print(step, flush=True)
"""


def test_kill_at_any_moment(tmp_path):
    def run(moment):
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), moment]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})

    newest = 0
    for moment in ("before the seal", "after the seal", "after the rename", "any"):
        with run(moment) as child:
            safe = int(child.stdout.readline())
            assert safe == newest + 2
            if moment == "any":
                time.sleep(random.uniform(0, 0.3))
                child.kill()
            assert child.wait(30) == -signal.SIGKILL
        newest = Checkpoints(tmp_path, 2, 1).newest_intact()
        assert newest >= safe + (moment == "after the rename")
    with run("check") as child:
        assert int(child.stdout.readline()) == newest
    assert not list(tmp_path.glob("*.damaged"))


def test_orphans_of_a_killed_save_are_removed_by_the_next_writer(tmp_path):
    checkpoints = saved(tmp_path, steps=[1])
    shutil.copytree(tmp_path / "1", tmp_path / "5.orbax-checkpoint-tmp")
    assert checkpoints.newest_intact() == 1 and checkpoints.list() == [1]
    assert (tmp_path / "5.orbax-checkpoint-tmp").exists()  # a reader leaves alone what another process may be writing
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_nothing_is_pickled(three_checkpoints):
    for path in files_of(three_checkpoints):
        if "/d/" not in str(path) and path.suffix != ".ocdbt":
            json.loads(path.read_text())
    assert "pickle" not in Path(checkpoint.__file__).read_text()
