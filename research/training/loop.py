"""The one training loop."""

import contextlib
import fcntl
import json
import math
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging

from research import config, environment
from research.accounting import flops, parameters
from research.command import Stopped
from research.data.pipeline import TrainBatches, load_corpus
from research.errors import RequestError, RunError
from research.model.build import make_model
from research.training import evaluation, samples
from research.training.checkpoint import Checkpoints
from research.training.metrics import Clock, MetricsLog, progress, to_plain
from research.training.step import init_state, make_eval_step, make_train_step


def train(settings: config.Settings, workdir: Path, profile: bool = False) -> dict:
    """Trains from the workdir's newest intact checkpoint, or from the start, to `training.steps`; evaluates and saves.

    Returns the summary that is printed. Raises RequestError before anything is written, RunError for a run that
    failed on its way, Stopped after saving on Ctrl-C or SIGTERM.
    """
    corpus = load_corpus(settings)
    settings = settings.with_vocabulary(corpus.tokenizer.vocab_size)
    steps, saving, evaluating = settings.training.steps, settings.checkpoint, settings.evaluation
    model = make_model(settings)
    checkpoints = Checkpoints(workdir / "checkpoints", saving.keep_last, saving.keep_best)
    state, record = start(model, settings, checkpoints)
    batches = TrainBatches(corpus, settings)
    if record:
        batches.set_state(record["data"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(owned(workdir))
        stack.callback(batches.close)
        peak = environment.matmul_peak()
        write_files(settings, workdir, corpus, peak)
        clock = Clock(record.get("seconds"))
        first, tokens = int(state["step"]) + 1, record.get("tokens", 0)
        log = MetricsLog(workdir, first - 1)
        stack.callback(log.close)
        bar = stack.enter_context(progress(steps, first - 1))
        stop = stack.enter_context(StopRequests())
        profiler = Profiler(workdir / "profile", first + 3 if profile else None)
        flops_per_token = flops.training_per_token(settings)
        step_function, compiled, eval_step = make_train_step(model, settings), {}, make_eval_step(model, settings)
        logging.info("%s", describe(settings, corpus, first))

        pending, ready = None, 0.0  # the step whose metrics are not read yet: (step, metrics, tokens, dispatched)

        def read_pending():
            """Waits for the pending step, stops the run if it went wrong, and writes its line."""
            nonlocal pending, ready, tokens
            if pending is None:
                return
            step, metrics, size, dispatched = pending
            pending = None
            metrics = to_plain(metrics)
            seconds = time.perf_counter() - max(dispatched, ready)
            ready = time.perf_counter()
            clock.seconds["train"] += seconds
            tokens += size
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                safe = checkpoints.newest_intact()
                raise RunError(f"step {step}: loss is {metrics['loss']}, gradient norm {metrics['grad_norm']}; "
                               + (f"the last good checkpoint is {checkpoints.directory / str(safe)}"
                                  if safe is not None else "no checkpoint was saved before"))
            speed = size / seconds
            log.write({"step": step, "split": "train"} | metrics | {
                "tokens": tokens, "tokens_per_second": speed, "mfu": flops_per_token * speed / peak})
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()

        def save(step, loss=None):
            with clock.phase("save"):
                log.sync()
                copy = jax.tree.map(jnp.copy, state)  # the next step may reuse the state's own buffers at once
                checkpoints.save(step, copy, {
                    "data": batches.get_state() | {"step": step}, "tokens": tokens, "seconds": clock.seconds}, loss)

        validation = None
        for step in range(first, steps + 1):
            with clock.phase("data"):
                batch = next(batches)
            size = batch["tokens_BT"].size
            if size not in compiled:
                read_pending()
                with clock.phase("compile"):
                    compiled[size] = step_function.lower(state, batch).compile()
            last = step == steps
            profiler.before(step)
            dispatched = time.perf_counter()
            state, metrics = compiled[size](state, batch)
            read_pending()
            pending = (step, metrics, size, dispatched)
            profiler.after(step, metrics, last)
            evaluates = last or (evaluating.every_steps and step % evaluating.every_steps == 0)
            saves = last or stop.code or (saving.every_steps and step % saving.every_steps == 0)
            if evaluates or saves:
                read_pending()
            if evaluates:
                with clock.phase("evaluate"):
                    validation = evaluation.evaluate(eval_step, state, corpus, settings,
                                                     None if last else evaluating.batches)
                log.write({"step": step, "split": "validation"} | validation)
                bar.write(f"step {step}: validation {validation['bits_per_byte']:.3f} bits per byte")
            if saves:
                save(step, validation["loss"] if evaluates else None)
            if stop.code and not last:
                checkpoints.close()
                logging.info("stopped after step %d, saved in %s", step, checkpoints.directory / str(step))
                raise Stopped(stop.code)
        bar.close()
        checkpoints.close()
        if validation is None:  # nothing was left to train
            validation = evaluation.evaluate(eval_step, state, corpus, settings)
        samples.write(model, state, corpus, settings, workdir / "samples.md")
        return {"steps": steps, "tokens": tokens, "validation": validation, "gzip_bits_per_byte":
                corpus.gzip_bits_per_byte, "held_out_bytes": corpus.validation_bytes, "seconds": clock.seconds,
                "peak_flops": peak, "flops_per_token": flops_per_token, "workdir": str(workdir)}


def evaluate_newest(settings: config.Settings, workdir: Path) -> dict:
    """Evaluates the workdir's newest intact checkpoint on all held-out text; writes nothing."""
    corpus = load_corpus(settings)
    settings = settings.with_vocabulary(corpus.tokenizer.vocab_size)
    model = make_model(settings)
    checkpoints = Checkpoints(workdir / "checkpoints", settings.checkpoint.keep_last, settings.checkpoint.keep_best)
    step = checkpoints.newest_intact()
    if step is None:
        raise RequestError(f"--workdir={workdir} holds no intact checkpoint")
    state, _ = checkpoints.restore(step, jax.eval_shape(lambda: init_state(model, settings)))
    return {"step": step, "gzip_bits_per_byte": corpus.gzip_bits_per_byte, "held_out_bytes": corpus.validation_bytes,
            "validation": evaluation.evaluate(make_eval_step(model, settings), state, corpus, settings)}


def start(model, settings, checkpoints: Checkpoints):
    """The state and the record to go on from: the newest intact checkpoint's, or step 0 and an empty record."""
    step = checkpoints.newest_intact()
    if step is not None:
        return checkpoints.restore(step, jax.eval_shape(lambda: init_state(model, settings)))
    if checkpoints.list():
        logging.warning("no checkpoint in %s is intact: starting again from step 0", checkpoints.directory)
    if settings.checkpoint.initialize_from:
        from research.interop.weights import initial_variables

        return init_state(model, settings, initial_variables(model, settings)), {}
    return jax.jit(lambda: init_state(model, settings))(), {}


@contextlib.contextmanager
def owned(workdir: Path):
    """Makes the workdir and holds it: a second run in it is refused while this one lives, however it ends."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise RequestError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"--workdir={workdir} is in use by another run") from None
        yield


class StopRequests:
    """Ctrl-C and SIGTERM, noted until the step is done. `code` is the exit code to leave with, 0 while none came."""

    def __init__(self):
        self.code = 0
        self._before = {}

    def __enter__(self):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            self._before[number] = signal.signal(number, lambda *_, code=code: self._note(code))
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, code: int) -> None:
        if self.code:
            raise Stopped(code)  # asked twice: leave now, the last checkpoint stands
        self.code = code
        logging.warning("stopping after this step; once more to leave without saving")


class Profiler:
    """A trace for xprof of three steps, once what is compiled has run, in `folder`."""

    def __init__(self, folder: Path, first: int | None):
        self.folder, self.first, self.running = folder, first, False

    def before(self, step: int) -> None:
        if step == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, step: int, metrics, last: bool) -> None:
        if self.running and (last or step == self.first + 2):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.running = False
            logging.info("wrote a trace to %s", self.folder)


def write_files(settings, workdir: Path, corpus, peak: float) -> None:
    """`config.json`, `tokenizer.json` and `environment.json` of the workdir; says which settings a resume changed."""
    path = workdir / "config.json"
    if path.exists():
        with contextlib.suppress(RequestError):
            before, now = (config.flatten(json.loads(s.to_json())) for s in (config.read(workdir), settings))
            for name in now:
                if before[name] != now[name]:
                    logging.warning("config.%s was %s and is %s now", name, before[name], now[name])
    path.write_text(settings.to_json())
    corpus.tokenizer.save(workdir / "tokenizer.json")
    record = environment.describe() | {"corpus_hash": corpus.corpus_hash, "matmul_peak_flops": peak}
    (workdir / "environment.json").write_text(json.dumps(record, indent=2) + "\n")


def describe(settings, corpus, first: int) -> str:
    """What is about to be trained, in a line or two."""
    count, m = parameters.count(settings), settings.model
    experts = f", {m.num_experts_per_tok} of {m.n_routed_experts} experts" if m.n_routed_experts else ""
    return (f"{count['total'] / 1e6:.2f}M parameters + {count['mtp'] / 1e6:.2f}M multi-token, "
            f"{count['active'] / 1e6:.2f}M active{experts}; corpus {len(corpus.train.flat):,} tokens, "
            f"{corpus.validation_bytes:,} bytes held out; steps {first} to {settings.training.steps}")
