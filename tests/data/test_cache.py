"""The cache gives back what was stored, or nothing."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from research.data import cache
from research.errors import RequestError

ARRAYS = {
    "flat": np.arange(1000, dtype=np.uint16),
    "offsets": np.array([[0, 3], [5, 9]], np.int64),
    "empty": np.zeros(0, np.uint32),
}


def assert_same(loaded: cache.Arrays) -> None:
    assert list(loaded) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_round_trip_is_memory_mapped_and_read_only(tmp_path: Path):
    cache.save(tmp_path / "a.bin", ARRAYS)
    loaded = cache.load(tmp_path / "a.bin")
    assert_same(loaded)
    assert not loaded["flat"].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        loaded["flat"][0] = 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("kept", [0, 1, 50, 71, 72, 73, 200, -1])
def test_a_file_cut_short_is_not_loaded(tmp_path: Path, kept: int):
    path = tmp_path / "a.bin"
    cache.save(path, ARRAYS)
    path.write_bytes(path.read_bytes()[:kept])
    assert cache.load(path) is None


def test_a_flipped_byte_anywhere_is_noticed(tmp_path: Path):
    path = tmp_path / "a.bin"
    cache.save(path, ARRAYS)
    whole = path.read_bytes()
    for place in range(0, len(whole), 13):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        assert cache.load(path) is None, place


def test_a_pickle_is_not_loaded(tmp_path: Path):
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(ARRAYS))
    assert cache.load(path) is None
    with path.open("wb") as file:
        np.save(file, np.array([ARRAYS], object), allow_pickle=True)
    assert cache.load(path) is None


def test_remember_builds_once_and_again_after_damage(tmp_path: Path):
    calls = []

    def build() -> cache.Arrays:
        calls.append(1)
        return ARRAYS

    folder = str(tmp_path / "deep" / "folder")
    assert_same(cache.remember(folder, "a.bin", build))
    assert_same(cache.remember(folder, "a.bin", build))
    assert len(calls) == 1
    path = Path(folder) / "a.bin"
    path.write_bytes(path.read_bytes()[:-5])
    assert_same(cache.remember(folder, "a.bin", build))
    assert len(calls) == 2
    assert_same(cache.load(path))


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.bin"
    cache.save(path, ARRAYS)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.save(path, {"flat": np.zeros(5)})
    assert_same(cache.load(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]
    with pytest.raises(RequestError, match=r"config.data.cache=.* cannot be written: No space left on device"):
        cache.remember(str(tmp_path), "b.bin", lambda: ARRAYS)


def test_an_unwritable_folder_is_known_before_the_work(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RequestError, match=r"config.data.cache=.* cannot be written"):
        cache.remember(str(tmp_path / "file"), "a.bin", lambda: pytest.fail("built"))
