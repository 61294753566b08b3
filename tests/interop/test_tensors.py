"""Safetensors headers that lie, and indexes that do not agree with the files: always one RequestError."""

import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from research.errors import RequestError
from research.interop.tensors import INDEX, list_tensors, read_header


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def file_bytes(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


A = {"a": entry()}
LIES = {
    "an empty file": (b"", "fewer than a header's length"),
    "half a header's length": (b"\1\0\0\0", "fewer than a header's length"),
    "a header beyond the file": (file_bytes(A, length=10**6), "its header says"),
    "a header of 2^64 - 1 bytes": (file_bytes(A, length=2**64 - 1), "its header says"),
    "a header that stops early": (file_bytes(A, length=20), "not JSON"),
    "a header of no bytes": (file_bytes(A, length=0), "not JSON"),
    "a header that is no JSON": (file_bytes(b"\x80\x04pickle"), "not JSON"),
    "a header that is a list": (file_bytes([]), "JSON object"),
    "a header 50,000 lists deep": (file_bytes(b"[" * 50_000), "not JSON"),
    "a header that is not UTF-8": (file_bytes(b'{"\xff": 1}'), "not JSON"),
    "a name twice": (file_bytes(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2)), "twice"),
    "an entry that is a number": (file_bytes({"a": 1}), "must hold dtype"),
    "an entry without offsets": (file_bytes({"a": {"dtype": "F32", "shape": [2]}}), "must hold dtype"),
    "an unknown dtype": (file_bytes({"a": entry("F33")}), 'dtype="F33"'),
    "a dtype that is a list": (file_bytes({"a": entry(["F32"])}), "dtype="),
    "a negative length": (file_bytes({"a": entry(shape=(-2,))}), "shape=[-2]"),
    "a fractional length": (file_bytes({"a": entry(shape=(2.0,))}), "shape=[2.0]"),
    "a shape that is true": (file_bytes({"a": entry(shape=(True, 2))}), "shape=[true"),
    "a shape of 9 axes": (file_bytes({"a": entry(shape=(1,) * 8 + (2,))}), "at most 8"),
    "a shape of 2^126 elements": (file_bytes({"a": entry(shape=(2**63, 2**63))}), "must span"),
    "a shape of 4,000 digits": (file_bytes({"a": entry(shape=(10**4000, 2))}), "must span"),
    "a shape larger than its data": (file_bytes({"a": entry(shape=(3,))}), "must span the 12 bytes"),
    "a shape smaller than its data": (file_bytes({"a": entry(shape=(1,))}), "must span the 4 bytes"),
    "a wider dtype than its data": (file_bytes({"a": entry("F64")}), "must span the 16 bytes"),
    "negative offsets": (file_bytes({"a": entry(offsets=(-8, 0))}), "data_offsets=[-8, 0]"),
    "offsets the wrong way round": (file_bytes({"a": entry(offsets=(8, 0))}), "data_offsets=[8, 0]"),
    "three offsets": (file_bytes({"a": entry(offsets=(0, 8, 8))}), "data_offsets"),
    "offsets far beyond the file": (file_bytes({"a": entry(offsets=(2**62, 2**62 + 8))}), "gap"),
    "data that overlap": (file_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "overlaps"),
    "data that are shared": (file_bytes({"a": entry(), "b": entry()}), "overlaps"),
    "a gap in the data": (file_bytes({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), "gap"),
    "a truncated file": (file_bytes(A, b"\0" * 7), "truncated"),
    "data without a name": (file_bytes(A, b"\0" * 9), "left over"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[lie][0])
    with pytest.raises(RequestError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message and LIES[lie][1] in message and "\n" not in message and len(message) < 600


def test_the_honest_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes({"__metadata__": {"format": "pt"}} | A, np.array([1, -2], "<f4").tobytes()))
    np.testing.assert_array_equal(read_header(path)["a"].read(), np.array([1, -2], np.float32))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(A))
    tensor = read_header(path)["a"]
    path.write_bytes(b"")
    with pytest.raises(RequestError, match="shorter"):
        tensor.read()


@pytest.mark.parametrize("make", (lambda path: path.mkdir(), os.mkfifo))
def test_what_is_not_a_file_is_not_opened(make, tmp_path):
    make(tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match="is not a file"):
        list_tensors(tmp_path)


VALID = file_bytes({"a": entry(), "b": entry("BF16", (2, 2), (8, 16)), "c": entry("I64", (), (16, 24))}, b"\1" * 24)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
       st.integers(0, len(VALID) + 4))
