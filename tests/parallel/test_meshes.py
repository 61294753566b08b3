"""One device equals several: loss, gradients, routing biases and metrics over several steps on every kind of mesh."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from research import summary
from research.accounting import exchange
from research.decoding.generate import Decoder
from research.errors import RequestError
from research.interop.tensors import list_tensors
from research.model.build import make_model
from research.parallel import experts, overlap
from research.parallel.mesh import make_mesh
from research.parallel.rules import AXES, axes_of, spread
from research.training.step import make_train_step
from tests import tiny
from tests.parallel.meshes import BAD, FIELDS, IN_PIECES, MESHES, PIPELINES, ROWS, STEPS

ROOT = Path(__file__).parents[2]
FP8_FOLDER = ROOT / "tests/golden/deepseek_v3_tiny_fp8"
OTHERS = [name for name in MESHES if not name.startswith("one")]


@pytest.fixture(scope="module")
def found():
    """{mesh: what `meshes.run` says}, of one process with eight simulated devices; `said` by XLA on its stderr."""
    hearing = {"TF_CPP_MIN_LOG_LEVEL": "0", "JAX_ENABLE_COMPILATION_CACHE": "false"}  # what is not compiled warns not
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | hearing
    done = subprocess.run([sys.executable, "-m", "tests.parallel.meshes"], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) | {"said": done.stderr}


def alone(mesh: str) -> str:
    """The run on one device that this mesh must equal."""
    return "one in pieces" if mesh in PIPELINES else "one"


@pytest.mark.parametrize("mesh", OTHERS)
def test_every_gradient_is_that_of_one_device(found, mesh):
    """Adam's first moments after the first step: a tenth of the gradients, which no norm has clipped."""
    one, other = found[alone(mesh)]["gradients"], found[mesh]["gradients"]
    assert one.keys() == other.keys()
    for path, expected in one.items():
        expected, actual = np.asarray(expected), np.asarray(other[path])
        assert np.any(expected), path
        assert np.linalg.norm(actual - expected) <= 2e-5 * np.linalg.norm(expected), path


@pytest.mark.parametrize("mesh", OTHERS)
def test_metrics_of_every_step_are_those_of_one_device(found, mesh):
    """Loads are counted over the whole batch, once: each expert's load is a whole number, so equal or wrong."""
    assert len(found[mesh]["metrics"]) == STEPS
    for one, other in zip(found[alone(mesh)]["metrics"], found[mesh]["metrics"], strict=True):
        assert one.keys() == other.keys()
        for name, expected in one.items():
            np.testing.assert_allclose(other[name], expected, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("mesh", OTHERS)
def test_the_state_after_several_steps_is_that_of_one_device(found, mesh):
    """Biases have moved alike; of the weights Adam's division enlarges what is next to nothing."""
    one, other = found[alone(mesh)]["state"], found[mesh]["state"]
    assert one["routing"].keys() == other["routing"].keys() and len(one["routing"]) == 2
    for path, expected in one["routing"].items():
        np.testing.assert_allclose(other["routing"][path], expected, atol=1e-6, err_msg=path)
    for part in ("params", "ema"):
        for path, expected in one[part].items():
            expected, actual = np.asarray(expected), np.asarray(other[part][path])
            assert np.linalg.norm(actual - expected) <= 2e-3 * np.linalg.norm(expected), path


def test_a_policy_that_draws_its_own_samples_learns_as_on_one_device(found):
    one, other = found["reinforced"]
    assert 0 < one[0]["accuracy"] < 1 and one[0]["grad_norm"] > 0 and one[2]["kl"] > 0  # the third update draws anew
    for expected, actual in zip(one, other, strict=True):
        assert expected.keys() == actual.keys()
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], rtol=2e-4, atol=1e-6, err_msg=name)


