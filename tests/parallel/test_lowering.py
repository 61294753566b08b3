"""`python -m research.lowering`: the program for GPUs that are not here, and what a device of them holds."""

import jax
import jax.numpy as jnp
import pytest

from kernels import aot
from research import lowering
from research.accounting import memory
from research.accounting.request import settings_of
from research.model.build import make_model
from research.parallel import overlap
from research.parallel.mesh import abstract_mesh, make_mesh
from research.training.step import abstract_batch, abstract_state, make_train_step
from tests import tiny
from tests.commands import exit_code
from tests.training import runs

NANO = "--config=experiments/nano.py:smoke"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(runs.ROOT)


@pytest.mark.parametrize("mesh", [
    {"data": 2, "expert": 4},  # moments of what is no expert's: an eighth on each; of experts: a quarter of a half
    {"fsdp": 2},
])
def test_a_device_holds_what_the_account_says(mesh):
    """Float32 weights and their moments; the account's are averages, and counts and vectors are on every device."""
    fields = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
    settings = settings_of("experiments/nano.py:smoke", (
        "precision.recipe=float32", "evaluation.batch_size=8", "training.batch_size=8", *fields))
    found, account = lowering.lowered(settings), memory.of_device(settings, gpu=True)
    assert found["account"] == account["total"]
    assert found["held"]["params"] == pytest.approx(account["weights"], rel=0.02)
    assert found["held"]["optimizer"] == pytest.approx(account["moments"], rel=0.05)
    travels = "ragged_all_to_all" in found["exchanges"]
    assert travels == ("expert" in mesh)
    assert found["kernels"] == {"in_text": 0, "different": 0}


def test_products_in_8_bits_are_kernels_on_each_device():
    """Within `shard_map`: XLA splits none of ours by itself, and refuses to lower those that it would have to."""
    settings = settings_of("experiments/nano.py:smoke", (
        "precision.recipe=fp8_deepseek", "evaluation.batch_size=8", "mesh.data=2", "mesh.expert=2"))
    mesh = abstract_mesh(settings)
    products = make_model(settings, mesh).products
    x_BTD, w_DF = jax.ShapeDtypeStruct((4, 128, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256, 128), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(lambda x, w: jnp.sum(products.linear(x, w, "q_proj", {}).astype(jnp.float32)),
                                  argnums=(0, 1))).trace(x_BTD, w_DF)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # x with its transpose, w, dy with its transpose; three products, of which the first is not used
    assert len(set(lowering.KERNEL.findall(text))) >= 4
    assert lowering.EXCHANGE.search(text)[1] == "all_reduce"  # the weight's gradient


@pytest.mark.parametrize("part", ["linear", "experts"])
def test_of_a_gathered_weights_copy_each_device_keeps_a_part(part):
    """8 bits a weight, once on the devices of fsdp together; what is multiplied with it is each device's own."""
    settings = settings_of("experiments/nano.py:smoke", (
        "precision.recipe=fp8_deepseek", "evaluation.batch_size=8", "training.batch_size=8", "mesh.data=2",
        "mesh.fsdp=4"))
    mesh, D, F = abstract_mesh(settings), 256, 384
    products = make_model(settings, mesh).products

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    x_XD, chosen = jax.ShapeDtypeStruct((8 * 16, D), jnp.bfloat16), jax.ShapeDtypeStruct((8 * 16, 2), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        if part == "linear":
            weights = 1
            kept = memory.kept_by(lambda x, w: products.linear(x, w, "q_proj", {}), x_XD, array(D, F))
        else:
            weights = 3 * 2
            kept = memory.kept_by(lambda x, *w: products.experts(x, *w, {}), x_XD, array(2, D, F), array(2, D, F),
                                  array(2, F, D), chosen, array(8 * 16, 2))
    sizes = [leaf.size for leaf in kept if leaf.dtype == jnp.uint8 and leaf.ndim == 1]
    assert sum(sizes) == mesh.shape["data"] * weights * D * F


def test_what_is_printed_and_refused(capsys, monkeypatch):
    given = {
        "devices": 2048, "mesh": {"pipeline": 2, "data": 16, "fsdp": 1, "expert": 64, "tensor": 1}, "lines": 27933,
        "seconds": {"traced": 12.4, "lowered": 6.0}, "kernels": {"in_text": 3, "different": 2},
        "exchanges": {"all_reduce": 50, "all_gather": 3}, "held": {"params": 63.9e9, "step": 4, "ema": 8.6e9},
        "taken": None, "meanwhile": None, "account": 164.1e9}
    monkeypatch.setattr(lowering, "lowered", lambda settings, compiles: given)
    assert exit_code(lowering, NANO) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2,048 H200: pipeline 2 x data 16 x expert 64",
        "program     27,933 lines of StableHLO, traced in 12 s, lowered in 6 s",
        "kernels     3 of our own in it, 2 different",
        "exchanges   3 all_gather, 50 all_reduce",
        "a device    params 63.9 GB, ema 8.6 GB: 72.5 GB of the state",
        "            164.1 GB in training, by the account"]
    given["seconds"]["compiled"], given["taken"], given["meanwhile"] = 70, 171e9, "of exchanges"
    assert exit_code(lowering, NANO, "--compile") == 0
    out = capsys.readouterr().out
    assert ", compiled in 70 s\n" in out
    assert out.endswith("by the account; 171.0 GB by the compiler\nmeanwhile   of exchanges\n")
    given["held"], given["account"] = {"params": 3e6, "step": 4}, 20e6
    assert exit_code(lowering, NANO) == 0
    assert "params 3.0 MB: 3.0 MB of the state\n            20.0 MB in training" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setattr(aot, "h200s", lambda n: (_ for _ in ()).throw(aot.Unavailable("none here")))
    for fields, said in (("mesh.expert=3",), "config.training.batch_size="), (
            ("mesh.data=2", "evaluation.batch_size=3"), "config.evaluation.batch_size=3"), (
            ("mesh.data=2", "precision.recipe=fp8_tensor"), "config.precision.recipe='fp8_tensor'"), (
            ("mesh.data=2", "evaluation.batch_size=8"), "--compile: none here"), ((), "--config is missing"):
        words = [NANO, *(f"--config.{field}" for field in fields)] if fields else []
        assert exit_code(lowering, *words, "--compile") == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("error:") and said in error and error.count("\n") == 1, error


