"""The report of a study: report.html, report.md, results.csv and results.json, from its run directories alone."""

import csv
import io
import json
import re
import shlex
import warnings as python_warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from halfstep.launcher.errors import HalfstepError, printable
from halfstep.launcher.metrics import numerics_history, plots
from halfstep.launcher.study import charts, run_status, study_folder, tables
from halfstep.launcher.study.collect import Result, results
from halfstep.launcher.study.conclusions import Summary, Verdict, judge
from halfstep.launcher.study.conditions import Conditions, conditions
from halfstep.launcher.study.study_file import READY
from halfstep.launcher.system.files import cannot_write, csv_cell, write_atomic

_LEADING = ("zero", "precision", "seed", "status", "reason", "proved")
_MEASURED = (
    "loss", "eval_loss", "perplexity", "tokens_per_second", "mfu", "step_seconds", "step_seconds_low",
    "step_seconds_high", "peak_memory_bytes", "predicted_memory_bytes", "predicted_step_seconds", "skipped_steps",
    "loss_scale", "wall_seconds", "devices", "tokens", "load", "checksum",
)  # fmt: skip
_CAPTIONS = {
    "Loss, and its difference to the reference": "Above, the mean over the seeds. Below, less the reference, over the "
    "seeds that both have.",
    "Loss scale and skipped steps": "The first seed of each cell; lines that would hide others stand a little apart.",
    "Throughput and peak memory": "Medians over steps and seeds.",
    "Speed against memory": "Up and to the left is better.",
}
_MOST_MAPS = 4


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is written, worked out once."""

    about: dict[str, Any]
    """The study, as study.json has it."""
    folder: Path
    results: list[Result]
    verdict: Verdict
    conditions: Conditions
    price: float | None


def make(where: Path, price: float | None = None) -> Report:
    """Read a study's folder; `price` of a device-hour wins over the study file's."""
    tree = study_folder.read(where)
    about = tree["study"]
    collected = results(tree, where, run_status.queue(where, tree["cells"]))
    verdict = judge(collected, about["reference"])
    seen = conditions(collected, about["axes"])
    return Report(
        about=about,
        folder=where,
        results=collected,
        verdict=verdict,
        conditions=seen,
        price=about["price"] if price is None else price,
    )


def write(report: Report) -> list[Path]:
    """Write the four files, and the pictures that report.md shows; return what a person opens first."""
    where = report.folder
    pictures = {**charts.draw(report.verdict), **_maps(report)}
    with cannot_write(where):
        for title, picture in pictures.items():
            write_atomic(where / _file_of(title), picture)
        write_atomic(where / "report.html", html(report, pictures))
        write_atomic(where / "report.md", markdown(report, pictures))
        write_atomic(where / "results.csv", as_csv(report))
        write_atomic(where / "results.json", as_json(report))
    return [where / name for name in ("report.html", "report.md", "results.csv", "results.json")]


def answer(report: Report) -> list[str]:
    """Return the answer in three sentences."""
    return tables.answer(report.verdict, report.price, report.about["currency"])


def html(report: Report, pictures: dict[str, str]) -> str:
    """Return the page: whole in itself, no script, nothing from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=True
    )
    return environment.get_template("report.html.j2").render(
        quality=tables.QUALITY,
        price=tables.PRICE,
        notes=tables.NOTES,
        recommended=report.verdict.best is not None,
        pictures=[(title, picture, _caption(title)) for title, picture in pictures.items()],
        **_parts(report),
    )


def _parts(report: Report) -> dict[str, Any]:
    verdict, seen, about = report.verdict, report.conditions, report.about
    return {
        "title": f"Study {about['name']}",
        "subtitle": _subtitle(report),
        "answer": answer(report),
        "warnings": tables.warnings(verdict, seen),
        "rows": tables.rows(verdict, report.price, about["currency"]),
        "failures": [result for result in report.results if not result.done],
        "equality": tables.equality(verdict, seen),
        "confounders": [tables.condition(condition, len(verdict.cells)) for condition in seen.confounders],
        "differences": [tables.condition(condition, len(verdict.cells)) for condition in seen.differences],
        "machines": _machines(seen),
        "again": again(report),
        "commands": [(f"{result.name}, seed {result.seed}", tables.command(result)) for result in report.results],
    }


