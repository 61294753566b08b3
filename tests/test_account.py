"""`python -m research.account`: the contract's names and digits, what is read at a glance, what is refused."""

import json
import re

import pytest

from research import account
from research.accounting import cost
from tests.commands import exit_code
from tests.training import runs

V3 = "--config=experiments/deepseek_v3.py"
LLAMA = "--config=experiments/llama_3_1.py:405b"
NANO = "--config=experiments/nano.py:smoke"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(runs.ROOT)


def run(capsys, *words: str) -> tuple[int, str, str]:
    return exit_code(account, *words), *capsys.readouterr()


@pytest.fixture
def light(monkeypatch):
    """Without the trace of what is kept, 10 s of DeepSeek-V3's account."""
    monkeypatch.setattr("research.accounting.memory._kept_and_copies", lambda settings, rows, gpu: (10**9, 10**9))


def test_deepseek_v3_to_the_digits_of_the_contract(capsys, light):
    code, out, _ = run(capsys, V3, "--format=json", "--gpu=H800", "--tokens_per_second=1541.7028", "--price_per_hour=2",
                       "--tokens=14.8e12")
    found = json.loads(out)
    assert code == 0
    assert found["parameters"]["total"] == sum(found["parameters"]["by_part"].values()) == 671_026_419_200
    assert found["parameters"]["active"] == 37_552_297_472 and found["parameters"]["mtp"] == 11_610_068_224
    assert found["kv_bytes_per_token"] == 70272 and isinstance(found["kv_bytes_per_token"], int)
    assert {"training_causal", "training_full", "executed"} <= found["flops_per_token"].keys()
    assert {"weights", "gradients", "master", "moments", "activations", "buffers"} <= found["memory_per_device"].keys()
    assert round(found["mfu"], 4) == 0.3894
    assert round(found["gpu_hours"] / 1e3, 1) == 2666.6 and found["dollars"] == 2 * found["gpu_hours"]
    assert found["days"] == found["gpu_hours"] / 24
    assert any("36.7B" in note for note in found["notes"]) and any("11.5B" in note for note in found["notes"])


def test_speed_follows_from_utilisation_and_price_from_speed(capsys, light):
    code, out, _ = run(capsys, V3, "--format=json", "--gpu=H800", "--mfu=0.3894", "--tokens_per_second=1850",
                       "--price_per_hour=2", "--tokens=1e12")
    found = json.loads(out)
    assert code == 0 and found["tokens_per_second"] == pytest.approx(0.3894 * 989e12 / 249_811_304_448)
    assert found["dollars"] == pytest.approx(2 * 1e12 / found["tokens_per_second"] / 3600)
    assert found["dollars_per_million_tokens"] == pytest.approx(2 / 3600 / 1850 * 1e6)


def test_text_is_read_at_a_glance(capsys, light):
    code, out, _ = run(capsys, LLAMA, "--gpu=H100", "--mfu=0.4", "--price_per_hour=2.5")
    assert code == 0 and max(map(len, out.splitlines())) <= 125
    for words in (("total", "405,853,388,800"), ("training, causal", "2,473.22 GFLOP"), ("cache", "516,096 bytes"),
                  ("utilisation", "40.00%"), ("prints 2448",), ("quarter",), ("7.28",)):
        assert any(all(word in line for word in words) for line in out.splitlines()), words


def test_of_kernels_that_do_not_run_here_nothing_is_said(monkeypatch):
    """E5M6 is written by plain XLA on a GPU: there a run says so, on a CPU an account of it does not."""
    from kernels import choice

    lines = []
    monkeypatch.setattr(choice, "say_once", lines.append)
    with choice.meant_for_h200():
        for backend in ("cpu", "gpu"):
            monkeypatch.setattr("jax.default_backend", lambda backend=backend: backend)
            assert choice.choose("quantize", "auto", "they write E4M3, not E5M6") == "xla"
            assert len(lines) == (backend == "gpu")


@pytest.mark.parametrize("tokens, said", [
    ("14.8e12", "14.8T"), ("8.62e9", "8.62B"), ("5e6", "5M"), ("51200", "51,200")])
def test_tokens_are_said_in_a_unit_that_fits(capsys, monkeypatch, tokens, said):
    monkeypatch.setattr("research.accounting.memory.of_device", lambda settings, gpu: {"total": 10**6})
    out = run(capsys, NANO, "--tokens_per_second=1000", f"--tokens={tokens}")[1]
    assert f"\ntraining {said} tokens\n" in out


def test_notes_name_the_length_of_their_figures():
    """Such as hold at any T have no GFLOP in them."""
    from research.accounting.published import NOTES

    of_flops = [note for _, notes in NOTES.values() for note in notes if "GFLOP" in note]
    assert len(of_flops) == 3 and all("T = 4,096" in note for note in of_flops)