def test_products_in_8_bits_are_those_of_one_device(found):
    """But for values that sums in another order move to their neighbours; and the weights of routed experts, of whose
    tokens each device makes tiles of its own, to what E4M3 rounds."""
    one, other = found["in 8 bits"]
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for path, expected in one["gradients"].items():
        expected, actual = np.asarray(expected), np.asarray(other["gradients"][path])
        routed = path in ("layers/mlp/gate_proj", "layers/mlp/up_proj", "layers/mlp/down_proj")
        assert np.linalg.norm(actual - expected) <= (0.037 if routed else 2e-3) * np.linalg.norm(expected), path


def test_tokens_and_gradients_travel_in_8_bits(found):
    """A byte a value and one for 128 of them, there; 16 bits back (which XLA:CPU widens), and so in the program for
    GPUs, beside choices and gate values. No gradient knows of it: one device reads the same 8 bits. Of y the sum of a
    token's two experts is of values in 16 bits."""
    errors = dict(found["dispatched"])
    exchange, lowered, y = (errors.pop(name) for name in ("exchange", "lowered", "y"))
    for array in ("u8[1,8,146]", "f32[1,8,144]"):
        assert sum(arrays.count(array) for arrays in exchange) == 2 * 8
    assert sum("144" in arrays or "146" in arrays for arrays in exchange) == 4
    assert lowered == ["64x146xui8", "64x1xi32", "64x1xf32", "16x144xbf16", "64x146xui8", "16x1xf32", "16x144xbf16"]
    assert 0 < y < 4e-3
    assert all(error < 1e-6 for error in errors.values()), errors


def test_redundant_experts_change_nothing_but_who_is_busy(found):
    """Each token's experts are the same, wherever their copies lie; placed by two of three batches."""
    said = summary.of_evaluation(found["evaluated"][1])
    one, other = (result["validation"] for result in found["evaluated"])
    before, after = other.pop("device_load")
    assert one.keys() == other.keys()
    for name, expected in one.items():
        np.testing.assert_allclose(other[name], expected, rtol=1e-5, err_msg=name)
    home = np.reshape(one["expert_load"], (4, 2)).sum(axis=1)  # of the only layer
    assert before == pytest.approx(home.max() / home.mean(), abs=1e-3)
    assert 1 <= after < 0.9 * before
    assert f"fullest device {before:.3f} times the mean, {after:.3f} with redundant experts" in said


def test_the_state_is_donated_on_every_mesh(found):
    """All of a device's weights, moments and averages are written over, in 8 bits too."""
    for run in (*(found[mesh] for mesh in MESHES), *found["in 8 bits"]):
        aliased, held = run["donated"]
        assert aliased == held > 10_000


def test_no_device_gets_a_whole_array_that_nobody_asked_for(found):
    """XLA warns where it knows no other way from one splitting to another; of a program made for it it does."""
    ours, bad = found["said"].split(BAD)
    assert "Involuntary full rematerialization" not in ours, ours[:3000]
    assert "Involuntary full rematerialization" in bad


def gathers(program: str) -> list[tuple[tuple[int, ...], str]]:
    """Of every array that a compiled program gathers its dimensions, and which operation of ours asks for it."""
    found = re.findall(r"= ([^=\n]*?) all-gather(?:-start)?\((?:.*?op_name=\"([^\"]*)\")?", program)
    return [(tuple(map(int, sizes.split(","))), name) for shapes, name in found
            for sizes in re.findall(r"\[([\d,]+)\]\{", shapes)]


def of_experts(dimensions: tuple[int, ...]) -> bool:
    """Whether these are of experts' weights: their width, 40, and more than one matrix (a shared expert's is alone)."""
    return 40 in dimensions and np.prod(dimensions) > 16 * 40


def test_experts_stay_where_they_are(found):
    """Tokens go to them and back; where fsdp splits a matrix it is gathered, so that the search can find it. What else
    is gathered over the axis expert are new weights, whose moments it splits, and how many pairs go from device to
    device: no affinities, no tokens."""
    assert any(of_experts(dimensions) for dimensions, _ in gathers(found["fsdp"]["program"]))
    for mesh in ("expert", "tensor and expert"):
        moved = gathers(found[mesh]["program"])
        assert moved and not any(of_experts(dimensions) for dimensions, _ in moved), mesh
        assert {name for dimensions, name in moved if np.prod(dimensions) > 8 * 8} == {"jit(train_step)/add"}, mesh
    exchanged = re.compile(r"mlp/shard_map/\S*all_to_all")
    assert exchanged.search(found["expert"]["program"])
    assert not exchanged.search(found["fsdp"]["program"])