@hypothesis_settings(max_examples=300, deadline=None, derandomize=True)
def test_any_damage_is_answered_by_a_request_error_or_harmless(tmp_path_factory, changes, length):
    data = bytearray(VALID)
    for place, byte in changes:
        data[place] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes((bytes(data) + b"\0" * 4)[:length if length % 3 == 0 else len(VALID)])
    try:
        tensors = read_header(path)
    except RequestError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return
    for tensor in tensors.values():
        if tensor.dtype in ("F32", "BF16"):
            assert tensor.read().shape == tensor.shape


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shards(folder, index=None):
    for file, name in ((ONE, "a"), (TWO, "b")):
        save_file({name: np.zeros(2, np.float32)}, folder / file)
    if index is not None:
        (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def test_shards_with_and_without_an_index(tmp_path):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    folders = shards(tmp_path / "with", {"weight_map": {"a": ONE, "b": TWO}}), shards(tmp_path / "without")
    save_file({"c": np.zeros(1, np.float32)}, folders[0] / "consolidated.safetensors")  # not in the index: not read
    for folder in folders:
        assert {name: tensor.path.name for name, tensor in list_tensors(folder).items()} == {"a": ONE, "b": TWO}


@pytest.mark.parametrize("index, expected", [
    ("{", "not JSON"), ("[]", "JSON object"), ({}, "weight_map"), ({"weight_map": [ONE]}, "weight_map"),
    ({"weight_map": {}}, "weight_map"), ({"weight_map": {"a": 1}}, "'a' in 1"),
    ({"weight_map": {"a": "../" + ONE}}, "in its folder"), ({"weight_map": {"a": "/etc/passwd"}}, "in its folder"),
    ({"weight_map": {"a": "pytorch_model.bin"}}, "in its folder"),
    ({"weight_map": {"a": ONE, "b": "model-00003-of-00002.safetensors"}}, "does not exist"),
    ({"weight_map": {"a": ONE, "b": TWO, "c": TWO}}, "does not hold it"),
    ({"weight_map": {"a": TWO, "b": ONE}}, "places it in"),
    ({"weight_map": {"a": ONE, "b": ONE}}, "does not hold it"),
    (f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}', "twice"),
])
def test_an_index_that_lies_is_refused(index, expected, tmp_path):
    with pytest.raises(RequestError, match=expected) as caught:
        list_tensors(shards(tmp_path, index))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("index", (None, {"weight_map": {"a": ONE, "b": TWO}}))
def test_a_name_in_two_shards_is_refused(index, tmp_path):
    shards(tmp_path, index)
    save_file({"b": np.zeros(2, np.float32), "a": np.zeros(2, np.float32)}, tmp_path / TWO)
    with pytest.raises(RequestError, match=f"{TWO} holds 'a', which is in {ONE} too"):
        list_tensors(tmp_path)


def test_a_tensor_that_the_index_leaves_out_is_refused(tmp_path):
    shards(tmp_path, {"weight_map": {"a": ONE, "b": TWO}})
    save_file({"b": np.zeros(2, np.float32), "c": np.zeros(2, np.float32)}, tmp_path / TWO)
    with pytest.raises(RequestError, match="holds 'c', but .* does not list it"):
        list_tensors(tmp_path)
