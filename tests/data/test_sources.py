"""Documents: their order, their split, and what is said of files that are wrong."""

import gzip
import json
import random
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest

from experiments.base import get_config
from research.data import sources
from research.data.sources import Document
from research.errors import RequestError


def data_of(**fields):
    data = get_config().data
    with data.unlocked():
        data.update(fields)
    return data


def read(files: str, **fields) -> list[Document]:
    return sources.documents(data_of(source="files", files=files, **fields))


def test_stdlib_is_the_text_of_this_pythons_source_files_in_order():
    found = sources.documents(data_of(source="stdlib"))
    names = [document.name for document in found]
    assert names == sorted(names)
    assert len(set(names)) == len(names) > 300
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("packages" in name.split("/")[0] or "__pycache__" in name for name in names)
    root = Path(sysconfig.get_path("stdlib"))
    for document in found[::50]:
        assert document.text.encode() == (root / document.name).read_bytes()


def test_stdlib_leaves_out_what_is_blank_undecodable_or_not_the_librarys(tmp_path: Path, monkeypatch):
    for name, content in {
        "b.py": b"b = '\xc3\xa9'\r\n",
        "a/c.py": b"c = 1",
        "latin.py": b"# \xe9",
        "empty.py": b"",
        "blank.py": b" \n",
        "notes.txt": b"no",
        "site-packages/x.py": b"x",
        "a/__pycache__/y.py": b"y",
        "test/test_b.py": b"z",
        "a/tests/test_c.py": b"z",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path))
    expected = [Document("a/c.py", "c = 1"), Document("b.py", "b = 'é'\r\n")]
    assert sources.documents(data_of(source="stdlib")) == expected


def test_files_of_every_kind_in_the_order_of_their_paths(tmp_path: Path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes("one\r\ntwo\u2028".encode())
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "x\u2028y"}\n\n{"text": " "}\n{"text": "é", "n": 1}', "utf-8")
    (tmp_path / "deep" / "er" / "c.md").write_text("deep")
    with gzip.open(tmp_path / "d.txt.gz", "wb") as file:
        file.write(b"packed")
    with gzip.open(tmp_path / "e.json.gz", "wb") as file:
        file.write(b'{"text": "row"}\n')
    found = read(f"{tmp_path}/*.*, {tmp_path}/**/*.md,{tmp_path}/b.txt")
    assert [(document.name.removeprefix(f"{tmp_path}/"), document.text) for document in found] == [
        ("a.jsonl:1", "x\u2028y"),
        ("a.jsonl:4", "é"),
        ("b.txt", "one\r\ntwo\u2028"),
        ("d.txt.gz", "packed"),
        ("deep/er/c.md", "deep"),
        ("e.json.gz:1", "row"),
    ]


def test_a_path_with_glob_characters_is_taken_as_it_is(tmp_path: Path):
    (tmp_path / "notes [1].txt").write_text("text")
    assert [document.text for document in read(str(tmp_path / "notes [1].txt"))] == ["text"]


def test_the_text_field_is_named_by_the_config(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": 3, "answer": "42"}')
    assert read(str(tmp_path / "a.jsonl"), text_field="answer")[0].text == "42"


@pytest.mark.parametrize("source", ["stdlib", "files"])
def test_max_documents_takes_the_first(tmp_path: Path, source: str):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(9)))
    files = f"{tmp_path}/a.jsonl" if source == "files" else ""
    every, some = (data_of(source=source, files=files, max_documents=most) for most in (0, 4))
    assert sources.documents(some) == sources.documents(every)[:4]


