"""Several processes as one run, by jax.distributed: how they meet, agree, read their shares and end together.

A process alone, which never joined, is its own first and agrees with itself; nothing here costs it anything. JAX is
imported where it is used: wrong flags are refused without it.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags, logging

from research import command
from research.errors import RequestError, RunError

_SECONDS_TO_MEET = 300
_SECONDS_TO_LEAVE = 15  # that a process which ends with an error grants the others to end with it
_KEYS = itertools.count()  # all processes ask for the same things in the same order
_told: list[str] = []  # keys that this process has set and others may still read
_client = None  # of the coordination service; None in a process alone
_process, _processes = 0, 1
_newest: Callable[[], str] | None = None  # says which checkpoint is the last, for a process that cannot go on
_gone = False  # a collective has failed: another process is no more


def define_flags(values: flags.FlagValues) -> None:
    """The flags of a command of which several processes can be one run, for `join_by`."""
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, where all processes of the run meet.", values)
    flags.DEFINE_integer("num_processes", None, "How many processes the run has; 1: no others, whatever a launcher "
                         "says.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", flag_values=values)
    flags.DEFINE_integer("heartbeat_timeout_seconds", 30, "A process that gives no sign of life for so long is lost, "
                         "and the run ends.", flag_values=values)


def join_by(values: flags.FlagValues) -> None:
    """`join`, as the flags of `define_flags` say."""
    join(*(values[name].value for name in (
        "coordinator_address", "num_processes", "process_id", "heartbeat_timeout_seconds")))


def launcher(environment: Mapping[str, str] = os.environ) -> str:
    """The launcher that has started this process as one of several, and whom JAX asks for the rest; empty for none."""
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "Slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    # JAX asks the cluster's API how many there are; without the package an indexed job says so by flags
    indexed = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    return "Kubernetes" if indexed and importlib.util.find_spec("kubernetes") else ""


def join(address: str | None, processes: int | None, process: int | None, heartbeat: int) -> None:
    """Makes this process one of several, where flags or a launcher say so; before any other use of JAX.

    What is None is the launcher's to say. heartbeat: seconds without a sign of life after which a process is lost,
    and all others end. Returns when all have met. Raises RequestError for flags that do not fit, RunError where the
    others do not come.
    """
    global _client, _process, _processes
    given = {"coordinator_address": address, "num_processes": processes, "process_id": process}
    _check(given, heartbeat)
    if processes == 1 or not (launcher() or any(value is not None for value in given.values())):
        return
    if address and process == 0:
        _check_port(address)
    with command.stops_held():
        import jax
        from jax._src import distributed

    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM; stops are agreed on by Stops
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu"))):  # whose libraries have things to say there
        _leave_stdout_to_python()
    _say_when_lost(heartbeat)
    # Slurm and Open MPI say which GPU is whose even where flags say the rest; the API of Kubernetes is asked in need
    asked = launcher() in ("Slurm", "Open MPI") or None in given.values()
    try:
        with _stops_at_once():
            jax.distributed.initialize(
                address, processes, process, cluster_detection_method=None if asked else "deactivate",
                initialization_timeout=_SECONDS_TO_MEET, heartbeat_timeout_seconds=heartbeat,
                shutdown_timeout_seconds=heartbeat)
    except Exception as error:  # also those of the launchers' own packages
        raise RunError(f"the processes did not meet{f' by {launcher()}' if launcher() else ''}: "
                       f"{str(error).splitlines()[0]}") from error
    state = distributed.global_state
    _client, _process, _processes = state.client, state.process_id, state.num_processes
    if _process:
        logging.set_verbosity(logging.WARNING)


def _check(given: dict, heartbeat: int) -> None:
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3 and given["num_processes"] != 1 and not launcher():
        raise RequestError(f"--{missing[0]} is missing: without a launcher that JAX knows, --coordinator_address, "
                           "--num_processes and --process_id go together")
    address, processes, process = given.values()
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise RequestError(f"--coordinator_address={address} must be HOST:PORT, of process 0")
    if processes is not None and processes < 1:
        raise RequestError(f"--num_processes={processes} must be at least 1")
    if process is not None and not 0 <= process < (processes or process + 1):
        raise RequestError(f"--process_id={process} must be at least 0 and below --num_processes={processes}")
    if not 1 <= heartbeat <= 600:
        raise RequestError(f"--heartbeat_timeout_seconds={heartbeat} must be from 1 to 600")


def _check_port(address: str) -> None:
    """RequestError where another program listens: JAX's service would crash (0.11.2)."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(address.rsplit(":", 1)[1])))
        except (OSError, OverflowError) as error:
            raise RequestError(f"--coordinator_address={address} cannot be listened at by process 0: "
                               f"{getattr(error, 'strerror', None) or error}") from None


