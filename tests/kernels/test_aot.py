"""The check without a GPU: what it reads from the compiler, what it refuses, what it writes."""

import dataclasses
import json
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from kernels import aot, operations, record
from kernels.attention import attention
from tests.commands import exit_code

SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for body_mosaic_gpu_kernel
    16 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
RESOURCES = "Resources(smem_scratch_bytes=199680, tmem_scratch_cols=0, barrier_counts=Counter({Barrier(num=5): 1}))"
INSTRUCTION = "{{ setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k{} {{%r63}}, %rd26, %rd27, p, 1, 1; }}\n"
GOOD = aot.Kernel(registers=168, spill_bytes=0, shared_bytes=199680, fp8_instructions=4)


class Shape(NamedTuple):
    R: int
    C: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int = 1


PRODUCT = operations.Operation(
    name="product",
    shapes=(Shape(8, 16), Shape(8, 32)),
    small=Shape(4, 8),
    arguments=lambda shape, key: (jax.random.normal(key, shape),),
    mosaic=lambda shape, tiles: lambda x: x,
    xla=lambda shape: lambda x: x,
    chosen=lambda shape: Tiles(),
    candidates=lambda shape: [],
    tolerance=0.0,
    warpgroup_fp8=True,
)
QUANTIZER = dataclasses.replace(PRODUCT, name="quantizer", shapes=(Shape(4, 4),), warpgroup_fp8=False)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A table of two operations, and what compiling each gives: change it by (rows, columns)."""
    monkeypatch.setattr(operations, "OPERATIONS", {"product": PRODUCT, "quantizer": QUANTIZER})
    monkeypatch.setattr(aot, "RESULT", tmp_path / "aot_result.json")
    monkeypatch.setattr(aot, "_h200", lambda: None)
    gives = {(8, 16): [GOOD], (8, 32): [GOOD], (4, 4): [GOOD._replace(fp8_instructions=0)]}

    def kernels_of(function, x):
        if isinstance(gives[x.shape], Exception):
            raise gives[x.shape]
        return gives[x.shape]

    monkeypatch.setattr(aot, "kernels_of", kernels_of)
    return gives


def run(*arguments):
    return exit_code(aot, *arguments)


@pytest.mark.parametrize("arguments, answer", [
    (["--op=produkt"], "--op='produkt' must be one of product, quantizer (did you mean product?)"),
    (["--ops=product"], "--ops is not a flag (did you mean --op?)"),
    (["product"], "'product' is not a flag: flags are written --name=value"),
])
def test_a_wrong_request_is_one_line_and_code_2(compiler, capsys, arguments, answer):
    assert run(*arguments) == 2
    assert capsys.readouterr().err == f"error: {answer}\n"
    assert not aot.RESULT.exists()


def test_without_the_cuda_packages_one_line_says_so(monkeypatch, tmp_path, capsys):
    def absent(**_):
        raise RuntimeError("no plugin for cuda\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    monkeypatch.setattr(aot, "RESULT", tmp_path / "aot_result.json")
    aot._h200.cache_clear()
    assert run() == 2
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith("error: no CUDA compiler here: `make aot` makes an environment with jax[cuda13]")
    with pytest.raises(aot.Unavailable, match="no CUDA compiler here"):
        aot.compile_for_h200(lambda x: x + 1, jnp.ones(3))
    assert not aot.RESULT.exists()


@pytest.mark.gpu
def test_memory_of_a_program_for_an_h200():
    x = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)
    compiled = aot.compile_for_h200(lambda x, weights: jnp.tanh(x @ weights["w"]), x, {"w": jnp.ones((128, 512))})
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 256 * 128 * 2 + 128 * 512 * 4
    assert memory.output_size_in_bytes == 256 * 512 * 4


@pytest.mark.gpu
def test_attention_over_packed_rows_never_holds_all_scores():
    """Of 8 blocks, forward and backward: less than one array of all scores, though a block needs five of its own."""
    T, N = 4096, 2
    q, v = (jax.ShapeDtypeStruct((1, T, N, width), jnp.bfloat16) for width in (192, 128))

    def both(q, k, v, do, segments_BT):
        o, backward = jax.vjp(lambda *x: attention(*x, segments_BT, 0.1), q, k, v)
        return o, backward(do)

    compiled = aot.compile_for_h200(both, q, q, v, v, jax.ShapeDtypeStruct((1, T), jnp.int32))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * T * T * N * 4  # 0.59; unchained 1.22


def test_what_the_compiler_said_is_read(tmp_path):
    (tmp_path / "k_0.ptxas").write_text(SAID.format(stores=124, loads=252))
    (tmp_path / "k_0.ptx").write_text(4 * INSTRUCTION.format("32.f32.e4m3.e4m3"))
    (tmp_path / "k_0.resources.txt").write_text(RESOURCES)
    assert aot._read(tmp_path / "k_0.ptxas") == aot.Kernel(168, 376, 199680, 4)
    (tmp_path / "k_0.ptx").write_text(INSTRUCTION.format("16.f32.bf16.bf16") + "mma.sync.m16n8k32.f32.e4m3.e4m3")
    assert aot._read(tmp_path / "k_0.ptxas").fp8_instructions == 0


def test_defects_are_spills_and_products_without_the_fp8_instruction():
    assert aot.defects(PRODUCT, [GOOD]) == aot.defects(QUANTIZER, [GOOD._replace(fp8_instructions=0)]) == []
    assert aot.defects(QUANTIZER, [GOOD, GOOD._replace(spill_bytes=8)]) == ["spills 8 bytes of registers"]
    found, = aot.defects(PRODUCT, [GOOD._replace(fp8_instructions=0)])
    assert found.startswith("has no FP8 warpgroup instruction")
    assert aot.defects(QUANTIZER, []) == ["has no Mosaic kernel"]


def test_the_result_is_written(compiler, capsys):
    assert run() == 0
    written = json.loads(aot.RESULT.read_text())
    assert written["failures"] == [] and written["target"] == "NVIDIA H200, sm_90a"
    assert written["date"] and written["code"] == record.code() and "jax" in written["versions"]
    assert [(row["operation"], row["shape"]) for row in written["results"]] == [
        ("product", "8x16"), ("product", "8x32"), ("quantizer", "4x4")]
    assert written["results"][0]["kernels"] == [GOOD._asdict()] and written["results"][0]["tiles"] == {"rows": 1}
    assert re.search(r"^product +8x32 +168 +0 +199680 +4 +\d", capsys.readouterr().out, re.M)


def test_what_fails_is_named(compiler, capsys):
    compiler[8, 32] = [GOOD._replace(spill_bytes=376)]
    compiler[4, 4] = ValueError("smem_bytes=264256 >\nmax_smem_bytes=232448")
    assert run() == 1
    assert capsys.readouterr().err == (
        "error: 2 of 3 fail: product 8x32 spills 376 bytes of registers; quantizer 4x4 does not compile: "
        "ValueError: smem_bytes=264256 > max_smem_bytes=232448\n")
    assert len(json.loads(aot.RESULT.read_text())["failures"]) == 2


def test_one_operation_alone_leaves_the_result_as_it_is(compiler):
    compiler[4, 4] = [GOOD._replace(spill_bytes=8)]
    assert run("--op=product") == 0
    assert run("--op=quantizer") == 1
    assert not aot.RESULT.exists()


def test_the_result_that_is_kept_has_every_operation_at_every_shape():
    kept = json.loads(aot.RESULT.read_text())
    assert kept["failures"] == []
    assert [(row["operation"], row["shape"]) for row in kept["results"]] == [
        (operation.name, record.key_of(shape)) for operation in operations.OPERATIONS.values()
        for shape in operation.shapes]
