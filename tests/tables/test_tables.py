"""`python -m research.tables`: the analytic tables to the papers' printed digits, their files, wrong requests."""

import json

import pytest

from research.errors import RequestError
from research.tables import __main__ as main
from research.tables import fp8_storage, runner
from tests.commands import exit_code

PNG = b"\x89PNG"
OFF = {  # figures that do not come out as they are printed: ours, and that the notes say why
    "fp8_storage": {"multi-token layer with its copies": "13", "multi-token layer alone": "11.6"},
    "inference_economics": {
        "revenue at list prices": "562,100", "inputs from the disk cache": "56.2", "press, dear over cheap": "39",
        "any token, cost (press: 10 cents)": "0.11", "tokens a second, 400G InfiniBand": "68",
        "tokens a second, GB200 NVL72": "1,220"},
    "isca_flops": {"Qwen-72B, dense": "445", "LLaMA-405B, dense": "2,473"},
    "isca_kv_cache": {"LLaMA-3.1 405B (GQA), multiple": "7.34"},
    "isca_mfu": {}, "v2_kv_cache": {}, "v3_bubbles": {},
    "v3_cluster": {"2,048 GPUs: pipeline 16 x expert 64 x data 2, bound of a step": "4.53"},
    "v3_cost": {"pre-training, by throughput": "2,667", "context extension, by FLOPs": "76"},
    "v3_redundant_experts": {},
}


def run(*words: str) -> int:
    return exit_code(main, *words)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "new" / "results"
    assert run("--table=all", f"--folder={folder}") == 0
    return folder


def rows_of(results, name: str) -> dict[str, dict]:
    found = json.loads((results / f"{name}.json").read_text())
    return {(row["what"], row["unit"]): row for row in found["rows"]["analytic"]}


@pytest.mark.parametrize("name", OFF)
def test_what_is_printed_comes_out_and_what_does_not_is_explained(results, name):
    rows = rows_of(results, name).values()
    compared = [row for row in rows if row["difference"]]
    off = {row["what"]: f"{row['ours']:,.{row['digits']}f}" for row in compared if row["difference"] != "equal"}
    assert len(compared) >= {"v3_cluster": 1, "v3_redundant_experts": 3}.get(name, 5) and off == OFF[name]
    assert not off or runner.load(name).NOTES


@pytest.mark.parametrize("name, what, unit, printed", [
    ("v3_cost", "total", "thousand H800 hours", "2,788"), ("v3_cost", "price of all", "million dollars", "5.576"),
    ("v3_cost", "pre-training", "thousand H800 hours", "2,664"),
    ("v3_cost", "price of context extension", "million dollars", "0.238"),
    ("isca_kv_cache", "DeepSeek-V3 (MLA)", "KB", "70.272"), ("isca_kv_cache", "Qwen2.5-72B (GQA)", "KB", "327.680"),
    ("isca_kv_cache", "LLaMA-3.1 405B (GQA)", "KB", "516.096"),
    ("isca_flops", "DeepSeek-V2, 236B", "GFLOP", "155"),
    ("isca_flops", "DeepSeek-V3, causal, two decimals", "GFLOP", "249.81"),
    ("isca_flops", "DeepSeek-V3, full attention", "GFLOP", "280.51"),
    ("isca_mfu", "MPFT, causal", "TFLOP/s", "385"), ("isca_mfu", "MPFT, full", "TFLOP/s", "432"),
    ("isca_mfu", "MPFT, causal", "% of the peak", "38.94"), ("isca_mfu", "MPFT, full", "% of the peak", "43.73"),
    ("isca_mfu", "MRFT, causal", "% of the peak", "38.90"), ("isca_mfu", "MRFT, full", "% of the peak", "43.68"),
    ("inference_economics", "cost of the day", "dollars", "87,072"),
    ("inference_economics", "margin over cost", "%", "545"),
    ("inference_economics", "bound of a token, 400G InfiniBand", "ms", "14.76"),
    ("fp8_storage", "weights of the repository", "billion", "684.489845504"),
    ("v2_kv_cache", "V2 against DeepSeek 67B", "%", "-93.3"),
])
def test_the_figures_that_must_match(results, name, what, unit, printed):
    row = rows_of(results, name)[what, unit]
    assert f"{row['ours']:,.{row['digits']}f}" == printed