WRONG_FILES = {
    "missing": (None, "matches no file"),
    "empty.txt": (b"", "empty.txt holds no document: the file is empty"),
    "blank.txt": (b" \n\t", "blank.txt holds no document: the file is empty"),
    "empty.jsonl": (b"\n\n", "empty.jsonl holds no document"),
    "blank.jsonl": (b'{"text": ""}\n{"text": "  "}\n', "blank.jsonl holds no document"),
    "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8: byte 0xe9 at offset 3"),
    "utf16.jsonl": ("{}".encode("utf-16"), "utf16.jsonl is not UTF-8"),
    "syntax.jsonl": (
        b'{"text": "a"}\n{"text": \n',
        "syntax.jsonl:2 is not JSON (Expecting value): expected one object",
    ),
    "pretty.json": (b'{\n  "text": "a"\n}\n', "pretty.json:1 is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1 is not JSON"),
    "field.jsonl": (b'{"text": "a"}\n\n{"body": "a"}\n', "field.jsonl:3 has no field 'text' (config.data.text_field)"),
    "list.jsonl": (b'["text"]', "list.jsonl:1 has no field 'text'"),
    "number.jsonl": (b'{"text": 5}', "number.jsonl:1 has a field 'text' that is not text"),
    "null.jsonl": (b'{"text": null}', "null.jsonl:1 has a field 'text' that is not text"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', "surrogate.jsonl:1 has a field 'text' that is not text"),
    "plain.txt.gz": (b"not gzip", "plain.txt.gz is not an intact gzip file"),
    "cut.txt.gz": (gzip.compress(b"text" * 99)[:-9], "cut.txt.gz is not an intact gzip file"),
    "flipped.txt.gz": (
        bytes(byte ^ (0xFF if 12 <= place < 16 else 0) for place, byte in enumerate(gzip.compress(b"text" * 99))),
        "flipped.txt.gz is not an intact gzip file",
    ),
    "void.txt.gz": (gzip.compress(b""), "void.txt.gz holds no document"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_named_in_one_line(tmp_path: Path, name: str):
    content, expected = WRONG_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read(str(tmp_path / name))
    message = str(caught.value)
    assert message.startswith("config.data.files=")
    assert expected in message
    assert "\n" not in message


def test_a_wrong_file_among_right_ones_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("right")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(RequestError, match=r"b\.txt holds no document"):
        read(f"{tmp_path}/*.txt")
    with pytest.raises(RequestError, match=r"/\*\.md' matches no file"):
        read(f"{tmp_path}/a.txt,{tmp_path}/*.md")


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(RequestError, match=r"a\.txt cannot be read: Permission denied"):
        read(str(tmp_path / "a.txt"))


def test_fields_that_name_nothing(tmp_path: Path):
    with pytest.raises(RequestError, match=r"config.data.source='web' is none of stdlib, files, huggingface"):
        sources.documents(data_of(source="web"))
    for nothing in ("", " , "):
        with pytest.raises(RequestError, match=r"config.data.files='.*' names no file"):
            read(nothing)
    with pytest.raises(RequestError, match=r"is a folder: name its files, as in"):
        read(str(tmp_path))
    with pytest.raises(RequestError, match=r"matches no file"):
        read("a\0b")


def test_a_python_without_its_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(RequestError, match="config.data.source='stdlib' finds no source files"):
        sources.documents(data_of(source="stdlib"))
    (tmp_path / "a.py").write_text("\n")
    with pytest.raises(RequestError, match="config.data.source='stdlib' yields no document"):
        sources.documents(data_of(source="stdlib"))


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows, error: Exception | None = None) -> list:
    calls = []

    def load_dataset(*arguments, **named):
        calls.append((arguments, named))
        if error:
            raise error
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_huggingface_streams_as_many_as_asked(monkeypatch: pytest.MonkeyPatch):
    def rows():
        yield from ({"text": text} for text in ("a", " ", "b", "c"))
        pytest.fail("read too far")

    calls = fake_datasets(monkeypatch, rows())
    data = data_of(source="huggingface", huggingface_dataset="x/y", max_documents=3)
    assert [(document.name, document.text) for document in sources.documents(data)] == [
        ("x/y:1", "a"),
        ("x/y:3", "b"),
        ("x/y:4", "c"),
    ]
    assert calls == [(("x/y", None), {"split": "train", "streaming": True})]


def test_huggingface_errors_are_one_line(monkeypatch: pytest.MonkeyPatch):
    asked = {"source": "huggingface", "huggingface_dataset": "x/y", "max_documents": 9}
    with pytest.raises(RequestError, match="config.data.huggingface_dataset='' is empty"):
        sources.documents(data_of(source="huggingface"))
    with pytest.raises(RequestError, match="config.data.max_documents=0 must say how many documents"):
        sources.documents(data_of(**asked | {"max_documents": 0}))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"config.data.source='huggingface' needs .*-r requirements-data.txt"):
        sources.documents(data_of(**asked))
    fake_datasets(monkeypatch, [], ValueError("Bad split\nmore"))
    with pytest.raises(RequestError, match=r"huggingface_dataset='x/y' cannot be read: Bad split$"):
        sources.documents(data_of(**asked))
    fake_datasets(monkeypatch, [{"body": "a", "id": 1}])
    with pytest.raises(RequestError, match=r"config.data.text_field='text' is no text of x/y: it has body, id"):
        sources.documents(data_of(**asked))

    def breaks():
        yield {"text": "a"}
        raise ConnectionError

    fake_datasets(monkeypatch, breaks())
    with pytest.raises(RequestError, match=r"huggingface_dataset='x/y' cannot be read: ConnectionError"):
        sources.documents(data_of(**asked))
    fake_datasets(monkeypatch, [])
    with pytest.raises(RequestError, match="config.data.source='huggingface' yields no document"):
        sources.documents(data_of(**asked))


