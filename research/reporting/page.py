"""One HTML page of a run that needs nothing else: no network, no script; what comes from the run is escaped."""

import html
import statistics
from pathlib import Path

from research.reporting.figures import figures
from research.reporting.run import Run, column, depth

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}  # as pictures
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(run: Run) -> str:
    """The whole document."""
    name = text(run.workdir.absolute().name)
    style = Path(__file__).with_name("page.css").read_text()
    return "\n".join([
        '<!DOCTYPE html>', '<html lang="en">', '<head>', '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{name}</title>", f"<style>\n{style}</style>", "</head>", "<body>",
        f"<header><h1>{name}</h1>", f"<p>{text(_about(run))}</p>",
        *(f'<p class="notice">{text(notice)}</p>' for notice in run.notices), "</header>",
        "<main>", _facts(run), *_section("Curves", _figures(run)), *_section("Samples", _samples(run)),
        *_section("Configuration", _configuration(run)), *_section("Environment", _environment(run)),
        "</main>", "</body>", "</html>", ""])


def text(value: object) -> str:
    """Anything of a run as text of the page: escaped, control characters visible, always encodable."""
    return html.escape(str(value).translate(CONTROLS).encode(errors="replace").decode())


def _about(run: Run) -> str:
    """What ran where, in a line; only what is known."""
    known = run.environment.get
    device = known("processor") if known("device") == "cpu cpu" else known("device")
    parts = (("recipe", run.fields.get("precision.recipe")), ("on", device), ("JAX", known("packages.jax")),
             ("commit", known("commit")))
    return ", ".join(f"{what} {value}" for what, value in parts if value)


def _section(title: str, content: str) -> list[str]:
    return [f"<section><h2>{title}</h2>", content, "</section>"]


def _facts(run: Run) -> str:
    """The figures that one looks for first."""
    facts = {"steps": f"{run.step:,} of {run.fields['training.steps']:,}"}
    if tokens := column(run.train, "tokens")[1]:
        facts["tokens"] = f"{tokens[-1]:,.0f}"
    for name, unit, lines, form in (
            ("bits_per_byte", "bits a byte, held out", run.validation, "{:.3f}"),
            ("loss", "loss, held out, nats a token", run.validation, "{:.4f}"),
            ("load_violation", "MaxVio, last step", run.train, "{:.2f}")):
        if values := column(lines, name)[1]:
            facts[unit] = form.format(values[-1])
    if found := [column(run.validation, "mtp_accuracy", k)[1] for k in range(depth(run.validation, "mtp_accuracy"))]:
        facts["multi-token accuracy by depth"] = ", ".join(f"{values[-1]:.1%}" for values in found if values)
    for name, unit, form in (("tokens_per_second", "tokens a second, median step", "{:,.0f}"),
                             ("mfu", "model FLOPs utilisation, median step", "{:.1%}")):
        if values := column(run.train, name)[1]:
            facts[unit] = form.format(statistics.median(values))
    if run.checkpoints:
        facts["checkpoints at steps"] = ", ".join(f"{step:,}" for step in run.checkpoints)
    return '<dl class="facts">' + "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items()) + "</dl>"


def _figures(run: Run) -> str:
    return '<div class="figures">' + "".join(
        f"<figure><figcaption><strong>{text(figure.title)}</strong></figcaption>{figure.svg}"
        f"<p>{text(figure.note)}</p></figure>" for figure in figures(run)) + (
            "</div>\n<p>A band is the range: over neighbouring steps where a curve has more than one a point, and over "
            "layers for MaxVio.</p>")


def _samples(run: Run) -> str:
    if not run.samples:
        return "<p>samples.md is not written yet: a run writes it when it has trained to the end.</p>"
    tags = {"heading": "h3", "paragraph": "p", "block": "pre"}  # a newline after <pre> is not part of it
    return "\n".join(f"<{tags[kind]}>" + "\n" * (kind == "block") + f"{text(content)}</{tags[kind]}>"
                     for kind, content in run.samples)


def _configuration(run: Run) -> str:
    changed = run.changed()
    rows = [(name, value, default) for name, (value, default) in changed.items()]
    every = [(name, value) for name, value in run.fields.items()]
    return (f"<p>{len(changed)} of {len(every)} fields are not as experiments/base.py has them:</p>"
            + _table(("field", "value", "default"), rows)
            + f"<details><summary>All {len(every)} fields</summary>{_table(('field', 'value'), every)}</details>")


def _environment(run: Run) -> str:
    return _table(("what", "value"), list(run.environment.items())) if run.environment else "<p>Not recorded.</p>"


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    def cells(row, tag):
        return "".join(f"<{tag}>{text(_shown(cell))}</{tag}>" for cell in row)

    return (f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>"
            + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows) + "</tbody></table>")


def _shown(value: object) -> str:
    """As JSON has it, but numbers in the fewest digits that tell them apart."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return {None: "none", "": "(empty)", True: "true", False: "false"}.get(value, value) \
        if isinstance(value, str | bool | None) else str(value)