def _leave_stdout_to_python() -> None:
    """What C writes there goes nowhere: Gloo has a line for each of its connections (JAX 0.11.2)."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    with open(os.devnull, "w") as nobody:
        os.dup2(nobody.fileno(), 1)


@contextlib.contextmanager
def _stops_at_once():
    """Ctrl-C and SIGTERM end the process: there is nothing to save, and Python would see them minutes later."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def several() -> bool:
    """Whether the run has more processes than this one."""
    return _processes > 1


def place() -> tuple[int, int]:
    """Which of the run's processes this is, from 0, and how many there are."""
    return _process, _processes


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return _process == 0


def from_first(function: Callable[[], Any]) -> Any:
    """What `function` returns on the first process (JSON), on all; the others do not call it. Its RequestError too."""
    if not several():
        return function()
    key = f"parsimony/{next(_KEYS)}"
    if is_first():
        try:
            value = function()
        except RequestError as error:
            _tell(key, {"error": str(error)})
            raise
        _tell(key, {"value": value})
        return value
    told = json.loads(_wait_for(key))
    if "error" in told:
        raise RequestError(told["error"])
    return told["value"]


@contextlib.contextmanager
def first_alone():
    """The first process goes through the body before the others: what it leaves on a shared disk they find."""
    if several() and not is_first():
        from_first(lambda: None)
    try:
        yield
    finally:
        if several() and is_first():
            from_first(lambda: None)


def agree(values: dict[str, Any], needed: str) -> None:
    """Raises RequestError on all processes where any of them has other values (JSON) by name than the first."""
    if not several():
        return
    own = json.loads(json.dumps(values))
    first = from_first(lambda: own)
    names = [name for name in {**own, **first} if own.get(name) != first.get(name)]
    with refused_alike():
        if names:
            raise RequestError(f"{names[0]}={own.get(names[0])} on process {_process} is {first.get(names[0])} on "
                               f"process 0: all processes need the same {needed}")


@contextlib.contextmanager
def refused_alike():
    """A RequestError of the body on any process is raised on all; the body itself waits for no other process."""
    wrong = ""
    try:
        yield
    except RequestError as error:
        wrong = str(error)
    told = [wrong for wrong in from_all(wrong) if wrong]
    if told:
        raise RequestError(told[0])


def from_all(value: Any) -> list:
    """The values (JSON) of all processes in their order, on all."""
    if not several():
        return [value]
    folder = f"parsimony/{next(_KEYS)}/"
    earlier = [*_told]
    _tell(f"{folder}{_process}", value)
    found = [json.loads(_wait_for(f"{folder}{number}")) for number in range(_processes)]
    for key in earlier:  # all are here, and so have read what was told before
        _client.key_value_delete(key)
        _told.remove(key)
    return found


def compiled_by_all(step: Callable) -> Callable:
    """A jitted `step(params, routing, batch)` that no process begins before all have compiled it: on CPUs the first to
    send would wait for 30 s alone (Gloo, JAX 0.11.2)."""
    programs = {}

    def once_compiled(params, routing, batch):
        shapes = tuple((name, batch[name].shape) for name in sorted(batch))
        if shapes not in programs:
            programs[shapes] = step.lower(params, routing, batch).compile()
            from_all(None)
        return programs[shapes](params, routing, batch)

    return once_compiled if several() else step