SCHEDULE = """
%branch (p: f32[8]) -> f32[8] {
  %a = ((f32[2]{0}), f32[8]{0}) all-gather-start(%p), dimensions={0}, metadata={op_name="jit(f)/gather"}
  %b = f32[8]{0} bitcast(%p)
  %c = f32[8]{0} all-gather-done(%a)
}

%other (p: f32[8]) -> f32[8] {
  %q = f32[] all-reduce(%p), to_apply=%add
}

%twice (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} conditional(%p, %p), branch_computations={%none, %branch}, metadata={op_name="%other"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %d = ((s32[3]{0}, bf16[4,2]{1,0}, s64[4]{0}), bf16[4,2]{1,0:S(1)}) ragged-all-to-all-start(%x, /*index=5*/%y)
  %e = ((f32[2,3]{1,0}, f32[]), (f32[2,3]{1,0}, f32[])) all-reduce-start(%x, %y), to_apply=%add
  %f = f32[9]{0} fusion(%p), calls=%dot, metadata={op_name="jit(f)/shared_experts/dot_general"}
  %g = bf16[4,2]{1,0:S(1)} ragged-all-to-all-done(%d), metadata={op_name="jit(f)/exchange"}
  %h = f32[9]{0} custom-call(%f), custom_call_target="k"
  %i = (f32[2,3]{1,0}, f32[]) all-reduce-done(%e)
  %j = f8e4m3fn[16]{0} all-to-all(%p), replica_groups={{0,1},{2,3}}, backend_config={"is_sync":true}
  %l = f32[8]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add
  %m = f32[8]{0} all-reduce(%p), replica_groups=mesh['data'=2,'tensor'=1,'expert'=1] {'tensor','expert'}, to_apply=%add
  %n = f32[2]{0} all-reduce(%p), replica_groups=mesh['data'=2,'tensor'=1] {'data','tensor'}, to_apply=%add
  %o = f32[8]{0} while(%p), condition=%less, body=%other
  ROOT %k = f32[8]{0} while(%p), condition=%less, body=%twice, backend_config={"known_trip_count":{"n":"3"},"x":"1"}
}
"""


def test_exchanges_and_what_is_computed_meanwhile_by_hand():
    """Of a branch in a loop of three, of a loop of nobody knows how many, and not of groups of one device."""
    assert overlap.exchanges(SCHEDULE) == [
        ("all-gather", 32, (), 3), ("all-reduce", 4, (), 0),
        ("ragged-all-to-all", 16, ("jit(f)/shared_experts/dot_general",), 1),
        ("all-reduce", 28, ("jit(f)/shared_experts/dot_general", ""), 1), ("all-to-all", 16, (), 1),
        ("all-reduce", 8, (), 1)]
    assert overlap.summary(SCHEDULE).startswith("2 of 6 exchanges, 44 of 104 bytes, go on beside computation")


@pytest.mark.gpu
def test_exchanges_of_gradients_and_tokens_go_on_beside_computation():
    """In the program for 8 H200; the shared expert's products while tokens travel. Without the option that the step is
    compiled with, all sums of gradients are waited for."""
    s = tiny.settings({"model.num_hidden_layers": 1, "model.first_k_dense_replace": 0,
                       "mtp.num_nextn_predict_layers": 0, "training.batch_size": 8, "evaluation.batch_size": 8,
                       "mesh.data": 2, "mesh.expert": 4})
    model = make_model(memory.with_plain_attention(s), make_mesh(s, aot.h200s(8)))
    with jax.sharding.use_abstract_mesh(abstract_mesh(s)):
        program = make_train_step(model, s).lower(abstract_state(model, s), abstract_batch(8, tiny.LENGTH)).compile()
    found = overlap.exchanges(program.as_text())
    for kind in "all-reduce", "all-gather":
        meanwhile = [exchange.meanwhile for exchange in found if exchange.kind == kind]
        assert meanwhile and all(meanwhile), kind
    tokens = [exchange for exchange in found if exchange.kind == "ragged-all-to-all"]
    assert len(tokens) >= 8 and sum(bool(exchange.meanwhile) for exchange in tokens) > 0.8 * len(tokens)
    assert any("shared_experts" in name for exchange in tokens for name in exchange.meanwhile)
