"""What a study's run directories come to: differences, bands, the answer, and the four files."""

import csv
import json
import re
import statistics
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fakes import studied

from halfstep.launcher.cli.main import main
from halfstep.launcher.rundir.lease import lease
from halfstep.launcher.study import report, report_data, run_status, sections
from halfstep.launcher.study.grid import Cell

HEAD = '[base]\nmodel = "gpt2-nano"\ndata = "{corpus}"\nsteps = 20\nsequence = 32\nbatch.global = 8\n'
GRID = '[axes]\nzero = [0, 1]\nprecision = ["fp32", "bf16"]\n[seeds]\nvalues = [0, 1, 2]\n'
WHOLE = HEAD + GRID + '[compare]\nreference = { zero = 1, precision = "fp32" }\n'
SEEDS = {0: 5.00, 1: 5.02, 2: 4.98}
"""The reference's losses: two standard deviations are 0.04."""


@pytest.fixture
def study(tmp_path: Path, corpus: Path) -> Callable[..., tuple[Path, list[Cell]]]:
    def start(text: str = WHOLE) -> tuple[Path, list[Cell]]:
        file = tmp_path / "mine.toml"
        file.write_text(text.replace("{corpus}", str(corpus)))
        where = tmp_path / "study"
        return where, studied.started(where, file)[1]

    return start


def finish_all(where: Path, cells: list[Cell], **special: dict[str, float]) -> None:
    for cell in cells:
        more = {"speed": 1000.0, "off": 0.0, **special.get(cell.folder.split("-s")[0].replace("-", "_"), {})}
        studied.finish(where, cell, SEEDS[cell.seed] + more.pop("off"), **more)


def verdicts(where: Path) -> dict[str, str]:
    return {cell.name: cell.verdict for cell in sections.make(where).sections[0].verdict.cells}


def test_identical_cells_are_identical_and_a_shift_beyond_the_noise_is_real(study) -> None:
    where, cells = study()
    finish_all(where, cells, zero0_fp32={"off": 0.0}, zero0_bf16={"off": 0.01})
    for cell in cells:  # the last cell differs by chance: the mean of its differences is within their noise
        if cell.name == "zero=1 precision=bf16":
            studied.finish(where, cell, SEEDS[cell.seed] + {0: 0.004, 1: -0.005, 2: 0.002}[cell.seed])
    assert verdicts(where) == {
        "zero=1 precision=fp32": "reference",
        "zero=0 precision=fp32": "identical",
        "zero=0 precision=bf16": "real",
        "zero=1 precision=bf16": "within noise",
    }


def test_the_numbers_are_those_worked_out_by_hand(study) -> None:
    where, cells = study()
    finish_all(where, cells, zero0_fp32={"off": 0.0}, zero1_bf16={"off": 0.0})
    off = {0: 0.010, 1: 0.014, 2: 0.012}
    for cell in cells:
        if cell.name == "zero=0 precision=bf16":
            studied.finish(where, cell, SEEDS[cell.seed] + off[cell.seed], speed=1500.0, memory=2e9)
    verdict = sections.make(where).sections[0].verdict
    (cell,) = [candidate for candidate in verdict.cells if candidate.name == "zero=0 precision=bf16"]
    assert verdict.reference.band == pytest.approx(2 * statistics.stdev(SEEDS.values()))
    assert cell.difference == pytest.approx(0.012)
    assert verdict.freedom == 2, "of the cells in bf16 one scatters, with three seeds"
    assert cell.noise == pytest.approx(4.303 * 0.002 / 3**0.5)
    assert (cell.verdict, verdict.best.name) == ("real", "zero=0 precision=bf16"), "worse, but within the seeds' band"
    assert cell.tokens_per_second == 1500.0
    assert verdict.frontier[0].name == "zero=0 precision=bf16"
    assert verdict.smallest.peak_memory_bytes == 1e9


