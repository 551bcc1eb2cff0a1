"""Saves a few rollouts of a step for people to read: problem, response, reward and advantage."""

import html
import io
import json
from pathlib import Path

from PIL import Image
from torch import Tensor

from mssr.batch import GradedRollouts
from mssr.observe.metrics import finite_or_none
from mssr.outputs import replace

FOLDER = "rollouts"


def save_rollouts(
    run_dir: Path, step: int, rollouts: GradedRollouts, baseline: Tensor | None, advantage: Tensor, count: int
) -> Path:
    """Write the first `count` rows to `run_dir/rollouts/step_000040/`; return that folder.

    It holds `rollouts.jsonl`, the images as files, and `index.html`, which shows both. An earlier folder of the same step
    of this run is replaced: a resumed run repeats its last steps.

    baseline, advantage: [B] of the rows; no baseline without a value tracker.
    """

    def write(folder: Path) -> None:
        folder.mkdir()
        records = [_record(rollouts, row, baseline, advantage, folder) for row in range(min(count, len(rollouts)))]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        _write(folder / "rollouts.jsonl", lines)
        _write(folder / "index.html", _page(step, records))

    return replace(Path(run_dir), f"{FOLDER}/step_{step:06d}", write)


def read_rollouts(folder: Path) -> list[dict]:
    """Return the saved records of a folder of `save_rollouts`, images as paths."""
    records = [json.loads(line) for line in (folder / "rollouts.jsonl").read_bytes().splitlines()]
    return [record | {"images": [folder / name for name in record["images"]]} for record in records]


def rollout_folders(run_dir: Path, after: int) -> list[str]:
    """Return the names in run_dir of the folders of later steps than `after`, which `save_rollouts` would replace."""
    folders = (run_dir / FOLDER).glob("step_*")
    names = [path.name for path in folders if path.name[5:].isdecimal() and int(path.name[5:]) > after]
    return [f"{FOLDER}/{name}" for name in sorted(names)]


def _record(rollouts: GradedRollouts, row: int, baseline: Tensor | None, advantage: Tensor, folder: Path) -> dict:
    prompt = rollouts.prompts[row]
    names = []
    for index, image in enumerate(prompt.images):
        names.append(f"{row:03d}_{index}.{_extension(image)}")
        (folder / names[-1]).write_bytes(image)
    return {
        "row": prompt.row,
        "problem": prompt.problem,
        "response": rollouts.texts[row],
        "answer": prompt.answer,
        "reward": _value(rollouts.reward, row),
        "correct": _value(rollouts.correct, row),
        "parts": {part: finite_or_none(value) for part, value in rollouts.parts[row].items()},
        "graded": bool(rollouts.graded[row]),
        "baseline": _value(baseline, row),
        "advantage": _value(advantage, row),
        "tokens": int(rollouts.mask[row].sum()),
        "truncated": bool(rollouts.truncated[row]),
        "images": names,
    }


def _value(column: Tensor | None, row: int) -> float | None:
    return None if column is None else finite_or_none(float(column[row]))


def _extension(image: bytes) -> str:
    with Image.open(io.BytesIO(image)) as opened:  # a prompt's images have been decoded before
        return opened.format.lower()


def _write(path: Path, text: str) -> None:
    # A lone surrogate in a dataset's text must not end a training run.
    path.write_text(text, encoding="utf-8", errors="replace")


def _page(step: int, records: list[dict]) -> str:
    title = f"Step {step}: {len(records)} rollouts, {sum(_is_correct(record) for record in records)} correct"
    cards = "\n".join(_card(record) for record in records)
    return _PAGE.replace("TITLE", title).replace("CARDS", cards)


def _is_correct(record: dict) -> bool:
    return (record["correct"] or 0.0) >= 0.5


def _card(record: dict) -> str:
    images = "".join(f'<a href="{name}"><img src="{name}" alt="{name}"></a>' for name in record["images"])
    parts = record["parts"] if len(record["parts"]) > 1 else {}  # one is the reward itself
    numbers = [
        ("reward", _number(record["reward"]) if record["graded"] else "no grade"),
        *((html.escape(part), _number(value)) for part, value in parts.items()),
        ("baseline", _number(record["baseline"])),
        ("advantage", _number(record["advantage"], sign="+")),
        ("tokens", f"{record['tokens']}{', truncated' if record['truncated'] else ''}"),
        ("row", record["row"]),
    ]
    facts = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in numbers)
    return (
        f'<article class="{"right" if _is_correct(record) else "wrong"}">'
        f"<div>{images}</div><div><p>{html.escape(record['problem'])}</p><pre>{html.escape(record['response'])}</pre>"
        f"<p>answer <b>{html.escape(record['answer'])}</b></p><footer>{facts}</footer></div></article>"
    )


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else format(value, f"{sign}.3g")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
:root { color-scheme: light dark; --right: #2a9d5c; --wrong: #d1495b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
article { display: grid; grid-template-columns: minmax(8rem, 16rem) 1fr; gap: 1.25rem; margin: 1rem 0; padding: 1rem;
  border: 1px solid #8884; border-left: 5px solid var(--wrong); border-radius: 6px; }
article.right { border-left-color: var(--right); }
article p { margin: 0 0 .5rem; white-space: pre-wrap; }
img { width: 100%; border-radius: 4px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .6rem; margin: 0 0 .5rem; }
footer { display: flex; flex-wrap: wrap; gap: 0 1.2rem; font-size: 13px; opacity: .85; }
</style></head><body><h1>TITLE</h1>
CARDS
</body></html>
"""
