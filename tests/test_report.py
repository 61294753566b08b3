"""`python -m research.report`: what the page of a run shows and escapes, at every state a run may be in."""

import html.parser
import json
import re

import pytest

from experiments import base, nano
from research import config, report
from research.files import write_whole
from research.reporting import figures, run
from research.training.checkpoint import Checkpoints
from research.training.metrics import MetricsLog
from research.training.samples import fenced
from tests.commands import exit_code

HOSTILE = "</pre><script>alert('1')</script>&amp;<img src=x onerror=alert(1)>\n```\n\x1b[0m\ttab \"quoted\" \u202e\n"
TAGS = {"p", "strong", "h1", "h2", "h3", "pre", "dl", "div", "dt", "dd", "section", "header", "main", "figure",
        "figcaption", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "html", "head", "body", "meta",
        "title", "style", "svg", "defs", "g", "path", "use", "clippath", "rect", "text", "pattern"}
TITLES = ("Loss", "Bits per byte, held out", "Multi-token accuracy, held out, the text before given",
          "Load of experts: MaxVio", "Training speed", "Gradient norm, before clipping", "Learning rate",
          "Load of experts by layer", "Load of each expert", "Where the time went")


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and the text of each element."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append((tag, []))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        opened, parts = self.open.pop()
        assert opened == tag
        self.texts.append((tag, "".join(parts)))

    def handle_data(self, data):
        for _, parts in self.open:
            parts.append(data)

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def line(step: int) -> dict:
    return {"step": step, "split": "train", "loss": 8 - step / 10, "next_token_loss": 6 - step / 10,
            "mtp_loss": [5.5 - step / 10], "grad_norm": 2.0, "learning_rate": 1e-3, "load_violation": 1.5,
            "load_violation_by_layer": [1.0, 2.0], "mtp_load_violation": [0.5], "tokens": 512 * step,
            "tokens_per_second": 1000.0 * step, "mfu": 0.25}


def workdir(path, steps: int = 4, whole: bool = True):
    """A run of four steps, `steps` of them done, as a run leaves it; whole: with all that comes at its end."""
    path.mkdir(parents=True)
    c = nano.get_config("smoke")
    c.training.steps = 4
    c.data.files = "<i>*.txt"
    write_whole(path / "config.json", config.check(c).to_json())
    log = MetricsLog(path, 0)
    for step in range(1, steps + 1):
        log.write(line(step))
    if whole:
        log.write({"step": steps, "split": "validation", "loss": 3.8728, "bits_per_byte": 5.587,
                   "mtp_accuracy": [0.28], "expert_load": [[1.0, 1.0], [0.005, 1.995]],
                   "mtp_expert_load": [[0.8, 1.2]]})
        (path / "samples.md").write_text(f"# Samples\n\n## <b>a.py\n\nGiven:\n\n{fenced(HOSTILE)}\nWritten:\n\n"
                                         + fenced("x < y"))
        (path / "environment.json").write_text(json.dumps({"device": "<u>cpu", "packages": {"jax": "0.11.2"}}))
        checkpoints = Checkpoints(path / "checkpoints", 1, 0)
        seconds = {"compile": 3.0, "train": 6.0, "data": 0.0, "evaluate": 1.0, "save": 0.0}
        checkpoints.save(steps, {"weight": 1.0}, {"seconds": seconds})
        checkpoints.close()
    log.close()
    return path


