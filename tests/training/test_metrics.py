"""What a run says of itself: whole lines, one for every step, whatever ended the process before."""

import io
import json
import logging
import sys
import time

import pytest
from tensorboardX.proto.event_pb2 import Event

from research.training import metrics
from research.training.metrics import Clock, MetricsLog, Progress, read_lines


def train_line(step: int) -> dict:
    return {"step": step, "split": "train", "loss": 0.1 * step, "mtp_loss": [1.5, 2.5]}


def written(workdir, *lines, after: int = 0) -> None:
    log = MetricsLog(workdir, after)
    for line in lines:
        log.write(line)
    log.close()


def events(workdir) -> list[Event]:
    """What the files of TensorBoard hold, in order: records of length, checksum, content, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_lines_are_cut_back_to_the_checkpoint(tmp_path):
    validation = {"step": 2, "split": "validation", "loss": 3.0}
    written(tmp_path, train_line(1), train_line(2), validation, train_line(3))
    log = MetricsLog(tmp_path, 2)
    assert read_lines(tmp_path / "metrics.jsonl") == [train_line(1), train_line(2), validation]
    assert log.validated == {2: 3.0}
    log.write(train_line(3))
    log.sync()
    log.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3]


@pytest.mark.parametrize("tail", [b'{"step": 3, "spl', b"\0\0\0\0", b"\xff\n", b"null\n", b'{"step": "3"}\n', b"[1]\n"])
def test_a_torn_line_is_dropped(tail, tmp_path):
    written(tmp_path, train_line(1), train_line(2))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    written(tmp_path, train_line(3), after=2)
    assert list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())) == [
        train_line(1), train_line(2), train_line(3)]


def test_nothing_changes_where_nothing_is_cut(tmp_path):
    written(tmp_path, train_line(1), train_line(2))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    written(tmp_path, after=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_has_every_scalar_and_forgets_what_is_done_again(tmp_path):
    written(tmp_path, train_line(1), train_line(2))
    written(tmp_path, train_line(2) | {"expert_load": [[0.5, 1.5]]}, after=1)
    found = events(tmp_path)
    assert [event.file_version for event in found if event.file_version] == ["brain.Event:2"] * 2
    assert [event.step for event in found if event.HasField("session_log")] == [1, 2]  # purged from there on
    scalars = [(event.step, {v.tag: v.simple_value for v in event.summary.value}) for event in found
               if event.HasField("summary")]
    assert [step for step, _ in scalars] == [1, 2, 2]
    assert scalars[0][1] == pytest.approx({"train/loss": 0.1, "train/mtp_loss/1": 1.5, "train/mtp_loss/2": 2.5})


def test_a_full_disk_is_an_error_of_the_line_and_not_of_the_end(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        log.write(train_line(1))
    log.close()


def test_the_clock_goes_on_where_it_was():
    clock = Clock({"train": 5.0})
    with pytest.raises(KeyError), clock.phase("save"):
        time.sleep(0.01)
        raise KeyError
    assert clock.seconds["train"] == 5.0 and clock.seconds["save"] >= 0.01
    assert set(clock.seconds) == set(metrics.PHASES)


def test_without_a_terminal_a_line_every_half_minute(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, "absl"):
        progress = Progress(100, 10)
        for step in range(11, 51):
            now[0] += 2
            progress.update(step, "loss 1")
        progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "step 26 of 100: loss 1, 02:28 left", "step 41 of 100: loss 1, 01:58 left"]


def test_on_a_terminal_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(20, 18)
    progress.update(19, "loss 1.5")
    progress.update(20, "loss 1.25")
    progress.close()
    assert "20/20" in sys.stderr.getvalue() and "loss 1.25" in sys.stderr.getvalue()
