"""The report of a study: report.html, report.md, results.csv and results.json, from its run directories alone."""

import re
import shlex
import warnings as python_warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from halfstep.launcher.errors import HalfstepError, printable
from halfstep.launcher.metrics import numerics_history, plots
from halfstep.launcher.study import charts, tables, task_table
from halfstep.launcher.study.conclusions import Verdict
from halfstep.launcher.study.conditions import Conditions
from halfstep.launcher.study.report_data import as_csv, as_json
from halfstep.launcher.study.sections import Report, Section, answer
from halfstep.launcher.study.study_file import READY
from halfstep.launcher.system.files import cannot_write, write_atomic

_CAPTIONS = {
    "Loss, and its difference to the reference": "Above, the mean over the seeds. Below, less the reference, over the "
    "seeds that both have.",
    "Loss scale and skipped steps": "The first seed of each cell; lines that would hide others stand a little apart.",
    "Throughput and peak memory": "Medians over steps and seeds.",
    "Speed against memory": "Up and to the left is better.",
}
_MOST_MAPS = 4


def write(report: Report) -> list[Path]:
    """Write the four files, and the pictures that report.md shows; return what a person opens first."""
    where = report.folder
    pictures = _pictures(report)
    with cannot_write(where):
        for title, picture in pictures.items():
            write_atomic(where / _file_of(title), picture)
        write_atomic(where / "report.html", html(report, pictures))
        write_atomic(where / "report.md", markdown(report, pictures))
        write_atomic(where / "results.csv", as_csv(report))
        write_atomic(where / "results.json", as_json(report))
    return [where / name for name in ("report.html", "report.md", "results.csv", "results.json")]


def _pictures(report: Report) -> dict[str, str]:
    drawn = {}
    for section in report.sections:
        for title, picture in {**charts.draw(section.verdict), **_maps(section)}.items():
            drawn[f"{section.title}: {title}" if section.title else title] = picture
    return drawn


def html(report: Report, pictures: dict[str, str]) -> str:
    """Return the page: whole in itself, no script, nothing from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=True
    )
    return environment.get_template("report.html.j2").render(
        quality=tables.QUALITY,
        price=tables.PRICE,
        notes=tables.NOTES,
        task_columns=task_table.COLUMNS,
        task_note=task_table.NOTE,
        recommended=all(section.verdict.best is not None for section in report.sections),
        pictures=[(title, picture, _caption(title)) for title, picture in pictures.items()],
        **_parts(report),
    )


def _parts(report: Report) -> dict[str, Any]:
    seen, about, count = report.conditions, report.about, len({result.name for result in report.results})
    return {
        "title": f"Study {about['name']}",
        "subtitle": _subtitle(report),
        "answer": answer(report),
        "warnings": _said_of_sections(report, tables.warnings),
        "sections": [
            (section.title, tables.rows(section.verdict, report.price, about["currency"]))
            for section in report.sections
        ],
        "judged": [
            (section.title, task_table.rows(section.judgements)) for section in report.sections if section.judgements
        ],
        "failures": [result for result in report.results if not result.done],
        "equality": _said_of_sections(report, tables.equality),
        "confounders": [tables.condition(condition, count) for condition in seen.confounders],
        "differences": [tables.condition(condition, count) for condition in seen.differences],
        "machines": _machines(seen),
        "again": again(report),
        "commands": [(f"{result.name}, seed {result.seed}", tables.command(result)) for result in report.results],
    }


def _said_of_sections(report: Report, say: Callable[[Verdict, Conditions], list[str]]) -> list[str]:
    """Return sentences about each section; what is said of all is said once, the rest with the section's name."""
    said = {section.title: say(section.verdict, section.conditions) for section in report.sections}
    shared = [sentence for sentence in next(iter(said.values())) if all(sentence in own for own in said.values())]
    own = [f"{title}: {sentence}" for title, own in said.items() for sentence in own if sentence not in shared]
    return [*shared, *own]


