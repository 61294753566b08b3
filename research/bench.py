"""Training speed beside Hugging Face transformers on the same CPU, shapes and tokens: `python -m research.bench`.

One process a side and size builds its model once; the driver then lets them take a few steps in turn, so that both see
the same machine. Without the peer's environment (`make parity`) only ours is measured. Real text, real router,
dropless on both sides, float32; ours keeps huge pages as `research.main` does, the peer also with `--peer_hugepages`.
Only a quiet machine gives a fair ratio. Wide ranges tell; the ratio of the best rounds, in brackets, suffers less. The
router is as initialised and hardly moves in so few steps: most tokens go to a few experts, on both sides.
"""

import collections
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time

import numpy as np
from absl import flags

from research import bench_peer, command
from research.errors import RequestError, RunError

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARITY_PYTHON = ROOT / ".venv-parity/bin/python"

BATCH, LENGTH, BATCHES = 8, 256, 16  # sequences a step, tokens a sequence, batches before the text repeats
MODEL = {  # the names of DeepSeek's config.json; n_routed_experts varies
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.006,
    "max_position_embeddings": 4096,
}
OPTIMIZER = {
    "learning_rate": 2.2e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}
PEAK_WIDTH = 2048  # of the square float32 product whose rate is the peak
WARMUP_STEPS = 3
# Fresh buffers of every step cost page faults: what research.main sets against them, before the process starts.
KEPT_PAGES = {"GLIBC_TUNABLES": command.KEPT_PAGES}
HUGE_PAGES = {"GLIBC_TUNABLES": command.HUGE_PAGES}  # what other commands set

FLAGS = flags.FLAGS
flags.DEFINE_string("peer_python", None, "Python with torch and transformers (default: .venv-parity's, if it exists)")
flags.DEFINE_bool("peer_hugepages", False, "measure the peer with our allocator settings as well")
flags.DEFINE_list("experts", ["16", "64", "256"], "numbers of routed experts")
flags.DEFINE_integer("rounds", 5, "turns of each side", lower_bound=1)
flags.DEFINE_integer("steps", 3, "training steps in a turn", lower_bound=1)
flags.DEFINE_string("json", None, "also write the result to this file")
flags.DEFINE_string("worker", None, "one side's process, started by the driver: its request as JSON")


def our_settings(experts: int):
    """MODEL and OPTIMIZER as our settings: no multi-token module and no balance loss, as the peer has none."""
    from experiments import base
    from research import config

    c = base.get_config()
    c.model.update(MODEL | {"n_routed_experts": experts, "aux_loss_alpha": 0.0})
    c.mtp.num_nextn_predict_layers = 0
    c.optimizer.update(OPTIMIZER)
    c.data.sequence_length = LENGTH
    c.training.batch_size = BATCH
    return config.check(c)


def our_steps(experts: int) -> tuple[bench_peer.Step, dict]:
    """Our training step at MODEL, OPTIMIZER and `experts`: `step(tokens_BS) -> loss` (unfetched), and its description.

    `tokens_BS` is int32 with S = LENGTH + 1. The step keeps its state and may return before it is done.
    """
    import jax

    from research import environment
    from research.model.build import make_model
    from research.training.step import init_state, make_train_step

    environment.compute_in_this_thread()
    settings = our_settings(experts)
    model = make_model(settings)
    train_step = make_train_step(model, settings)
    state = init_state(model, settings)
    environment.pin_threads()
    whole = {
        "segments_BT": np.ones((BATCH, LENGTH), np.int32),
        "positions_BT": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH)),
        "mask_BT": np.ones((BATCH, LENGTH), bool),
    }

    def step(tokens_BS):
        nonlocal state
        state, metrics = train_step(state, whole | {"tokens_BT": tokens_BS[:, :-1], "targets_BT": tokens_BS[:, 1:]})
        return metrics["loss"]

    return step, {"name": "parsimony", "parameters": sum(x.size for x in jax.tree.leaves(state["params"]))}


def peak_steps() -> tuple[bench_peer.Step, dict]:
    """One square float32 product a step, each reading the one before, so that none overlaps or is left out."""
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(jnp.dot)
    w_DD = jax.random.normal(jax.random.key(0), (PEAK_WIDTH, PEAK_WIDTH)) * PEAK_WIDTH**-0.5
    x_DD = w_DD

    def step(_):
        nonlocal x_DD
        x_DD = multiply(x_DD, w_DD)
        return x_DD[0, 0]

    return step, {"name": "matmul peak"}


