"""Steps of the tiny model on meshes of 8 simulated devices, as JSON: run in a process of its own by the tests."""

import json
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

DEVICES = 8
BAD = "a program that XLA must warn of:"  # on stderr before the last
FIELDS = {
    "model.num_hidden_layers": 1, "model.first_k_dense_replace": 0, "model.moe_intermediate_size": 40,
    "mtp.num_nextn_predict_layers": 1, "training.batch_size": 8,
    "training.ema_decay": 0.5, "training.expert_room": 1.0,  # in rounds
    "optimizer.clip_norm": 0, "model.bias_update_until": 1.0, "mtp.loss_weight_switch": 1.0,
}
MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "expert": {"expert": 8},
    "tensor and expert": {"tensor": 2, "expert": 4},
    "one in pieces": {},
    "pipeline": {"pipeline": 4},
    "pipeline and expert": {"pipeline": 2, "fsdp": 2, "expert": 2},
}
PIPELINES = ("pipeline", "pipeline and expert")
ZERO_BUBBLE = "pipeline"
IN_PIECES = {  # of these, and of the one device that they must equal: a dense layer, four with experts, micro-batches
    "model.num_hidden_layers": 5, "model.first_k_dense_replace": 1, "model.attention": "gqa",
    "training.batch_size": 16, "training.accumulation_steps": 4,
}
ROWS = ((7, 5), (4, 3, 3), (12,), (5, 6), (2, 2, 2), (9, 1), (11,), ())
STEPS = 3
REMAT = {"fsdp": "layer", "tensor and expert": "up_projections"}  # computed again there, kept on one device
DISPATCHED = "tensor and expert"  # as training dispatches; the definition, elsewhere, compiles in a third of the time


def run(name: str) -> dict:
    """Metrics of every step; the first step's gradients (Adam's first moments); the state after the last step."""
    import numpy as np

    from research.parallel.mesh import make_mesh
    from research.training.step import init_state, make_train_step
    from research.tree import paths
    from tests import tiny

    experts, attention = ("auto", "xla") if name == DISPATCHED else ("reference", "reference")
    pieces = IN_PIECES if name in ("one in pieces", *PIPELINES) else {}
    rows = ROWS * (2 if pieces else 1)
    s = tiny.settings(FIELDS | pieces | {f"mesh.{axis}": size for axis, size in MESHES[name].items()}
                      | {"model.attention_implementation": attention, "model.remat": REMAT.get(name, "none")}
                      | ({"training.pipeline_schedule": "zero_bubble"} if name == ZERO_BUBBLE else {}))
    model, variables = tiny.model(s, experts=experts)
    model = model.clone(products=replace(model.products, mesh=make_mesh(s), expert_room=s.training.expert_room))
    state = init_state(model, s, variables)
    step = make_train_step(model, s).lower(state, tiny.batch(rows)).compile()
    metrics, gradients = [], None
    for number in range(STEPS):
        state, found = step(state, tiny.batch(rows, seed=number))
        metrics.append({key: np.asarray(value).tolist() for key, value in found.items()})
        if gradients is None:
            gradients = {path: np.asarray(x).tolist() for path, x in paths(state["optimizer"][0].mu).items()}
    return {
        "metrics": metrics, "donated": donated(step, state),
        "gradients": gradients,
        "state": {part: {path: np.asarray(x).tolist() for path, x in paths(state[part]).items()}
                  for part in ("params", "routing", "ema")},
        "program": step.as_text(),
        "held": {path: x.addressable_shards[0].data.shape for path, x in paths(state["params"]).items()},
    }


def donated(step, state) -> list[int]:
    """Bytes that a compiled step writes over its arguments, on a device, and those of the state there."""
    import jax

    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    return [step.memory_analysis().alias_size_in_bytes, held]