def test_the_active_weights_of_v3s_multi_token_module_are_those_of_its_note(capsys, light):
    """By the account: the module's own but for 248 of 256 experts, and embedding and head."""
    found = json.loads(run(capsys, V3, "--format=json")[1])
    parts, projection = found["parameters"]["by_part"], 2 * 7168**2
    idle = parts["routed experts"] // 58 * 248 // 256
    active = found["parameters"]["mtp"] - idle + parts["embedding"] + parts["head"]
    (note,) = (note for note in found["notes"] if note.startswith("multi-token module"))
    for number in (active, active - projection):
        assert f"{number / 1e9:.2f}B" in note
    assert "2.4B active" in note


def test_what_v3_sends_is_said_on_average_and_at_most(capsys, light):
    out = run(capsys, V3)[1]
    assert re.search(r"8\.7\d\d MB +to 3\.47 other nodes on average, to 4 at most \(10\.082\)", out)
    assert re.search(r"11\.6\d\d MB +to 4\.63 other nodes on average, to 7 at most \(17\.643\)", out)


def test_a_mesh_that_training_refuses_is_counted_and_said(capsys, light):
    """The 58 layers with experts have two halves and no sixteenths."""
    fields = ["--gpu=H800", "--config.mesh.expert=64", "--config.training.accumulation_steps=120",
              "--config.training.batch_ramp_start=0", "--config.evaluation.batch_size=1024"]
    refused, taken = (run(capsys, V3, *fields, f"--config.mesh.{stages}")[1] for stages in (
        "pipeline=16", "pipeline=2"))
    line = "  training refuses this mesh: config.mesh.pipeline=16 does not divide the 58 layers with experts; "
    assert any(found.startswith(line) for found in refused.splitlines()) and "refuses" not in taken


def test_an_account_without_terms_has_no_prices(capsys):
    found = json.loads(run(capsys, NANO, "--format=json")[1])
    assert found["gpu_hours"] is found["dollars"] is found["dollars_per_million_tokens"] is None
    assert found["memory_per_device"]["activations"] > found["memory_per_device"]["weights"]


def test_r1s_student_trains_on_one_h200_as_its_page_says(capsys):
    code, out, _ = run(capsys, "--config=experiments/r1_distill_qwen_1_5b.py", "--gpu=H200", "--format=json")
    assert code == 0 and json.loads(out)["memory_per_device"]["total"] == pytest.approx(101.9e9, abs=0.05e9)


@pytest.mark.parametrize("words, said", [
    ((), "--config is missing"),
    (("--config=experiments/deepseek_v33.py",), "does not exist (did you mean experiments/deepseek_v3.py?)"),
    (("--config=experiments/distill.py",), "the config is one of research.distill, of a teacher and a student"),
    ((NANO, "--gpu=H8000"), "--gpu='H8000' is none of H20, H100, H200, H800 (did you mean H800?)"),
    ((NANO, "--gpu=H800", "--mfu=1.2"), "--mfu=1.2 must be above 0 and at most 1"),
    ((NANO, "--gpu=H800", "--mfu=nan"), "--mfu=nan must be above 0"),
    ((NANO, "--mfu=0.4"), "--mfu=0.4 needs --gpu"),
    ((NANO, "--tokens_per_second=10", "--price_per_hour=-2"), "--price_per_hour=-2 must be at least 0"),
    ((NANO, "--price_per_hour=2"), "--price_per_hour=2 needs a speed"),
    ((NANO, "--tokens_per_second=0"), "--tokens_per_second=0 must be above 0"),
    ((NANO, "--tokens=many"), "many"),
    ((NANO, "--format=xml"), "format"),
    ((NANO, "--config.mesh.data=0"), "config.mesh.data=0 must be at least 1"),
    ((NANO, "--config.mesh.data=3"), "config.training.batch_size=8 must be a multiple of 3"),
    ((NANO, "--config.mesh.expert=8", "--config.model.n_routed_experts=12"), "config.mesh.expert=8 does not divide"),
    (("--config=experiments/llama_3_1.py", "--config.mesh.expert=2"), "config.mesh.expert=2 must be 1"),
    ((NANO, "--config.mesh.pipeline=9"), "config.mesh.pipeline=9 must be at most"),
])
def test_wrong_requests_are_one_line(capsys, words, said):
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err


def test_decoding_reads_more_experts_with_more_rows():
    from research.accounting.request import settings_of

    s = settings_of("experiments/deepseek_v3.py", ())
    of = [cost.decode_intensity(s, 70272, batch) for batch in (1, 32, 4096)]
    assert of == sorted(of)
    active = 2 * (35_591_487_488 + 58 * 256 * 7168 + 926_679_040)  # bytes of the weights that one token meets
    assert of[0] == pytest.approx(142_841_085_952 / (active + 4096 * 70272), rel=1e-3)
