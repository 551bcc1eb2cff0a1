"""run_dir/data_report.json: which rows a run leaves out, and why."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mssr.data.dataset import ProblemDataset
from mssr.data.solved import Solved
from mssr.outputs import replace

DATA_REPORT = "data_report.json"


def write_data_report(
    run_dir: Path, datasets: Mapping[str, ProblemDataset | None], solved: Mapping[int, Solved] | None = None
) -> None:
    """Write the report anew.

    datasets: by their key in the configuration; `solved` is about the first.
    """
    report = {}
    for key, problems in datasets.items():
        if problems is not None:
            report[key] = _described(problems, solved or {})
            solved = None
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    replace(run_dir, DATA_REPORT, lambda partial: partial.write_text(text, encoding="utf-8", errors="replace"))


def _described(problems: ProblemDataset, solved: Mapping[int, Solved]) -> list[dict[str, Any]]:
    """Return an entry per source, which names rows by their number in it."""
    entries = {
        path: {"source": path, "rows": rows, "bad": [], "overlong": [], "solved": []}
        for path, rows in problems.sizes().items()
    }
    for kind, rows in (("bad", problems.bad_rows), ("overlong", problems.overlong)):
        for row in rows:
            entries[row.source][kind].append({"row": row.row, "why": row.reason})
    for index, found in sorted(solved.items()):
        source, row = problems.place(index)
        entries[source]["solved"].append(
            {"row": row, "value": round(found.value, 4), "not_from_epoch": found.epoch + 1}
        )
    return list(entries.values())
