"""Conversion in both directions: every byte comes back, what is wrong is named, and nothing is left half written."""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from research import config, convert, main
from research.data.tokenizer import Tokenizer, _bytes
from research.errors import RequestError
from research.interop import blocks, shards, transfer
from research.interop.exporter import export_workdir
from research.interop.huggingface import read_settings
from research.interop.importer import import_folder
from research.interop.names import SCALE
from research.interop.scoring import logits
from research.interop.tensors import FP8, INDEX, list_tensors
from research.interop.weights import initial_variables, read_weights
from research.model.build import make_model
from research.training import evaluation
from research.training.checkpoint import Checkpoints, damage
from research.tree import paths
from tests.commands import exit_code
from tests.interop.test_blocks import Q_A, changed, nan
from tests.interop.test_huggingface import (
    FOLDERS,
    GOLDEN,
    copy,
    in_their_names,
    random_model,
    read_variables,
    weights,
    write,
)
from tests.interop.test_score import workdir

FP8_FOLDER, MTP = GOLDEN / "deepseek_v3_tiny_fp8", GOLDEN / "deepseek_v3_tiny_mtp"
STEP = Path("checkpoints/0")


def stored(folder):
    """{name: (dtype, shape, bytes)}."""
    return {name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
            for name, tensor in list_tensors(folder).items()}


# Every byte


@pytest.mark.parametrize("name", FOLDERS)
def test_there_and_back_every_tensor_has_the_same_bytes(name, made):
    ours, again = made(name)
    assert stored(again) == stored(GOLDEN / name)
    assert read_settings(again) == read_settings(GOLDEN / name) == config.read(ours)
    assert not damage(ours / STEP)


def test_weights_of_a_workdir_are_those_of_its_folder(made):
    for name in ("deepseek_v3_tiny_fp8", "qwen2_tiny"):
        found, expected = paths(read_weights(made(name)[0])[1]), paths(read_variables(GOLDEN / name, read_settings(
            GOLDEN / name)))
        assert found.keys() == expected.keys()
        for path, values in expected.items():
            assert found[path].dtype == np.float32
            np.testing.assert_array_equal(found[path], values, err_msg=path)
    theirs, ours = (paths(read_weights(folder, stored=True)[1])["params/layers/mlp/up_proj"][-1]
                    for folder in (FP8_FOLDER, made("deepseek_v3_tiny_fp8")[0]))
    np.testing.assert_array_equal(theirs.values_DF.view(np.uint8), ours.values_DF.view(np.uint8))
    np.testing.assert_array_equal(theirs.scales_GB, ours.scales_GB)


def test_golden_logits_of_a_workdir_in_fp8_notice_each_bug(made):
    """1e-4 is far below what a concat the wrong way round, a skipped layer or another expert's scale do."""
    settings, variables = read_weights(made("deepseek_v3_tiny_fp8")[0])
    golden = np.load(FP8_FOLDER / "golden.npz")

    def error(change=lambda params: None):
        params = jax.tree.map(np.array, variables["params"])
        change(params)
        found = logits(settings, variables | {"params": params}, golden["input_ids"])
        return [float(np.abs(found[name][..., :golden[name].shape[1], :] - golden[name]).max())
                for name in ("logits", "mtp_logits")]

    def swap(params):
        kernel = params["mtp_1"]["eh_proj"]["kernel"]
        kernel[:] = np.roll(kernel, kernel.shape[0] // 2, axis=0)

    def skip(params):
        for leaf in jax.tree.leaves(params["layers"]):
            leaf[1] = leaf[0]

    def exchange(params):
        experts = params["layers"]["mlp"]["up_proj"]
        experts[0] *= np.linspace(0.9, 1.1, experts.shape[1], dtype=np.float32)[:, None, None]

    assert max(error()) < 1e-4
    assert error(swap)[0] < 1e-4 < error(swap)[1]
    assert min(error(skip)) > 1e-3 and min(error(exchange)) > 1e-3


def test_scales_that_are_powers_of_two_are_announced_there_and_back(tmp_path, made):
    """V3.1's `scale_fmt`; float32 scales that are not, if but one of them, have none."""
    scales = {name: tensor.read() for name, tensor in list_tensors(FP8_FOLDER).items() if name.endswith(SCALE)}
    raw = json.loads((FP8_FOLDER / "config.json").read_text())["quantization_config"] | {"scale_fmt": "ue8m0"}
    source = changed(tmp_path / "source", {name: np.exp2(np.ceil(np.log2(x))) for name, x in scales.items()},
                     {"quantization_config": raw})
    import_folder(source, tmp_path / "ours", None, None)
    export_workdir(tmp_path / "ours", tmp_path / "again", None, None)
    assert stored(tmp_path / "again") == stored(source)
    announced = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert announced == raw
    export_workdir(made("deepseek_v3_tiny_fp8")[0], tmp_path / "other", None, None)
    assert "scale_fmt" not in json.loads((tmp_path / "other/config.json").read_text())["quantization_config"]
    assert blocks.powers_of_two(np.float32([0.25, 1, 2.0**-126])) and not blocks.powers_of_two(np.float32([1, 3]))


def test_orbax_restores_it_as_any_checkpoint(made):
    state = made("deepseek_v3_tiny_fp8")[0] / STEP / "state"
    with ocp.PyTreeCheckpointer() as plain:
        tree = plain.restore(state)
    tensors = list_tensors(FP8_FOLDER)
    name = "model.layers.2.mlp.experts.5.gate_proj.weight"
    values, scales = (tree[group]["layers"]["mlp"]["gate_proj"][1, 5] for group in ("params", "scales"))
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), tensors[name].read().T.view(np.uint8))
    np.testing.assert_array_equal(scales, tensors[name + SCALE].read().T)