def in_8_bits(remat: str, **sizes) -> dict:
    """Loss and gradients of a step under `fp8_deepseek`, and `donated`; 128 tokens a device: whole tiles, and more than
    a device with four experts of eight has room for in one round. Activations are in float32:
    in 16 bits XLA rounds between other operations in each program, and 8-bit values move to their neighbours."""
    import numpy as np

    from research.model.build import make_model
    from research.parallel.mesh import make_mesh
    from research.training.step import init_state, make_train_step
    from research.tree import paths
    from tests import tiny

    fields = FIELDS | {"model.attention": "gqa", "model.attention_implementation": "reference",
                       "mtp.num_nextn_predict_layers": 0, "data.sequence_length": 128, "training.ema_decay": 0.0}
    s = tiny.settings(fields | {"precision.recipe": "fp8_deepseek", "model.remat": remat}
                      | {f"mesh.{axis}": size for axis, size in sizes.items()})
    model, (_, variables) = make_model(s, make_mesh(s)), tiny.model(tiny.settings(fields))
    recipe = replace(model.products.recipe, activations="float32")
    model = model.clone(products=replace(model.products, recipe=recipe))
    batch = tiny.batch([[10 * size for size in row] for row in ROWS], 128)
    state = init_state(model, s, variables)
    step = make_train_step(model, s).lower(state, batch).compile()
    state, metrics = step(state, batch)
    return {"loss": float(metrics["loss"]), "donated": donated(step, state),
            "gradients": {path: np.asarray(x).tolist() for path, x in paths(state["optimizer"][0].mu).items()}}


def dispatched() -> dict:
    """Of a layer of experts under `fp8_dispatched` over expert 8: {what: its error beside one device}, and what its
    `exchange` sends, and that of its program for GPUs (`lowered`)."""
    from unittest import mock

    import jax
    import jax.numpy as jnp
    import numpy as np

    from research.parallel import experts as parallel
    from research.parallel.mesh import make_mesh
    from research.precision.products import Products
    from research.precision.recipe import RECIPES
    from tests import tiny

    X, E, K, D, F = 64, 8, 2, 144, 40
    mesh, rng = make_mesh(tiny.settings(FIELDS | {"mesh.expert": 8})), np.random.default_rng(0)
    *weights, gates_XK, x_XD, dy_XD = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (
        (E, D, F), (E, D, F), (E, F, D), (X, K), (X, D), (X, D)))
    indices_XK = jnp.int32(np.argsort(rng.random((X, E)), axis=1)[:, :K])
    operands = x_XD.astype(jnp.bfloat16), *weights, gates_XK

    def of(mesh):
        products = Products(RECIPES["fp8_dispatched"], mesh=mesh, expert_room=float(E))  # all in one round

        def layer(*operands):
            *most, gates_XK = operands
            return products.experts(*most, indices_XK, gates_XK, {})

        def run(*operands):
            y_XD, back = jax.vjp(layer, *operands)
            return y_XD, *back(dy_XD.astype(y_XD.dtype))

        return jax.jit(run)

    one, several = (of(each).lower(*operands).compile() for each in (None, mesh))
    program = several.as_text()
    one, several = ([np.float32(z) for z in compiled(*operands)] for compiled in (one, several))
    with mock.patch.object(parallel, "platform", lambda: "gpu"):
        text = of(mesh).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    errors = [float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in zip(one, several, strict=True)]
    return dict(zip(("y", "x", "gate", "up", "down", "gates"), errors, strict=True)) | {
        "exchange": re.findall(r"= ([^\n]*?) all-to-all\(", program),
        "lowered": re.findall(r"@ragged_all_to_all[^\n]*-> tensor<(\w+)>", text)}


def restored(folder: Path) -> dict:
    """Shapes on a device of experts saved by two stages of fsdp 4, read by expert 2 and by one; whether all bits are
    equal, and those of the average that a run starts from on expert 2."""
    import jax
    import numpy as np

    from research.interop.weights import weights_for
    from research.parallel.mesh import make_mesh
    from research.training.checkpoint import Checkpoints
    from research.training.step import abstract_state, init_state
    from tests import tiny

    def on(**sizes):
        s = tiny.settings(FIELDS | {"model.num_hidden_layers": 2, "training.accumulation_steps": 2}
                          | {f"mesh.{axis}": size for axis, size in sizes.items()})
        model, variables = tiny.model(s)
        products = replace(model.products, mesh=make_mesh(s), expert_room=s.training.expert_room)
        return model.clone(products=products), s, variables

    def held(state):
        return list(state["params"]["layers"]["mlp"]["gate_proj"].addressable_shards[0].data.shape)

    def equal(one, other):
        return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True))

    model, s, variables = on(pipeline=2, fsdp=4)
    state, checkpoints = init_state(model, s, variables), Checkpoints(folder / "checkpoints", 1, 0)
    state["ema"] = jax.tree.map(lambda x: 2 * x, state["params"])
    checkpoints.save(3, state, {})
    checkpoints.close()
    (folder / "config.json").write_text(s.to_json())
    read = [checkpoints.restore(3, abstract_state(*on(**sizes)[:2]))[0] for sizes in ({"expert": 2}, {})]
    begun, wrong = weights_for(*on(expert=2)[:2], folder)
    return {"saved": held(state), "two": held(read[0]), "one": held(read[1]), "begun": wrong or held(begun),
            "equal": [equal(state, other) for other in read] + [equal(state["ema"], begun["params"])]}


