"""Figures and the page of a study with known numbers."""

import matplotlib
import numpy as np
import pytest
from PIL import Image
from study_runs import study_results

from bench.study.plots import plot_arms, plot_curves
from bench.study.report import write_report
from bench.study.results import write_results
from mssr.errors import UserError
from mssr.observe.plots import COLOURS

CLAIMS = [
    {"text": "New ends higher.", "higher": "new", "lower": "base"},
    {"text": "Base ends higher.", "higher": "base", "lower": "new"},
    {"text": "New collapses more often.", "at": "collapsed", "higher": "new", "lower": "base"},
    {"text": "New keeps entropy.", "metric": "policy/entropy", "higher": "new", "lower": "base"},
]
SERIES = {
    "train__reward": [0.3, 0.4, 0.5, 0.6],
    "policy__entropy": [0.4, 0.3, 0.2, 0.1],
    "train__grad_norm": [1.0, 2.0, 50.0, 1.0],
    "policy__clip_fraction": [0.0, 0.0, 0.01, 0.02],
}
BINS = [[10.0, 10.0 * (0.1 * n + 0.05), 6.0] for n in range(10)]


def toy(folder, arms=2, seeds=3, **more):
    names = ["base", "new", *(f"arm{number}" for number in range(2, arms))][:arms]
    runs = {
        name: [[0.3, 0.4 + 0.05 * row + 0.01 * seed, 0.5 + 0.05 * row + 0.01 * seed] for seed in range(seeds)]
        for row, name in enumerate(names)
    }
    return study_results(folder, runs, **SERIES | more)