def work(request: dict) -> None:
    """One of our own processes: the model's steps, or the product whose rate is the peak."""
    step, about = peak_steps() if request["side"] == "peak" else our_steps(request["model"]["n_routed_experts"])
    bench_peer.serve(step, about, request["tokens"])


class Worker:
    """One side's process; `start_seconds` is from its start to the end of its first step, compilation included."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: pathlib.Path):
        inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        self.errors = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115
        start = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=inherited | environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.about = self.read()
        self.start_seconds = time.perf_counter() - start

    def read(self) -> dict:
        """The next JSON line; RunError with the last line of stderr when the process has ended instead."""
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise RunError(f"{' '.join(self.process.args[:3])} ... ended with code {code}: {last}")
        return json.loads(line)

    def seconds(self, steps: int) -> float:
        """Takes so many steps now; seconds a step."""
        return self.turn(steps)["seconds"]

    def turn(self, steps: int) -> dict:
        """Takes so many steps now; what the process says of them."""
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `read` says how it ended
        return self.read()

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


def request(side: str, tokens_file: pathlib.Path, experts: int) -> str:
    """What a worker is told, as JSON."""
    model = MODEL | {"n_routed_experts": experts}
    return json.dumps({"side": side, "tokens": str(tokens_file), "model": model, "optimizer": OPTIMIZER})


def start(side: str, folder: pathlib.Path, experts: int, peer_python: str | None) -> Worker:
    """A worker of `ours`, `peak`, `peer` or `peer_hugepages`."""
    told = request(side, folder / "tokens.npy", experts)
    if side.startswith("peer"):
        # -I: torch and transformers alone; the packages of this repository are not on its path
        script = [peer_python, "-I", str(ROOT / "research/bench_peer.py"), told]
        return Worker(script, KEPT_PAGES if side == "peer_hugepages" else {}, folder)
    module = [sys.executable, "-m", "research.bench", f"--worker={told}"]
    return Worker(module, KEPT_PAGES | {"JAX_PLATFORMS": "cpu"}, folder)


def text_tokens() -> np.ndarray:
    """(BATCHES, BATCH, LENGTH + 1) int32: words and signs of the standard library's sources, the commonest numbered
    from 1, 0 for those beyond the vocabulary. Rows are consecutive text."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    pieces = re.findall(r"\w+|\s+|[^\w\s]", "".join(file.read_text("utf-8", "replace") for file in files))
    commonest = collections.Counter(pieces).most_common(MODEL["vocab_size"] - 1)
    numbers = {piece: number for number, (piece, _) in enumerate(commonest, start=1)}
    count = BATCHES * BATCH * (LENGTH + 1)
    return np.array([numbers.get(piece, 0) for piece in pieces[:count]], np.int32).reshape(BATCHES, BATCH, LENGTH + 1)


def flops_per_token() -> float:
    """Model FLOPs of training on one token, the same at every number of experts but for the router: the smallest's."""
    from research.accounting import flops

    return flops.training_per_token(our_settings(16))


def measure(experts: int, sides: list[str], peak: Worker, folder: pathlib.Path, peer_python: str | None) -> dict:
    """Tokens/s of every side at one size, a number a round, and the best rate of the peak's product."""
    workers: dict[str, Worker] = {}
    try:
        for side in sides:
            workers[side] = start(side, folder, experts, peer_python)
            workers[side].seconds(WARMUP_STEPS)
        rates = {side: [] for side in sides}
        products = []
        for number in range(FLAGS.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):  # neither is always the one that goes first
                rates[side].append(BATCH * LENGTH / workers[side].seconds(FLAGS.steps))
            products += [peak.seconds(2) for _ in range(3)]
        return {
            "experts": experts,
            "sides": {
                side: worker.about | {"start_seconds": worker.start_seconds, "tokens_per_second": rates[side]}
                for side, worker in workers.items()
            },
            "ratio": {
                side: statistics.median(ours / peer for ours, peer in zip(rates["ours"], rates[side], strict=True))
                for side in sides[1:]
            },
            "ratio_of_best": {side: max(rates["ours"]) / max(rates[side]) for side in sides[1:]},
            "peak_flops": 2 * PEAK_WIDTH**3 / min(products),
        }
    finally:
        for worker in workers.values():
            worker.close()


