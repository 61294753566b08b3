"""`python -m research.account`: the contract's names and digits, what is read at a glance, what is refused."""

import json

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


def test_an_account_without_terms_has_no_prices(capsys):
    found = json.loads(run(capsys, NANO, "--format=json")[1])
    assert found["gpu_hours"] is found["dollars"] is found["dollars_per_million_tokens"] is None
    assert found["memory_per_device"]["activations"] > found["memory_per_device"]["weights"]


def test_r1s_student_trains_on_one_h200_as_its_page_says(capsys):
    code, out, _ = run(capsys, "--config=experiments/r1_distill_qwen_1_5b.py", "--gpu=H200", "--format=json")
    assert code == 0 and json.loads(out)["memory_per_device"]["total"] == pytest.approx(94.8e9, abs=0.05e9)


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