def test_a_cell_that_is_worse_than_the_seeds_band_is_not_recommended(study) -> None:
    where, cells = study()
    finish_all(where, cells, zero0_bf16={"off": 0.05, "speed": 9000.0}, zero1_bf16={"off": 0.001, "speed": 2000.0})
    made = sections.make(where)
    assert made.sections[0].verdict.best.name == "zero=1 precision=bf16"
    assert sections.answer(made)[0].startswith(
        "Use zero=1 precision=bf16: at 2,000 tokens/s it is the fastest, 2.00 times (2.00 to 2.00)"
    )


def test_speeds_that_overlap_between_seeds_are_not_told_apart(study) -> None:
    where, cells = study()
    speeds = {"zero=0 precision=fp32": 1500.0, "zero=1 precision=bf16": 1530.0}
    for cell in cells:
        spread = {0: 1.0, 1: 1.04, 2: 0.97}[(cell.seed + len(cell.name) + cell.plan.zero) % 3]
        studied.finish(where, cell, SEEDS[cell.seed], speed=speeds.get(cell.name, 1000.0) * spread)
    made = sections.make(where)
    assert made.sections[0].verdict.best.name == "zero=1 precision=bf16"
    assert [candidate.name for candidate in made.sections[0].verdict.as_fast] == ["zero=0 precision=fp32"]
    assert "Its speed cannot be told from that of zero=0 precision=fp32." in sections.answer(made)[0]


def test_what_is_not_proved_is_flagged_and_left_out(study) -> None:
    where, cells = study()
    finish_all(
        where, cells, zero0_bf16={"speed": 9000.0, "proved": False}, zero0_fp32={"speed": 5000.0, "proved": None}
    )
    made = sections.make(where)
    assert {cell.name for cell in made.sections[0].verdict.usable} == {"zero=1 precision=fp32", "zero=1 precision=bf16"}
    page = report.html(made, {})
    assert "Not proved, and left out of the recommendation: " in page
    assert "zero=0 precision=bf16" in page.split("left out of the recommendation: ")[1].split("</div>")[0]
    assert "its repairs are off" in page


def test_what_the_gate_does_not_know_is_said_wherever_the_cell_is_shown(study) -> None:
    where, cells = study()
    finish_all(where, cells, zero0_bf16={"speed": 9000.0})
    unknown = "the parity gate does not know the model family mine"
    for cell in cells:
        if cell.name == "zero=0 precision=bf16":
            file = where / "runs" / cell.folder / "proof.json"
            file.write_text(json.dumps({"proved": None, "reason": unknown}))
    made = sections.make(where)
    rows = list(csv.DictReader(report_data.as_csv(made).splitlines()))
    named = {(row["zero"], row["precision"]): (row["proved"], row["unproved_because"]) for row in rows}
    assert named["0", "bf16"] == ("", unknown)
    assert set(named.values()) == {("", unknown), ("true", "")}
    tree = json.loads(report_data.as_json(made))
    assert {run["unproved_because"] for run in tree["runs"] if run["proved"] is None} == {unknown}
    assert tree["best"] != "zero=0 precision=bf16", "it is the fastest by far"
    sentence = f"Not proved, and left out of the recommendation: zero=0 precision=bf16 ({unknown})."
    assert sentence in report.html(made, {})
    assert sentence in report.markdown(made, {})
    (line,) = [line for line in report.markdown(made, {}).splitlines() if "| zero=0 precision=bf16 | 3/3 |" in line]
    assert line.endswith("| NOT PROVED |")


def test_cells_within_an_axis_have_a_reference_each_and_are_compared_with_no_other(study) -> None:
    where, cells = study(WHOLE + 'within = "zero"\n')
    for cell in cells:
        off = 2.0 * (cell.values["zero"] == "0") + 0.3 * (cell.name == "zero=0 precision=bf16")
        studied.finish(where, cell, SEEDS[cell.seed] + off)
    made = sections.make(where)
    assert [section.title for section in made.sections] == ["0", "1"]
    verdicts = {cell.name: cell.verdict for section in made.sections for cell in section.verdict.cells}
    assert verdicts == {
        "zero=0 precision=fp32": "reference",
        "zero=0 precision=bf16": "real",
        "zero=1 precision=fp32": "reference",
        "zero=1 precision=bf16": "identical",
    }
    tree = json.loads(report_data.as_json(made))
    assert [(each["title"], each["reference"]["zero"], len(each["cells"])) for each in tree["sections"]] == [
        ("0", "0", 2),
        ("1", "1", 2),
    ]
    assert len(tree["runs"]) == 12
    assert [sentence.split()[0] for sentence in tree["answer"]][::3] == ["0:", "1:"]
    report.write(made)
    page, text = (where / "report.html").read_text(), (where / "report.md").read_text()
    for title in ("0: quality, cell by cell", "1: speed, memory and cost", "1: Speed against memory"):
        assert title in page
        assert f"## {title}" in text
    assert text.count("Up and to the left is better.") == 2, "a caption for each section's picture"


