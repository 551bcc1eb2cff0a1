"""`mssr push`: uploads a run's model, or a checkpoint, with its card to the Hugging Face hub."""

import json
from contextlib import ExitStack
from dataclasses import replace as changed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from mssr.config import Config
from mssr.errors import UserError, shortened
from mssr.observe.metrics import FILE_NAME, read_metrics
from mssr.outputs import is_foreign
from mssr.training.card import model_card
from mssr.training.export import export, saved_config
from mssr.training.run import CURVES
from mssr.training.summary import CARD, SUMMARY, summarise

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def push(
    run_dir: Path,
    name: str,
    *,
    step: int | None = None,
    adapter: bool = False,
    private: bool = False,
    update: bool = False,
) -> str:
    """Create the repository `name` on the hub and upload the model with its card; return its address.

    step: of the checkpoint to export and upload; None: what the run wrote at its end.
    adapter: upload the LoRA adapter instead of the model.
    private: only for the owner. update: the repository is there; add a commit that replaces files of the same names.

    Raises:
        UserError: no such run, model or checkpoint; no token; the repository is there already, or is not there, or may
            not be written; no connection.
    """
    if private and update:
        raise UserError("--private: a repository that is there keeps its visibility; leave out --private or --update")
    config = saved_config(run_dir)
    _require_access(name)
    kind = "adapter" if adapter else "model"
    with ExitStack() as opened:
        if step is None:
            folder = run_dir / kind
            if not folder.is_dir():
                other = "was trained without model.lora" if adapter and not config.model.lora else "has not ended"
                raise UserError(f"{folder}: not there: the run {other}; push a checkpoint with --step")
            upload = Path(opened.enter_context(TemporaryDirectory(prefix="mssr_push_")))
            _link_files(folder, upload)
        else:
            upload = Path(opened.enter_context(TemporaryDirectory(prefix=".push_", dir=run_dir))) / kind
            export(run_dir, upload, step=step, adapter=adapter)
        _write_card(run_dir, config, upload, name, step, adapter)
        return _upload(upload, name, step, private=private, update=update)


def _require_access(name: str) -> None:
    """Refuse what can be refused without a request."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: no name for the hub, which is OWNER/NAME: {shortened(error, 200)}") from None
    if "/" not in name:  # the hub would add the token's owner, and the card would name another repository
        raise UserError(f"{name}: no owner; name the repository OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push")
    if get_token() is None:
        raise UserError(f"no token for the hub; {LOG_IN}")


def _link_files(folder: Path, upload: Path) -> None:
    """Fill `upload` with links to the folder's files, except those that `_write_card` writes."""
    for file in folder.rglob("*"):
        place = upload / file.relative_to(folder)
        if file.is_file() and str(file.relative_to(folder)) not in (CARD, CURVES):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file.resolve())


def _write_card(run_dir: Path, config: Config, upload: Path, name: str, step: int | None, adapter: bool) -> None:
    """Write the card for the hub and its picture; a card that somebody edited stays as it is."""
    if picture := (run_dir / CURVES).is_file():
        (upload / CURVES).write_bytes((run_dir / CURVES).read_bytes())
    if step is None and not adapter and (run_dir / CARD).is_file() and is_foreign(run_dir, CARD):
        (upload / CARD).write_bytes((run_dir / CARD).read_bytes())
        return
    records = read_metrics(run_dir / FILE_NAME)
    if step is not None:
        records = [record for record in records if record["step"] <= step]
    if any("sft/loss" in record for record in records):
        raise UserError(
            f"{run_dir}: a warm start by `mssr sft`, which has no card; `hf upload {name} {run_dir}/model` does"
        )
    summary = changed(summarise(config, records), **_known_of_the_run(run_dir))
    title = name.rpartition("/")[2]
    text = model_card(config, records, summary, name=title, path=name, adapter=adapter, picture=picture)
    (upload / CARD).write_text(text, encoding="utf-8")


def _known_of_the_run(run_dir: Path) -> dict[str, Any]:
    """Return what summary.json has and the metrics have not; nothing of a run that did not end."""
    try:
        found = json.loads((run_dir / SUMMARY).read_text())
        return {name: found[name] for name in ("rollout_engine", "ranks", "command", "versions")}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError):
        raise UserError(f"{run_dir / SUMMARY}: damaged; restore it, or remove it") from None


def _upload(folder: Path, name: str, step: int | None, *, private: bool, update: bool) -> str:
    api = HfApi()
    try:
        api.repo_info(name) if update else api.create_repo(name, private=private or None)
    except Exception as error:
        raise UserError(f"{name}: {_reason(error, name)}") from None
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"mssr: uploading {len(files)} files, {size / 2**20:,.1f} MiB, to {api.endpoint}/{name}", flush=True)
    what = "Upload of mssr push" if step is None else f"Checkpoint of step {step}, by mssr push"
    try:
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=what)
    except Exception as error:
        again = "" if update else "; the repository is there now: push again with --update"
        raise UserError(f"{name}: {_reason(error, name)}{again}") from None
    return f"{api.endpoint}/{name}"


def _reason(error: Exception, name: str) -> str:
    """Return what is wrong and what to do. The library passes on what its HTTP client and its storage client raise."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = shortened(getattr(error, "server_message", None) or error, 300) or type(error).__name__
    if status == 401:
        return f"the hub does not accept the token; {LOG_IN}"
    if status == 403:
        return f"the token may not write there ({said}); check the owner in the name, and the token's permissions"
    if status == 404:
        return f"no such repository ({said}); push without --update to create it"
    if status == 409:
        return "already there; name a new repository, or add a commit to this one with --update"
    if status is not None:
        return f"the hub refused ({status}): {said}"
    return f"the hub cannot be reached, or the upload failed ({said}); check the connection and HF_ENDPOINT"
