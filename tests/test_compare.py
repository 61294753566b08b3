"""The table of runs beside a baseline: what it computes, and what it refuses."""

import json

import pytest

from research import compare
from research.errors import RequestError


def run(folder, name: str, train: list[float], validation: float | None):
    (folder / name).mkdir()
    lines = [{"step": i, "split": "train", "loss": loss} for i, loss in enumerate(train, 1)]
    if validation is not None:
        lines.append({"step": len(train), "split": "validation", "loss": validation})
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_distances_are_relative_and_of_the_same_seed(tmp_path):
    for seed, base in ((0, 2.0), (1, 4.0)):
        run(tmp_path, f"bfloat16-{seed}", [base] * 4, base)
        run(tmp_path, f"fp8_tensor-{seed}", [9.0, base, base * 1.01, base * 0.99], base * (1.02 if seed else 0.99))
    arm, base = (compare.losses(tmp_path / name) for name in ("fp8_tensor-0", "bfloat16-0"))
    assert base == (2.0, [2.0] * 4)
    smooth = [9.0, 0.9 * 9 + 0.1 * 2, 0.9 * 8.3 + 0.1 * 2.02, 0.9 * 7.672 + 0.1 * 1.98]
    assert arm[1] == pytest.approx(smooth)
    assert compare.distances(arm, base) == pytest.approx((-0.01, (smooth[2] / 2 + smooth[3] / 2) / 2 - 1))
    rows = compare.table(tmp_path, "bfloat16").splitlines()
    assert rows[2].startswith("| bfloat16 | 0 1 | 3.0000 (2.0000 to 4.0000) |")
    assert "| fp8_tensor | 0 1 | 3.0300 (1.9800 to 4.0800) | +0.50% (-1.00% to +2.00%) |" in rows[3]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(RequestError, match="there are no runs"):
        compare.table(tmp_path, "bfloat16")
    run(tmp_path, "bfloat16-0", [2.0, 2.0], 2.0)
    run(tmp_path, "mxfp8-1", [2.0, 2.0], 2.0)
    with pytest.raises(RequestError, match="mxfp8-1: no bfloat16-1"):
        compare.table(tmp_path, "bfloat16")
    run(tmp_path, "bfloat16-1", [2.0], 2.0)
    with pytest.raises(RequestError, match="no bfloat16-1 of as many steps"):
        compare.table(tmp_path, "bfloat16")
    run(tmp_path, "bfloat16-2", [2.0], None)
    with pytest.raises(RequestError, match="bfloat16-2: its metrics.jsonl has no training or no validation loss"):
        compare.table(tmp_path, "bfloat16")