def test_where_nothing_is_proved_nothing_is_recommended(study) -> None:
    where, cells = study()
    for cell in cells:
        studied.finish(where, cell, SEEDS[cell.seed], proved=None)
    tree = json.loads(report_data.as_json(sections.make(where)))
    assert [tree[name] for name in ("best", "fastest", "smallest", "cheapest", "frontier")] == [None] * 4 + [[]]
    assert tree["answer"] == ["No cell can be recommended: 4 not proved."]


def test_a_run_that_no_study_told_anything_stands_as_its_summary_says(study) -> None:
    where, cells = study()
    finish_all(where, cells)
    for cell in cells:
        (where / "runs" / cell.folder / "proof.json").unlink()
    first = where / "runs" / cells[0].folder / "summary.json"
    first.write_text(json.dumps({**json.loads(first.read_text()), "proved": True, "unproved_because": ""}))
    results = sections.make(where).results
    assert [result.proved for result in results].count(True) == 1
    assert {result.unproved_because for result in results if result.proved is None} == {"the parity gate was not asked"}


def test_failures_are_rows_with_their_reasons(study) -> None:
    where, cells = study('exclude = [{ zero = 1, precision = "bf16" }]\n' + WHOLE.replace("[0, 1]\n", "[0, 1, 2]\n"))
    finish_all(where, cells)
    causes = {
        0: (3, "out of host memory: DefaultCPUAllocator: can't allocate memory", "out of memory"),
        1: (76, "3 steps in a row had no finite loss", "diverged"),
        2: (124, "it took longer than the 9 s it was given", "timed out"),
    }
    for cell in cells:
        if cell.name == "zero=2 precision=fp32":
            studied.fail(where, cell, *causes[cell.seed][:2])
    made = sections.make(where)
    failed = {result.seed: result for result in made.results if result.status == "failed"}
    for seed, (_, cause, kind) in causes.items():
        assert failed[seed].reason == f"{kind}: {cause}"
    page = report.html(made, {})
    assert "out of host memory: DefaultCPUAllocator: can&#39;t allocate memory" in page
    rows = list(csv.DictReader(report_data.as_csv(made).splitlines()))
    assert len(rows) == len(cells)
    assert list(rows[0])[:6] == ["zero", "precision", "seed", "status", "reason", "proved"]
    assert {row["status"] for row in rows} == {"done", "failed"}


def test_a_run_whose_rows_were_edited_is_a_damaged_result_and_the_others_are_reported(study) -> None:
    where, cells = study()
    finish_all(where, cells)
    victim = where / "runs" / cells[0].folder / "metrics.jsonl"
    victim.write_text(victim.read_text().replace('"step_seconds": ', '"step_seconds": "soon", "was": ', 1))
    made = sections.make(where)
    (bad,) = [result for result in made.results if result.status == "failed"]
    assert bad.reason == "metrics.jsonl is damaged in line 1: step_seconds = 'soon' should be a valid number"
    assert sum(result.done for result in made.results) == len(cells) - 1
    (where / "runs" / cells[1].folder / "plan.json").write_text("{")
    assert sections.make(where).sections[0].verdict.reference.done