def test_each_leaves_three_files_that_say_how_they_were_made(results):
    assert {path.name for path in results.iterdir()} == {
        f"{name}.{kind}" for name in OFF for kind in ("json", "md", "png")}
    assert [name for name in runner.names() if "analytic" in runner.scales(runner.load(name))] == [*OFF]
    for name in OFF:
        found = json.loads((results / f"{name}.json").read_text())
        assert {"command", "commit", "machine", "seeds"} <= found["made"]["analytic"].keys()
        page = (results / f"{name}.md").read_text()
        assert f"![{found['title']}]({name}.png)" in page and f"--table={name} --scale=analytic" in page
        assert all(note in page for note in found["notes"])
        assert (results / f"{name}.png").read_bytes().startswith(PNG)


def test_another_scale_leaves_the_first_as_it_stands(results, tmp_path):
    (tmp_path / "isca_kv_cache.json").write_text((results / "isca_kv_cache.json").read_text())
    rows = [runner.Row("a model trained here", "KB", 2.0, 2.5, 1)]
    made = {"command": "c", "commit": "d", "machine": "e", "jax": "f", "seeds": [0, 1]}
    runner.write("isca_kv_cache", "cpu", rows, made, tmp_path)
    found = json.loads((tmp_path / "isca_kv_cache.json").read_text())
    assert found["rows"]["analytic"] == list(rows_of(results, "isca_kv_cache").values())
    assert found["rows"]["cpu"][0]["difference"] == "+0.50 (+25.00%)"
    page = (tmp_path / "isca_kv_cache.md").read_text()
    assert page.index("## analytic") < page.index("## cpu") and "seeds 0, 1" in page and "70.272" in page


def test_what_does_not_differ_is_not_written_again(results, tmp_path):
    """Not even by another commit; a figure, a note or a missing picture does it."""
    for kind in ("json", "md", "png"):
        (tmp_path / f"isca_mfu.{kind}").write_bytes((results / f"isca_mfu.{kind}").read_bytes())
    rows = runner.load("isca_mfu").SCALES["analytic"]()
    made = runner.provenance("c") | {"commit": "another"}

    def write(rows):
        times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        runner.write("isca_mfu", "analytic", rows, made, tmp_path)
        return {path.suffix for path in tmp_path.iterdir() if path.stat().st_mtime_ns != times.get(path)}

    assert write(rows) == set()
    (tmp_path / "isca_mfu.png").unlink()
    assert write(rows) == {".json", ".md", ".png"}
    assert "another" not in (tmp_path / "isca_mfu.md").read_text()
    assert write([*rows, runner.Row("one more", "KB", 1, 1)]) == {".json", ".md", ".png"}
    assert "another" in (tmp_path / "isca_mfu.md").read_text()