def corpus(count: int) -> list[Document]:
    return [Document(f"{n}.txt", f"text {n % (count - count // 10)}") for n in range(count)]


def test_split_keeps_order_loses_nothing_and_separates_texts():
    found = corpus(2000)
    train, validation = sources.split(found, 0.1)
    assert 140 < len(validation) < 260
    assert sorted(train + validation, key=found.index) == found
    assert [document for document in found if document in set(validation)] == validation
    assert not {document.text for document in train} & {document.text for document in validation}


def test_split_of_a_text_depends_on_the_text_alone():
    found = corpus(500)
    held_out = {document.text for document in sources.split(found, 0.1)[1]}
    shuffled = [Document("moved/" + document.name, document.text) for document in found]
    random.Random(0).shuffle(shuffled)
    assert {document.text for document in sources.split(shuffled, 0.1)[1]} == held_out
    part = [document for document in found if document.text < "text 3"]
    assert {document.text for document in sources.split(part, 0.1)[1]} == {text for text in held_out if text < "text 3"}
    assert held_out < {document.text for document in sources.split(found, 0.2)[1]}


def test_split_is_the_same_in_another_process_and_forever():
    assert Document("any", "text 0").digest.hex() == "054ec765152dfd77ebfde2662d24f63b"
    code = "from research.data.sources import Document; print(Document('b', 'text 0').digest.hex())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == Document("any", "text 0").digest.hex()


def test_split_of_nothing_is_nothing():
    found = corpus(30)
    assert sources.split(found, 0.0) == (found, [])


@pytest.mark.parametrize(("fraction", "side", "bound"), [(1e-9, "validation", "least"), (1 - 1e-9, "training", "most")])
def test_a_side_left_empty_is_refused_with_a_fraction_that_works(fraction: float, side: str, bound: str):
    found = corpus(20)
    with pytest.raises(
        RequestError, match=rf"leaves none of 20 documents for {side}: .* is the {bound} that"
    ) as caught:
        sources.split(found, fraction)
    named = float(str(caught.value).split(": ")[1].split()[0])
    train, validation = sources.split(found, named)
    assert train
    assert validation


def test_of_one_text_the_end_is_held_out():
    text = "".join(map(str, range(50)))
    assert sources.split([Document("a", text)], 0.1) == ([Document("a", text[:81])], [Document("a", text[81:])])
    assert sources.split([Document("a", text)], 0.0) == ([Document("a", text)], [])
    for text, side in (("abc", "validation"), ("  abc", "training")):
        with pytest.raises(RequestError, match=rf"leaves nothing of a text of {len(text)} characters for {side}$"):
            sources.split([Document("a", text)], 0.2 if side == "validation" else 0.6)
    with pytest.raises(RequestError, match="leaves none of 2 documents for validation: they are one text, again"):
        sources.split([Document("a", "same"), Document("b", "same")], 0.02)


def test_gzip_figure_by_hand_is_that_of_the_concatenation():
    found = [Document("a", "Unë " * 500), Document("b", "Unë " * 400 + "end")]
    raw = ("Unë " * 900 + "end").encode()
    assert sources.utf8_bytes(found) == len(raw) == 900 * 5 + 3
    assert sources.gzip_bits_per_byte(found) == 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw)
    apart = sum(len(gzip.compress(document.text.encode(), 9, mtime=0)) for document in found)
    assert sources.gzip_bits_per_byte(found) < 0.7 * 8 * apart / len(raw)
    assert sources.gzip_bits_per_byte([]) is None


def test_corpus_hash_depends_on_texts_and_order():
    one, other = Document("a", "x"), Document("b", "y")
    assert sources.corpus_hash([one, other]) == sources.corpus_hash([Document("c", "x"), other])
    hashes = [sources.corpus_hash(found) for found in ([], [one], [one, other], [other, one], [Document("a", "xy")])]
    assert len(set(hashes)) == 5