def test_shards_of_bounded_size_in_the_order_of_layers(tmp_path, monkeypatch):
    """Two dense layers, two multi-token modules, 16 bits: what no golden folder has."""
    settings, variables, raw = random_model()
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in in_their_names(variables, settings).items()}
    tensors |= {name: value.astype(np.float32) for name, value in tensors.items() if name.endswith("bias")}
    source = write(tmp_path / "source", tensors, raw, shards=3)
    monkeypatch.setattr(shards.lay_out, "__defaults__", (40_000,))
    import_folder(source, tmp_path / "ours", None, None)
    export_workdir(tmp_path / "ours", tmp_path / "again", None, None)
    assert stored(tmp_path / "again") == stored(source)
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 5 and all(file.stat().st_size < 60_000 for file in files)
    where = json.loads((tmp_path / "again" / INDEX).read_text())["weight_map"]
    layers = [[int(found[1]) for name in where if where[name] == file.name
               and (found := re.match(r"model\.layers\.(\d+)\.", name))] for file in files]
    layers = [numbers for numbers in layers if numbers]
    assert all(max(one) <= min(other) for one, other in zip(layers, layers[1:], strict=False))
    for tensor in list_tensors(tmp_path / "again").values():
        assert tensor.begin % 4 == 0 or tensor.dtype != "F32"


def test_every_tensor_lies_where_it_can_be_read_in_place(tmp_path):
    entries = [shards.Entry("c", FP8, (3,)), shards.Entry("b", "BF16", (1,)), shards.Entry("a", "F32", (1,))]
    with shards.Shards(tmp_path, shards.lay_out(entries)) as made:
        for entry in entries:
            made.put(entry.name, 0, b"\1" * entry.nbytes)
    begins = {name: tensor.begin for name, tensor in list_tensors(tmp_path).items()}
    assert begins["a"] % 4 == 0 and begins["b"] % 2 == 0 and begins.keys() == {"a", "b", "c"}


@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_of_ours_becomes_a_release(averaged, tmp_path):
    """Orbax stores its arrays whole; files beside them come along. Of a run that averages its weights, the average: the
    weights that it evaluates."""
    settings, variables, _ = random_model()
    average = jax.tree.map(lambda x: x / 2, variables["params"]) if averaged else None
    run = workdir(tmp_path / "run", recipe="fp8_delayed", average=average)  # its histories are no weights
    if averaged:
        variables = {"params": average, "routing": variables["routing"]}
        jax.tree.map(np.testing.assert_array_equal, read_weights(run)[1], variables)
    (run / "generation_config.json").write_text("{}")
    export_workdir(run, tmp_path / "again", None, None)
    expected = in_their_names(variables, settings)
    found = list_tensors(tmp_path / "again")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].read(), value, err_msg=name)
    assert read_settings(tmp_path / "again").model == settings.model
    assert (tmp_path / "again" / "generation_config.json").read_text() == "{}"


# --quantize and --dtype