def placed(folder: Path) -> dict:
    """Of golden folders, and of a workdir made of one, read onto fsdp 2 x expert 2 x tensor 2: what a device holds,
    whether every bit is that which one device reads, and the bytes read of tensors. `untied`: of a dense one, whose
    head begins as the embedding."""
    from unittest import mock

    import numpy as np

    from research.config import check
    from research.interop.importer import import_folder
    from research.interop.tensors import Tensor
    from research.interop.weights import read_settings, read_weights, weights_for
    from research.model.build import make_model
    from research.parallel.mesh import make_mesh
    from research.tree import paths

    golden = Path(__file__).parents[1] / "golden"
    import_folder(golden / "deepseek_v3_tiny_fp8", folder / "converted", None, None)
    sizes, read = [], Tensor.read

    def counted(*arguments):
        values = read(*arguments)
        sizes.append(values.nbytes)
        return values

    def onto(source, untie=False):
        c = read_settings(source).to_config()
        c.mesh.fsdp, c.mesh.expert, c.mesh.tensor = (2, 2 if c.model.n_routed_experts else 1, 2)
        c.model.tie_word_embeddings = c.model.tie_word_embeddings and not untie
        s = check(c)
        with mock.patch.object(Tensor, "read", counted):
            sizes.clear()
            variables, wrong = weights_for(make_model(s, make_mesh(s)), s, source, untie)
        found, expected = paths(variables), paths(read_weights(source)[1])
        if untie:
            expected["params/lm_head"] = expected["params/embed_tokens"].T
        return {"wrong": wrong, "read": sum(sizes),
                "held": {path: x.addressable_shards[0].data.shape for path, x in found.items()},
                "equal": found.keys() == expected.keys() and all(
                    np.array_equal(found[path], value) for path, value in expected.items())}

    return {"folder": onto(golden / "deepseek_v3_tiny_fp8"), "workdir": onto(folder / "converted"),
            "untied": onto(golden / "qwen2_tiny", untie=True)}


def evaluated() -> list[dict]:
    """What evaluations say: of one device; and of expert 4, in two nodes, with two redundant experts each."""
    from types import SimpleNamespace

    import jax

    from research.parallel.mesh import make_mesh
    from research.training.evaluation import on_held_out
    from research.training.step import shardings_of
    from tests import tiny

    batches = [tiny.batch(ROWS, seed=seed) for seed in range(3)]
    corpus = SimpleNamespace(validation_batches=lambda settings, number: batches[:number], gzip_bits_per_byte=1.0,
                             validation=SimpleNamespace(targets=300), validation_bytes=300)
    found = []
    small = FIELDS | {"model.attention": "gqa", "model.attention_implementation": "reference",
                      "model.n_shared_experts": 0, "model.balance_loss": "none", "training.expert_room": 4.0}
    for more in ({}, {"mesh.expert": 4, "evaluation.redundant_experts": 4, "evaluation.expert_nodes": 2,
                      "evaluation.batches": 2}):
        s = tiny.settings(small | more)
        model, variables = tiny.model(s)
        mesh = make_mesh(s)
        if mesh:
            products = replace(model.products, mesh=mesh, expert_room=s.training.expert_room)
            model = model.clone(products=products)
            over = shardings_of(model, s).state
            variables = jax.device_put(variables, {name: over[name] for name in variables})
        found.append(on_held_out(model, variables | {"ema": None}, corpus, s))
    return found


