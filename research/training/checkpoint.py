"""Checkpoints: saved in the background, sealed with a manifest, checked before they are believed.

Under DIR/checkpoints:

    <step>/state           the arrays (Orbax, OCDBT, not compressed: zstd takes 5 times as long for 8% less; what
                           research.convert writes: research/interop/storage.py)
    <step>/record          what goes with them, as JSON: data position, timing, fingerprint
    <step>/metrics         the validation loss by which the best are kept
    <step>/manifest.json   size and SHA-256 of every other file of the step
    <step>.damaged         a checkpoint that failed its check, moved aside by the next save

Orbax writes to `<step>.orbax-checkpoint-tmp`; the manifest is the last file written there, and one rename
makes `<step>` of it. A process killed at any moment leaves whole checkpoints and perhaps a directory with the
temporary name, which the next save removes. Reading changes nothing on disk.
"""

import asyncio
import hashlib
import json
import logging as python_logging
import math
import os
import shutil
from collections.abc import Container, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from research.errors import RequestError, RunError
from research.parallel import hosts

MANIFEST = "manifest.json"


def seal(folder: Path, known: dict[str, str] | None = None) -> None:
    """Writes the manifest of everything in `folder`, after everything has reached the disk.

    known: SHA-256 by name of files whose writer has computed it.
    """
    files, known = {}, known or {}
    for name, path in files_of(folder).items():
        _sync(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or _digest(path)}
    with (folder / MANIFEST).open("w") as file:
        json.dump({"files": files}, file, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())
    for directory, _, _ in os.walk(folder):
        _sync(directory)


