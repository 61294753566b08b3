"""The score command: what it writes, and every wrong request answered by one line with nothing half-written."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from research import score as main
from research.errors import RequestError, RunError
from research.interop import scoring as module
from research.interop.scoring import score
from research.training.checkpoint import Checkpoints
from tests.commands import exit_code
from tests.interop.test_huggingface import GOLDEN, in_their_names, random_model, write

V3 = GOLDEN / "deepseek_v3_tiny"


def tokens(folder, *shape, **arrays):
    """An .npz of random ids, or of the arrays given."""
    path = folder / "in.npz"
    np.savez(path, **(arrays or {"input_ids": np.random.default_rng(0).integers(0, 96, shape)}))
    return path


def scored(checkpoint, path, recipe=None):
    output = path.with_name("out.npz")
    score(checkpoint, path, output, recipe)
    assert sorted(file.name for file in path.parent.glob("*.npz*")) == ["in.npz", "out.npz"]
    with np.load(output, allow_pickle=False) as archive:
        return dict(archive)


def deep_folder(folder):
    """A random model with two multi-token modules."""
    settings, variables, raw = random_model()
    return write(folder / "deep", in_their_names(variables, settings), raw)


def workdir(folder, recipe="float32", change=None, average=None):
    """The random model as a run leaves it; average: `params` of its own average, where it keeps one."""
    settings, variables, _ = random_model()
    settings = replace(settings, precision=FrozenConfigDict({**settings.precision, "recipe": recipe}))
    config = json.loads(settings.to_json())
    for name, value in (change or {}).items():
        config["model"][name] = value
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=1, keep_best=0)
    arrays = jax.device_put(variables)
    checkpoints.save(3, {**arrays, "optimizer": {}, "ema": average, "step": np.int32(3)}, {})
    checkpoints.close()
    return folder


def test_golden_logits_through_the_file(tmp_path):
    shutil.copy(V3 / "golden.npz", tmp_path / "in.npz")
    result = scored(V3, tmp_path / "in.npz")
    assert set(result) == {"logits"} and result["logits"].dtype == np.float32
    np.testing.assert_allclose(result["logits"], np.load(V3 / "golden.npz")["logits"], rtol=0, atol=5e-5)


def test_deeper_multi_token_logits_end_in_nan(tmp_path):
    result = scored(deep_folder(tmp_path), tokens(tmp_path, 2, 6))
    assert result["logits"].shape == (2, 6, 96) and result["mtp_logits"].shape == (2, 2, 5, 96)
    assert np.isfinite(result["logits"]).all() and np.isfinite(result["mtp_logits"][0]).all()
    known = np.isfinite(result["mtp_logits"][1]).all(axis=(0, 2))
    assert known.tolist() == [True] * 4 + [False]
    assert np.isnan(result["mtp_logits"][1, :, 4]).all()


def test_an_implementation_that_this_machine_cannot_run(tmp_path):
    folder, path = workdir(tmp_path / "run"), tokens(tmp_path, 1, 4)
    config = json.loads((folder / "config.json").read_text())
    config["precision"]["implementation"] = "mosaic"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"^config\.precision\.implementation='mosaic' cannot run: .* not a GPU$"):
        score(folder, path, tmp_path / "out.npz", "fp8_deepseek")
    assert not list(tmp_path.glob("*out.npz*"))


def test_rows_shorter_than_the_depth(tmp_path):
    result = scored(deep_folder(tmp_path), tokens(tmp_path, 1, 1))
    assert result["logits"].shape == (1, 1, 96) and result["mtp_logits"].shape == (2, 1, 0, 96)


def test_rows_in_pieces_are_rows_at_once(tmp_path, monkeypatch):
    folder, path = deep_folder(tmp_path), tokens(tmp_path, 3, 6)
    whole = scored(folder, path)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2 * 6 * 96 * 3)  # two rows, the last call half empty
    pieces = scored(folder, path)
    for name, value in whole.items():
        np.testing.assert_allclose(pieces[name], value, rtol=0, atol=1e-4, err_msg=name)


def test_a_workdir_gives_the_logits_of_its_folder(tmp_path):
    path = tokens(tmp_path, 2, 6)
    theirs = scored(deep_folder(tmp_path), path)
    ours = scored(workdir(tmp_path / "run"), path)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_the_recipe_is_the_runs_own_unless_it_is_named(tmp_path):
    path, run = tokens(tmp_path, 2, 6), workdir(tmp_path / "run", recipe="bfloat16")
    own, named, full = scored(run, path), scored(run, path, "bfloat16"), scored(run, path, "float32")
    np.testing.assert_array_equal(own["logits"], named["logits"])
    assert 1e-4 < np.abs(own["logits"] - full["logits"]).mean() < 1


def pickled(path):
    np.savez(path, input_ids=np.array([[1, "a"]], object))


def encrypted(path):
    """A plain archive whose flags say that it is encrypted."""
    np.savez(path, input_ids=np.ones((1, 2), int))
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + offset] |= 1
    path.write_bytes(data)


def liar(path):
    """An array whose header claims 2^60 numbers."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (2**30, 2**30)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("input_ids.npy", file.getvalue() + b"\0" * 64)


def truncated(path):
    np.savez(path, input_ids=np.ones((4, 400), int))
    path.write_bytes(path.read_bytes()[:2000])