def make(*words: str) -> int:
    return exit_code(report, *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = workdir(tmp_path_factory.mktemp("report") / "<em>a&b\"'")
    (path / "report.html").write_text("an old page")
    assert make(f"--workdir={path}") == 0
    assert not list(path.glob(".*part"))
    return path


@pytest.fixture(scope="module")
def page(finished):
    return Page((finished / "report.html").read_text())


def test_everything_of_the_run_is_on_the_page(page):
    assert tuple(page.of("strong")) == TITLES and len(page.of("svg")) == len(TITLES)
    facts = dict(zip(page.of("dt"), page.of("dd"), strict=True))
    assert facts == {
        "steps": "4 of 4", "tokens": "2,048", "bits a byte, held out": "5.587",
        "loss, held out, nats a token": "3.8728", "MaxVio, last step": "1.50", "multi-token accuracy by depth": "28.0%",
        "tokens a second, median step": "2,500", "model FLOPs utilisation, median step": "25.0%",
        "checkpoints at steps": "4"}
    notes = dict(zip(page.of("strong"), [p for p in page.of("p") if p.endswith(".")], strict=False))
    assert notes["Loss"] == "Last all parts = 7.6; next token = 5.6; multi-token, depth 1 = 5.1; " \
                            "next token, held out = 3.873."
    assert notes["Training speed"] == "Last 4,000, least 1,000, greatest 4,000."
    assert "Most uneven at the end: layer 2, MaxVio 2." in notes["Load of experts by layer"]
    assert notes["Load of each expert"] == ("Step 4, held-out text; 1 is the mean of a layer. Greatest 1.995: layer 2, "
                                            "expert 1. 1 of 6 experts below 0.01.")
    assert "compile 30%, train 60%, data 0%, evaluate 10%, save 0% of 10.0 s" in notes["Where the time went"]
    assert page.of("svg")[TITLES.index("Bits per byte, held out")].split().count("4") == 1  # a tick for one step
    changed, every, environment = page.of("tbody")
    assert "training.steps41000" in changed and "optimizer.beta1" in every and "optimizer.beta1" not in changed
    assert "packages.jax0.11.2" in environment


def test_what_comes_from_the_run_is_text(page):
    assert {tag for tag, _ in page.tags} == TAGS
    assert page.of("h1") == ["<em>a&b\"'"] == page.of("title")
    assert page.of("h3") == ["Samples", "<b>a.py"]
    assert page.of("pre") == ["\n" + HOSTILE.replace("\x1b", "\u241b"), "\nx < y"]  # the first newline is not shown
    assert "<i>*.txt" in page.of("td") and "<u>cpu" in page.of("td")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_the_page_needs_nothing_else(finished, page):
    found = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(found) == len(set(found)) > len(TITLES)
    source = (finished / "report.html").read_text()
    assert {*re.findall(r"url\(#(.*?)\)", source), *re.findall(r'href="#(.*?)"', source)} <= set(found)
    used = [value for _, attributes in page.tags for name, value in attributes.items()
            if name.endswith(("href", "src"))]
    assert used and all(value.startswith("#") for value in used)
    assert "@import" not in source and not re.findall(r"url\((?!#)", source)
    assert ("meta", {"http-equiv": "Content-Security-Policy",
                     "content": "default-src 'none'; style-src 'unsafe-inline'"}) in page.tags
    assert "#000000" not in source and "currentColor" in source and "prefers-color-scheme: dark" in source


def test_a_run_that_goes_on_is_shown_as_far_as_it_got(tmp_path, capsys):
    path = workdir(tmp_path / "run", steps=2, whole=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "spl')
    assert make(f"--workdir={path}") == 0
    shown = Page((path / "report.html").read_text())
    notices = capsys.readouterr().out.splitlines()[:-1]
    assert notices == [
        "Not finished: 2 of 4 steps are logged. It may still run; the same command makes this page anew.",
        "metrics.jsonl is read up to its first damaged line: 1 of its 3 lines are left out.",
        "environment.json is missing or cannot be read."]
    assert all(notice in shown.of("p") for notice in notices) and any("samples.md is not" in p for p in shown.of("p"))
    assert shown.of("strong") == [title for title in TITLES if not re.search("held out|time|each expert", title)]

    whole = (path / "metrics.jsonl").read_text().rpartition("\n")[0]
    (path / "metrics.jsonl").write_text(whole + '\n{"step": 3, "split": "diverged"}\n')
    assert make(f"--workdir={path}") == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "Diverged: at step 3 of 4 the loss or its gradient was no number any more.")


def test_odd_values_and_files_are_left_out(tmp_path):
    path = workdir(tmp_path / "run", steps=0, whole=False)
    odd = {"step": 4, "split": "train", "loss": "<b>", "grad_norm": float("nan"), "tokens": True, "mfu": None,
           "mtp_loss": [None], "load_violation": 0.5, "load_violation_by_layer": [{}, 1]}
    (path / "metrics.jsonl").write_text(json.dumps(odd) + "\n" + json.dumps(odd | {"step": 5}) + "\n")
    (path / "environment.json").write_text("[]")
    (path / "samples.md").write_bytes(b"```\n\xff\x00 never closed")
    for name, content in (("7", "{"), ("8", '{"seconds": {"train": "fast"}}'), ("9", '{"seconds": 3}')):
        (path / "checkpoints" / name / "record").mkdir(parents=True)
        (path / "checkpoints" / name / "manifest.json").touch()
        (path / "checkpoints" / name / "record" / "metadata").write_text(content)
    fields = json.loads((path / "config.json").read_text())
    fields["model"] = {"of_an_older_version": "\ud800"}
    (path / "config.json").write_text(json.dumps(fields))
    assert make(f"--workdir={path}") == 0
    shown = Page((path / "report.html").read_text())
    assert shown.of("strong") == ["Load of experts: MaxVio"] and shown.of("pre") == ["\n\ufffd\u2400 never closed"]
    assert "model.of_an_older_version" in shown.of("td") and "All steps are logged" in " ".join(shown.of("p"))


def pipeline(path):
    (path / "config.json").write_text(json.dumps(base.get_distillation_config().to_dict()))
    for name in ("distilled", "base"):
        (path / name).mkdir()
        (path / name / "metrics.jsonl").touch()


@pytest.mark.parametrize("change, said", [
    (None, "is not a directory"),
    (lambda path: (path / "config.json").unlink(), "is not the workdir of a run"),
    (lambda path: (path / "config.json").write_text("{"), "is not a configuration in JSON"),
    (lambda path: (path / "config.json").write_text("[]"), "is not a configuration in JSON"),
    (lambda path: (path / "config.json").write_text("{}"), "config.training.steps=None must be a whole number"),
    (pipeline, "is a folder of research.distill, whose stage `evaluate` writes report.md; the models in it have pages "
     "of their own: base, distilled"),
    (lambda path: (path / "metrics.jsonl").unlink(), "holds no whole line"),
    (lambda path: (path / "metrics.jsonl").write_text(""), "holds no whole line"),
    (lambda path: (path / "metrics.jsonl").write_text('{"step'), "holds no whole line"),
])
def test_wrong_requests_are_one_line_and_leave_the_old_page(tmp_path, capsys, change, said):
    path = workdir(tmp_path / "run", steps=1, whole=False) if change else tmp_path / "none"
    if change:
        change(path)
        (path / "report.html").write_text("an old page")
    assert make(f"--workdir={path}") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err and str(path) in err
    assert not change or (path / "report.html").read_text() == "an old page"


def test_a_page_that_cannot_be_written_leaves_the_old_one(finished, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    old = (finished / "report.html").read_text()
    (finished / "samples.md").write_text("other")
    monkeypatch.setattr("os.replace", refuse)
    assert make(f"--workdir={finished}") == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert (finished / "report.html").read_text() == old and not list(finished.glob(".*part"))


@pytest.mark.parametrize("words, said", [
    ((), "--workdir is required"), (("--workdir=",), "--workdir is required"),
    (("--folder=x",), "--folder is not a flag"),
])
def test_wrong_flags_are_one_line(capsys, words, said):
    assert make(*words) == 2
    assert said in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_without_matplotlib_the_page_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert make(f"--workdir={tmp_path}") == 2
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 1, figures.POINTS, figures.POINTS + 1, 1000])
def test_windows_hold_every_step_once(count):
    steps, values = list(range(1, count + 1)), [float(i * i) for i in range(count)]
    ends, mean, low, high = figures.windows(steps, values)
    assert len(ends) == len(mean) == len(low) == len(high) <= figures.POINTS
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert sum(sizes) == count
    assert sum(m * size for m, size in zip(mean, sizes, strict=True)) == pytest.approx(sum(values))
    if count:
        assert (ends[-1], low[0], high[-1]) == (count, 0, values[-1])
        assert all(a <= m <= b for a, m, b in zip(low, mean, high, strict=True))


def test_columns_hold_finite_numbers_of_their_own_steps():
    lines = [{"step": 1, "x": 2, "y": [1.0]}, {"step": 2, "x": True}, {"step": 3, "x": float("inf"), "y": [1.0, 5]},
             {"step": 4, "x": 10**400}]
    assert run.column(lines, "x") == ([1], [2.0]) and run.column(lines, "y", 1) == ([3], [5.0])
    rows = {"even": [[1, 2.0], [3, 4]], "ragged": [[1, 2], [3]], "text": [["1"]], "empty": [[]], "flat": [1],
            "none": None}
    assert run.table(rows, "even") == [[1.0, 2.0], [3.0, 4.0]]
    assert not any(run.table(rows, name) for name in ("ragged", "text", "empty", "flat", "none", "absent"))
    assert run.depth(lines, "y") == 2 and run.depth(lines, "x") == 0