def sealed(folder: Path) -> dict[str, tuple[int, str]]:
    """{name: (size, SHA-256)} of a sealed folder's manifest."""
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def damage(folder: Path, unread: Container[str] = ()) -> str:
    """The first thing that is wrong with a sealed folder, file first; empty when every byte is as it was sealed.

    unread: names of files whose content the caller compares with its digest as it reads them.
    """
    try:
        expected = sealed(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    found = files_of(folder)
    for name in expected:
        if name not in found:
            return f"{name} is missing"
    for name in found:
        if name not in expected:
            return f"{name} is not in {MANIFEST}"
    for name, (size, digest) in expected.items():
        try:
            if found[name].stat().st_size != size:
                return f"{name} has {found[name].stat().st_size} bytes instead of {size}"
            if name not in unread and _digest(found[name]) != digest:
                return f"{name} has changed: its SHA-256 is not the one in {MANIFEST}"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


class Checkpoints:
    """The checkpoints of a run: the last `keep_last`, and the `keep_best` of lowest validation loss."""

    def __init__(self, directory: str | Path, keep_last: int, keep_best: int):
        """`directory` is DIR/checkpoints; it is made by the first save."""
        if keep_last < 1:
            raise RequestError.field("checkpoint.keep_last", keep_last, "is less than 1")
        self.directory = Path(directory).absolute()
        self._losses: dict[int, float] = {}  # by step: what `rank` was told
        self._retention = _Retention(keep_last, keep_best, self._losses)
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None  # the step that the background thread is at
        self._damage: dict[int, str] = {}  # by step checked: what is wrong, empty for nothing
        self._named: set[int] = set()
        _quiet()

    def save(self, step: int, state: Any, record: dict[str, Any], loss: float | None = None) -> None:
        """Starts to save `state` (a pytree of arrays) with `record` (JSON); returns before they are on disk.

        The buffers of `state` may be donated at once. A checkpoint without a validation `loss` is kept as one of
        the last, and as one of the best only where `rank` tells it. A step that stands intact is not written again.
        Damaged checkpoints are moved aside first. Raises RunError when this or the previous save failed.
        """
        self.wait()
        self._saving = step
        try:
            if hosts.from_first(lambda: self._manager is None or any(self._damage.get(known) for known in self.list())):
                self._open()
            if hosts.from_first(lambda: step not in self.list()):
                self._damage.pop(step, None)
                items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record))
                self._manager.save(step, args=items, metrics={"loss": loss}, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def rank(self, step: int, loss: float) -> None:
        """Tells the validation loss of a step whose checkpoint may have been saved before it was known.

        It counts in this process alone, as a sealed checkpoint is not written again: it is told anew at each start.
        """
        self._losses[step] = loss

    def wait(self) -> None:
        """Returns when the last save is on disk; raises RunError, naming what is safe, when it failed."""
        if self._saving is None:
            return
        try:
            if self._manager is not None:
                self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def close(self) -> None:
        """Waits for the last save and ends the background threads; raises RunError as `wait` does."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def newest_intact(self) -> int | None:
        """The newest step whose every byte is as it was saved; names each damaged one on the way in a warning."""
        for step in reversed(self.list()):
            self._damage.pop(step, None)
            if not self._check(step):
                return step
        return None

    def agreed(self) -> int | None:
        """`newest_intact` of the first process, on all: the others believe it, and read no more than they hold."""
        step = hosts.from_first(self.newest_intact)
        if step is not None:
            self._damage[step] = ""
        return step

    def newest(self) -> str:
        """Which checkpoint is the newest, in a phrase and at once: sealed, and not read again."""
        steps = self.list()
        return f"the last checkpoint is {self.directory / str(steps[-1])}" if steps else "no checkpoint was saved"

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The state saved at `step`, bit for bit, and its record.

        `abstract_state` (of jax.eval_shape) gives the tree, the shapes and the dtypes, and where its leaves have
        one, the sharding. Raises RequestError, before any array is read, when they are not those of the checkpoint.
        """
        path, record = self._intact(step), self.record(step)
        if "weights_of" in record:
            raise RequestError(f"{path} holds weights alone: a run starts from them in a workdir of its own, with "
                               "--config.checkpoint.initialize_from")
        found = differences(saved_tree(path), abstract_state)
        if found:
            raise RequestError(f"{path} belongs to another model: {found}")
        return _read(path, abstract_state), record

    def record(self, step: int) -> dict[str, Any]:
        """What was saved with `step` besides its state; whether the checkpoint is intact is not looked at."""
        return json.loads((self.directory / str(step) / "record" / "metadata").read_text())

    def weights(self, step: int) -> dict[str, Any]:
        """What `restore_weights` gives, with a shape and a dtype at each leaf; no array is read."""
        return weights_of(saved_tree(self._intact(step)))

    def restore_weights(self, step: int, over: dict[str, Any] | None = None) -> dict[str, Any]:
        """`params` and `routing` of `step`, as they are stored; over: their shardings, None: on the first device.

        `params` are the average of the weights where the run kept one, as in its evaluations. Without knowledge of
        model or optimiser.
        """
        path = self._intact(step)
        saved = saved_tree(path)
        wanted = weights_of(saved)
        if over:
            wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), wanted, over)
        name = params_of(saved)
        read = _read(path, {name: wanted["params"], "routing": wanted["routing"]})
        return {"params": read[name], "routing": read["routing"]}

    def list(self) -> Sequence[int]:
        """The steps on disk, ascending, damaged ones included."""
        return sorted(int(path.name) for path in self.directory.glob("[0-9]*") if path.name.isdigit())

    def _open(self) -> None:
        """Sets damaged checkpoints aside, then starts Orbax, which removes what killed saves have left."""
        if self._manager is not None:
            self._manager.close()
        if jax.process_index() == 0:
            self._set_aside()
        ocp.multihost.sync_global_processes("checkpoints:set_aside")
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics["loss"],  # makes Orbax write the metrics; _Retention reads them
            preservation_policy=self._retention,
            cleanup_tmp_directories=True,
            temporary_path_class=_SealedPath,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=handlers)

    def _set_aside(self) -> None:
        newest = self.newest_intact()
        for step in self.list():
            wrong, path = self._check(step), self.directory / str(step)
            if wrong.endswith("is missing") and newest is not None and step < newest:
                shutil.rmtree(path)  # the rest of a checkpoint that was being removed when the process was killed
            elif wrong:
                aside = path.with_name(f"{step}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                logging.warning("moved the damaged checkpoint aside: %s", aside)

    def _check(self, step: int) -> str:
        if step not in self._damage:
            path = self.directory / str(step)
            self._damage[step] = damage(path)
            if self._damage[step] and step not in self._named:
                self._named.add(step)
                logging.warning("checkpoint %s is damaged and skipped: %s", path, self._damage[step])
        return self._damage[step]

    def _intact(self, step: int) -> Path:
        path = self.directory / str(step)
        if step not in self.list():
            raise RequestError(f"{path} does not exist: {self.directory} holds {self.list() or 'no checkpoint'}")
        if self._check(step):
            raise RequestError(f"{path} is damaged: {self._damage[step]}")
        return path

    def _failed(self, error: Exception) -> RunError:
        """What a failed save comes to; the next one starts Orbax anew.

        The partial directory is removed here, or, where one of Orbax's writers is still at it, by the next save.
        """
        step, manager = self._saving, self._manager
        self._saving = self._manager = None
        with suppress(Exception):  # it repeats the error that is being reported
            if manager is not None:
                manager.close()
        for partial in self.directory.glob(f"{step}{ocp.path.atomicity.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(partial, ignore_errors=True)
        newest = self.newest_intact()
        safe = "no checkpoint is on disk" if newest is None else f"the last good one is {self.directory / str(newest)}"
        return RunError(f"saving the checkpoint of step {step} failed: {_reason(error)}; {safe}")


class _SealedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary directory of a step or of an item in it; a step is sealed before the rename that commits it."""

    async def finalize(self) -> None:
        temporary, final = Path(self.get()), Path(self.get_final())
        if self._checkpoint_metadata_store is not None:  # it writes in a thread of its own
            await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
        if final.name.isdigit():
            await asyncio.to_thread(seal, temporary)
        temporary.rename(final)
        _sync(final.parent)


class _Retention(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the last ones and the best ones; one without a finite loss is never among the best.

    Orbax's own BestN keeps everything while there are no more than N, with a loss or without.
    """

    def __init__(self, last: int, best: int, told: dict[int, float]):
        """`told`: losses by step, for the checkpoints that hold none."""
        self.last, self.best, self.told = last, best, told

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        losses = {info.step: (info.metrics or {}).get("loss") for info in checkpoints}
        losses = {step: self.told.get(step) if loss is None else loss for step, loss in losses.items()}
        ranked = sorted((loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss))
        kept = {step for _, step in ranked[: self.best]} | set(sorted(losses)[-self.last :])
        return [info.step in kept for info in checkpoints]


def files_of(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by name, but the manifest, and hidden ones that a file manager may have left."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir()
                   and (path.name == ".zarray" or not path.name.startswith(".")))
    return {path.relative_to(folder).as_posix(): path for path in paths if path != folder / MANIFEST}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: str | Path) -> None:
    """Returns when the file, or the entries of the directory, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def params_of(saved: dict[str, Any]) -> str:
    """Which part of a saved state its weights are: `ema`, the average, where the run kept one, else `params`."""
    return "params" if saved.get("ema") is None else "ema"


def weights_of(saved: dict[str, Any]) -> dict[str, Any]:
    """{`params`, `routing`} of a saved state: its weights, see `params_of`."""
    return {"params": saved[params_of(saved)], "routing": saved["routing"]}


def saved_tree(path: Path) -> dict[str, Any]:
    """The state saved in a step's folder as a tree of dicts and lists with a shape and a dtype at each leaf."""
    _quiet()
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(path / "state")).tree