def lines(size: dict) -> list[str]:
    """One size as the table's lines; a ratio is ours over that side's."""
    made = []
    for side, result in size["sides"].items():
        rates = result["tokens_per_second"]
        spread = f"{min(rates):,.0f}-{max(rates):,.0f}"
        line = f"{size['experts']:>7}  {side:<14} {statistics.median(rates):>9,.0f}  {spread:>15}"
        line += f"  {result['start_seconds']:>5.1f} s"
        if side == "ours":
            rate = statistics.median(rates) * flops_per_token()
            share = rate / size["peak_flops"]
            line += f"         {rate / 1e9:.0f} GFLOP/s, {share:.0%} of {size['peak_flops'] / 1e9:.0f}"
        else:
            line += f"  {size['ratio'][side]:.2f}x ({size['ratio_of_best'][side]:.2f}x)"
        made.append(line)
    return made


def find_peer(peer_python: str | None) -> str | None:
    """Path of the Python that has torch and transformers: the given one, else .venv-parity's, None where it is not."""
    if peer_python is None:
        if not PARITY_PYTHON.exists():
            return None
        peer_python = str(PARITY_PYTHON)
    peer_python = os.path.abspath(shutil.which(peer_python) or peer_python)  # not resolved: a venv is its link
    has_both = "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ('torch', 'transformers'))))"
    try:
        missing = subprocess.run([peer_python, "-I", "-c", has_both], check=False, capture_output=True).returncode
    except OSError as error:
        raise RequestError(f"--peer_python={peer_python!r} does not run: {error.strerror}") from error
    if missing:
        raise RequestError(f"--peer_python={peer_python!r} has no torch and transformers: `make parity` makes one")
    return peer_python


def check_json(file: str | None, flag: str = "json") -> None:
    """RequestError where the result could not be written to the file that `--flag` names."""
    if file is not None:
        parent = pathlib.Path(file).absolute().parent
        if not (parent.is_dir() and os.access(parent, os.W_OK)) or pathlib.Path(file).is_dir():
            raise RequestError(f"--{flag}={file!r} is not a file that can be written")


def checked_flags() -> tuple[list[int], list[str], str | None]:
    """The sizes, the sides and the peer's Python; RequestError for what cannot be measured."""
    smallest = MODEL["num_experts_per_tok"]
    for text in FLAGS.experts:
        if not text.isdecimal() or int(text) < smallest:
            raise RequestError(f"--experts={text!r} is not a whole number of at least {smallest}")
    if not FLAGS.experts:
        raise RequestError("--experts is empty: give numbers of experts such as 16,64,256")
    peer_python = find_peer(FLAGS.peer_python)
    if FLAGS.peer_hugepages and peer_python is None:
        raise RequestError("--peer_hugepages=True needs the peer: `make parity`, or --peer_python=PATH")
    check_json(FLAGS.json)
    sides = ["ours"] + ["peer"] * (peer_python is not None) + ["peer_hugepages"] * FLAGS.peer_hugepages
    return [int(text) for text in FLAGS.experts], sides, peer_python


def run() -> None:
    """Measures every size, printing each when it is done."""
    sizes, sides, peer_python = checked_flags()
    print(
        f"training in float32: {BATCH}x{LENGTH} tokens of real text a step, width {MODEL['hidden_size']}, "
        f"{MODEL['num_hidden_layers']} layers, top-{MODEL['num_experts_per_tok']}, dropless; "
        f"{FLAGS.rounds} rounds of {FLAGS.steps} steps in turn: median and range; start: to the first step's end"
    )
    print(
        f"{'experts':>7}  {'side':<14} {'tokens/s':>9}  {'range':>15}  {'start':>7}  ours/side (best/best)", flush=True
    )
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        np.save(folder / "tokens.npy", text_tokens())
        peak = start("peak", folder, sizes[0], None)
        try:
            for experts in sizes:
                results.append(measure(experts, sides, peak, folder, peer_python))
                print("\n".join(lines(results[-1])), flush=True)
        finally:
            peak.close()
    for side, result in results[0]["sides"].items():
        print(f"{side}: {result['name']}{', huge pages kept' * (side != 'peer')}")
    if FLAGS.json is not None:
        shape = {"batch": BATCH, "length": LENGTH, "model": MODEL, "optimizer": OPTIMIZER}
        result = {"shape": shape, "steps": FLAGS.steps, "flops_per_token": flops_per_token(), "sizes": results}
        pathlib.Path(FLAGS.json).write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """The driver, or one of its workers."""
    if FLAGS.worker is not None:
        work(json.loads(FLAGS.worker))
    else:
        run()


if __name__ == "__main__":
    command.run(main)