def test_the_exchange_sends_what_it_must(found):
    """Bytes of a step that one of 8 devices gives to the first round of the exchange: of each of two layers a row for
    each of its tokens and devices, whether it goes, there with a choice and its gate value, back, and the gradients but
    for the choice. The account counts these bytes without choices and gate values. Further rounds, where a device may
    lack room, are loops."""
    def exchanges(mesh):
        return re.findall(r"= (\([^\n]*?\)|\S+) all-to-all\([^\n]*?op_name=\"([^\"]*)\"", found[mesh]["program"])

    sent = sum(np.prod([int(size) for size in sizes.split(",")]) * {"pred": 1, "f32": 4, "s32": 4}[kind]
               for shapes, name in exchanges("expert") if "shard_map/while/" not in name
               for kind, sizes in re.findall(r"(\w+)\[([\d,]+)\]", shapes))
    tokens, width, layers = max(map(sum, ROWS)), 16, 2
    assert sent == layers * 8 * tokens * (1 + 4 * (4 * width + 3))
    s = tiny.settings(FIELDS | {"mesh.expert": 8})
    counted = exchange.of_mesh(s)  # of the main model's layer, and of the devices that a token's two experts lie on
    assert sent == layers * tokens * (8 // counted["devices"] * counted["bytes"] + 8 * (1 + 4 * 3))
    for mesh in ("expert", "tensor and expert", "pipeline and expert"):
        assert any(re.search("shard_map/(.*/)?while/", name) for _, name in exchanges(mesh)), mesh


@pytest.mark.parametrize("mesh, within", [("data", 0.02), ("pipeline", 0.002), ("fsdp", 0.2)])
def test_the_account_of_a_step_is_what_its_program_exchanges(found, mesh, within):
    """Besides the account XLA sums the head's two gradients one by one (data), and does not gather twice all that it
    might (fsdp); what `expert` sends is counted above, and of `tensor` XLA makes more sums than it would need."""
    sent = sum(each.bytes * each.times for each in overlap.exchanges(found[mesh]["program"]))
    sizes = {f"mesh.{axis}": size for axis, size in MESHES[mesh].items()}
    assert sent == pytest.approx(exchange.of_step(tiny.settings(
        FIELDS | (IN_PIECES if mesh in PIPELINES else {}) | sizes)), rel=within)


def test_where_the_platform_has_it_only_tokens_travel(found):
    """The ragged exchange, by an emulation of what XLA:CPU lacks; its program for GPUs: three arrays there and one
    back, and the gradients of all but the choices, in the first round and the others, which are computed again."""
    exchanges, rows = (found["ragged"].pop(name) for name in ("lowered", "rows"))
    assert exchanges == 2 * (4 + 3) + 4
    assert 13 in rows and 16 not in rows  # room for 1.5 x 8 pairs and the last one's second, not for 4 x 4 tokens
    for routing, errors in found["ragged"].items():
        assert all(error < 1e-6 for error in errors.values()), (routing, errors)  # of NaN too


@pytest.mark.parametrize("seed", range(20))
def test_no_round_brings_more_than_there_is_room_for(seed):
    """Each token goes once to each device that holds any of its experts, before the last round has ended."""
    rng = np.random.default_rng(seed)
    n, X, E = 4, 8, int(rng.integers(1, 5))
    K = int(rng.integers(1, min(n * E, 6) + 1))
    wishes = rng.normal(size=(n, X, n * E)) + 3 * rng.integers(0, 2) * np.arange(n * E)  # of all devices' tokens
    device_nXK = np.argsort(wishes, axis=-1)[..., :K] // E
    size_nnX = np.sum(device_nXK[:, None] == np.arange(n)[None, :, None, None], axis=-1)  # from, to
    window, pairs = experts.window_and_pairs(n, rng.uniform(1, 1.5), X, K, E)
    sizes_nn = size_nnX.sum(axis=-1)
    earlier_nn = np.cumsum(sizes_nn, axis=0) - sizes_nn
    round_nnX = np.stack([experts.round_of(jnp.asarray(size_nX), jnp.asarray(earlier_n), window)
                          for size_nX, earlier_n in zip(size_nnX, earlier_nn, strict=True)])
    np.testing.assert_array_equal(round_nnX >= 0, size_nnX > 0)
    rounds = -(-np.max(sizes_nn.sum(axis=0)) // window)
    assert np.max(round_nnX) < rounds
    came = [np.max(np.sum(size_nnX * (round_nnX == number), axis=(0, 2))) for number in range(rounds)]
    assert max(came) <= pairs
    assert rounds == 1 or np.max(sizes_nn.sum(axis=0)) > window  # what has room comes at once


def test_a_device_holds_its_share(found):
    """(1, E, D, F) of a layer's experts, and a matrix of all tokens."""
    experts, matrix = "layers/mlp/gate_proj", "layers/mlp/shared_experts/gate_proj/kernel"
    assert found["one"]["held"][experts] == [1, 8, 16, 40] and found["one"]["held"][matrix] == [1, 16, 40]
    assert found["data"]["held"][experts] == [1, 8, 16, 40]
    assert found["fsdp"]["held"][experts] == [1, 8, 2, 40] and found["fsdp"]["held"][matrix] == [1, 2, 40]
    assert found["expert"]["held"][experts] == [1, 1, 16, 40]
    assert found["tensor and expert"]["held"][experts] == [1, 2, 16, 20]
    assert found["tensor and expert"]["held"][matrix] == [1, 16, 20]
    assert found["one in pieces"]["held"][experts] == [4, 8, 16, 40]
    assert found["pipeline"]["held"][experts] == [1, 8, 16, 40]
    assert found["pipeline and expert"]["held"][experts] == [2, 4, 8, 40]
    assert found["pipeline and expert"]["held"]["lm_head"] == [8, 32]  # and all else is on every stage
    assert found["pipeline and expert"]["held"]["dense_layers/mlp/gate_proj/kernel"] == [1, 8, 24]


def test_moments_are_split_as_far_as_a_dimension_divides():
    mesh = AbstractMesh((1, 4, 2, 8, 2), AXES)  # pipeline, data, fsdp, expert, tensor

    def split(length, axes=("fsdp", "tensor")):
        return spread(axes, (3,) * (len(axes) - 2) + (length, 5), mesh)

    assert split(64) == (("fsdp", "data", "expert"), "tensor")
    assert split(16) == (("fsdp", "expert"), "tensor") and split(8) == (("fsdp", "data"), "tensor")
    assert split(6) == ("fsdp", "tensor")
    assert split(64, ("expert", "fsdp", "tensor")) == ("expert", ("fsdp", "data"), "tensor")
    assert split(6, ("expert", "fsdp", "tensor")) == ("expert", "fsdp", "tensor")


def test_a_checkpoint_goes_on_on_another_mesh(found):
    """Saved by two stages of four, read by two and by one: the same bits, split as the reader's mesh says."""
    assert found["restored"] == {"saved": [1, 8, 4, 40], "two": [2, 4, 16, 40], "one": [2, 8, 16, 40],
                                 "begun": [2, 4, 16, 40], "equal": [True, True, True]}


def test_a_release_is_read_onto_a_mesh(found):
    """FP8 blocks of a folder, and of what a conversion made of it, as one device dequantises them; each tensor is read
    once, but for the copies of embedding and head, which are compared."""
    tensors = list_tensors(FP8_FOLDER)
    whole = sum(tensor.nbytes for tensor in tensors.values())
    compared = sum(tensors[name].nbytes for name in ("model.embed_tokens.weight", "lm_head.weight"))
    for kind, read in {"folder": whole + compared, "workdir": whole - compared}.items():
        held = found["placed"][kind].pop("held")
        assert found["placed"][kind] == {"wrong": "", "read": read, "equal": True}
        assert held["params/layers/mlp/up_proj"] == [2, 4, 32, 16] and held["params/lm_head"] == [32, 192]
        assert held["params/layers/attention/q_a_proj/kernel"] == [2, 32, 24]
        assert held["routing/layers/mlp/gate/e_score_correction_bias"] == [2, 8]
    untied = found["placed"]["untied"]
    assert untied["equal"] and untied["held"]["params/lm_head"] == [32, 192]
    assert untied["held"]["params/dense_layers/mlp/up_proj/kernel"][1:] == [32, 80]


def test_texts_over_a_mesh_are_those_of_one_device(found):
    """Three prompts for four who share the batch: nothing is said of the row that fills it."""
    of, golden = found["decoded"], np.load(ROOT / "tests/golden/qwen2_tiny/golden.npz")["greedy"][0].tolist()
    assert [len(row) for row in of["one"]["tokens"]] == [60, 60, 60]
    assert of["plain"]["tokens"] == of["drafted"]["tokens"] == of["one"]["tokens"]
    assert (of["drafted"]["steps"], of["drafted"]["accepted"]) == (of["one"]["steps"], of["one"]["accepted"])
    assert of["plain"]["steps"] == 3 * 59 and 0 < of["one"]["accepted"][0] < of["one"]["steps"]
    assert of["grouped"]["tokens"][0][:24] == golden[16:]


def test_a_cache_lies_as_the_table_says(found):
    """Rows like the batch, keys and values by heads, latents whole; weights as in training; and no step gathers rows,
    slots (128) or experts."""
    of = found["decoded"]
    assert of["drafted"]["cache"] == {"latent": [1, 128, 8], "rope_key": [1, 128, 8]}
    assert of["grouped"]["cache"] == {"key": [2, 128, 2, 8], "value": [2, 128, 2, 8]}
    assert of["one"]["held"] == [[8, 16, 40], [12, 16], [8, 16]]
    assert of["drafted"]["held"] == [[4, 16, 20], [6, 16], [4, 16]]
    assert of["grouped"]["held"] == [[32, 80], [32, 32], [192, 32]]
    for name in ("plain", "drafted", "grouped"):
        for dimensions, asked in gathers(of[name]["program"]):
            assert 128 not in dimensions and not of_experts(dimensions), (name, asked)
    assert "collective-permute" not in of["plain"]["program"]  # as updates of rows would be that XLA splits by itself


@pytest.mark.parametrize("fields, weights, said", [
    ({"mesh.pipeline": 2, "training.accumulation_steps": 2, "model.num_hidden_layers": 2}, None,
     "config.mesh.pipeline=2 must be 1: decoding has no stages"),
    ({"mesh.tensor": 2, "model.attention": "gqa"}, None,
     "config.mesh.tensor=2 does not divide config.model.num_key_value_heads=1"),
    ({"mesh.data": 2}, "int8", "--weights=int8: over a mesh they are as the recipe has them"),
])
def test_what_is_not_decoded_over_a_mesh(fields, weights, said):
    s = tiny.settings(FIELDS | fields)
    mesh = AbstractMesh(tuple(s.mesh[axis] for axis in AXES), AXES)
    with pytest.raises(RequestError, match=said):
        Decoder(make_model(s, mesh), {}, weights=weights)


@pytest.mark.parametrize("fields, said", [
    ({"mesh.data": 2}, r"config.mesh.data=2 needs 2 devices: 1 cpu device is present"),
    ({"mesh.expert": 4, "mesh.tensor": 2}, r"config.mesh.expert=4 \* mesh.tensor=2 needs 8 devices: 1 cpu device is"),
    ({"mesh.data": 3}, r"config.training.batch_size=8 must be a multiple of 3 = mesh.data \* mesh.fsdp \* mesh.expert"),
    ({"mesh.data": 4, "training.batch_ramp_start": 2}, r"config.training.batch_ramp_start=2 must be a multiple of 4"),
    ({"mesh.data": 4, "training.accumulation_steps": 4}, r"config.training.batch_size=8 must be a multiple of 16"),
    ({"mesh.tensor": 4}, r"config.mesh.tensor=4 does not divide config.model.num_attention_heads=2"),
    ({"mesh.expert": 4, "model.n_routed_experts": 6, "model.n_group": 1, "model.topk_group": 1},
     r"config.mesh.expert=4 does not divide config.model.n_routed_experts=6"),
    ({"mesh.expert": 2, "model.n_routed_experts": 0}, r"config.mesh.expert=2 must be 1: the model has no experts"),
    (IN_PIECES | {"mesh.pipeline": 3}, r"mesh.pipeline=3 does not divide the 4 layers with experts; the first stage"),
    (tiny.DENSE | {"model.num_hidden_layers": 3, "mesh.pipeline": 2}, r"mesh.pipeline=2 does not divide the 3 layers$"),
    (IN_PIECES | {"mesh.pipeline": 4, "training.accumulation_steps": 2},
     r"config.training.accumulation_steps=2 must be at least config.mesh.pipeline=4: the pieces of a batch"),
    (IN_PIECES | {"mesh.pipeline": 2, "mesh.tensor": 2}, r"config.mesh.tensor=2 must be 1 with config.mesh.pipeline=2"),
    (IN_PIECES | {"mesh.pipeline": 4}, r"config.mesh.pipeline=4 needs 4 devices: 1 cpu device is present"),
    ({"mesh.data": 2, "precision.recipe": "fp8_delayed"}, r"precision.recipe='fp8_delayed' has one scale a tensor"),
    ({"mesh.tensor": 2, "precision.recipe": "mxfp8"}, r"config.mesh.tensor=2 must be 1 under mxfp8: devices share no"),
])
def test_what_does_not_fit_is_refused_with_the_numbers(fields, said):
    with pytest.raises(RequestError, match=said):
        make_mesh(tiny.settings(FIELDS | fields))


def test_another_loss_is_not_computed_in_stages():
    s = tiny.settings(FIELDS | IN_PIECES | {"mesh.pipeline": 2})
    with pytest.raises(RequestError, match=r"config.mesh.pipeline=2 must be 1: only pre-training's own loss"):
        make_train_step(make_model(s), s, loss=lambda *arguments, **more: None)


def test_experts_have_no_copies_in_training():
    s = tiny.settings(FIELDS | {"mesh.expert": 4, "evaluation.redundant_experts": 4})
    with pytest.raises(RequestError, match=r"config.evaluation.redundant_experts=4 must be 0 in training: experts"):
        make_train_step(make_model(s), s)


def test_evaluation_is_split_too():
    with pytest.raises(RequestError, match=r"config.evaluation.batch_size=4 must be a multiple of 8 = mesh.data"):
        make_mesh(tiny.settings(FIELDS | {"mesh.fsdp": 8, "evaluation.batch_size": 4}), devices=[object()] * 8)


def test_a_width_that_does_not_divide_is_refused():
    s = tiny.settings(FIELDS | {"mesh.tensor": 2, "model.moe_intermediate_size": 5})
    with pytest.raises(RequestError, match=r"mesh.tensor=2 does not divide the 5 of layers/mlp/down_proj \(1, 8"):
        make_mesh(s, devices=[object()] * 2)


def test_a_mesh_of_one_is_no_mesh():
    assert make_mesh(tiny.settings()) is None


def test_no_rule_covers_a_strange_parameter():
    assert axes_of("layers/mlp/up_proj", 4, "layers") == ("pipeline", "expert", "fsdp", "tensor")
    assert axes_of("dense_layers/mlp/up_proj/kernel", 3, "layers") == (None, "fsdp", "tensor")
    with pytest.raises(ValueError, match="no rule of RULES covers strange"):
        axes_of("strange", 2, "layers")