def test_a_damaged_file_is_named_and_left(tmp_path):
    (tmp_path / "isca_mfu.json").write_text("{")
    with pytest.raises(RequestError, match="isca_mfu.json is not JSON"):
        runner.write("isca_mfu", "analytic", [], {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["isca_mfu.json"]


@pytest.mark.parametrize("words, said", [
    (("--table=v3_costs",), "--table='v3_costs' is no table (did you mean v3_cost?)"),
    (("--table=v3_cost", "--scale=gpu"), "--scale=gpu: v3_cost has analytic"),
    (("--table=v3_mtp",), "--scale=analytic: v3_mtp has cpu, gpu"),
    (("--table=v3_mtp", "--scale=gpu"), "--scale=gpu: JAX runs on cpu here"),
    (("--table=v3_mtp", "--scale=cpu", "--sizes=nano"), "--sizes=nano: cpu has micro, mini"),
    (("--table=v3_mtp", "--scale=cpu", "--seeds=0,0"), "--seeds='0,0' must be different whole numbers"),
    (("--table=v3_mtp", "--scale=cpu", "--seeds=a"), "--seeds='a' must be different whole numbers"),
    (("--table=v3_mtp", "--scale=cpu", "--config.training.step=3"), "config.training.step=3 is not a field"),
    (("--table=v3_mtp", "--scale=cpu", "--config.training.steps=0"), "config.training.steps=0"),
    (("--table=v3_cost", "--seeds=1"), "--scale=analytic trains nothing"),
    (("--table=v3_cost", "--scale=tpu"), "analytic|cpu|gpu"),
    (("--table=v3_cost", f"--folder={__file__}/results"), "/results' is not a folder that can be written"),
    (("--table=v3_cost", "--folder="), "--folder='' is not a folder that can be written"),
    (("v3_cost",), "'v3_cost' is not a flag"),
])
def test_wrong_requests_are_one_line(capsys, words, said):
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_without_matplotlib_nothing_is_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("--table=v3_cost", f"--folder={tmp_path}/results") == 2
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_a_name_the_tables_are_listed(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == runner.names()
    assert set(OFF) < set(runner.names())


def test_scales_are_those_of_the_released_tensors():
    """The checkpoint's shapes: 62 layers with the multi-token one, 3 of them dense, 257 experts in the others."""
    attention = 12 * 56 + 192 * 12 + 5 * 56 + 256 * 4 + 56 * 128
    assert fp8_storage.stored(runner.published("deepseek_v3"))["scales"] == \
        62 * attention + 3 * 3 * 144 * 56 + 59 * 257 * 3 * 16 * 56


def test_a_cluster_by_hand(results):
    """V3's own mesh: bytes and products of 30,720 tokens a GPU, each through all layers; and which meshes fit."""
    rows = {row["what"]: row for row in json.loads((results / "v3_cluster.json").read_text())["rows"]["analytic"]}
    name = "2,048 GPUs: pipeline 16 x expert 64 x data 2"
    tokens = 15360 * 4096 / 2048
    most = tokens * 58 * 4 * 7168 * 2 * (1 + 1 / 32 + 2)
    sent = most * 3.963 * 7 / 8 / 4  # of 4 nodes, its own among them for one token of 8 (test_exchange.py)
    assert rows[f"{name}, sent at most"]["ours"] == pytest.approx(most / 1e9)
    assert rows[f"{name}, sent"]["ours"] == pytest.approx(sent / 1e9, rel=2e-3)
    assert rows[f"{name}, sending"]["ours"] == pytest.approx(sent / 50e9, rel=2e-3)
    products = tokens * (30.70e9 / 989e12 + 219.11e9 / 1978e12)
    assert rows[f"{name}, products"]["ours"] == pytest.approx(products, rel=1e-3)
    idle = 7 * (3 + 2 - 3) / (120 * 3)  # Table 2's formula for DualPipe
    assert rows[f"{name}, step with that"]["ours"] == pytest.approx(sent / 50e9 * (1 + idle), rel=2e-3)
    assert rows[f"{name}, bound of a step"]["ours"] == pytest.approx(products * (1 + idle), rel=1e-3)
    assert [row["how"] for row in rows.values() if row["unit"] == "GB a GPU"] == [
        "fits; training here refuses this mesh", *2 * ("does not fit into 80 GB; training here refuses this mesh",),
        "fits; training here takes this mesh"]


def test_redundant_experts_by_hand(results):
    """An expert's 3 matrices in each of 58 layers, a byte a weight, a scale for 128 x 128; and what copies are for."""
    rows = {row["what"]: row["ours"] for row in rows_of(results, "v3_redundant_experts").values()}
    expert = 58 * 3 * 7168 * 2048 * (1 + 4 / 128**2) / 1e9
    assert rows["prefill: experts of a GPU"] == pytest.approx(8 * expert)
    assert rows["prefill: with a redundant one"] == pytest.approx(9 * expert)
    assert rows["as they lie"] > rows["0 redundant"] > rows["32 redundant, within 4 nodes"] > rows["32 redundant"] >= 1