def _read(path: Path, tree: Any) -> Any:
    """The arrays of `tree` from a checkpoint, on the shardings of its leaves, or else on the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> ocp.ArrayRestoreArgs:
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None else first
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    request = ocp.args.PyTreeRestore(item=tree, restore_args=jax.tree.map(target, tree), partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path / "state", args=request)


def _leaves(tree: Any) -> dict[str, str]:
    """`{"params/embedding": "float32 (4096, 256)", ...}` in the order of the tree."""
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype} {tuple(leaf.shape)}"
        for path, leaf in paths_and_leaves
    }


def differences(saved: Any, expected: Any) -> str:
    """Where names, shapes and dtypes of two trees differ, in one line; empty where they do not.

    A phrase for each of the first three leaves, the parameters first: the optimiser and the average only repeat them.
    """
    saved, expected = _leaves(saved), _leaves(expected)
    different = {
        name: f"{name} is {saved[name]} in the checkpoint and {leaf} in the model"
        if name in saved
        else f"it lacks {name}"
        for name, leaf in expected.items()
        if saved.get(name) != leaf
    } | {name: f"the model lacks {name}" for name in saved if name not in expected}
    phrases = [different[name] for name in sorted(different, key=lambda name: not name.startswith("params/"))]
    return "; ".join(phrases[:3]) + (f" (and {len(phrases) - 3} more)" if len(phrases) > 3 else "")


def _reason(error: BaseException) -> str:
    """One line; TensorStore puts the operating system's words into a long message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for known in ("No space left on device", "Disk quota exceeded", "File too large", "Permission denied"):
        if known in str(error):
            return known
    return (str(error) or type(error).__name__).splitlines()[0]


def _quiet() -> None:
    for logger in ("absl", "asyncio"):
        python_logging.getLogger(logger).addFilter(_without_orbax)


def _without_orbax(record: python_logging.LogRecord) -> bool:
    """Orbax narrates each save on loggers that are shared; what fails in it comes as an exception."""
    text = python_logging.Formatter().format(record) if record.name == "asyncio" else record.pathname
    return "/orbax/checkpoint/" not in text
