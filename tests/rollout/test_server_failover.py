"""When a rollout server hangs, dies or fails, the other servers answer its requests, each exactly once.

The servers are threads of this process that speak vLLM's protocol; test_several_servers has real ones.
"""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from mssr_process import free_port
from server_helpers import rollout

import mssr.rollout.servers.rollout as servers_module
from mssr.batch import Prompt
from mssr.errors import UserError
from mssr.rollout.servers.client import not_listening

SILENCE_S = 1000  # on the test's clock


class Http(ThreadingHTTPServer):
    daemon_threads = False  # closing the server waits for them

    def handle_error(self, request, client_address):
        """Do nothing: the client is gone. Printing a traceback beside pytest's own crashes Python 3.11 (both use `ast`)."""


class FakeServer:
    """Answers prompt [10, row] with [row].

    asked: the rows of its requests. fault: called instead of answering, with the request's handler and row.
    health: the status of its answers to GET. version: the weight version that it reports.
    may_answer: acquired before each answer.
    """

    def __init__(self) -> None:
        self.health = 200
        self.asked: list[int] = []
        self.fault = None
        self.version = 0
        self.may_answer = threading.Semaphore(1000)
        self._end = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer({"world_size": 1} if self.path == "/get_world_size" else None, fake.health)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                row = body["token_ids"][1]
                fake.asked.append(row)
                if fake.fault is not None:
                    return fake.fault(self, row)
                assert fake.may_answer.acquire(timeout=30)
                self.answer(choice(row, str(fake.version)))

            def answer(self, value, status=200):
                data = b"" if value is None else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._end.set()
        self.may_answer.release(1000)
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()

    def say_nothing(self, handler, row) -> None:
        """Send nothing until the test ends."""
        self._end.wait(30)

    def reset(self, handler, row) -> None:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    def fail(self, handler, row) -> None:
        handler.answer({"error": "EngineDeadError"}, status=500)

    def have_other_weights(self, handler, row) -> None:
        handler.answer(choice(row, version="7"))

    def give_up(self, handler, row) -> None:
        handler.answer(choice(row, version="0", finish_reason="abort"))


def choice(row: int, version: str, finish_reason: str = "stop") -> dict:
    return {
        "choices": [{
            "token_ids": [row], "finish_reason": finish_reason, "weight_versions": [{"version": version}],
            "logprobs": {"content": [{"logprob": -float(row)}]},
        }]
    }  # fmt: skip


class Sends:
    """Stand-in for the weight transfer, which needs real servers. policy.sent: the servers of each transfer."""

    def __init__(self, *_) -> None:
        pass

    def send(self, policy, version, workers) -> None:
        for fake in policy.fakes:
            fake.version = version
        policy.sent.append(list(workers))

    def close(self) -> None:
        pass


