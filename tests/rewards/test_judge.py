"""The judge, asked over HTTP: a server on this machine plays one, with all that a real one does to its clients."""

import asyncio
import base64
import io
import json
import sqlite3
import threading
from contextlib import closing
from http.client import HTTPConnection

import pytest
from judge_server import judge_server  # noqa: F401
from mssr_process import free_port
from PIL import Image

from mssr.errors import UserError
from mssr.rewards.builtin.judge import judge
from mssr.rewards.row import Row

ROW = Row("What is 2 + 2?", "4", prompt="user: What is 2 + 2?", columns={"level": "easy"})


@pytest.fixture
def server(judge_server):  # noqa: F811
    return judge_server


def scores(server, *responses, row=ROW, **options):
    """Judge the responses at the same time; return their scores, or errors."""
    options = {"url": server.url, "model": "wise", "retries": 0} | options

    async def ask():
        return await asyncio.gather(
            *(judge(response, row, **options) for response in responses), return_exceptions=True
        )

    return asyncio.run(ask())


def score(server, response="4", row=ROW, **options):
    (found,) = scores(server, response, row=row, **options)
    if isinstance(found, Exception):
        raise found
    return found


def asked(server, request=0):
    return server.requests[request]["messages"][0]["content"]


def test_without_options_the_judge_compares_with_the_right_answer(server):
    server.replies = ["It is right.\nScore: 1", "Score: 0"]
    assert score(server, "<think>5?</think> 4") == 1 and score(server, "5") == 0
    text = asked(server)
    assert "Problem:\nWhat is 2 + 2?\n" in text and "Right answer:\n4\n" in text and "Answer to grade:\n4\n" in text
    assert server.requests[0] == {"model": "wise", "messages": [{"role": "user", "content": text}], "temperature": 0}
    assert server.keys[0][0] == "/v1/chat/completions"
    with pytest.raises(UserError, match="^the row has no answer to compare with"):
        score(server, row=Row("?", ""))


def test_a_template_knows_the_row_and_the_response(server, tmp_path):
    file = tmp_path / "judge.jinja"
    file.write_text(
        "{{ problem }}|{{ answer }}|{{ response }}|{{ final }}|{{ prompt }}|{{ level }}|{{ columns.level }}"
    )
    for template in (str(file), file.read_text()):
        score(server, "<think>x</think>4", template=template, cache=False)
    expected = "What is 2 + 2?|4|<think>x</think>4|4|user: What is 2 + 2?|easy|easy"
    assert [asked(server, 0), asked(server, 1)] == [expected, expected]
    score(server, "{{ answer }}", template="{{ response }}")
    assert asked(server, 2) == "{{ answer }}"  # what a policy writes is no template
    with pytest.raises(
        UserError, match=r"^template: 'color' is undefined; a row has level, problem, answer, response, "
    ):
        score(server, template="{{ color }}")


def test_the_rows_pictures_are_sent(server):
    files = []
    for kind in ("png", "jpeg"):
        Image.new("RGB", (2, 3)).save(buffer := io.BytesIO(), kind)
        files.append(buffer.getvalue())
    row = Row("?", "4", image_files=tuple(files))
    score(server, row=row, images=True)
    score(server, row=row)
    score(server, images=True)
    *pictures, text = asked(server)
    for picture, file, kind in zip(pictures, files, ("image/png", "image/jpeg"), strict=True):
        assert picture == {
            "type": "image_url",
            "image_url": {"url": f"data:{kind};base64,{base64.b64encode(file).decode()}"},
        }
    assert text["type"] == "text" and text["text"] == asked(server, 1)
    assert isinstance(asked(server, 2), str)  # a row without pictures


@pytest.mark.parametrize(
    ("reply", "options", "expected"),
    [
        ("score = 0.5", {}, 0.5),
        ("**Score:** 1", {}, 1),
        ("Score: 0, no: Score: 1", {}, 1),  # the last one
        ("[[7]]", {"pattern": r"\[\[(\d+)\]\]", "scale": 10}, 0.7),
        ("7", {"pattern": r"\d+", "scale": 10}, 0.7),
        ("No... Yes!", {"scale": {"yes": 1, "no": 0}}, 1),
        ("partly", {"scale": {"yes": 1, "partly": 0.5, "no": 0}}, 0.5),
        ("Incorrect", {"scale": {"correct": 1, "incorrect": 0}}, 0),
        ("<b>", {"scale": {"a": 1, "b": 0.25}, "pattern": "<(.)>"}, 0.25),
    ],
)
def test_a_score_is_read_from_the_reply(server, reply, options, expected):
    server.replies = [reply]
    assert score(server, **options) == expected


