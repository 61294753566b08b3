"""The one training loop."""

import contextlib
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging

from research import config, environment
from research.accounting import flops, memory, parameters
from research.command import Stopped
from research.data.pipeline import load_corpus
from research.data.tokenizer import Tokenizer
from research.errors import Diverged, RequestError, RunError
from research.interop.weights import initial_variables, weights_for
from research.model.build import check_implementations, make_model
from research.parallel import hosts
from research.parallel.mesh import make_mesh
from research.training import evaluation, samples
from research.training.checkpoint import Checkpoints
from research.training.metrics import Clock, MetricsLog, NoLog, Progress, to_plain
from research.training.step import (
    abstract_state,
    init_state,
    loss_of,
    make_eval_step,
    make_train_step,
    shardings_of,
)
from research.training.stopping import Interrupted, StopRequests
from research.training.workdir import owned, write_files


def train(settings: config.Settings, workdir: Path, profile: bool = False, corpus=None, loss=loss_of,
          evaluate: Callable | None = None, note: dict | None = None) -> dict:
    """Trains from the workdir's newest intact checkpoint, or from the start, to `training.steps`; evaluates and saves.

    corpus: None is the config's text; anything else that has batches (finetune.Examples, rollouts.Rollouts) stands in
    for it. loss: as `step.loss_of`. evaluate: as `evaluation.evaluate`, whose `loss` says which checkpoint is best.
    note: what goes into the record of every checkpoint besides.
    Returns the summary that is printed. Raises RequestError before anything is written, RunError for a run that
    failed on its way, Stopped after saving on Ctrl-C or SIGTERM. Of several processes each does all of this, and the
    first alone writes, but for the arrays of checkpoints.
    """
    corpus = corpus or load_shared(settings)
    settings = settings.with_vocabulary(corpus.tokenizer.vocab_size)
    steps, saving, evaluating = settings.training.steps, settings.checkpoint, settings.evaluation
    model = make_model(settings, make_mesh(settings))
    step_function, over = make_train_step(model, settings, loss), shardings_of(model, settings)
    corpus = shared_out(corpus, model, settings)
    checkpoints = Checkpoints(workdir / "checkpoints", saving.keep_last, saving.keep_best)
    step = 0  # the one that is at work
    with contextlib.ExitStack() as stack:
        stack.enter_context(owned(workdir))
        stack.enter_context(explained(checkpoints, lambda: step))
        stack.enter_context(environment.runnable())
        batches = corpus.train_batches(settings)
        stack.callback(batches.close)
        state, record = start(model, settings, checkpoints)
        if record:
            batches.set_state(record["data"])
        step, tokens = int(state["step"]), record.get("tokens", 0)
        first = step + 1
        environment.pin_threads()
        peak = hosts.from_first(environment.matmul_peak) * machines(settings)
        clock = Clock(record.get("seconds"))
        log = None
        if hosts.is_first():
            write_files(settings, workdir, corpus, peak)
            log = MetricsLog(workdir, step)
        validated = hosts.from_first(lambda: list(log.validated.items()))
        log = log or NoLog(dict(validated))
        stack.callback(log.close)
        for evaluated, told in log.validated.items():  # a stop in mid-evaluation has saved its step without a loss
            checkpoints.rank(evaluated, told)
        logging.info("%s", describe(settings, corpus, first))
        if model.products.mesh is not None and hosts.is_first():
            logging.info("%s", describe_device(settings))
        progress = Progress(steps, step, hosts.is_first())
        stack.callback(progress.close)
        stop = stack.enter_context(StopRequests(hosts.Stops(model.products.mesh) if hosts.several() else None))
        profiler = Profiler(workdir / "profile", first, steps) if profile and hosts.is_first() else None
        flops_per_token = flops.training_per_token(settings)
        mesh = model.products.mesh
        # one CPU device a process: a command's call returns when its step is done (environment.compute_in_this_thread)
        alone = jax.default_backend() == "cpu" and (mesh is None or mesh.local_mesh.size == 1)
        compiled, eval_step = {}, make_eval_step(model, settings)
        pending, ready = None, 0.0  # the step whose metrics are not read yet: (step, metrics, tokens, dispatched)

        def read_pending():
            """Waits for the pending step, stops the run if it went wrong, and writes its line."""
            nonlocal pending, ready, tokens
            if pending is None:
                return
            done, metrics, size, dispatched = pending
            pending = None
            metrics = to_plain(metrics)
            seconds = time.perf_counter() - max(dispatched, ready)
            ready = time.perf_counter()
            clock.seconds["train"] += seconds
            tokens += size
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                raise Diverged(done, f"loss is {metrics['loss']}, gradient norm {metrics['grad_norm']}; "
                               + safe(checkpoints))
            speed = size / seconds
            log.write({"step": done, "split": "train"} | metrics | {
                "tokens": tokens, "tokens_per_second": speed, "mfu": flops_per_token * speed / peak})
            told = "reward" if "reward" in metrics else "loss"  # the loss of reinforcement is about 0 at every step
            progress.update(done, f"{told} {metrics[told]:.3f}, {speed:,.0f} tokens/s")

        def save(loss):
            with clock.phase("save"):
                log.sync()
                copy = jax.tree.map(jnp.copy, state)  # the next step may reuse the state's own buffers at once
                checkpoints.save(step, copy, {
                    "data": batches.get_state() | {"step": step}, "tokens": tokens, "seconds": clock.seconds}
                    | (note or {}), loss)

        def evaluates():
            return step == steps or bool(evaluating.every_steps and step % evaluating.every_steps == 0)

        def validate():
            """Held-out loss at this step, written to the log; None where a stop request came before it was known."""
            try:
                with clock.phase("evaluate"):
                    found = (evaluate or evaluation.evaluate)(stop.checked(eval_step), state, corpus, settings,
                                                              None if step == steps else evaluating.batches)
            except Interrupted:
                return None
            if step not in log.validated:
                log.write({"step": step, "split": "validation"} | found)
            checkpoints.rank(step, found["loss"])
            logging.info("step %d: validation %s", step, f"{found['bits_per_byte']:.3f} bits per byte"
                         if "bits_per_byte" in found else f"accuracy {found['accuracy']:.1%}")
            return found

        validation = None
        if step and evaluates() and (step == steps or step not in log.validated):  # a stop request came in between
            validation = validate()
        for step in range(first, steps + 1):
            with clock.phase("data"):
                batch = batches.take(state)
                if over:  # what was computed for it, a teacher's logits say, lies on one device
                    batch = jax.device_put(batch, over.batch)
            size, shapes = batch["tokens_BT"].size, tuple((name, batch[name].shape) for name in sorted(batch))
            if shapes not in compiled:
                read_pending()
                with clock.phase("compile"):
                    compiled[shapes] = step_function.lower(state, batch).compile()
                    hosts.from_all(None)  # else Gloo gives the others 30 s to compile it too (JAX 0.11.2)
            if profiler:
                profiler.before(step)
            dispatched = time.perf_counter()
            asked = stop.asked()  # known when the step before is, for which `read_pending` waits
            state, metrics = compiled[shapes](state, batch)
            read_pending()
            pending = (step, metrics, size, dispatched)
            if alone:
                read_pending()
            if profiler:
                profiler.after(step, metrics)
            stops = bool(stop.agreed(asked))
            saves = step == steps or bool(saving.every_steps and step % saving.every_steps == 0)
            if evaluates() or saves or stops:
                read_pending()
            if evaluates():
                validation = validate()
                stops = stops or validation is None
            if saves or stops:
                save(validation["loss"] if evaluates() and validation else None)
            if stops:
                break
        checkpoints.close()
        progress.close()
        stop.release()
        if stop.agreed(stop.asked()):
            logging.info("stopped at step %d: %s", int(state["step"]), safe(checkpoints))
            raise Stopped(stop.code)
        if model.products.mesh is not None:
            model, state = make_model(settings), gathered(state)
        decoding = {}
        if hosts.is_first():
            samples.write(model, state, corpus, settings, workdir / "samples.md")
            decoding = samples.time_decoding(model, state, corpus, settings)
        return {"steps": steps, "tokens": tokens, "validation": validation, "decoding": decoding, "gzip_bits_per_byte":
                corpus.gzip_bits_per_byte, "held_out_bytes": corpus.validation_bytes, "seconds": clock.seconds,
                "peak_flops": peak, "flops_per_token": flops_per_token, "workdir": str(workdir)}


