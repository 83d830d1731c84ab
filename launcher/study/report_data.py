"""The report of a study for programs: a row for each run as CSV, and everything as JSON."""

import csv
import io
import json
from typing import Any

from halfstep.launcher.study import tables
from halfstep.launcher.study.conclusions import Summary
from halfstep.launcher.study.sections import Report, Section, answer, answer_of
from halfstep.launcher.system.files import csv_cell

_LEADING = ("zero", "precision", "seed", "status", "reason", "proved")
_MEASURED = (
    "loss", "eval_loss", "perplexity", "tokens_per_second", "mfu", "step_seconds", "step_seconds_low",
    "step_seconds_high", "peak_memory_bytes", "predicted_memory_bytes", "predicted_step_seconds", "skipped_steps",
    "loss_scale", "wall_seconds", "devices", "tokens", "load", "checksum",
)  # fmt: skip


def as_csv(report: Report) -> str:
    """Return a row for each cell and seed."""
    text = io.StringIO()
    axes = [axis for axis in report.about["axes"] if axis not in _LEADING]
    out = csv.writer(text, lineterminator="\n")
    tasks = list(dict.fromkeys(name for result in report.results for name in result.tasks))
    out.writerow(map(csv_cell, [*_LEADING, *axes, *_MEASURED, *tasks, "unproved_because", "run"]))
    for result in report.results:
        leading = [result.zero, result.precision, result.seed, result.status, result.reason, _truth(result.proved)]
        measured = [getattr(result, name) for name in _MEASURED] + [result.tasks.get(name) for name in tasks]
        run = "" if result.run is None else str(result.run.relative_to(report.folder))
        why = "" if result.proved else result.unproved_because
        out.writerow(map(csv_cell, [*leading, *(result.values[axis] for axis in axes), *measured, why, run]))
    return text.getvalue()


def as_json(report: Report) -> str:
    """Return the answer, the cells and the runs as JSON."""
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
        | ({"tasks": result.tasks} if result.tasks else {})
        | {
            "run": None if result.run is None else str(result.run.relative_to(report.folder)),
            "command": tables.command(result),
        }
        for result in report.results
    ]
    sections = [_section_as_json(report, section) for section in report.sections]
    tree = {
        "study": report.about["name"],
        **(sections[0] if len(sections) == 1 else {"answer": answer(report), "sections": sections}),
        "runs": runs,
        "unexplained": [condition.name for condition in report.conditions.unexplained],
    }
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _section_as_json(report: Report, section: Section) -> dict[str, Any]:
    verdict = section.verdict

    def cell(summary: Summary) -> dict[str, Any]:
        kept = {name: value for name, value in vars(summary).items() if name != "results"}
        about = {"done": summary.done, "proved": summary.proved, "usable": summary in verdict.usable}
        return {**kept, "name": summary.name, **about}

    chosen = {name: getattr(verdict, name) for name in ("best", "fastest", "smallest", "cheapest")}
    return {
        **({"title": section.title} if section.title else {}),
        "answer": answer_of(report, section),
        "reference": verdict.reference.values,
        **{name: summary and summary.name for name, summary in chosen.items()},
        "frontier": [summary.name for summary in verdict.frontier],
        "cells": [cell(summary) for summary in verdict.cells],
        **({"tasks": [vars(judgement) for judgement in section.judgements]} if section.judgements else {}),
    }


def _truth(value: bool | None) -> str:
    return "" if value is None else str(value).lower()