def _tell(key: str, value: Any) -> None:
    _client.key_value_set(key, json.dumps(value))
    _told.append(key)


def _wait_for(key: str, seconds: float = float("inf")) -> str:
    """A value that another process sets; in pieces, as Ctrl-C and SIGTERM are not seen within a call."""
    import jax

    end = time.monotonic() + seconds
    while True:
        try:
            return _client.blocking_key_value_get(key, 500)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > end:
                raise


class Share:
    """The rows of each batch that this process reads, and the batch of all processes' rows."""

    def __init__(self, sharding):
        self._sharding = sharding

    def rows(self, numbers):
        """Those of a batch's row numbers that lie on this process's devices, in their order."""
        import numpy as np

        places = self._sharding.addressable_devices_indices_map((len(numbers),)).values()
        pieces = sorted({place[0].indices(len(numbers))[:2] for place in places})
        return np.concatenate([numbers[start:end] for start, end in pieces])

    def whole(self, batch):
        """The global arrays of a batch of which this process has read its rows."""
        import jax
        import numpy as np

        return {name: jax.make_array_from_process_local_data(self._sharding, np.asarray(rows))
                for name, rows in batch.items()}


def whole(tree, mesh):
    """Global arrays, as those of this process's own devices, each of which holds all of them."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    copied = jax.jit(_same, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), copied)


def _same(tree):
    """One function for all calls of `whole`: a tree of the same shapes is compiled once."""
    return tree


class Stops:
    """The largest of the processes' numbers, once a step; on GPUs without waiting for it."""

    def __init__(self, mesh):
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        self._split, self._devices = NamedSharding(mesh, P(mesh.axis_names)), mesh.local_mesh.size
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

    def cast(self, number: int):
        """The vote of this process; what comes back is to be given to int(), as late as may be."""
        import jax
        import numpy as np

        own = np.full(self._devices, number, np.int32)
        return self._largest(jax.make_array_from_process_local_data(self._split, own))


def last_words(newest: Callable[[], str]) -> None:
    """`newest` says, in a phrase and at once, from where a run goes on that ends because another process is lost."""
    global _newest
    _newest = newest


def is_loss(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other side is gone (on a CPU; elsewhere it waits to be ended)."""
    global _gone
    _gone = _gone or (several() and "Gloo" in str(error))
    return _gone


def _say_when_lost(heartbeat: int) -> None:
    """Gives JAX's end of a process whose peers are lost, which is abort(), the exit code 1 and a last line.

    The callback that JAX's client takes for this cannot be written in Python: its argument has no conversion (0.11.2).
    abort() raises SIGABRT in the thread that calls it, so that Python may be called from there.
    """
    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_):
        if not _gone:
            why = (f"another process of the run has ended, or has not answered for {heartbeat} s" if _client else
                   f"the processes of the run did not meet within {_SECONDS_TO_MEET} s")
            print(f"error: ended by JAX: {why}; {_newest() if _newest else 'nothing was saved'}", file=sys.stderr,
                  flush=True)
        os._exit(1)

    _say_when_lost.handler = aborted  # kept: C holds no reference
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)


def leave(code: int) -> None:
    """Ends this process with an exit code, its last error said: with the others, or, where they do not come, alone.

    A process that is done waits for the others as long as they live; one that failed does not.
    """
    if not several():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if _gone:
        os._exit(code)
    import jax

    seconds = _SECONDS_TO_LEAVE if code else float("inf")
    try:
        _client.key_value_set(f"parsimony/left/{_process}", str(code))
        if is_first():
            for number in range(1, _processes):
                _wait_for(f"parsimony/left/{number}", seconds)
            _client.key_value_set("parsimony/left/all", str(code))
        else:
            told = int(_wait_for("parsimony/left/all", seconds))
            code = code or told
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError:  # they hear no more of this process, and end by that
        os._exit(code)
    sys.exit(code)