def markdown(report: Report, pictures: dict[str, str]) -> str:
    """Return the same as Markdown, with the pictures in files beside it."""
    parts = _parts(report)
    lines = [f"# {parts['title']}", "", parts["subtitle"], "", *[f"**{sentence}**" for sentence in parts["answer"]], ""]
    lines += [line for sentence in parts["warnings"] for line in (f"> {sentence}", "")]
    lines += ["## Quality, cell by cell", "", *_table(tables.QUALITY, [row.quality for row in parts["rows"]]), ""]
    lines += ["## Speed, memory and cost", "", *_table(tables.PRICE, [row.price for row in parts["rows"]]), ""]
    lines += [line for note in tables.NOTES for line in (note, "")]
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


def as_csv(report: Report) -> str:
    """Return a row for each cell and seed."""
    text = io.StringIO()
    axes = [axis for axis in report.about["axes"] if axis not in _LEADING]
    out = csv.writer(text, lineterminator="\n")
    out.writerow(map(csv_cell, [*_LEADING, *axes, *_MEASURED, "unproved_because", "run"]))
    for result in report.results:
        leading = [result.zero, result.precision, result.seed, result.status, result.reason, _truth(result.proved)]
        measured = [getattr(result, name) for name in _MEASURED]
        run = "" if result.run is None else str(result.run.relative_to(report.folder))
        why = "" if result.proved else result.unproved_because
        out.writerow(map(csv_cell, [*leading, *(result.values[axis] for axis in axes), *measured, why, run]))
    return text.getvalue()


def as_json(report: Report) -> str:
    """Return the answer, the cells and the runs as JSON."""
    verdict = report.verdict

    def cell(summary: Summary) -> dict[str, Any]:
        skipped = ("results",)
        kept = {name: value for name, value in vars(summary).items() if name not in skipped}
        return {
            **kept,
            "name": summary.name,
            "done": summary.done,
            "proved": summary.proved,
            "usable": summary in verdict.usable,
        }

    named = {
        key: chosen and chosen.name
        for key, chosen in {
            "best": verdict.best,
            "fastest": verdict.fastest,
            "smallest": verdict.smallest,
            "cheapest": verdict.cheapest,
        }.items()
    }
    runs = [
        {
            "values": result.values,
            "seed": result.seed,
            "status": result.status,
            "reason": result.reason,
            "proved": result.proved,
            "unproved_because": "" if result.proved else result.unproved_because,
        }
        | {name: getattr(result, name) for name in _MEASURED}
        | {
            "run": None if result.run is None else str(result.run.relative_to(report.folder)),
            "command": tables.command(result),
        }
        for result in report.results
    ]
    tree = {
        "study": report.about["name"],
        "answer": answer(report),
        "reference": report.about["reference"],
        **named,
        "frontier": [summary.name for summary in verdict.frontier],
        "cells": [cell(summary) for summary in verdict.cells],
        "runs": runs,
        "unexplained": [condition.name for condition in report.conditions.unexplained],
    }
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


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
    what = f"{plans[0]['model']['name']}, {plans[0]['steps']:,} steps; " if plans else ""
    return (
        f"{what}{axes}; seeds {', '.join(map(str, report.about['seeds']))}. Reference: {report.verdict.reference.name}."
    )


def _machines(seen: Conditions) -> list[str]:
    versions = ", ".join(f"{name} {' and '.join(seen_versions)}" for name, seen_versions in seen.versions.items())
    lines = [*seen.machines, versions]
    return [
        line
        for line in [*lines, *(f"Halfstep's code: {revision}" for revision in seen.revisions if revision != "None")]
        if line
    ]


def _maps(report: Report) -> dict[str, str]:
    """Return what fp16 loses of each layer, for the first cells that have recorded it."""
    maps: dict[str, str] = {}
    with_readings = [cell for cell in report.verdict.cells if cell.results[0].has_gradients and cell.results[0].run]
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
    return _CAPTIONS.get(title, "The first seed; layer by step, without and with the loss scale.")


def _file_of(title: str) -> str:
    return "report-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") + ".svg"


def _table(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(map(_plain, cells)) + " |"

    return [line(columns), "|" + "---|" * len(columns), *map(line, lines)]


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _truth(value: bool | None) -> str:
    return "" if value is None else str(value).lower()