BAD_TOKENS = {
    "no file": (lambda path: None, "does not exist"),
    "a directory": (lambda path: path.mkdir(), "is not a file"),
    "a pipe": (os.mkfifo, "is not a file"),
    "text": (lambda path: path.write_text("1 2 3"), "cannot be read as an .npz of plain arrays: it is no zip archive"),
    "an empty file": (lambda path: path.write_bytes(b""), "cannot be read"),
    "an .npy array": (lambda path: np.save(path.open("wb"), np.ones((1, 2), int)), "not an .npz"),
    "another key": (lambda path: np.savez(path, ids=np.ones((1, 2), int)), "lacks input_ids; it holds 'ids'"),
    "pickled objects": (pickled, "allow_pickle=False"),
    "an encrypted archive": (encrypted, "cannot be read"),
    "a header that lies": (liar, "cannot be read"),
    "a truncated archive": (truncated, "cannot be read"),
    "fractions": (lambda path: np.savez(path, input_ids=np.ones((1, 2))), "whole numbers, not float64"),
    "truth values": (lambda path: np.savez(path, input_ids=np.ones((1, 2), bool)), "whole numbers, not bool"),
    "one axis": (lambda path: np.savez(path, input_ids=np.ones(2, int)), "shape (2,)"),
    "three axes": (lambda path: np.savez(path, input_ids=np.ones((1, 2, 3), int)), "shape (1, 2, 3)"),
    "no rows": (lambda path: np.savez(path, input_ids=np.ones((0, 3), int)), "shape (0, 3)"),
    "no tokens": (lambda path: np.savez(path, input_ids=np.ones((3, 0), int)), "shape (3, 0)"),
    "an id that is too large": (lambda path: np.savez(path, input_ids=np.array([[1, 384]])), "input_ids[0, 1]=384"),
    "a negative id": (lambda path: np.savez(path, input_ids=np.array([[1], [-1]])), "input_ids[1, 0]=-1"),
    "an id of 64 bits": (lambda path: np.savez(path, input_ids=np.array([[2**63]], np.uint64)), f"={2**63}"),
    "rows that are too long": (lambda path: np.savez(path, input_ids=np.ones((1, 129), int)),
                               "max_position_embeddings=128"),
}


def refused(folder, expected, **change):
    request = {"checkpoint": V3, "tokens": folder / "in.npz", "output": folder / "out.npz"} | change
    before = sorted(folder.rglob("*"))
    with pytest.raises(RequestError) as caught:
        score(**request)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("what", BAD_TOKENS)
def test_wrong_tokens_are_refused(what, tmp_path):
    make, expected = BAD_TOKENS[what]
    make(tmp_path / "in.npz")
    refused(tmp_path, expected)


def test_other_wrong_requests(tmp_path):
    tokens(tmp_path, 1, 4)
    refused(tmp_path, "did you mean bfloat16?", recipe="bfloat")
    refused(tmp_path, "cannot be written: No such file or directory", output=tmp_path / "no" / "out.npz")
    refused(tmp_path, "is not a file", output=tmp_path)
    refused(tmp_path, "does not exist", checkpoint=tmp_path / "none")
    refused(tmp_path, "holds neither checkpoints/ nor *.safetensors", checkpoint=tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(tmp_path, "config.json does not exist", checkpoint=tmp_path / "run")


def test_a_workdir_that_has_nothing_or_something_else(tmp_path):
    tokens(tmp_path, 1, 4)
    run = workdir(tmp_path / "run", change={"hidden_size": 48})
    refused(tmp_path, "is not of the model in its config.json: params/", checkpoint=run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    refused(tmp_path, "holds no intact checkpoint", checkpoint=run)


def test_an_earlier_output_survives_a_wrong_request(tmp_path):
    tokens(tmp_path, 1, 4, input_ids=np.array([[10**6]]))
    (tmp_path / "out.npz").write_bytes(b"earlier")
    refused(tmp_path, "input_ids[0, 0]=1000000")
    assert (tmp_path / "out.npz").read_bytes() == b"earlier"


def test_a_disk_that_fills_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    path = tokens(tmp_path, 1, 1)
    monkeypatch.setattr(module, "logits", lambda *_: {})
    monkeypatch.setattr(module.np, "savez", full)
    with pytest.raises(RunError, match="No space left on device"):
        score(V3, path, tmp_path / "out.npz")
    assert list(tmp_path.iterdir()) == [path]


def test_the_command(tmp_path):
    """In a process of its own: the flags, what is said on stderr, and the code of a wrong request."""
    path = tokens(tmp_path, 1, 4)
    flags = [f"--checkpoint={V3}", f"--tokens={path}", f"--output={tmp_path / 'out.npz'}"]
    for words, code in ((flags, 0), ([*flags, f"--tokens={tmp_path}"], 2)):
        done = subprocess.run([sys.executable, "-m", "research.score", *words], capture_output=True, text=True,
                              cwd=GOLDEN.parents[1], timeout=600)
        assert done.returncode == code, done.stderr
        if code == 0:
            assert np.load(tmp_path / "out.npz")["logits"].shape == (1, 4, 384)
            assert done.stderr.count("num_nextn_predict_layers=1") == 1
            (tmp_path / "out.npz").unlink()
    assert "is not a file" in done.stderr and done.stderr.count("\n") == 1 and not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("change, expected", [(slice(2), "--output is required: "), (["--recipe=fp"], "--recipe='fp'"),
                                              (["--tokns=x"], "tokns")])
def test_wrong_flags(change, expected, tmp_path, capsys):
    flags = [f"--checkpoint={V3}", f"--tokens={tokens(tmp_path, 1, 4)}", f"--output={tmp_path / 'out.npz'}"]
    flags = flags[change] if isinstance(change, slice) else flags + change
    assert exit_code(main, *flags) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and not (tmp_path / "out.npz").exists()
