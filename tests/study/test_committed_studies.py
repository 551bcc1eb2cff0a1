"""docs/STUDY.md is generated from the committed results."""

from pathlib import Path

from bench.study.report import page
from bench.study.results import load_results
from bench.study.spec import load_study

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ORDER = ("full", "rates", "boundary", "sparse", "ablation", "sweep", "confirm")
RESULTS = [DOCS / "study" / f"study_digits_{name}.json" for name in ORDER]


def test_the_page_agrees_with_the_results():
    assert sorted(RESULTS) == sorted((DOCS / "study").glob("*.json"))
    assert (DOCS / "STUDY.md").read_text() == page([load_results(path) for path in RESULTS])


def test_the_results_are_of_the_shipped_studies():
    for path in RESULTS:
        results = load_results(path)
        spec = load_study(ROOT / "bench/study/configs" / f"{path.stem.removeprefix('study_')}.yaml")
        here = (spec.question, spec.seeds, spec.match, spec.budget, spec.arms, spec.claims, spec.report_intro)
        there = (
            results.question,
            results.seeds,
            results.match,
            results.budget,
            results.arms,
            results.claims,
            results.intro,
        )
        assert here == there


def test_the_figures_are_there():
    for path in RESULTS:
        assert path.with_suffix(".png").is_file() and path.with_name(f"{path.stem}_arms.png").is_file()
