"""Bytes that are kept for the backward pass: counted from shapes, checked against compiled programs."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from ml_collections import FrozenConfigDict

from experiments import fp8
from research import config, experiment
from research.accounting import memory
from research.accounting.parameters import count
from research.accounting.request import settings_of
from research.errors import RequestError
from research.training.step import abstract_state, make_train_step
from tests import tiny
from tests.accounting.test_flops import batch_of

TOKENS = 640  # no other size


def settings(recipe: str, *changes):
    found = config.check(experiment.change(fp8.get_config("smoke"), (
        "model.hidden_size=256", "model.intermediate_size=512", "model.moe_intermediate_size=128",
        "model.num_attention_heads=4", "model.v_head_dim=64", *changes)))
    return replace(found.with_vocabulary(262), precision=FrozenConfigDict({**found.precision, "recipe": recipe}))


@functools.cache
def parts(recipe: str) -> dict[str, list]:
    """Traced once a recipe: each of the kernels takes a tenth of a second."""
    with memory.meant_for_h200():
        return memory.parts(settings(recipe), TOKENS)


def activations(leaves) -> int:
    """Bytes of what has an entry or more for each token, scales apart: those have one for 128."""
    return memory.needed_by(leaf for leaf in leaves if TOKENS in leaf.shape and leaf.size >= 128 * TOKENS)


def test_inputs_of_projections_are_half_of_16_bits_and_a_quarter_of_32():
    found = {recipe: parts(recipe) for recipe in ("float32", "bfloat16", "fp8_deepseek")}
    eight, sixteen, full = (activations(found[r]["projection"]) for r in ("fp8_deepseek", "bfloat16", "float32"))
    assert (eight, sixteen, full) == (256 * TOKENS, 512 * TOKENS, 1024 * TOKENS)
    eight, sixteen = (activations(found[r]["o_proj"]) for r in ("fp8_deepseek", "bfloat16"))
    assert eight == 3 * sixteen // 4 == 384 * TOKENS  # E5M6 has 12 bits


def test_a_feed_forward_network_keeps_its_input_and_swiglus():
    """8 bits each: x and both of SwiGLU's; its output is computed again. bfloat16 keeps the output for its product."""
    found = {recipe: activations(parts(recipe)["dense"]) for recipe in ("bfloat16", "fp8_deepseek")}
    assert found["fp8_deepseek"] == (256 + 2 * 512) * TOKENS
    assert found["bfloat16"] >= 2 * (256 + 3 * 512) * TOKENS


@pytest.mark.parametrize("recipe", ["fp8_deepseek", "fp8_dispatched", "fp8_tensor", "mxfp8"])
def test_nothing_of_more_bits_is_kept(recipe):
    for part, leaves in parts(recipe).items():
        e5m6 = [leaf for leaf in leaves if leaf.dtype == jnp.float16]
        assert len(e5m6) == (part == "o_proj" and recipe in ("fp8_deepseek", "fp8_dispatched"))
        eight = [leaf for leaf in leaves if leaf.dtype == jnp.uint8]
        wide = [leaf for leaf in leaves if leaf.dtype not in (jnp.uint8, jnp.float16)]
        assert max(leaf.size for leaf in wide) <= max(leaf.size for leaf in eight) / 32, part  # scales, and indices


def test_the_count_is_that_of_the_compiled_program():
    s = settings("fp8_deepseek")
    products = memory.make_model(s).products

    def forward(x, *weights):
        return jax.tree.leaves(jax.vjp(lambda x: products.feed_forward(x, *weights, {}), x)[1])

    weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 512), (256, 512), (512, 256))]
    arguments = jax.ShapeDtypeStruct((TOKENS, 256), jnp.bfloat16), *weights
    compiled = jax.jit(forward).lower(*arguments).compile().memory_analysis().output_size_in_bytes
    counted = memory.bytes_of(memory.kept_by(lambda x, *w: products.feed_forward(x, *w, {}), *arguments))
    assert counted <= compiled <= 1.01 * counted + 1024  # arrays are aligned, and listed in a table


