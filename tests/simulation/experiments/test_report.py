"""The report of an experiment as files."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from support.experiment_records import make_record

from fedbus.simulation.experiments.report import (
    ExperimentReport,
    Finding,
    Plot,
    ReportContext,
    ReportTable,
    format_csv,
    format_markdown_table,
    format_seconds,
    write_report,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def draw(figure: "Figure") -> None:
    figure.subplots().plot([1, 2], [3, 4])


REPORT = ExperimentReport(
    title="A study",
    setting=["3 clients"],
    findings=[Finding("it is fast", is_met=True), Finding("it is small", is_met=False), Finding("a fact")],
    tables=[ReportTable("Times", ["mode", "s"], [["sync", "12"], ["a|b", "3"]], note="A note.")],
    plots=[Plot("times.png", "Times", draw)],
    rows=[{"mode": "sync", "s": 12.5}, {"mode": "async", "s": None, "extra": 1}],
)


def test_all_files_are_written(tmp_path: Path) -> None:
    context = ReportContext("fedbus experiment study", [1, 2], 75, {"mode=x": "it raised"})
    records = [make_record({"loss": 1}, mode="sync")]
    files = write_report(REPORT, records, context, tmp_path / "out")
    assert [file.name for file in files] == ["results.json", "results.csv", "times.png", "README.md"]
    assert (tmp_path / "out/times.png").read_bytes().startswith(PNG_SIGNATURE)
    facts = json.loads((tmp_path / "out/results.json").read_text())
    assert facts["findings"][1] == {"text": "it is small", "met": False}
    assert facts["cells"][0]["outcome"] == {"loss": 1}
    assert facts["failures"] == {"mode=x": "it raised"}
    with (tmp_path / "out/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"mode": "sync", "s": "12.5", "extra": ""}, {"mode": "async", "s": "", "extra": "1"}]


def test_the_page_has_command_seeds_versions_and_findings(tmp_path: Path) -> None:
    context = ReportContext("fedbus experiment study --seed 1", [1, 2], 75, {"mode=x": "it raised"})
    write_report(REPORT, [], context, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# A study\n\n- met: it is fast\n- not met: it is small\n- a fact\n")
    for part in (
        "## Setting\n\n```\nfedbus experiment study --seed 1\n```",
        "- 3 clients",
        "- seeds 1, 2; Python 3",
        "numpy 2",
        "1 min 15 s",
        "the cell `mode=x` failed: it raised",
        "## Times",
        "![Times](times.png)",
        "A note.",
    ):
        assert part in page, part


def test_a_markdown_table_is_padded_and_escaped() -> None:
    assert format_markdown_table(REPORT.tables[0]) == [
        "| mode |   s |",
        "| ---- | --: |",
        "| sync |  12 |",
        "| a\\|b |   3 |",
    ]


def test_a_table_without_rows_is_an_empty_file() -> None:
    assert format_csv([]) == "\n"


def test_durations_have_two_units_at_most() -> None:
    assert [format_seconds(one) for one in (3.14, 61, 3700)] == ["3.1 s", "1 min 1 s", "1 h 1 min"]