class Clock:
    """The module's time: it stands still unless the test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class StartsMeanwhile(Clock):
    """Each time somebody sleeps, the next server gets ready."""

    def __init__(self, fakes) -> None:
        super().__init__()
        self._starting = list(fakes)

    def sleep(self, seconds: float) -> None:
        self._starting.pop(0).health = 200


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(servers_module, "time", clock)
    return clock


@pytest.fixture
def fakes():
    fakes = [FakeServer(), FakeServer()]
    yield fakes
    for fake in fakes:
        fake.stop()


@pytest.fixture
def synced(fakes, monkeypatch):
    """Make an engine with the first `count` servers that has sent weights of version 0. Return it and the policy."""
    monkeypatch.setattr(servers_module, "WeightTransfer", Sends)

    def synced(at_once=2, server_timeout_s=SILENCE_S, count=2):
        policy = SimpleNamespace(image_token_id=None, merge_size=None, forbidden_token_ids=[], fakes=fakes, sent=[])
        engine = rollout(policy, fakes[:count], batch_size=at_once, server_timeout_s=server_timeout_s)
        engine.update_weights(policy, 0)
        return engine, policy

    return synced


def ask(engine, count=8, on_response=lambda row: None):
    """Check that every row gets its own answer and is reported once."""
    prompts = [Prompt(str(row), row, "", "", None, torch.tensor([10, row]), None, None, ()) for row in range(count)]
    told = []

    def tell(row, response):
        told.append(row)
        on_response(row)

    batch = engine.generate(prompts, [0] * count, 1.0, on_response=tell)
    assert batch.tokens.tolist() == [[row] for row in range(count)]
    assert batch.logp.tolist() == [[-row] for row in range(count)]
    assert sorted(told) == list(range(count))
    return batch


def out_lines(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("mssr: rollout server")]


@pytest.mark.parametrize(
    "fault, reason",
    [
        (FakeServer.reset, ""),
        (FakeServer.fail, "/inference/v1/generate failed with 500: "),
        (FakeServer.have_other_weights, "it has weights 7, not 0: restarted?"),
        (FakeServer.give_up, "it ended a response by itself (abort)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_server_that_fails_is_left_out_until_the_next_sync(synced, fakes, capfd, fault, reason):
    (well, broken), (engine, policy) = fakes, synced()
    broken.fault = fault.__get__(broken)
    ask(engine)
    assert 1 <= len(broken.asked) <= 2  # two at once; none after the first failure
    assert set(range(8)) <= set(well.asked)
    (line,) = out_lines(capfd)
    assert line.startswith(f"mssr: rollout server {broken.url} is out: {reason}")

    broken.fault = None
    broken.asked.clear()
    ask(engine)
    assert broken.asked == []
    engine.update_weights(policy, 1)
    assert ask(engine).weight_version.tolist() == [1] * 8
    assert broken.asked and policy.sent == [[well.url, broken.url]] * 2
    assert out_lines(capfd) == []


def test_a_server_that_falls_silent_loses_its_requests(synced, fakes, clock, capfd):
    """With one request at a time, only the silent server owes a response when the clock moves."""
    (well, silent), (engine, policy) = fakes, synced(at_once=1)
    well.may_answer = threading.Semaphore(0)

    def say_nothing(handler, row):
        well.may_answer.release(8)
        silent.say_nothing(handler, row)

    silent.fault = say_nothing

    def silence(row):
        clock.now += SILENCE_S

    ask(engine, on_response=silence)
    assert len(silent.asked) == 1 and sorted(well.asked) == list(range(8))
    assert out_lines(capfd) == [f"mssr: rollout server {silent.url} is out: nothing came from it for {SILENCE_S} s"]
    engine.update_weights(policy, 1)
    assert policy.sent == [[well.url, silent.url]] * 2


def test_a_server_that_answers_now_and_then_is_not_silent(synced, fakes, clock, capfd):
    """Each answer comes after more than half of the allowed time."""
    fakes[0].may_answer = threading.Semaphore(1)
    engine, _ = synced(at_once=4, count=1)

    def later(row):
        clock.now += 0.6 * SILENCE_S
        fakes[0].may_answer.release()

    ask(engine, on_response=later)
    assert out_lines(capfd) == []


def test_no_server_says_anything(synced, fakes, capfd):
    """With the real clock."""
    engine, _ = synced(server_timeout_s=0.5)
    for fake in fakes:
        fake.fault = fake.say_nothing
    silent = r"http://\S+: nothing came from it for 0\.5 s; "
    with pytest.raises(
        UserError, match=rf"^rollout\.servers: not there: {silent}{silent}start them with `mssr serve`$"
    ):
        ask(engine)
    assert len(out_lines(capfd)) == 2


def test_no_server_left(synced, fakes):
    engine, policy = synced()
    for fake in fakes:
        fake.fault = fake.reset
    urls = sorted(fake.url for fake in fakes)
    with pytest.raises(UserError, match=r"^rollout\.servers: not there: .*start them with `mssr serve`$") as error:
        ask(engine)
    assert all(url in str(error.value) for url in urls)
    for fake in fakes:
        fake.stop()
    with pytest.raises(UserError, match=rf"^rollout\.servers: not there: {fakes[0].url}: .*; {fakes[1].url}: "):
        engine.update_weights(policy, 1)


def test_servers_that_are_still_starting_are_named_at_once(synced, fakes, monkeypatch, capfd):
    for fake in fakes:
        fake.health = 503
    monkeypatch.setattr(servers_module, "time", StartsMeanwhile(fakes))
    _, policy = synced()
    first, second = (fake.url for fake in fakes)
    lines = capfd.readouterr().out.splitlines()
    begin = "mssr: waiting up to 1000 s (rollout.server_timeout_s) for rollout.servers "
    assert [line.startswith(begin) for line in lines] == [True, True, False]
    assert first in lines[0] and second in lines[0] and first not in lines[1] and second in lines[1]
    assert "/health failed with 503" in lines[0] and "`mssr serve`" in lines[0]
    assert lines[2] == "mssr: all rollout.servers are there"
    assert policy.sent == [[first, second]]


@pytest.mark.parametrize(
    "address, reason", [("http://nowhere.invalid:8000", r"\w.*"), ("http://127.0.0.1:70000", "Port out of range.*")]
)
def test_an_address_that_cannot_be_one(address, reason):
    with pytest.raises(UserError, match=rf"^rollout\.servers {address}: {reason}; correct the address$"):
        not_listening([address])


def test_who_listens_and_who_does_not(fakes):
    nobody = f"http://127.0.0.1:{free_port()}"
    assert not_listening([fakes[0].url, nobody + "/"]) == {nobody + "/": "Connection refused"}


def test_a_server_that_is_gone_when_the_weights_are_sent(synced, fakes, capfd):
    (well, gone), (engine, policy) = fakes, synced()
    gone.stop()
    engine.update_weights(policy, 1)
    assert policy.sent[-1] == [well.url]
    assert ask(engine).weight_version.tolist() == [1] * 8
    (line,) = out_lines(capfd)
    assert line.startswith(f"mssr: rollout server {gone.url} is out: ")