DAMAGE = [
    ("metrics.jsonl", lambda text: text + "5\n"),
    ("metrics.jsonl", lambda text: text.replace('"loss": ', '"loss": [], "was": ')),
    ("metrics.jsonl", lambda text: text.replace('"step": 20', '"step": 1e999')),
    ("metrics.jsonl", lambda text: "".join(text.splitlines(keepends=True)[:-1])),
    ("metrics.jsonl", lambda text: text.replace('"eval_loss": ', '"eval_loss": "x", "was": ')),
    ("plan.json", lambda text: text.replace('"deepspeed": {', '"deepspeed": 5, "was": {')),
    ("plan.json", lambda text: "[]"),
    ("plan.json", lambda text: text.replace('"memory": {', '"memory": "much", "was": {')),
    ("summary.json", lambda text: text.replace('"tokens_per_second": ', '"tokens_per_second": "fast", "was": ')),
    ("summary.json", lambda text: text.replace('"skipped_steps": 0', '"skipped_steps": NaN')),
    ("summary.json", lambda text: text.replace('"load_average": [', '"load_average": 3, "was": [')),
    ("events.jsonl", lambda text: text.replace('"aa"', "[1]")),
    ("proof.json", lambda text: text.replace("true", '"yes"')),
    ("proof.json", lambda text: "\0\1"),
    ("attempts/0001/env.json", lambda text: text.replace('"versions": {', '"versions": 7, "was": {')),
    ("attempts/0001/exit.json", lambda text: text.replace('"code": 0', '"code": "x"')),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_whatever_was_done_to_a_file_by_hand_the_report_is_written(
    study, name: str, damage: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    where, cells = study()
    finish_all(where, cells)
    victim = where / "runs" / cells[0].folder / name
    victim.write_text(damage(victim.read_text()))
    assert main(["study", "report", str(where)]) == 0, capsys.readouterr().err
    assert main(["study", "status", str(where)]) == 0, capsys.readouterr().err
    json.loads((where / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_how_a_run_ended_is_what_was_written_last(study) -> None:
    where, cells = study()
    run = studied.fail(where, cells[0], 137, "killed")
    row = {"run": f"runs/{cells[0].folder}", "refused": None}
    assert run_status.of(row, where).reason == "crashed (137): killed"
    refused = {"code": 2, "cause": "n2 has no data", "time": 2e9}
    (run / "refused.json").write_text(json.dumps(refused))
    assert run_status.of(row, where).reason == "request: n2 has no data"
    (run / "outcome.json").write_text(json.dumps({"code": 124, "cause": "slow", "time": 3e9}))
    assert run_status.of(row, where).reason == "timed out: slow"


def test_other_hardware_and_versions_are_said(study) -> None:
    where, cells = study()
    finish_all(where, cells)
    file = where / "runs" / cells[0].folder / "attempts/0001/env.json"
    file.write_text(file.read_text().replace("2.13.0", "1.0").replace("a processor", "another"))
    page = report.html(sections.make(where), {})
    assert "did not all run on the same torch: 1.0, 2.13.0" in page
    assert "did not all run on the same device: another, a processor" in page


def test_a_study_that_runs_is_left_alone_and_one_that_is_damaged_is_written_again(study, capsys) -> None:
    where, cells = study()
    finish_all(where, cells)
    file = where.parent / "mine.toml"
    before = (where / "study.json").read_text()
    with lease(where):
        assert main(["study", "run", str(file), "zero=1", "--out", str(where), "--no-gate"]) == 2
    assert "is in use by" in capsys.readouterr().err
    assert (where / "study.json").read_text() == before
    (where / "study.json").write_text("{")
    assert main(["study", "run", str(file), "--out", str(where), "--no-gate"]) == 0, capsys.readouterr().err
    assert "0 run, 0 of them failed; 12 had a result already" in capsys.readouterr().out


def test_one_seed_gives_no_noise_and_the_page_says_so(study) -> None:
    where, cells = study(WHOLE.replace("[0, 1, 2]", "[0]"))
    finish_all(where, cells, zero0_bf16={"off": 0.01})
    assert verdicts(where)["zero=0 precision=bf16"] == "not judged"
    assert "One seed: no noise is known" in report.html(sections.make(where), {})


def test_different_initial_weights_are_found(study) -> None:
    where, cells = study()
    finish_all(where, cells, zero0_bf16={"checksum": "bb"})
    seen = sections.make(where).conditions
    assert set(seen.weights.values()) == {("aa", "bb")} or set(seen.weights.values()) == {("bb", "aa")}
    assert "Initial weights differ where they should not" in report.html(sections.make(where), {})


def test_every_difference_between_configs_follows_from_an_axis(study) -> None:
    where, cells = study(WHOLE.replace("zero = [0, 1]", "zero = [0, 1, 3]"))
    finish_all(where, cells)
    seen = sections.make(where).conditions
    assert seen.unexplained == ()
    follows = {condition.name: condition.follows_from for condition in seen.differences}
    assert follows["zero_optimization.stage"] == "zero"
    assert follows["bf16.enabled"] == "precision"
    pinned = {condition.name: condition.pinned for condition in seen.confounders}
    for name in ("overlapped communication", "reduce bucket, elements", "gradient clipping"):
        assert pinned[name], name


def test_a_plan_that_was_changed_by_hand_is_no_result(study) -> None:
    where, cells = study()
    finish_all(where, cells)
    file = where / "runs" / cells[0].folder / "plan.json"
    tree = json.loads(file.read_text())
    tree["deepspeed"]["gradient_clipping"] = 7.0
    file.write_text(json.dumps(tree))
    (bad,) = [result for result in sections.make(where).results if result.status == "failed"]
    assert bad.reason == "plan.json was changed after it was written: its run id does not fit"


def test_tasks_are_columns_with_their_bands(study) -> None:
    where, cells = study()
    first = {0: 50.0, 1: 52.0, 2: 54.0}
    off = {"zero=0 precision=fp32": (0, 0, 0), "zero=0 precision=bf16": (6, 7, 8), "zero=1 precision=bf16": (-1, 0, 1)}
    for cell in cells:
        moved = off.get(cell.name, (0, 0, 0))[cell.seed]
        bleu, distinct = first[cell.seed] + moved, 0.5 if moved < 6 else None
        metrics = {"bleu": bleu, "perplexity": 100 - bleu, "distinct_1": distinct}
        before = {"words": {"bleu": 3.0, "perplexity": None}}
        studied.finish(where, cell, SEEDS[cell.seed], tasks={"words": metrics}, tasks_before=before)
    judged = {(row.name, row.cell): row for row in sections.make(where).sections[0].judgements}
    assert len(judged) == 3 * 4
    reference = judged["words.bleu", "zero=1 precision=fp32"]
    assert (reference.mean, reference.band, reference.verdict) == (52.0, 4.0, "reference")
    # Both bf16 cells scatter by 1 between seeds: t(0.975, 4) = 2.776, over the root of three seeds.
    better, noisy = (judged["words.bleu", f"zero={zero} precision=bf16"] for zero in (0, 1))
    assert (better.difference, noisy.difference) == (7.0, 0.0)
    assert [better.noise, noisy.noise] == pytest.approx([2.776 / 3**0.5] * 2)
    assert (better.before, better.gain, noisy.gain) == (3.0, 56.0, 49.0)
    # Gains scatter by 3 in both bf16 cells and by 2 in the others: t(0.975, 8) = 2.306.
    assert better.gain_noise == pytest.approx(2.306 * 6.5**0.5 / 3**0.5)
    assert judged["words.perplexity", better.cell].gain is None
    verdicts = {name: judged[f"words.{name}", better.cell].verdict for name in ("bleu", "perplexity", "distinct_1")}
    assert verdicts == {"bleu": "real, better", "perplexity": "real, better", "distinct_1": "not judged"}
    assert noisy.verdict == "within noise"
    assert judged["words.bleu", "zero=0 precision=fp32"].verdict == "identical"
    report.write(sections.make(where))
    table = list(csv.DictReader((where / "results.csv").read_text().splitlines()))
    assert [row["words.bleu"] for row in table] == [
        str(first[cell.seed] + off.get(cell.name, (0, 0, 0))[cell.seed]) for cell in cells
    ]
    tree = json.loads((where / "results.json").read_text())
    assert tree["runs"][0]["tasks"]["words.bleu"] == float(table[0]["words.bleu"])
    assert {row["verdict"] for row in tree["tasks"]} >= {"real, better", "identical", "within noise", "reference"}
    for page in ("report.md", "report.html"):
        assert "Tasks, cell by cell" in (where / page).read_text()
    figures = "3.0000 | 59.0000 | ±6.0000 | +56.0000 | ±3.3943 | +7.0000 | ±1.6027 | real, better"
    assert f"| words.bleu | zero=0 precision=bf16 | {figures} |" in (where / "report.md").read_text()


def test_the_four_files_stand_by_themselves(study) -> None:
    where, cells = study(WHOLE.replace('"bf16"]', '"bf16", "fp16"]') + "price = 2.0\n")
    finish_all(where, cells, zero1_bf16={"speed": 2000.0})
    report.write(sections.make(where))
    page = (where / "report.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)|(?<!xmlns)=\"https?://(?!www\.w3\.org|purl)", page), (
        "all in one file"
    )
    assert page.count("<svg") == 4
    Balanced().feed(page)
    text = (where / "report.md").read_text()
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (where / name).read_text().startswith("<svg")
    tree = json.loads((where / "results.json").read_text())
    assert tree["best"] == "zero=1 precision=bf16"
    assert len(tree["runs"]) == len(cells)
    assert all(run["command"].startswith("halfstep run model=gpt2-nano ") for run in tree["runs"])
    assert "USD" in tree["answer"][2]
    assert f"halfstep study run {where.parent / 'mine.toml'}" in text


def test_what_a_file_says_is_escaped(study) -> None:
    text = (
        WHOLE.replace('model = "gpt2-nano"', 'model = "gpt2-nano"')
        .replace(
            'precision = ["fp32", "bf16"]',
            'policy = [{ name = "<b>bold</b>", precision = "fp32" }, { name = "b", precision = "bf16" }]',
        )
        .replace('precision = "fp32" }\n', 'policy = "b" }\n')
    )
    where, cells = study(text)
    for cell in cells:
        studied.finish(where, cell, SEEDS[cell.seed])
    page = report.html(sections.make(where), {})
    assert "<b>bold</b>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page


def test_nothing_usable_is_said_with_its_reasons(study) -> None:
    where, cells = study()
    finish_all(where, cells[:2])
    made = sections.make(where)
    assert sections.answer(made) == ["No cell can be recommended: 4 not done."]
    report.write(made)


def test_report_and_status_are_verbs(study, capsys: pytest.CaptureFixture[str]) -> None:
    where, cells = study()
    finish_all(where, cells[:-1])
    assert main(["study", "report", str(where), "--price", "3"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert main(["study", "status", str(where)]) == 0
    shown = capsys.readouterr().out
    assert "11 done, 1 missing" in shown
    assert main(["study", "status", str(where), "--json"]) == 0
    assert {row["status"] for row in json.loads(capsys.readouterr().out)} == {"done", "missing"}
    assert main(["study", "report", str(where), "--price", "cheap"]) == 2
    assert "'cheap' is no price" in capsys.readouterr().err
    assert main(["study", "report", str(where.parent / "nothing")]) == 2
    assert "is no study that was started here" in capsys.readouterr().err
    (where / "study.json").write_text("{")
    assert main(["study", "report", str(where)]) == 2
    assert "study.json is damaged" in capsys.readouterr().err


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not the last one that was opened."""

    VOID = ("meta", "br", "hr", "img", "input", "link", "use", "path", "rect", "circle", "stop")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag


# --- what others wrote


EVIL = "\x1b[2J\x07\x9b31m"


def test_names_and_causes_are_shown_not_obeyed(written_study, capsys: pytest.CaptureFixture[str]) -> None:
    where, cells = written_study
    for cell in cells:
        studied.finish(where, cell, 4.0)
    run = studied.fail(where, cells[0], 1, f"it broke {EVIL}\nerror: all is well")
    assert main(["study", "status", str(where)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J\\x07\\u009b31m error: all is well" in out
    assert main(["study", "report", str(where)]) == 0
    out += capsys.readouterr().out
    assert not [letter for letter in out if (ord(letter) < 32 and letter != "\n") or 0x7F <= ord(letter) < 0xA0]
    page = (where / "report.md").read_text()
    assert not [letter for letter in page if (ord(letter) < 32 and letter != "\n") or 0x7F <= ord(letter) < 0xA0]
    assert run.is_dir()


def test_a_cell_of_the_table_is_no_formula(written_study) -> None:
    where, cells = written_study
    for cell in cells:
        studied.finish(where, cell, -0.5)
    proof = where / "runs" / cells[0].folder / "proof.json"
    proof.write_text(json.dumps({"proved": None, "refused": '=HYPERLINK("http://x")', "reason": ""}))
    rows = list(csv.DictReader(report_data.as_csv(sections.make(where)).splitlines()))
    reasons = {row["reason"] for row in rows}
    assert reasons == {'\'=HYPERLINK("http://x")', ""}
    assert {row["policy"] for row in rows} == {"'@SUM(1)", "'+1x"}
    assert {row["eval_loss"] for row in rows if row["status"] == "done"} == {"-0.5"}, "a number stays a number"


@pytest.fixture
def written_study(tmp_path: Path, corpus: Path) -> tuple[Path, list[Cell]]:
    file = tmp_path / "odd.toml"
    file.write_text(
        f'[base]\nmodel = "gpt2-nano"\ndata = "{corpus}"\nsteps = 6\n"batch.global" = 8\nsequence = 64\n'
        '[axes]\npolicy = [{ name = "@SUM(1)", zero = 1 }, { name = "+1x", zero = 2 }]\n[seeds]\nvalues = [0]\n'
    )
    _, cells = studied.started(tmp_path / "study", file)
    return tmp_path / "study", cells


STUDIES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda tree: tree["cells"][0].update(run="../../etc"), "lies outside of the study"),
    (lambda tree: tree["cells"][0].update(run="/etc/passwd"), "lies outside of the study"),
    (lambda tree: tree["cells"][0].update(run="runs/../.."), "no plain name"),
    (lambda tree: tree["cells"][0].update(run="runs/a\nb"), "no plain name"),
    (lambda tree: tree["cells"][0].update(seed="0"), "cells.0.seed = '0'"),
    (lambda tree: tree["cells"][0].update({"words": ["x", 1]}), "cells.0.words.1 = 1"),
    (lambda tree: tree["cells"][0].update(values={}), "cells.0 is not on the study's axes"),
    (lambda tree: tree["cells"][0].update(values={"zero": "9", "precision": "fp32"}), "not on the study's axes"),
    (lambda tree: tree["study"].update(price="cheap"), "study.price = 'cheap'"),
    (lambda tree: tree["study"].update(reference={"zero": "9"}), "its reference is none of its cells"),
    (lambda tree: tree["study"].update(axes=[]), "study.axes"),
    (lambda tree: tree["study"].pop("name") and None, "it has no study.name"),
    (lambda tree: tree.update(format=2), "its format is 2"),
    (lambda tree: tree.update(cells=[]), "its reference is none of its cells"),
]


@pytest.mark.parametrize(("change", "said"), STUDIES, ids=[said for _, said in STUDIES])
def test_a_study_json_that_claims_too_much_is_refused(
    study, change: Callable[[Any], Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where, _ = study()
    file = where / "study.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    for verb in ("status", "report"):
        assert main(["study", verb, str(where)]) == 2
        message = capsys.readouterr().err
        assert "study.json is damaged" in message
        assert said in message


def test_rows_in_another_order_are_no_curve(study) -> None:
    where, cells = study()
    finish_all(where, cells)
    victim = where / "runs" / cells[0].folder / "metrics.jsonl"
    first, second, *rest = victim.read_text().splitlines(keepends=True)
    victim.write_text("".join([second, first, *rest]))
    (bad,) = [result for result in sections.make(where).results if result.status == "failed"]
    assert bad.reason == "metrics.jsonl is damaged: it has its steps in another order than they were made"