def test_dequantising_and_quantising_are_inverse(made, tmp_path):
    """The multi-token folder holds what the FP8 folder's blocks mean, in float32."""
    wide, narrow = stored(MTP), stored(FP8_FOLDER)
    ours = made("deepseek_v3_tiny_fp8")[0]
    import_folder(FP8_FOLDER, tmp_path / "inward", "none", "float32")
    export_workdir(tmp_path / "inward", tmp_path / "a", None, None)
    export_workdir(ours, tmp_path / "b", "none", "float32")
    assert stored(tmp_path / "a") == stored(tmp_path / "b") == wide
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    import_folder(MTP, tmp_path / "quantised", "fp8_blocks", "bfloat16")
    export_workdir(tmp_path / "quantised", tmp_path / "c", None, None)
    export_workdir(made("deepseek_v3_tiny_mtp")[0], tmp_path / "d", "fp8_blocks", "bfloat16")
    assert stored(tmp_path / "c") == stored(tmp_path / "d") == narrow
    assert json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"] == blocks.QUANTIZATION


def test_what_is_untouched_and_what_is_cast(made, tmp_path):
    """Without --dtype what is dequantised is float32; FP8 tensors and biases keep their bytes under --dtype."""
    ours = made("deepseek_v3_tiny_fp8")[0]
    export_workdir(ours, tmp_path / "wide", "none", None)
    export_workdir(ours, tmp_path / "cast", "fp8_blocks", "float32")
    export_workdir(made("deepseek_v3_tiny_mtp")[0], tmp_path / "half", None, "bfloat16")
    original = stored(FP8_FOLDER)
    for name, (dtype, _, data) in stored(tmp_path / "wide").items():
        assert dtype == ("F32" if original[name][0] == FP8 else original[name][0])
        assert original[name][0] == FP8 or data == original[name][2]
    for name, (dtype, _, data) in stored(tmp_path / "cast").items():
        assert dtype == (FP8 if original[name][0] == FP8 else "F32")
        assert original[name][0] == "BF16" or data == original[name][2]
    for name, (dtype, _, data) in stored(tmp_path / "half").items():
        value = list_tensors(MTP)[name].read()
        kept = name.endswith("e_score_correction_bias")
        assert dtype == ("F32" if kept else "BF16")
        assert data == (value if kept else value.astype(ml_dtypes.bfloat16)).tobytes()


def test_blocks_in_pieces_of_rows_are_blocks_at_once(tmp_path, monkeypatch):
    """Several blocks in both directions, unequal in number, and a tensor that is read in pieces: scales stay put."""
    raw = json.loads((GOLDEN / "llama3_tiny" / "config.json").read_text()) | {
        "hidden_size": 200, "intermediate_size": 300, "head_dim": 50, "num_hidden_layers": 1}
    random, shapes = np.random.default_rng(0), {
        "self_attn.q_proj": (200, 200), "self_attn.k_proj": (100, 200), "self_attn.v_proj": (100, 200),
        "self_attn.o_proj": (200, 200), "mlp.gate_proj": (300, 200), "mlp.up_proj": (300, 200),
        "mlp.down_proj": (200, 300)}
    tensors = {f"model.layers.0.{name}.weight": random.normal(size=shape).astype(np.float32)
               * np.repeat(2.0 ** np.arange(-3, 0), 100)[:shape[0], None].astype(np.float32)
               for name, shape in shapes.items()}
    tensors |= {f"model.layers.0.{name}_layernorm.weight": np.ones(200, np.float32)
                for name in ("input", "post_attention")} | {"model.norm.weight": np.ones(200, np.float32)}
    tensors |= {name: random.normal(size=(384, 200)).astype(np.float32)
                for name in ("model.embed_tokens.weight", "lm_head.weight")}
    source = write(tmp_path / "source", tensors, raw)
    monkeypatch.setattr(transfer, "AT_ONCE", 1)
    import_folder(source, tmp_path / "ours", "fp8_blocks", None)
    export_workdir(tmp_path / "ours", tmp_path / "narrow", None, None)
    export_workdir(tmp_path / "ours", tmp_path / "wide", "none", None)
    narrow, wide = list_tensors(tmp_path / "narrow"), list_tensors(tmp_path / "wide")
    for name in shapes:
        name = f"model.layers.0.{name}.weight"
        values, scales = blocks.quantize(tensors[name])
        assert narrow[name].read().tobytes() == values.tobytes()
        np.testing.assert_array_equal(narrow[name + SCALE].read(), scales)
        np.testing.assert_array_equal(wide[name].read(), blocks.dequantize(values, scales))
    import_folder(tmp_path / "narrow", tmp_path / "copied", None, None)  # a release's own blocks, byte for byte
    export_workdir(tmp_path / "copied", tmp_path / "back", None, None)
    assert stored(tmp_path / "back") == stored(tmp_path / "narrow")
    for name in ("ours", "copied", "narrow"):
        _, variables = read_weights(tmp_path / name)
        np.testing.assert_array_equal(variables["params"]["dense_layers"]["mlp"]["down_proj"]["kernel"][0],
                                      wide["model.layers.0.mlp.down_proj.weight"].read().T, err_msg=name)
    _, kept = read_weights(tmp_path / "copied", stored=True)
    down = kept["params"]["dense_layers"]["mlp"]["down_proj"]["kernel"][0]
    np.testing.assert_array_equal(down.scales_GB, narrow[f"model.layers.0.mlp.down_proj.weight{SCALE}"].read().T)


