"""Functions that are called concurrently or with batches: each call ends, and only the guilty one fails."""

import re
import time
from concurrent.futures import CancelledError

import pytest
from pools import (
    BEHAVIOUR,
    as_a_batch,
    fixture_of,
    function,
    kinds,
    line_of,
    open_pool,
    outcome,
    outcomes,
)

concurrent, batched = fixture_of("concurrent"), fixture_of("batched")


def test_async_calls_wait_together(concurrent):
    assert concurrent.kind == "async"
    assert kinds(outcomes(concurrent, *["all 200"] * 200)) == [None] * 200


def test_async_calls_that_do_not_end(concurrent):
    found = outcomes(concurrent, "waits", "hang", "waits", "stubborn", "waits")
    assert kinds(found) == [None, "timeout", None, "timeout", None]
    assert (
        f'File "{BEHAVIOUR}", line {line_of("await asyncio.sleep(600)")}, in concurrent' in found[1].failure.traceback
    )


@pytest.mark.parametrize(
    "response, kind, message",
    [
        ("block", "timeout", "took more than 1 s"),
        ("block below", "timeout", "took more than 1 s"),
        ("exit", "error", r"SystemExit: 3 \(.*"),
        ("exit below", "died", r"ended its process \(exit status 3\)"),
        ("end", "died", r"ended its process \(exit status 3\)"),
    ],
)
def test_one_async_call_fails(concurrent, response, kind, message):
    found = outcomes(concurrent, "waits", "waits", response, "waits", "waits")
    assert kinds(found) == [None, None, kind, None, None]
    assert re.fullmatch(message, found[2].failure.message)
    if kind == "timeout":
        assert f'File "{BEHAVIOUR}", line' in found[2].failure.traceback


def test_batches_are_as_large_as_allowed(batched):
    assert batched.kind == "batched"
    found = outcomes(batched, *["fine"] * 100)
    sizes = {one.parts["size"] for one in found}
    assert max(sizes) == 8


@pytest.mark.parametrize(
    "response, kind, message",
    [
        ("hang", "timeout", "took more than 1 s"),
        ("raise", "error", r"ValueError: not so \(.*"),
        ("end", "died", r"ended its process \(exit status 3\)"),
        ("nan", "result", "returned nan"),
        ("short", "result", "returned 0 results for 1 response"),
        ("text", "result", "returned str '1', not a list of 1 rewards"),
    ],
)
def test_of_a_batch_one_call_fails(batched, response, kind, message):
    found = outcomes(batched, *["fine"] * 5, response, *["fine"] * 6)
    assert kinds(found) == [None] * 5 + [kind] + [None] * 6
    assert re.fullmatch(message, found[5].failure.message)


def test_a_batch_of_the_wrong_length_is_in_the_log(tmp_path, log):
    pool = open_pool(function("batched"), log=log)
    futures = as_a_batch(pool, tmp_path, *["fine"] * 6, "short", "fine")
    assert kinds([future.result(60) for future in futures]) == [None] * 6 + ["result", None]
    assert re.search(
        r"a call with 8 responses, .* failed \(result\): returned 7 results for 8 responses", log.read_text()
    )
    pool.close()


def test_an_async_batch():
    pool = open_pool(function("async_batched"), workers=2, timeout_s=60.0)
    assert pool.kind == "batched"
    assert all(found.parts["accuracy"] >= 1 for found in outcomes(pool, *["fine"] * 20))
    pool.close()


def test_calls_of_a_late_batch_that_were_cancelled_are_not_made_again(tmp_path):
    pool = open_pool(function("batched"), timeout_s=0.5)
    futures = as_a_batch(pool, tmp_path, *["hang"] * 8)
    while not futures[-1].running():
        time.sleep(0.005)
    for future in futures:
        assert not future.cancel()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(60)
    assert outcome(pool, "fine").parts
    pool.close()


@pytest.mark.slow("22 s: 2,048 calls of 20 ms keep two workers busy; 2,048 calls of 50 ms wait together")
@pytest.mark.parametrize(("name", "together"), [("waits_50_ms", 20), ("computes_20_ms", 1.6)])
def test_2048_calls(name, together):
    """Measured against the time inside the function, which a busy machine makes longer: 5.1 s and 26 s on an idle one."""
    pool = open_pool(function(name), workers=2, timeout_s=60)
    began = time.monotonic()
    found = outcomes(pool, *["go"] * 2048)
    seconds = time.monotonic() - began
    assert kinds(found) == [None] * 2048
    assert sum(one.seconds for one in found) / seconds > together  # calls at a time
    pool.close()
