"""Conversions that are stopped: nothing under the final name, and the same command goes on; in little memory."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from research import convert
from research.errors import RequestError, RunError
from research.interop import destination, shards
from research.interop.exporter import export_workdir
from research.interop.importer import import_folder
from research.interop.tensors import INDEX
from research.training.checkpoint import damage
from tests.commands import exit_code
from tests.interop.test_convert import FP8_FOLDER, STEP, refused
from tests.interop.test_huggingface import GOLDEN


def test_destinations_that_are_not_written(made, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    for name in ("there", "link"):
        refused("exists already", import_folder, GOLDEN / "qwen2_tiny", tmp_path / name, None, None)
    with pytest.raises(RequestError, match="--destination='/' exists already"):
        import_folder(GOLDEN / "qwen2_tiny", Path("/"), None, None)
    with pytest.raises(RequestError, match="cannot be written: Not a directory"):
        import_folder(GOLDEN / "qwen2_tiny", tmp_path / "file" / "b", None, None)
    with destination.built(tmp_path / "b", {}):
        ours = made("qwen2_tiny")[0]
        refused("is being written by another process", export_workdir, ours, tmp_path / "b", None, None)


@pytest.mark.parametrize("unread", ("generation_config.json", "checkpoints"))
def test_a_source_that_cannot_be_read(unread, tmp_path, monkeypatch, capsys):
    """Of what goes along it is named before a tensor is moved; root may read all, so that the refusal is made here."""
    folder = Path(shutil.copytree(GOLDEN / "qwen2_tiny", tmp_path / "a"))
    (folder / "generation_config.json").write_text("{}")
    for name in ("is_dir", "read_bytes"):
        real = getattr(Path, name)

        def guarded(self, real=real):
            if self.name == unread:
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(self)

        monkeypatch.setattr(Path, name, guarded)
    assert exit_code(convert, f"--source={folder}", f"--destination={tmp_path / 'b'}") == 2
    assert "cannot be read: Permission denied" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def failing(monkeypatch, after):
    """Makes the disk full after so many writes."""
    real, left = os.pwrite, iter(range(after))

    def pwrite(*arguments):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("direction", ("in", "out"))
def test_a_full_disk_and_the_same_command_again(direction, made, tmp_path, monkeypatch):
    ours, again = made("deepseek_v3_tiny_fp8")
    function, source, whole = {"in": (import_folder, FP8_FOLDER, ours), "out": (export_workdir, ours, again)}[direction]
    final, partial = tmp_path / "a", tmp_path / ".a.partial"
    with monkeypatch.context() as patch:
        failing(patch, 120)
        with pytest.raises(RunError, match="No space left on device; what is written waits in .*partial: the same"):
            function(source, final, None, None)
    assert not final.exists() and partial.exists()
    data = [path for path in partial.rglob("*") if path.is_file() and path.stat().st_size > 1500]
    stands = {path: path.stat().st_mtime_ns for path in data}
    with max(data, key=lambda path: path.stat().st_size).open("r+b") as file:  # the disk lost a byte
        file.seek(-7, os.SEEK_END)
        file.write(b"\xa5")
    account = function(source, final, None, None)
    assert 0 < account.written < account.read
    if direction == "in":
        same = [path for path in data if (final / path.relative_to(partial)).stat().st_mtime_ns == stands[path]]
        assert len(same) >= len(data) - 3  # the damaged one, and the two that the full disk met
    assert files(final) == files(whole)
    assert not partial.exists() and not (final / ".lock").exists()


def files(folder):
    """{name: bytes}, but what names the place or differs with the time."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not damage(folder / STEP) if (folder / STEP).exists() else True
    return {name: data for name, data in found.items() if Path(name).parts[2:] not in (
        ("record", "metadata"), ("manifest.json",))}


def test_what_another_request_left_is_not_used(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, 60)
        with pytest.raises(RunError):
            import_folder(FP8_FOLDER, tmp_path / "a", None, None)
    import_folder(FP8_FOLDER, tmp_path / "a", "none", "float32")
    assert not list((tmp_path / "a" / STEP / "state").glob("scales*"))
    assert not damage(tmp_path / "a" / STEP)


SPARSE = """
import sys
from research import convert
from research.interop.importer import import_folder
from research.interop.exporter import export_workdir
from pathlib import Path
base = Path(sys.argv[1])
import_folder(base / "source", base / "ours", None, None)
export_workdir(base / "ours", base / "again", None, None)
print(convert.peak_memory())
"""


def sparse_folder(folder):
    """A folder of zeros that takes no place: 176 MiB of layers and a 64 MiB embedding, in 16 bits."""
    raw = json.loads((GOLDEN / "qwen2_tiny" / "config.json").read_text()) | {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 32768,
        "num_attention_heads": 16, "num_key_value_heads": 4}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({key: raw[key] for key in raw if key != "layer_types"}))
    shapes = {"model.embed_tokens.weight": (32768, 1024), "model.norm.weight": (1024,)}
    for layer in range(6):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in {
            "self_attn.q_proj.weight": (1024, 1024), "self_attn.q_proj.bias": (1024,),
            "self_attn.k_proj.weight": (256, 1024), "self_attn.k_proj.bias": (256,),
            "self_attn.v_proj.weight": (256, 1024), "self_attn.v_proj.bias": (256,),
            "self_attn.o_proj.weight": (1024, 1024), "mlp.gate_proj.weight": (4096, 1024),
            "mlp.up_proj.weight": (4096, 1024), "mlp.down_proj.weight": (1024, 4096),
            "input_layernorm.weight": (1024,), "post_attention_layernorm.weight": (1024,)}.items()}
    with shards.Shards(folder, shards.lay_out(shards.Entry(name, "BF16", shape) for name, shape in shapes.items())):
        pass
    for file in folder.glob("*.safetensors"):
        size = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
        os.truncate(file, file.stat().st_size + size)
    return folder


def test_memory_is_bounded_and_a_killed_conversion_leaves_no_destination(tmp_path):
    sparse_folder(tmp_path / "source")
    killed = subprocess.Popen([sys.executable, "-m", "research.convert", f"--source={tmp_path}/source",
                               f"--destination={tmp_path}/killed"], cwd=GOLDEN.parents[1])
    while not list(tmp_path.glob(".killed.partial/checkpoints/0/state/*/*")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists()
    done = subprocess.run([sys.executable, "-c", SPARSE, str(tmp_path)], cwd=GOLDEN.parents[1], capture_output=True,
                          text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1])
    assert peak < 380 * 2**20, f"{peak / 2**20:.0f} MiB"  # 250 of them the process itself
    shutil.rmtree(tmp_path)