def test_arguments_and_repeats_do_not_count():
    x, y = jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 5), jnp.float32)
    assert memory.kept_by(lambda x, y: jnp.sum(x @ y), x, y) == []
    assert [leaf.shape for leaf in memory.kept_by(lambda x: jnp.sum(jnp.sin(x)), x)] == [(3, 4)]
    assert len(memory.kept_by(lambda x: (lambda s: jnp.sum(s * s))(jnp.exp(x)), x)) == 1


def test_what_does_not_grow_with_the_tokens_is_apart():
    """Of a model of one dense layer, whose kernels are traced in a fifth of the time."""
    small = "mtp.num_nextn_predict_layers=0", "model.n_routed_experts=0", "model.num_hidden_layers=1"
    found = {recipe: memory.count(settings(recipe, *small)) for recipe in ("bfloat16", "fp8_deepseek")}
    assert found["bfloat16"]["weights"] == found["fp8_deepseek"]["weights"]
    assert found["bfloat16"]["optimizer"] == pytest.approx(2 * found["bfloat16"]["weights"], rel=1e-4)  # Adam's two
    assert found["bfloat16"]["kept"]["projection"] == 0
    assert found["fp8_deepseek"]["kept"]["projection"] == 256 * 256 + 4 * 2 * 2  # its weight and the weight's scales
    assert found["fp8_deepseek"]["kept_per_token"]["projection"] == 256 + 4 * 256 / 128
    assert found["fp8_deepseek"]["kept_per_token"]["model"] < found["bfloat16"]["kept_per_token"]["model"]


@pytest.mark.parametrize("argument, fields", [
    ("nano", ("mtp.num_nextn_predict_layers=0", "model.num_hidden_layers=1", "model.first_k_dense_replace=0")),
    ("llama_3_1", ("model.num_hidden_layers=4", "model.scan_unroll=1", "precision.recipe=float32",  # a loop, as on GPUs
                   "data.sequence_length=32", "training.batch_size=2", "training.accumulation_steps=2")),
])
def test_a_device_holds_what_the_compiled_program_takes(argument, fields):
    """A step in float32 on this machine: arguments, results that are not donated arguments, and temporaries."""
    s = settings_of(f"experiments/{argument}.py:smoke", fields)
    model = memory.make_model(s)
    step = make_train_step(model, s).lower(abstract_state(model, s), batch_of(s))
    found = step.compile().memory_analysis()
    taken = (found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
             + found.temp_size_in_bytes)
    assert memory.of_device(s, gpu=False)["total"] == pytest.approx(taken, rel=0.1)


