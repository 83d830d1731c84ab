"""What a study came to: one comparison, or one for each value of an axis within which cells are compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.launcher.study import run_status, study_folder, tables
from halfstep.launcher.study.collect import Result, results
from halfstep.launcher.study.conclusions import Verdict, judge
from halfstep.launcher.study.conditions import Conditions, conditions
from halfstep.launcher.study.grid import references
from halfstep.launcher.study.task_table import Judgement, judgements


@dataclass(frozen=True, kw_only=True)
class Section:
    """Cells that are compared with one reference: all, or those with one value of the axis `within`."""

    title: str
    """That value; empty where there is one section."""
    results: list[Result]
    verdict: Verdict
    judgements: list[Judgement]
    """Of the tasks that the runs were judged by."""
    conditions: Conditions


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is written, worked out once."""

    about: dict[str, Any]
    """The study, as study.json has it."""
    folder: Path
    results: list[Result]
    sections: list[Section]
    conditions: Conditions
    """Over all sections."""
    price: float | None


def make(where: Path, price: float | None = None) -> Report:
    """Read a study's folder; `price` of a device-hour wins over the study file's."""
    tree = study_folder.read(where)
    about = tree["study"]
    collected = results(tree, where, run_status.queue(where, tree["cells"]))
    within, sections = about.get("within"), []
    for title, reference in references(about["reference"], within, [result.values for result in collected]).items():
        own = [result for result in collected if within is None or result.values[within] == title]
        seen = conditions(own, about["axes"])
        about_tasks = judgements(own, reference)
        sections.append(
            Section(title=title, results=own, verdict=judge(own, reference), judgements=about_tasks, conditions=seen)
        )
    return Report(
        about=about,
        folder=where,
        results=collected,
        sections=sections,
        conditions=conditions(collected, about["axes"]),
        price=about.get("price") if price is None else price,
    )


def answer(report: Report) -> list[str]:
    """Return the answer in three sentences, of each section."""
    return [sentence for section in report.sections for sentence in answer_of(report, section)]


def answer_of(report: Report, section: Section) -> list[str]:
    sentences = tables.answer(section.verdict, report.price, report.about["currency"])
    return [f"{section.title}: {sentences[0]}", *sentences[1:]] if section.title else sentences