def reinforced(**sizes) -> list[dict]:
    """Metrics of the updates of a policy, two of the first batch that it draws and one of the next; what has an even
    sum is right."""
    from functools import partial
    from types import SimpleNamespace

    import numpy as np

    from research.data.tokenizer import Tokenizer, _bytes
    from research.distillation import reinforce, rollouts
    from research.distillation.tasks import Problem
    from research.distillation.template import TEMPLATES
    from research.distillation.verify import Checker
    from research.model.build import make_model
    from research.parallel.mesh import make_mesh
    from research.training.step import init_state, make_train_step
    from tests import tiny

    config = SimpleNamespace(questions=4, group_size=4, minibatches=1, epochs=2, max_tokens=8, temperature=1.0,
                             form="token", clip=0.2, kl_weight=0.1, reference_every=0, draft_tokens=0)
    s = tiny.settings(tiny.DENSE | {"model.vocab_size": 320, "model.num_hidden_layers": 1, "training.batch_size": 16,
                                    "training.ema_decay": 0.5, "data.validation_fraction": 0.1}
                      | {f"mesh.{axis}": size for axis, size in sizes.items()})
    _, variables = tiny.model(s)
    rollouts.initial_variables = lambda *_: variables
    problems = [Problem(f"{n}?", "", "", "numeric", "") for n in range(9)]
    drawn = rollouts.Rollouts(problems, Tokenizer(_bytes()), TEMPLATES["plain"], Checker(1.0), config, s,
                              reinforce.Rewards(config, s, None))
    drawn._judged = lambda problem, row: (sum(row) % 2 == 0, True)
    model, batches, found = make_model(s, make_mesh(s)), drawn.train_batches(s), []
    state = init_state(model, s, variables)
    step = make_train_step(model, s, partial(reinforce.policy_loss, reinforcement=config))
    for _ in range(3):
        state, metrics = step(state, batches.take(state))
        found.append({name: np.asarray(value).tolist() for name, value in metrics.items()})
    return found