def test_a_mesh_divides_what_it_shards():
    """Counted by hand: of a model without experts, and of one with, whose experts alone are divided by their axis."""
    names = ("weights", "gradients", "moments", "activations", "buffers")
    arguments = "experiments/llama_3_1.py:smoke", "experiments/nano.py:smoke"
    (dense, routed), (fully, replicated, experts) = ([memory.of_device(s, gpu=False) for s in found] for found in (
        [settings_of(argument, ("precision.recipe=float32",)) for argument in arguments],
        [settings_of(arguments[0], ("precision.recipe=float32", "mesh.fsdp=4")),
         settings_of(arguments[0], ("precision.recipe=float32", "mesh.data=4")),
         settings_of(arguments[1], ("mesh.expert=4",))]))
    assert [fully[n] / dense[n] for n in names] == pytest.approx([0.25] * 5, rel=1e-3)
    assert [replicated[n] / dense[n] for n in names] == pytest.approx([1, 1, 0.25, 0.25, 0.25], rel=1e-3)
    of = count(settings_of(arguments[1], ()))
    both = of["by_part"]["routed experts"] * 3 // 2  # two layers, and the multi-token module's
    alone = of["total"] + of["mtp"] - both - 3 * 16  # without the router's biases, which are no parameters
    assert experts["weights"] == 4 * (alone + both // 4)
    assert experts["moments"] == pytest.approx(routed["moments"] / 4, rel=1e-3)


def test_a_stage_holds_its_layers_what_all_hold_and_what_it_has_received():
    """By hand: of two layers with experts each stage has one; a third micro-batch is on its way beside the last two."""
    fields = "mesh.data=1", "training.batch_size=32", "training.accumulation_steps=4"
    alone, two = (memory.of_device(settings_of("experiments/nano.py:smoke", (*fields, *more)), gpu=False)
                  for more in (("model.num_hidden_layers=2",), ("mesh.pipeline=2",)))
    received = 3 * 8 * 64 * 64 * 4  # rows, positions, width, float32
    assert two["activations"] == alone["activations"] + received and two["total"] == alone["total"] + received
    assert [two[name] for name in ("weights", "gradients", "moments")] == [
        alone[name] for name in ("weights", "gradients", "moments")]
    waits = memory.of_device(settings_of("experiments/nano.py:smoke", (
        *fields, "mesh.pipeline=2", "training.pipeline_schedule=zero_bubble")), gpu=False)
    attention, dense, shared = 64 + 40 + 32 + 128 + 64 + 64 + 64 + 96, 3 * (64 + 128), 3 * (64 + 32)
    operands = 3 * 8 * 64 * (3 * attention + dense + 2 * shared + 128 + 64) * 4  # of three blocks and of eh_proj
    assert waits["activations"] == two["activations"] + operands and waits["total"] == two["total"] + operands


def test_stages_that_training_refuses_are_counted_as_an_average():
    """Two layers with experts, three stages."""
    one, three = (memory.of_device(settings_of("experiments/nano.py:smoke", fields), gpu=False)
                  for fields in ((), ("mesh.pipeline=3",)))
    assert [three[name] / one[name] for name in ("weights", "moments")] == pytest.approx([1 / 3] * 2, rel=1e-3)


def test_what_a_cpu_does_not_spare_is_counted():
    """16 bits are multiplied through float32 copies, and unrolled layers are not computed again; a GPU does spare both.
    (Measured: compiled smokes take what is counted within 6%, with and without.)"""
    plain, sixteen, remat = ("precision.recipe=float32",), ("precision.recipe=bfloat16",), ("model.remat=layer",)
    on_cpu, on_gpu = ([memory.of_device(settings_of("experiments/llama_3_1.py:smoke", fields), gpu)["activations"]
                       for fields in (plain, sixteen, plain + remat)] for gpu in (False, True))
    assert on_cpu[0] == on_cpu[1] == on_cpu[2] and on_gpu[0] > on_gpu[1] > on_gpu[2]


def test_layers_that_are_computed_again_keep_their_inputs_in_any_recipe():
    """The 8-bit copies of weights are made again too; a hundredth is of what routing keeps beside them."""
    eight, sixteen = (memory.of_device(tiny.settings({"precision.recipe": recipe, "model.remat": "layer"}), gpu=True)
                      for recipe in ("fp8_deepseek", "bfloat16"))
    assert eight["activations"] == pytest.approx(sixteen["activations"], rel=0.01)


def test_accumulated_gradients_stay():
    once, twice = (memory.of_device(settings_of("experiments/llama_3_1.py:smoke", (
        "precision.recipe=float32", f"training.accumulation_steps={pieces}")), gpu=False) for pieces in (1, 2))
    assert twice["activations"] == pytest.approx(once["activations"] / 2, rel=1e-3)
    assert once["total"] == sum(once[n] for n in ("weights", "moments", "activations", "buffers"))
    assert twice["total"] == sum(twice[n] for n in ("weights", "moments", "activations", "buffers", "accumulated"))


def test_a_loop_over_layers_has_gradients_beside_activations():
    """On a GPU, where layers are one; and what is transposed there to be gathered, by hand: routed experts, and what
    comes back from the attention of four blocks, from a dense network and from three of shared experts."""
    alone, pieces, split = (memory.of_device(settings_of("experiments/nano.py:smoke", (
        "precision.recipe=float32", "training.batch_size=8", *fields)), gpu=True) for fields in (
        (), ("training.accumulation_steps=2",), ("mesh.fsdp=2",)))
    for found in alone, pieces, split:
        assert found["total"] == pytest.approx(sum(found.values()) / 2, abs=len(found))
    assert alone["accumulated"] == alone["transposed"] == 0 and pieces["accumulated"] == pieces["gradients"]
    routed = count(settings_of("experiments/nano.py:smoke", ()))["by_part"]["routed experts"] * 3 // 2
    assert split["transposed"] == 4 * (routed + 64 * (4 * 64 + 128 + 3 * 32)) / 2


def test_norms_keep_only_what_they_read():
    from research.model.layers import rms_norm

    x, scale = jax.ShapeDtypeStruct((2, 8, 16), jnp.bfloat16), jax.ShapeDtypeStruct((16,), jnp.float32)
    assert memory.kept_by(lambda x, scale: rms_norm(x, scale, 1e-6), x, scale) == []


def test_wrong_requests(monkeypatch):
    monkeypatch.setattr(memory, "_CONFIG", type("Flag", (), {"value": "experiments/fp8.py"}))
    monkeypatch.setattr(memory, "_RECIPES", type("Flag", (), {"value": ["fp8_deepsek"]}))
    with pytest.raises(RequestError, match="fp8_deepsek.*fp8_deepseek"):
        memory.main()


@pytest.mark.parametrize("recipe", ["bfloat16", "fp8_deepseek"])
def test_experts_of_a_mesh_keep_what_they_have_room_for(recipe):
    """What more room takes on a GPU, by hand, in three layers with the multi-token module's. In 16 bits: tokens that
    have come and SwiGLU's two inputs in as many rows as there are slots, 1.25 times a balanced router's, and an eighth
    of the pairs; in 8: the same in the order of the experts' whole blocks of 128 rows, with a scale for 128 numbers
    each. And choices with what belongs to them."""
    n, X, smaller, larger = 8, 128, 1.0, 1.75

    def settings_at(room):
        return settings_of("experiments/nano.py:smoke", (
            "model.hidden_size=512", "model.moe_intermediate_size=256", f"training.batch_size={n * X // 64}",
            f"mesh.expert={n}", f"training.expert_room={room}", f"precision.recipe={recipe}"))

    m = settings_at(1.0).model
    D, F, K, k = m.hidden_size, m.moe_intermediate_size, m.num_experts_per_tok, 2
    tokens = int((larger - smaller) * X * K)
    rows = tokens
    if recipe == "bfloat16":
        rows = int(larger * X * K) + 1 - (640 + 513 // 8)
    of_token = 2 * D if recipe == "bfloat16" else 0
    of_row = 4 * F + 4 if recipe == "bfloat16" else (D + 2 * F) * (1 + 4 / 128) + 4
    of_choice = 4 + 4 + 4 + (1 if recipe == "bfloat16" else 4)  # expert, gate value, row; whether it names one
    held = [memory.of_device(settings_at(room), gpu=True)["activations"] for room in (smaller, larger)]
    expected = 3 * (tokens * (of_token + k * of_choice) + rows * of_row)
    assert held[1] - held[0] == pytest.approx(expected, rel=5e-3)


def test_rooms_beyond_all_that_can_come_are_one():
    settings = [settings_of("experiments/nano.py:smoke", (
        "training.batch_size=8", "mesh.expert=4", f"training.expert_room={room}")) for room in (4.0, 9.0)]
    assert memory.of_device(settings[0], gpu=True) == memory.of_device(settings[1], gpu=True)