@environment.runnable()
def evaluate_newest(settings: config.Settings, workdir: Path) -> dict:
    """Evaluates the workdir's newest intact checkpoint on all held-out text; writes nothing."""
    checkpoints = Checkpoints(workdir / "checkpoints", settings.checkpoint.keep_last, settings.checkpoint.keep_best)
    step = checkpoints.agreed()
    if step is None:
        raise RequestError(f"--workdir={workdir} holds no intact checkpoint")
    corpus = load_shared(settings, Tokenizer.load(workdir / "tokenizer.json"))  # on any text, the model's own tokens
    settings = settings.with_vocabulary(corpus.tokenizer.vocab_size)
    model = make_model(settings, make_mesh(settings))
    corpus = shared_out(corpus, model, settings)
    state, _ = checkpoints.restore(step, abstract_state(model, settings))
    return {"step": step} | evaluation.on_held_out(model, state, corpus, settings)


@environment.runnable()
def evaluate_weights(settings, folder: Path) -> dict:
    """Evaluates a Hugging Face folder, or what research.convert wrote, on the text that `settings.data` holds out.

    Writes nothing. Tokens are those of the folder's own tokenizer.json. Raises RequestError.
    """
    corpus = load_shared(settings, Tokenizer.load(folder))
    model = make_model(settings, make_mesh(settings))
    corpus = shared_out(corpus, model, settings)
    variables, wrong = weights_for(model, settings, folder)
    if wrong:
        raise RequestError(f"--workdir={folder} holds another model: {wrong}")
    environment.pin_threads()
    variables = variables if model.products.mesh else jax.device_put(variables)
    return evaluation.on_held_out(model, variables | {"ema": None}, corpus, settings)


