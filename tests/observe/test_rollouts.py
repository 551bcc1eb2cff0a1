import io
import json
from html.parser import HTMLParser

import torch
from PIL import Image

from mssr.batch import GradedRollouts, Prompt, pad_rows
from mssr.observe.rollouts import save_rollouts


def encoded(format):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, format)
    return buffer.getvalue()


def prompt(row, problem="What is 3 + 7?", images=()):
    return Prompt(f"key{row}", row, problem, "10", None, torch.tensor([1, 2]), None, None, tuple(images))


def save(folder, step, prompts, texts, count, *, baseline=None, advantage=None):
    rows = [torch.arange(1, 4 + row) for row in range(len(prompts))]
    tokens = pad_rows(rows, 3 + len(prompts))
    reward = torch.tensor([1.0, 0.0, 0.5][: len(prompts)])
    rollouts = GradedRollouts(
        tuple(prompts),
        tokens,
        mask=tokens > 0,
        logp=torch.zeros(tokens.shape),
        truncated=torch.arange(len(prompts)) == 1,
        weight_version=torch.zeros(len(prompts), dtype=torch.int64),
        reward=reward,
        correct=reward,
        graded=torch.arange(len(prompts)) != 2,
        masked=torch.zeros(len(prompts), dtype=torch.bool),
        parts=tuple({"accuracy": float(value), "<short>": -0.25} for value in reward),
        texts=tuple(texts),
    )
    advantage = torch.zeros(len(prompts)) if advantage is None else torch.tensor(advantage)
    baseline = None if baseline is None else torch.tensor(baseline)
    return save_rollouts(folder, step, rollouts, baseline, advantage, count)


def records(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """The page's tags and text, parsed as a browser does."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words = [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words += data


def test_the_records_say_what_was_asked_answered_and_given(tmp_path):
    prompts = [prompt(7, images=[encoded("PNG"), encoded("JPEG")]), prompt(9)]
    texts = ["<think>3 7</think>\\boxed{10}", "数"]
    folder = save(tmp_path, 40, prompts, texts, 8, baseline=[0.25, 0.5], advantage=[0.75, float("nan")])
    assert folder == tmp_path / "rollouts" / "step_000040"
    assert records(folder) == [
        {
            "row": 7,
            "problem": "What is 3 + 7?",
            "response": "<think>3 7</think>\\boxed{10}",
            "answer": "10",
            "reward": 1.0,
            "correct": 1.0,
            "parts": {"accuracy": 1.0, "<short>": -0.25},
            "graded": True,
            "baseline": 0.25,
            "advantage": 0.75,
            "tokens": 3,
            "truncated": False,
            "images": ["000_0.png", "000_1.jpeg"],
        },
        {
            "row": 9,
            "problem": "What is 3 + 7?",
            "response": "数",
            "answer": "10",
            "reward": 0.0,
            "correct": 0.0,
            "parts": {"accuracy": 0.0, "<short>": -0.25},
            "graded": True,
            "baseline": 0.5,
            "advantage": None,
            "tokens": 4,
            "truncated": True,
            "images": [],
        },
    ]


def test_images_are_files_named_by_what_they_are(tmp_path):
    formats = ["PNG", "JPEG", "GIF", "WEBP", "BMP"]
    images = [encoded(format) for format in formats]
    folder = save(tmp_path, 1, [prompt(0, images=images)], ["10"], 1)
    names = records(folder)[0]["images"]
    assert [name.rsplit(".")[-1] for name in names] == ["png", "jpeg", "gif", "webp", "bmp"]
    assert [(folder / name).read_bytes() for name in names] == images


def test_the_page_shows_each_rollout_and_links_its_images(tmp_path):
    prompts = [prompt(0, images=[encoded("PNG")]), prompt(1)]
    folder = save(tmp_path, 40, prompts, ["I say 10", "I say 11"], 8, advantage=[0.5, -0.25])
    page = Page(folder / "index.html")
    assert [a["class"] for tag, a in page.tags if tag == "article"] == ["right", "wrong"]
    sources = [a["src"] for tag, a in page.tags if tag == "img"]
    assert sources == ["000_0.png"] and (folder / sources[0]).exists()
    assert "Step 40: 2 rollouts, 1 correct" in page.words
    for part in ("I say 10", "I say 11", "+0.5", "-0.25", "4, truncated", "reward 1accuracy 1<short> -0.25baseline"):
        assert part in page.words


def test_a_response_without_a_grade_has_none_on_the_page(tmp_path):
    page = Page(save(tmp_path, 40, [prompt(row) for row in range(3)], ["10", "11", "12"], 8) / "index.html")
    assert page.words.count("reward no grade") == 1


def test_what_the_model_wrote_cannot_become_markup(tmp_path):
    nasty = "<script>alert(1)</script> & <img src=x onerror=y> CARDS TITLE"
    page = Page(save(tmp_path, 1, [prompt(0, problem=nasty)], [nasty + "</pre><b>"], 1) / "index.html")
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert page.words.count(nasty) == 2 and nasty + "</pre><b>" in page.words


def test_only_the_first_rows_are_kept_and_a_step_done_again_replaces_its_folder(tmp_path):
    three = [prompt(row, images=[encoded("PNG")]) for row in range(3)]
    folder = save(tmp_path, 5, three, ["a", "b", "c"], 2)
    assert [record["response"] for record in records(folder)] == ["a", "b"]
    save(tmp_path, 6, three, ["a", "b", "c"], 1)
    assert save(tmp_path, 5, three, ["x", "y", "z"], 1) == folder
    assert [record["response"] for record in records(folder)] == ["x"]
    assert sorted(path.name for path in folder.iterdir()) == ["000_0.png", "index.html", "rollouts.jsonl"]


def test_numbers_that_do_not_exist_are_null_and_half_a_character_is_replaced(tmp_path):
    folder = save(tmp_path, 1, [prompt(0)], ["\ud800 half a pair"], 1, advantage=[float("nan")])
    assert records(folder)[0]["baseline"] is None and records(folder)[0]["advantage"] is None
    assert records(folder)[0]["response"] == "? half a pair"
