"""What the notebooks compute, and that their sliders compute it anew."""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import plots
from research.studies import cost, fp8, notebook, routing, tables
from research.training.step import loss_of
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def small():
    """Layers of experts alone, so that their chain is the whole backward pass."""
    s = tiny.settings({"mtp.num_nextn_predict_layers": 0, "model.balance_loss": "none"})
    return s, *tiny.model(s), tiny.batch()


def test_the_chain_of_layers_is_the_model(small):
    """Its states end where the model does; its gradients, layer by layer, are those of the whole loss."""
    s, model, variables, batch = small
    chain = fp8.Chain(model, s, variables, batch, "float32")
    states = chain.states()
    total = batch["mask_BT"].sum()
    whole = jax.jit(jax.grad(lambda params: loss_of(
        {"params": params, "amax": {}}, variables["routing"], batch, total, 1, 0.0, model, s)[0]))(variables["params"])
    dy = chain.top(states[-1])
    assert chain.length == len(states) - 1 == 2
    for number in (1, 0):
        y, d_params, dy = chain.pass_through(number, states[number], dy)
        np.testing.assert_allclose(y, states[number + 1], rtol=1e-5, atol=1e-6)
        exact = jax.tree.map(lambda leaf, at=number: leaf[at:at + 1], whole["layers"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), d_params, exact)


def test_errors_are_those_of_the_bits(small):
    s, model, variables, batch = small
    found = fp8.errors_of(model, s, variables, batch, ("bfloat16",))
    own = np.array(found["bfloat16"]["own"])
    assert own.shape == (2, 3) and np.all((own > 2**-10) & (own < 2**-5))
    assert len(found["bfloat16"]["carried"]) == 3


def test_a_distance_by_hand():
    assert fp8.distance(np.array([3.0, 4.0]), np.array([0.0, 0.0]), np.array([0.0, 5.0])) == 1.0
    assert fp8.distance({"a": [1.0], "b": [0.0]}, {"a": [4.0], "b": [4.0]}) == pytest.approx(5 / 32**0.5)


def axes_of(draw, panels: int):
    """The curves that are drawn: {label: (x, y)} of each axes."""
    found = []

    def drawing(axes):
        draw(axes)
        found.extend({line.get_label(): tuple(np.asarray(z) for z in line.get_data()) for line in panel.lines}
                     for panel in axes)

    assert plots.png(drawing, panels).startswith(b"\x89PNG")
    return found


def lines_of(losses, split="train", name="next_token_loss"):
    return [{"step": step, "split": split, name: value} for step, value in enumerate(losses, start=1)]


def test_losses_are_drawn_beside_the_baselines():
    runs = {"bfloat16": lines_of([4.0, 2.0]), "fp8": lines_of([4.4, 2.0])}
    curves, relative = axes_of(lambda axes: fp8.draw_losses(axes, runs, "bfloat16"), 2)
    assert set(curves) == {"bfloat16", "fp8"} and "bfloat16" not in relative
    np.testing.assert_allclose(relative["fp8"][1], [10, 100 * (3.2 / 3 - 1)])  # means of the steps so far


def test_runs_are_drawn_with_what_was_held_out():
    run = lines_of([2.0, 1.0], name="load_violation") + lines_of([6.0, 5.0], "validation", "loss")
    violation, held = axes_of(lambda axes: routing.draw_runs(axes, {"bias": run, "nothing": run}), 2)
    np.testing.assert_allclose(violation["bias"][1], [2, 1.5])
    np.testing.assert_allclose(held["nothing"][1], [6, 5])  # no means of evaluations


def test_figures_of_results_are_the_arms_and_no_differences():
    rows = tables.rows(str(ROOT / "results"), "v3_balance")
    labels = []

    def draw(axes):
        routing.draw_figures(axes[0], rows, "MaxVio")
        labels.extend(tick.get_text() for tick in axes[0].get_yticklabels())

    plots.png(draw)
    assert "micro: bias" in labels and not [label for label in labels if " less " in label]
    said = routing.said(rows, "MaxVio").splitlines()
    assert said and all(" less " in line for line in said)