# Wrong requests


def refused(expected, function, *arguments, remains=()):
    """The error's one line; nothing new but `remains` stands where it was to be written."""
    before = {path.name for path in arguments[1].parent.iterdir()} if arguments[1].parent.exists() else set()
    with pytest.raises(RequestError) as caught:
        function(*arguments)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name for path in arguments[1].parent.iterdir()} - before == set(remains)


def test_a_nan_is_named_and_nothing_remains(made, tmp_path):
    tensors, names = weights("qwen2_tiny"), ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    for name in names:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[7] = np.nan
    refused(f"2 not finite (NaN or infinite values): {', '.join(names)}", import_folder,
            copy("qwen2_tiny", tmp_path / "a", tensors=tensors), tmp_path / "b", None, None)
    bad = changed(tmp_path / "c", nan(Q_A, (3, 5)) | nan(f"{Q_A}_scale_inv", (0, 0)))
    refused(f"2 not finite (NaN or infinite values): {Q_A}, {Q_A}_scale_inv", import_folder, bad, tmp_path / "b", None,
            "bfloat16")
    folder = tmp_path / "ours"
    shutil.copytree(made("qwen2_tiny")[0], folder)
    chunk = folder / STEP / "state" / "params.norm.scale" / "0"
    chunk.write_bytes(b"\xff" * chunk.stat().st_size)
    refused(f"is damaged: {chunk} changed after it was sealed", export_workdir, folder, tmp_path / "b", None, None)
    (folder / STEP / "state" / "params.norm.scale" / ".zarray").unlink()
    refused("is damaged: state/params.norm.scale/.zarray is mis", export_workdir, folder, tmp_path / "b", None, None)
    (folder / STEP / "manifest.json").write_text("{}")
    refused("is damaged: manifest.json cannot be read", export_workdir, folder, tmp_path / "b", None, None)


def test_a_stack_of_two_dtypes_is_named(tmp_path):
    name, tensors = "model.layers.1.mlp.experts.3.up_proj.weight", weights("deepseek_v3_tiny")
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    folder = copy("deepseek_v3_tiny", tmp_path / "a", tensors=tensors)
    refused(f"{name} is BF16 among F32", import_folder, folder, tmp_path / "b", None, None)
    import_folder(folder, tmp_path / "b", None, "float32")


def test_a_copy_that_differs(tmp_path):
    name, tensors = "model.layers.3.shared_head.head.weight", weights("deepseek_v3_tiny_mtp")
    tensors[name] = tensors[name] * 2
    refused(f"{name} (a copy of lm_head.weight)", import_folder,
            copy("deepseek_v3_tiny_mtp", tmp_path / "a", tensors=tensors), tmp_path / "b", None, None)