@pytest.mark.parametrize(
    ("reply", "options", "message"),
    [
        ("Well.", {}, "no score in the judge's reply 'Well.'; change template or pattern, or raise max_tokens"),
        ("", {}, "no score in the judge's reply ''; .*"),
        ("Score: 7", {}, r"the judge's score '7' is not within scale \(1.0\); change template, pattern or scale"),
        ("Score: 7", {"pattern": ".*"}, "the judge's score '' is not within scale .*"),
        ("Score: -1", {"pattern": "-?[0-9]"}, "the judge's score '-1' is not within scale .*"),
        ("maybe", {"scale": {"yes": 1}, "pattern": ".+"}, "the judge's score 'maybe' is not within scale .*"),
    ],
)  # fmt: skip
def test_a_reply_without_a_score_is_an_error(server, reply, options, message):
    server.replies = [reply]
    with pytest.raises(UserError, match=f"^{message}$"):
        score(server, **options)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_overloaded_server_is_asked_again_when_it_says_so(server, status):
    busy = (status, {"Retry-After": "0.01"}, '{"error": {"message": "busy"}}')
    server.replies = [busy, busy, "Score: 1"]
    assert score(server, retries=2) == 1 and len(server.requests) == 3
    server.requests.clear()
    with pytest.raises(UserError, match=rf"HTTP {status}: busy; asked 2 times; lower concurrency, or raise retries$"):
        score(server, retries=1, cache=False)
    assert len(server.requests) == 2


def refusal(status, message):
    return status, {}, json.dumps({"error": {"message": message}})


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(401, "no key"), "HTTP 401: no key; name the environment variable with its API key as `key`"),
        (refusal(404, "Not Found"), "HTTP 404: Not Found; URL/models lists its models; is 'wise' one, and does url end"),
        (refusal(400, "too long"), "HTTP 400: too long; it does not accept the request; check template, images and"),
        ((200, {"Content-Type": "text/html"}, "<html>Welcome</html>"), "its reply is no chat completion"),
        ((200, {}, "{garbage"), "its reply is no chat completion"),
        ((200, {}, "{}"), "its reply is no chat completion"),
        ((200, {}, '{"choices": []}'), "its reply is no chat completion"),
        ((500, {}, "\n\nTraceback\n  nothing"), "HTTP 500: "),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_says_what_to_do(server, reply, message):
    server.replies = [reply]
    with pytest.raises(UserError) as error:
        score(server)
    assert str(error.value).startswith(f"the judge at {server.url}: {message.replace('URL', server.url)}")
    assert "\n" not in str(error.value)


