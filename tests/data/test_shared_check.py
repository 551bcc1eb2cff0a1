"""Ranks that open the same source share the checking, each row on one rank, and agree on the result."""

import json

import pytest
from data_encoders import build_encoder

from mssr.data.dataset import ProblemDataset
from mssr.errors import UserError


def counted(world, path: str):
    """Return the rows that this rank counts while it checks, and the totals it tells."""
    encoder = build_encoder(on_bad_row="skip")
    told = []
    ProblemDataset(path, encoder, encoder.config, world, lambda by, total: told.append((by, total)))
    return sum(by for by, _ in told), {total for _, total in told}


def opened(world, path: str, **keys):
    """Return (fingerprint, usable rows, bad rows, problems that this rank checked itself), or the error's text."""
    encoder = build_encoder(**keys)
    checked, check = [], encoder.check
    encoder.check = lambda row: checked.append(row["problem"]) or check(row)
    path = path.replace("RANK", str(world.rank))
    try:
        problems = ProblemDataset(path, encoder, encoder.config, world=world)
    except UserError as error:
        return str(error)
    rows = [problems[index].row for index in range(len(problems))]
    return problems.fingerprint, rows, [str(bad) for bad in problems.bad_rows], sorted(checked)


@pytest.fixture
def file(tmp_path, png):
    rows = []
    for number in range(11):
        (tmp_path / f"{number}.png").write_bytes(png(seed=number))
        rows.append({"images": [f"{number}.png"], "problem": f"<image>Is it {number}?", "answer": str(number)})
    rows[3]["answer"] = None
    rows[4]["images"] = ["none.png"]
    rows.append(rows[2] | {"answer": "other"})  # the problem of row 2, which another rank may have checked
    rows.append(rows[1])
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "a.jsonl"


def test_two_ranks_find_what_one_finds(ranks, file, make_dataset):
    alone = make_dataset(file, on_bad_row="skip")
    first, second = ranks(opened, str(file), on_bad_row="skip")
    assert first[:3] == second[:3]
    assert first[0] == alone.fingerprint
    assert first[1] == [prompt.row for prompt in alone]
    assert first[2] == [str(bad) for bad in alone.bad_rows] and len(first[2]) == 3
    assert first[3] == sorted(f"<image>Is it {number}?" for number in (0, 2, 4, 6, 8, 10, 1))  # row 12 repeats row 1
    assert second[3] == sorted(f"<image>Is it {number}?" for number in (1, 3, 5, 7, 9, 2))  # and row 11 row 2


def test_the_first_rank_tells_how_many_rows_all_have_checked(ranks, file):
    assert ranks(counted, str(file))[0] == (12, {13})  # 6 of its 7 rows count for both ranks


def test_all_ranks_refuse_the_same_rows(ranks, file):
    first, second = ranks(opened, str(file))
    assert first == second
    assert first.startswith(f"{file}: 3 of 13 rows cannot be used: row 3: ") and "row 4: " in first
    assert "; row 11: same problem as row 2 with a different answer ('other', there '2')" in first


def test_fewer_rows_than_ranks(ranks, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": 2}))
    first, second = ranks(opened, str(tmp_path / "a.jsonl"))
    assert first[:3] == second[:3] and first[1] == [0]


def test_ranks_with_other_files(ranks, tmp_path):
    for rank in range(2):
        rows = [{"problem": f"{n}?", "answer": n} for n in range(5 + rank)]
        (tmp_path / f"{rank}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = "{}: 6 rows on rank 1, 5 on rank 0; give every node the same files"
    found = ranks(opened, str(tmp_path / "RANK.jsonl"))
    assert found == [expected.format(tmp_path / f"{rank}.jsonl") for rank in range(2)]
