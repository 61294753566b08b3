"""Small files: the old one whole or the new one whole, whatever comes in between."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from research.files import write_whole

ROOT = Path(__file__).parents[1]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.json"
    for content in ("old", "ü\r\nnew\n", ""):
        write_whole(path, content)
        assert path.read_bytes() == content.encode() and list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_leaves_what_stood_there(step, there, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    if there:
        path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new" * 100)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == ([("a.json", "old")] if there else [])


def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    path, synced, replace = tmp_path / "a.json", [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))

    def checked(*names):
        assert synced == [3]
        replace(*names)

    monkeypatch.setattr(os, "replace", checked)
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_what_a_kill_leaves_is_taken_up_by_the_next(tmp_path):
    """A process that is killed between the file's last byte and its name."""
    path = tmp_path / "a.json"
    write_whole(path, "old")
    kill = ("import os, pathlib, signal, sys; from research import files; "
            "files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
            "files.write_whole(pathlib.Path(sys.argv[1]), 'new')")
    assert subprocess.run([sys.executable, "-c", kill, path], cwd=ROOT, timeout=60).returncode == -9
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.glob("[!.]*")) == [path]  # what is left is hidden
    write_whole(path, "newer")
    assert path.read_text() == "newer" and list(tmp_path.iterdir()) == [path]