def pixels(png, *colours):
    """Return how many pixels of a PNG have each of these colours."""
    with Image.open(png) as image:
        whole = np.asarray(image.convert("RGB"), dtype=np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    return [int(np.count_nonzero(whole == int(colour[1:], 16))) for colour in colours]


def test_every_arm_is_drawn_in_its_colour_and_matplotlib_stays_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    results = toy(tmp_path, arms=8, bins=BINS)
    for plot in (plot_curves, plot_arms):
        png = plot(results, tmp_path / "deep" / f"{plot.__name__}.png")
        assert min(pixels(png, *COLOURS)) > 40, plot.__name__
    assert dict(matplotlib.rcParams) == before


def test_panels_follow_what_was_recorded(tmp_path):
    with Image.open(plot_curves(toy(tmp_path / "1", bins=BINS), tmp_path / "all.png")) as image:
        whole = image.height
    bare = study_results(tmp_path / "2", {"a": [[0.3, 0.4]]}, train__reward=[0.1, 0.2])
    with Image.open(plot_curves(bare, tmp_path / "bare.png")) as image:
        assert image.height < whole


def test_the_band_reaches_from_the_lowest_seed_to_the_highest(tmp_path):
    """The fill is faint where seeds differ; one seed has none."""
    wide = plot_curves(study_results(tmp_path / "1", {"a": [[0.3, 0.4], [0.3, 0.8]]}), tmp_path / "wide.png")
    one = plot_curves(study_results(tmp_path / "2", {"a": [[0.3, 0.6]]}), tmp_path / "one.png")
    base = np.array(list(bytes.fromhex(COLOURS[0][1:])))
    faint = "#" + bytes(np.round(255 - 0.13 * (255 - base)).astype(int).tolist()).hex()
    assert pixels(wide, faint)[0] > 2000 > 50 > pixels(one, faint)[0]


@pytest.mark.parametrize("seeds", [1, 2])
def test_diverged_runs_single_seeds_and_zeros_are_drawn_without_a_warning(tmp_path, seeds, recwarn):
    runs = {"base": [[0.0, 0.0]] * seeds, "new": [[0.0, 0.0]] * seeds}
    ends = {("new", seed): "diverged" for seed in range(seeds)}
    results = study_results(tmp_path, runs, ends=ends, policy__entropy=[None, None], train__grad_norm=[0.0, 0.0])
    plot_curves(results, tmp_path / "curves.png")
    plot_arms(results, tmp_path / "arms.png")
    # ResourceWarnings are of whatever is freed meanwhile.
    assert not [str(warning.message) for warning in recwarn if warning.category is not ResourceWarning]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A folder as written by `python -m bench.study run`, with one run missing, and the results.json of another study."""
    folder = tmp_path_factory.mktemp("studies")
    changes = {"intro": "Read me *first*.", "missing": ["new seed 3"]}
    first = toy(folder / "a", claims=CLAIMS).model_copy(update=changes)
    write_results(first, folder / "a" / "results.json")
    second = toy(folder / "b").model_copy(update={"name": "other", "question": "And this?"})
    write_results(second, folder / "other.json")
    return [folder / "a", folder / "other.json"]


@pytest.fixture(scope="module")
def page(studies, mssr):
    """The page as the command writes it."""
    out = studies[0].parent / "docs" / "STUDY.md"
    assert mssr("-m", "bench.study", "report", *studies, "--out", out).check().out.split() == [str(out)]
    return out


def test_the_page_has_every_claim_with_its_figure_and_its_numbers(page):
    text = page.read_text()
    assert text.index("Read me *first*.") < text.index("## toy") < text.index("## other")
    assert (
        "`python -m bench.study run configs/toy_study.yaml`" in text
        and "Abacus 1, 2 cores; python 3.12.0, torch 2.12.0" in text
    )
    assert "6 runs in 1 h 07 min, 2 at a time, 2 min of CPU time" in text
    assert "Budget: 16 optimiser updates per run." in text
    lines = [line for line in text.splitlines() if line.startswith(("| ✔", "| ✘", "| ○"))]
    verdicts = [line.split(" | ")[2].split(":")[0] for line in lines]
    assert verdicts == ["holds", "does not hold", "inconclusive", "inconclusive"]
    assert "new − base, final: +5.0 points, 95 % interval 5.0 to 5.0, 3 seeds" in lines[0]
    assert "base − new, final: −5.0 points, 95 % interval −5.0 to −5.0, 3 seeds" in lines[1]
    assert "**4 claims; holds: 1, does not hold: 1, inconclusive: 2.**" in text
    linked = {part.split(")")[0] for part in text.split("](")[1:] if part.startswith("study/")}
    assert linked == {"study/toy.png", "study/toy_arms.png", "study/other.png", "study/other_arms.png"}
    assert all((page.parent / name).is_file() for name in linked)
    assert all("[toy](#toy), [figure](study/toy" in line and "not finished: preliminary" in line for line in lines)


def test_an_unfinished_study_is_marked(page):
    assert "**6 of 7 runs (the others are not finished)**" in page.read_text()
    assert "**Not finished and not in this table: new seed 3.**" in page.read_text()


def test_the_same_results_make_the_same_page_and_figures(studies, page, tmp_path):
    again = write_report(studies[1:], tmp_path / "STUDY.md").read_text()
    section = again[again.index("## other") :]
    assert page.read_text().endswith(section)
    for figure in (tmp_path / "study").iterdir():
        assert figure.read_bytes() == (page.parent / "study" / figure.name).read_bytes()


def test_missing_results_and_equal_names_are_refused_in_one_line(studies, mssr, tmp_path):
    out = tmp_path / "STUDY.md"
    assert "not found; run the study first" in mssr("-m", "bench.study", "report", tmp_path, "--out", out).line
    assert (
        "two studies are called toy" in mssr("-m", "bench.study", "report", studies[0], studies[0], "--out", out).line
    )
    assert not out.exists()


def test_another_file_is_not_overwritten_by_the_report(tmp_path):
    (tmp_path / "thesis.md").write_text("# Mine")
    with pytest.raises(UserError, match="thesis.md: already there, and no report of studies"):
        write_report([], tmp_path / "thesis.md")
    assert (tmp_path / "thesis.md").read_text() == "# Mine"