@pytest.mark.parametrize("damaged, expected", [
    (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "00002.safetensors does not exist"),
    (lambda folder: os.truncate(folder / "model-00002-of-00002.safetensors", 99_999), "it is truncated"),
    (lambda folder: os.truncate(folder / "model-00001-of-00002.safetensors", 99), "its header says it has"),
    (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    (lambda folder: (folder / "tokenizer.json").write_text("[1"), "tokenizer.json: not a tokenizer.json: "),
])
def test_a_damaged_folder(damaged, expected, tmp_path):
    folder = Path(shutil.copytree(FP8_FOLDER, tmp_path / "a"))
    damaged(folder)
    refused(expected, import_folder, folder, tmp_path / "b", None, None)


def call(*words):
    """Exit code of the command in this process."""
    return exit_code(convert, *words)


@pytest.mark.parametrize("words, expected", [
    ((), "--source is required"), (("--source=x",), "--destination is required"),
    (("--source=x", "--destination=y", "--quantize=fp8"), "--quantize='fp8' must be one of fp8_blocks, none"),
    (("--source=x", "--destination=y", "--dtype=float16"), "--dtype='float16' must be one of bfloat16, float32"),
    (("--source=x", "--destination=y", "--quantise=none"), "--quantise is not a flag (did you mean --quantize?)"),
    (("--source={tmp}/x", "--destination={tmp}/y"), "x does not exist"),
    (("--source={tmp}/x.py", "--plan"), "--source={tmp}/x.py does not exist"),
    (("--source=experiments/nano.py", "--plan"), "config.model.vocab_size=None must be a whole number"),
    (("--source={tmp}", "--destination={tmp}/y"), "holds neither checkpoints/ nor *.safetensors"),
])
def test_wrong_flags(words, expected, tmp_path, capsys):
    assert call(*(word.format(tmp=tmp_path) for word in words)) == 2
    said = capsys.readouterr().err
    assert expected.format(tmp=tmp_path) in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_moved(tmp_path, capsys):
    assert call(f"--source={GOLDEN / 'qwen2_tiny'}", f"--destination={tmp_path / 'a' / 'b'}") == 0
    assert re.fullmatch(r"26 tensors, 444,672 bytes read, 444,672 written in [\d.]+ s \(\d+ MB/s\); peak memory "
                        r"[\d,]+ MiB\n", capsys.readouterr().out)
    assert call(f"--source={tmp_path / 'a' / 'b'}", f"--destination={tmp_path / 'c'}") == 0
    assert stored(tmp_path / "c") == stored(GOLDEN / "qwen2_tiny")


# What reads the result


def test_a_run_starts_from_a_converted_workdir_but_does_not_go_on_in_it(made):
    ours = made("deepseek_v3_tiny_fp8")[0]
    chosen = config.read(ours).to_config()
    chosen.checkpoint.initialize_from = str(ours)
    settings = config.check(chosen)
    started = paths(initial_variables(make_model(settings), settings))
    for path, values in paths(read_weights(ours)[1]).items():
        np.testing.assert_array_equal(started[path], values)
    with pytest.raises(RequestError, match="weights alone: a run starts from them in a workdir of its own"):
        Checkpoints(ours / "checkpoints", 1, 0).restore(0, {})


def test_a_head_of_its_own_begins_as_the_embedding():
    """Qwen2.5-Math-1.5B ties them, R1-Distill-Qwen-1.5B does not."""
    chosen = read_weights(GOLDEN / "qwen2_tiny")[0].to_config()
    chosen.checkpoint.initialize_from, chosen.model.tie_word_embeddings = str(GOLDEN / "qwen2_tiny"), False
    settings = config.check(chosen)
    params = initial_variables(make_model(settings), settings)["params"]
    np.testing.assert_array_equal(params["lm_head"], np.asarray(params["embed_tokens"]).T)


def evaluated(*words):
    """Exit code of `research.main --mode=eval` in this process."""
    return exit_code(main, "--mode=eval", "--config.data.source=files", *words)


def test_both_kinds_are_evaluated_on_given_text(tmp_path, capsys, monkeypatch):
    folder = Path(shutil.copytree(FP8_FOLDER, tmp_path / "theirs"))
    Tokenizer(_bytes()).save(folder / "tokenizer.json")
    import_folder(folder, tmp_path / "ours", None, None)
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 20)
    words = (f"--config.data.files={tmp_path}/*.txt", f"--config.data.cache={tmp_path}/cache")
    seen, real = [], evaluation.evaluate

    def evaluate(step, state, *rest):
        seen.append(paths(state["params"]))
        return real(step, state, *rest) if len(seen) == 1 else {
            "loss": 1.0, "bits_per_byte": 1.0, "mtp_accuracy": [0.0], "targets": 1}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    for name in ("theirs", "ours"):
        assert evaluated(f"--workdir={tmp_path / name}", *words) == 0
    out = capsys.readouterr().out
    assert re.search(r"bits per byte +\d+\.\d+ on [\d,]+ held-out bytes", out) and "multi-token  accuracy" in out
    for path, values in seen[0].items():
        np.testing.assert_array_equal(seen[1][path], values)
    assert evaluated(f"--workdir={folder}", "--config=experiments/nano.py", *words) == 2
    assert "is a Hugging Face folder: it is evaluated without --config" in capsys.readouterr().err
    assert evaluated(f"--workdir={folder}", "--config.model.hidden_size=32", *words) == 2
    assert "holds another model" in capsys.readouterr().err