SAID = ("dollars_an_hour", "experts")  # move no picture, of hours: experts that are not chosen cost none


class Sliders(ModuleType):
    """Stands in for ipywidgets, which the tests' environment lacks: keeps what `interact` is given."""

    SelectionSlider = SimpleNamespace

    def interact(self, picture, **sliders):
        self.picture, self.sliders = picture, sliders
        picture(**{name: slider.value for name, slider in sliders.items()})


def cells_with_sliders():
    for path in sorted((ROOT / "colabs").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code" and "notebook.explore(" in "".join(cell["source"]):
                yield pytest.param("".join(cell["source"]), id=f"{path.stem}-{cell['id']}")


def test_notebooks_with_sliders():
    assert sorted(param.id.split("-")[0] for param in cells_with_sliders()) == ["cost", "cost", "fp8", "routing"]


@pytest.mark.parametrize("source", list(cells_with_sliders()))
def test_sliders_compute_anew(source, monkeypatch):
    """The cell as it is committed: another place of any of its sliders is another picture, or said to be none."""
    sliders, shown = Sliders("ipywidgets"), []
    monkeypatch.delenv(notebook.STATIC, raising=False)
    monkeypatch.setitem(sys.modules, "ipywidgets", sliders)
    monkeypatch.setattr(notebook, "show", lambda draw, panels=1, height=3.2: shown.append(
        plots.png(draw, panels, height)))
    affinity_LXE = jax.nn.sigmoid(jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 16)) + np.arange(16) / 4))
    exec(source, {"notebook": notebook, "routing": routing, "cost": cost, "fp8": fp8, "LAYER": 0,
                  "routed": {"nothing": SimpleNamespace(affinity_LXE=np.asarray(affinity_LXE, np.float32))}})

    def at(**places):
        shown.clear()
        with redirect_stdout(io.StringIO()) as text:
            sliders.picture(**({name: slider.value for name, slider in sliders.sliders.items()} | places))
        return text.getvalue(), *shown

    start = at()
    assert len(start) > 1 and start == at()
    for name, slider in sliders.sliders.items():
        moved = at(**{name: slider.options[0]})
        assert slider.value in slider.options and moved != start, name
        assert name in SAID or moved[1:] != start[1:], name


def test_without_anybody_to_move_them_three_places_are_shown(monkeypatch, capsys):
    monkeypatch.setenv(notebook.STATIC, "1")
    notebook.explore(lambda a, b: print(a * b), a=[1, 2, 3, 4, 5], b=[10, 20, 30])
    assert capsys.readouterr().out.splitlines() == [
        "a = 1, b = 20", "20", "a = 3, b = 20", "60", "a = 5, b = 20", "100"]


def test_a_run_is_watched_while_it_trains(monkeypatch, tmp_path, capsys):
    """The picture is drawn anew, in the same place, for every look at what the run has written so far."""
    lines, seen = lines_of([3.0, 2.0, 1.0]), []

    class Run:
        returncode = 0

        def __init__(self, command, **_):
            assert command[1:4] == ["-m", "research.main", "--config=experiments/nano.py"]
            self.written = 0

        def poll(self):
            folder = tmp_path / "run"
            folder.mkdir(exist_ok=True)
            with (folder / "metrics.jsonl").open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines[self.written:self.written + 1])
            self.written += 1
            return 0 if self.written > len(lines) else None

        def terminate(self): ...

        wait = terminate

    monkeypatch.setattr(notebook, "SECONDS", 0)
    monkeypatch.setattr(notebook.subprocess, "Popen", Run)
    monkeypatch.setattr(notebook, "show_in_place", lambda shown, *picture: seen.append(
        (shown, axes_of(*picture)[0]["next token"][1].tolist())) or len(seen))
    found = notebook.train("experiments/nano.py", str(tmp_path / "run"), {"training.steps": 3}, notebook.run_so_far)
    assert seen == [(None, [3.0]), (1, [3.0, 2.0]), (2, [3.0, 2.0, 1.0])] and found == lines
    assert "--config.training.steps=3" in capsys.readouterr().out
