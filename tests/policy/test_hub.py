"""A model that is not there is said in one line, after one request at most; a local server stands for the hub."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from mssr.errors import UserError
from mssr.policy.architectures import model_config
from mssr.policy.loading import check_model_path


def refusal(path) -> str:
    for check in (check_model_path, model_config):  # the trainer's and the planner's
        with pytest.raises(UserError) as caught:
            check(path)
        line = str(caught.value)
        assert line.startswith(f"model.path {path}: ") and "\n" not in line
    return line.removeprefix(f"model.path {path}: ")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Answer like the hub: with the error code that is the name's second part. Returns the list of requested paths."""
    requests = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            code = self.path.split("/")[2]
            self.send_response(503 if code == "Down" else 403 if code == "GatedRepo" else 404)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    yield requests
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nobody/RepoNotFound", "no such folder, and no such model on the hub; check the name"),
        ("somebody/GatedRepo", "access to it is restricted; ask for it at https://huggingface.co/somebody/GatedRepo"),
        ("somebody/EntryNotFound", "has no config.json on the hub"),
        ("somebody/Down", "no such folder, and the hub cannot be reached (Server error '503"),
    ],
)
def test_what_the_hub_says_is_asked_once(hub, name, line):
    assert refusal(name).startswith(line)
    assert hub == [f"/{name}/resolve/main/config.json"] * 2  # by the trainer and by the planner


def test_without_a_connection(hub, monkeypatch):
    template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert refusal("some/model").startswith("no such folder, and the hub cannot be reached (")


def test_offline():
    assert refusal("nobody/nothing").startswith("no such folder, and not in the hub's cache; HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("path", ["/nope", "./nope", "../nope", "~/nope", "/no/such/model", "runs/none/sft/model"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(hub, path):
    assert refusal(path).startswith("no such folder, and no hub name")
    assert hub == []


SETTINGS = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"]


@pytest.mark.parametrize(
    "name, kept", [*((name, kept) for name in SETTINGS for kept in (0, 1, 7)), ("chat_template.jinja", 0)]
)
def test_a_damaged_file_of_settings_is_named(tmp_path, name, kept):
    """transformers goes on without a cut generation_config.json, in which the end tokens are."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps({"eos_token_id": [1, 2]})[:kept])
    assert refusal(tmp_path) == f"{name} is damaged ({kept} bytes); copy the model again"