def markdown(report: Report, pictures: dict[str, str]) -> str:
    """Return the same as Markdown, with the pictures in files beside it."""
    parts = _parts(report)
    lines = [f"# {parts['title']}", "", parts["subtitle"], "", *[f"**{sentence}**" for sentence in parts["answer"]], ""]
    lines += [line for sentence in parts["warnings"] for line in (f"> {sentence}", "")]
    for title, rows in parts["sections"]:
        before = f"{_plain(title)}: quality" if title else "Quality"
        lines += [f"## {before}, cell by cell", "", *_table(tables.QUALITY, [row.quality for row in rows]), ""]
        before = f"{_plain(title)}: speed" if title else "Speed"
        lines += [f"## {before}, memory and cost", "", *_table(tables.PRICE, [row.price for row in rows]), ""]
    for title, rows in parts["judged"]:
        lines += [f"## {f'{_plain(title)}: tasks' if title else 'Tasks'}, cell by cell", ""]
        lines += [*_table(task_table.COLUMNS, rows), ""]
    notes = (*tables.NOTES, task_table.NOTE) if parts["judged"] else tables.NOTES
    lines += [line for note in notes for line in (note, "")]
    if parts["failures"]:
        failed = [(result.name, str(result.seed), result.status, result.reason) for result in parts["failures"]]
        lines += [
            "## What did not run to its end, and why",
            "",
            *_table(("cell", "seed", "status", "reason"), failed),
            "",
        ]
    for title in pictures:
        lines += [f"## {_plain(title)}", "", f"![{_plain(title)}]({_file_of(title)})", "", _caption(title), ""]
    lines += ["## Were the conditions equal?", "", *[line for sentence in parts["equality"] for line in (sentence, "")]]
    for title, key in (("confounder", "confounders"), ("key in which cells differ", "differences")):
        listed = [(condition["name"], condition["text"], condition["why"]) for condition in parts[key]]
        lines += [*_table((title, "value", "follows from"), listed), ""]
    lines += ["## On what it ran", "", *[f"- {machine}" for machine in parts["machines"]], ""]
    lines += ["## To do it again", "", "```console", f"$ {parts['again']}", "```", ""]
    commands = [f"$ {command}" for _, command in parts["commands"]]
    lines += ["Each run by itself:", "", "```console", *commands, "```", ""]
    return "\n".join(printable(line, keep="\t") for line in lines)


def again(report: Report) -> str:
    """Return the command that runs the whole study."""
    about = report.about
    source = about["name"] if Path(about["source"]).parent == READY else about["source"]
    return shlex.join(["halfstep", "study", "run", source, *about.get("words", []), "--out", str(report.folder)])


def _subtitle(report: Report) -> str:
    axes = "; ".join(
        f"{axis.removesuffix('.name')}: {', '.join(labels)}" for axis, labels in report.about["axes"].items()
    )
    plans = [result.plan for result in report.results if result.plan]
    what = f"{plans[0]['model']['name']}, {_steps(plans)} steps; " if plans else ""
    reference = ", ".join(section.verdict.reference.name for section in report.sections)
    return f"{what}{axes}; seeds {', '.join(map(str, report.about['seeds']))}. Reference: {reference}."


def _steps(plans: Sequence[dict[str, Any]]) -> str:
    every = sorted({plan["steps"] for plan in plans})
    return f"{every[0]:,}" if len(every) == 1 else f"{every[0]:,} to {every[-1]:,}"


def _machines(seen: Conditions) -> list[str]:
    versions = ", ".join(f"{name} {' and '.join(seen_versions)}" for name, seen_versions in seen.versions.items())
    lines = [*seen.machines, versions]
    return [
        line
        for line in [*lines, *(f"Halfstep's code: {revision}" for revision in seen.revisions if revision != "None")]
        if line
    ]


def _maps(section: Section) -> dict[str, str]:
    """Return what fp16 loses of each layer, for the first cells that have recorded it."""
    maps: dict[str, str] = {}
    with_readings = [cell for cell in section.verdict.cells if cell.results[0].has_gradients and cell.results[0].run]
    for cell in with_readings[:_MOST_MAPS]:
        run = cell.results[0].run
        assert run is not None, "chosen because it has one"
        try:
            read = numerics_history.read(run)
        except HalfstepError:
            continue
        with python_warnings.catch_warnings():
            python_warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
            maps[f"Gradients that fp16 loses: {cell.name}"] = charts.svg(plots.draw(read))
    return maps


def _caption(title: str) -> str:
    """Return what stands under a picture; a section's name may stand before its title."""
    known = (caption for known, caption in _CAPTIONS.items() if title.endswith(known))
    return next(known, "The first seed; layer by step, without and with the loss scale.")


def _file_of(title: str) -> str:
    return "report-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") + ".svg"


def _table(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(map(_plain, cells)) + " |"

    return [line(columns), "|" + "---|" * len(columns), *map(line, lines)]


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