def decoded(folder: Path) -> dict:
    """Greedy texts after three prompts: by `one` device, drafted; over data 2 x expert 2 x tensor 2 `plain` and
    `drafted`; and of a folder, as research.generate loads it over fsdp 2 x tensor 2, `grouped` queries. What a device
    has of weights and of the cache, and the program of the steps."""
    import shutil

    import jax
    import numpy as np

    from research import generate
    from research.data.tokenizer import Tokenizer, _bytes
    from research.decoding.generate import Decoder
    from research.parallel.mesh import make_mesh
    from tests import tiny

    def said(decoder, prompts, drafts):
        made = decoder.generate(prompts, 60, draft_tokens=drafts)
        program = next(program for name, program in decoder._compiled.items() if name[0] == "decode")
        state, over = decoder.weights["layers"][-1]["params"], program.output_shardings["cache"]["layers"][-1].arrays
        of_token = (4, 8) if "key" in over else (8,)
        weights = state["mlp"]["gate_proj"], state["attention"]["o_proj"], decoder.weights["embed_tokens"]
        return {"tokens": made.tokens, "steps": made.steps, "accepted": made.accepted, "program": program.as_text(),
                "cache": {name: way.shard_shape((4, 128, *of_token)) for name, way in over.items()},
                "held": [x.addressable_shards[0].data.shape for x in jax.tree.leaves(weights)]}

    def random(drafts, **sizes):
        s = tiny.settings(FIELDS | {"model.vocab_size": 8} | {f"mesh.{axis}": size for axis, size in sizes.items()})
        model, variables = tiny.model(s)
        products = replace(model.products, mesh=make_mesh(s), expert_room=s.training.expert_room)
        return said(Decoder(model.clone(products=products), variables), [[1, 7, 2, 3, 5], [3], [6, 6]], drafts)

    golden, made = Path(__file__).parents[1] / "golden/qwen2_tiny", folder / "qwen2_tiny"
    shutil.copytree(golden, made)
    Tokenizer(_bytes()).save(made / "tokenizer.json")
    begun = np.load(golden / "golden.npz")["greedy"][0].tolist()
    grouped = generate.load(made, None, None, None, ("mesh.fsdp=2", "mesh.tensor=2"))[0]
    return {"one": random(1), "plain": random(0, data=2, expert=2, tensor=2),
            "drafted": random(1, data=2, expert=2, tensor=2),
            "grouped": said(grouped, [begun[:16], begun[:5], begun[2:9]], 0)}


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all`, which XLA:CPU lacks, by gathers; NaN where senders and receivers do not agree."""
    import jax
    import jax.numpy as jnp

    everyones = [jax.lax.all_gather(z, axis_name) for z in (operand, input_offsets, send_sizes, output_offsets)]
    me, rows = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    for sender, (sent, start_n, size_n, to_n) in enumerate(zip(*everyones, strict=True)):
        there = (rows >= to_n[me]) & (rows < to_n[me] + size_n[me])
        values = sent[jnp.clip(rows - to_n[me] + start_n[me], 0, len(sent) - 1)]
        if jnp.issubdtype(output.dtype, jnp.floating):
            values = jnp.where(size_n[me] == recv_sizes[sender], values, jnp.nan)
        output = jnp.where(there.reshape(-1, *[1] * (output.ndim - 1)), values, output)
    return output


def ragged() -> dict:
    """{routing: {what: its largest error of the largest entry}} of the ragged exchange over expert 4 x data 2, in one
    round or up to three; of the program for GPUs how many it has (`lowered`), and of how many `rows` arrays are."""
    from functools import partial
    from unittest import mock

    import jax
    import jax.numpy as jnp
    import numpy as np

    from kernels.experts import experts
    from research.parallel import experts as parallel
    from research.parallel.mesh import make_mesh
    from tests import tiny

    X, E, K, D, F = 32, 8, 2, 6, 4
    mesh, rng = make_mesh(tiny.settings(FIELDS | {"mesh.expert": 4, "mesh.data": 2})), np.random.default_rng(0)
    x_XD, gate_EDF, up_EDF, down_EFD, weights_XK, dy_XD = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (
        (X, D), (E, D, F), (E, D, F), (E, F, D), (X, K), (X, D)))
    operands, compute = (x_XD, gate_EDF, up_EDF, down_EFD, weights_XK), partial(experts, implementation="reference")

    def loss(run, indices_XK, x_XD, gate_EDF, up_EDF, down_EFD, weights_XK):
        y_XD = run(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK)
        return jnp.sum(y_XD * dy_XD), y_XD

    of = jax.jit(jax.value_and_grad(loss, argnums=(2, 3, 4, 5, 6), has_aux=True), static_argnums=0)
    over, found = partial(parallel.over_mesh, compute, mesh, 1.5, (None, None)), {}
    for routing, indices_XK in {
        "random": np.argsort(rng.random((X, E)), axis=1)[:, :K], "one device has all": np.tile([[2, 3]], (X, 1)),
        "two devices have all": np.tile([[7, 0]], (X, 1)), "in turn": np.add.outer(np.arange(X), [0, 1]) % E,
    }.items():
        (_, y), gradients = of(compute, jnp.int32(indices_XK), *operands)
        with mock.patch.object(parallel, "platform", lambda: "gpu"), mock.patch.object(
                jax.lax, "ragged_all_to_all", emulated):
            (_, other), others = of(over, jnp.int32(indices_XK), *operands)
        found[routing] = {what: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) for what, a, b in zip(
            ("y", "x", "gate", "up", "down", "weights"), (y, *gradients), (other, *others), strict=True)}
    jax.clear_caches()  # of what was traced with the emulation
    with mock.patch.object(parallel, "platform", lambda: "gpu"):
        text = of.trace(over, jnp.int32(indices_XK), *operands).lower(lowering_platforms=("cuda",)).as_text()
    return found | {"lowered": text.count("@ragged_all_to_all"),
                    "rows": sorted({int(rows) for rows in re.findall(rf"tensor<(\d+)x{D}xf32>", text)})}


def copied_whole() -> None:
    """Compiles what `rules.looked_up` is there for: columns over fsdp, looked up for tokens over fsdp; XLA warns."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from research.parallel.mesh import make_mesh
    from research.parallel.rules import BATCH, placed
    from tests import tiny

    mesh = make_mesh(tiny.settings(FIELDS | {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}))
    columns, rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P(BATCH))
    gradient = jax.grad(lambda embed_VD, tokens_BT: jnp.sum(placed(mesh, embed_VD[tokens_BT]) ** 2))
    print(BAD, file=sys.stderr, flush=True)
    jax.jit(gradient, in_shardings=(columns, rows), out_shardings=columns).lower(
        jax.ShapeDtypeStruct((32, 16), jnp.float32), jax.ShapeDtypeStruct((8, 12), jnp.int32)).compile()


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    with tempfile.TemporaryDirectory() as folder:
        json.dump({name: run(name) for name in MESHES} | {
            "restored": restored(Path(folder)), "placed": placed(Path(folder)), "ragged": ragged(),
            "evaluated": evaluated(), "reinforced": [reinforced(), reinforced(data=4, tensor=2)],
            "dispatched": dispatched(), "decoded": decoded(Path(folder)),
            "in 8 bits": [in_8_bits("none"), in_8_bits("layer", data=2, fsdp=2, expert=2)]}, sys.stdout)
    copied_whole()