def load_shared(settings, tokenizer: Tokenizer | None = None):
    """The corpus, which the first process tokenizes where the cache is shared."""
    with hosts.first_alone():
        return load_corpus(settings, tokenizer)


def shared_out(corpus, model, settings):
    """The corpus, of whose batches each of several processes reads the rows of its own devices: the same for all."""
    if not hosts.several():
        return corpus
    hosts.agree({"corpus": corpus.corpus_hash, "tokenizer": corpus.tokenizer.hash}, "text")
    return corpus.shared(hosts.Share(shardings_of(model, settings).batch))


def gathered(state):
    """What decoding reads of a state, on the first device of the first process, which decodes alone."""
    kept = {name: state[name] for name in ("params", "routing", "ema", "step")}
    if hosts.several():
        kept = hosts.whole(kept, kept["step"].sharding.mesh)
    return jax.device_put(kept, jax.local_devices()[0]) if hosts.is_first() else None


def start(model, settings, checkpoints: Checkpoints):
    """The state and the record to go on from: the newest intact checkpoint's, or step 0 and an empty record."""
    check_implementations(model, settings)  # before anything is written
    step = checkpoints.agreed()
    if step is not None:
        if step > settings.training.steps:
            raise RequestError.field("training.steps", settings.training.steps,
                                     f"is less than what is done: {checkpoints.directory / str(step)}")
        return checkpoints.restore(step, abstract_state(model, settings))
    if checkpoints.list():
        logging.warning("no checkpoint in %s is intact: starting again from step 0", checkpoints.directory)
    if settings.checkpoint.initialize_from:
        return init_state(model, settings, initial_variables(model, settings)), {}
    return init_state(model, settings), {}


def safe(checkpoints: Checkpoints) -> str:
    """What can be gone on from, once the save under way has ended."""
    with contextlib.suppress(RunError):
        checkpoints.wait()
    step = checkpoints.newest_intact()
    if step is None:
        return "no checkpoint was saved"
    return f"the last good checkpoint is {checkpoints.directory / str(step)}"


@contextlib.contextmanager
def explained(checkpoints: Checkpoints, step: Callable[[], int]):
    """What the system or the device refuses (a full disk, memory), as a RunError with the step and what is safe."""
    try:
        hosts.last_words(checkpoints.newest)
        yield
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        if hosts.is_loss(error):
            raise RunError(f"step {step()}: another process of the run has ended; {checkpoints.newest()}") from error
        if isinstance(error, ValueError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise RunError(f"step {step()}: {reason}; {safe(checkpoints)}") from error


def machines(settings) -> int:
    """How many times over there is what one device measures alone: on a CPU a machine's devices share its cores."""
    names = hosts.from_all(socket.gethostname())
    return len(set(names)) if jax.default_backend() == "cpu" else math.prod(settings.mesh.values())


class Profiler:
    """A trace for xprof, in `folder`, of three of the steps `first` to `last`, once what is compiled has run if so
    many are left."""

    def __init__(self, folder: Path, first: int, last: int):
        self.folder, self.running = folder, False
        self.first = max(first, min(first + 3, last - 2))
        self.last = min(self.first + 2, last)
        if first > last:
            logging.warning("--profile: no step is left to trace")

    def before(self, step: int) -> None:
        if step == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, step: int, metrics) -> None:
        if self.running and step == self.last:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.running = False
            logging.info("wrote a trace to %s", self.folder)


def describe(settings, corpus, first: int) -> str:
    """What is about to be trained, in a line or two."""
    count, m = parameters.count(settings), settings.model
    steps = f"steps {first} to {settings.training.steps}" if first <= settings.training.steps else "all steps done"
    experts = f", {m.num_experts_per_tok} of {m.n_routed_experts} experts" if m.n_routed_experts else ""
    return (f"{count['total'] / 1e6:.2f}M parameters + {count['mtp'] / 1e6:.2f}M multi-token, "
            f"{count['active'] / 1e6:.2f}M active{experts}; {corpus.description}; {steps}")


def describe_device(settings) -> str:
    """What the account expects of the memory of one device of the mesh, in a line."""
    held = memory.of_device(settings, jax.default_backend() == "gpu")
    mesh = " x ".join(f"{axis} {size}" for axis, size in settings.mesh.items() if size > 1)
    parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in held.items() if size and name != "total")
    return f"a device of {mesh}: {held['total'] / 1e6:,.1f} MB by the account ({parts})"