def test_a_key_is_sent_and_a_wrong_one_is_named(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.replies = ["Score: 1", (401, {}, '{"error": {"message": "wrong key"}}')]
    assert score(server, key="JUDGE_KEY") == 1 and server.keys == [("/v1/chat/completions", "Bearer secret")]
    with pytest.raises(UserError, match="wrong key; check the API key in JUDGE_KEY$"):
        score(server, "other", key="JUDGE_KEY")


def test_nobody_at_the_address():
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(
        UserError, match=rf"^the judge at {url}: not reachable \(.*\); start the server, or correct url$"
    ):
        asyncio.run(judge("4", ROW, url=url, model="wise", retries=0))


def test_a_server_that_hangs(server):
    server.replies = ["hang"]
    message = r"no reply within 0.1 s, asked 1 times; raise request_timeout_s, or lower concurrency$"
    with pytest.raises(UserError, match=message):
        score(server, request_timeout_s=0.1)


def test_no_more_requests_at_a_time_than_allowed(server):
    """The server holds what it gets; meanwhile others could come, in the time of 50 requests of another client."""
    server.hold = threading.Event()

    def other_request():
        with closing(HTTPConnection("127.0.0.1", server.server_port)) as client:
            client.request("GET", "/")
            client.getresponse()

    async def ask():
        options = {"url": server.url, "model": "wise", "concurrency": 3}
        calls = [asyncio.create_task(judge(str(number), ROW, **options)) for number in range(9)]
        while len(server.requests) < 3:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.to_thread(other_request)
        server.hold.set()
        return await asyncio.gather(*calls)

    assert asyncio.run(ask()) == [1] * 9 and server.most == 3


def test_equal_requests_are_made_once(server):
    server.replies = ["Score: 0.5"]
    assert scores(server, "4", "4", "5", "4") == [0.5] * 4 and len(server.requests) == 2
    assert scores(server, "4", "4", cache=False) == [0.5] * 2 and len(server.requests) == 4


def test_an_error_is_not_remembered(server):
    server.replies = ["what?", "Score: 1"]
    options = {"url": server.url, "model": "wise", "retries": 0}

    async def twice():
        return [
            *await asyncio.gather(judge("4", ROW, **options), return_exceptions=True),
            await judge("4", ROW, **options),
        ]

    error, again = asyncio.run(twice())
    assert isinstance(error, UserError) and again == 1


def test_a_call_that_is_given_up_does_not_disturb_an_equal_one(server):
    server.hold = threading.Event()
    options = {"url": server.url, "model": "wise", "retries": 0}

    async def give_up():
        first = asyncio.create_task(judge("4", ROW, **options))
        second = asyncio.create_task(judge("4", ROW, **options))
        while not server.requests:
            await asyncio.sleep(0)
        first.cancel()
        server.hold.set()
        return await second

    assert asyncio.run(give_up()) == 1 and len(server.requests) == 1


def test_a_file_remembers_replies_for_other_processes(server, tmp_path):
    cache = str(tmp_path / "replies")
    server.replies = ["Score: 0.5"]
    assert scores(server, "4", "5", cache=cache) == [0.5] * 2 and len(server.requests) == 2
    # Another event loop, as another rank has; another address, too: the model's name counts.
    assert scores(server, "4", "5", cache=cache, scale=5) == [0.1] * 2 and len(server.requests) == 2
    assert score(server, "4", cache=cache, model="wiser") == 0.5 and len(server.requests) == 3


def test_many_write_the_same_file(server, tmp_path):
    options = {"cache": str(tmp_path / "replies"), "concurrency": 8}
    found = [None] * 3

    def rank(number):
        found[number] = scores(server, *map(str, range(number, number + 10)), **options)

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    assert found == [[1] * 10] * 3
    before = len(server.requests)
    assert scores(server, *map(str, range(12)), **options) == [1] * 12 and len(server.requests) == before


URL = {"url": "http://localhost/v1", "model": "wise"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "wise"}, "url: is missing; the judge needs its url and model"),
        (URL | {"modle": "x"}, "modle: the judge has no such option; it has url, model, template, .*"),
        (URL | {"url": "localhost:8000/v1"}, "url: must start with http:// or https://, got 'localhost:8000/v1'"),
        (URL | {"model": ""}, "model: must be the name of a model of the server, got ''"),
        (URL | {"images": "yes"}, "images: must be true or false, got 'yes'"),
        (URL | {"template": "nowhere.jinja"}, "template: nowhere.jinja: .*No such file.*; give a file, or text with .*"),
        (URL | {"template": "{{ a\n}} {{ b"}, "template: line 2: .*"),
        (URL | {"pattern": "("}, r"pattern: '\(' is not a regular expression: .*"),
        (URL | {"scale": 0}, "scale: must be a number of at least 0.001, got 0"),
        (URL | {"scale": {True: 1}}, "scale: True is not a word; put it in quotes"),
        (URL | {"scale": {"yes": 2}}, "scale: must be a number from 0 to 1, got 2"),
        (URL | {"request": "max_tokens"}, "request: must be fields and their values, such as .*"),
        (URL | {"concurrency": 0}, "concurrency: must be an integer of at least 1, got 0"),
        (URL | {"retries": -1}, "retries: must be an integer of at least 0, got -1"),
        (URL | {"request_timeout_s": 0}, "request_timeout_s: must be a number of at least 0.001, got 0"),
        (URL | {"key": "NO_SUCH_KEY"}, "key: the environment variable NO_SUCH_KEY is not set; set it to the API key"),
        (URL | {"cache": 5}, "cache: must be true, false or a file, got 5"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_before_anything_is_asked(options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        judge.check(**options)


def test_right_options_ask_nothing(server, tmp_path):
    judge.check(url=server.url, model="wise", cache=str(tmp_path / "replies"))
    assert server.requests == []


def test_a_cache_that_is_another_file_is_refused(tmp_path):
    (text := tmp_path / "notes.txt").write_text("mine " * 100)
    with sqlite3.connect(other := tmp_path / "other.sqlite") as file:
        file.execute("CREATE TABLE mine (x)")
    with pytest.raises(
        UserError, match=r"^cache: .*notes.txt: file is not a database; name a file that can be written"
    ):
        judge.check(**URL, cache=str(text))
    with pytest.raises(UserError, match=r"^cache: .*other.sqlite is another database; name a file of its own"):
        judge.check(**URL, cache=str(other))
    with pytest.raises(UserError, match=r"^cache: .*nowhere/x: unable to open database file; "):
        judge.check(**URL, cache=str(tmp_path / "nowhere" / "x"))
    assert text.read_text() == "mine " * 100


def test_fields_of_the_request(server):
    score(server, request={"max_tokens": 9, "temperature": 0.5, "chat_template_kwargs": {"enable_thinking": False}})
    sent = server.requests[0]
    assert (sent["max_tokens"], sent["temperature"]) == (9, 0.5)
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
