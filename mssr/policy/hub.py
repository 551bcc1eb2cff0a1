"""Says what is wrong with a hub name before transformers tries, which retries for half a minute and prints each failure."""

from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from mssr.errors import UserError, shortened
from mssr.policy.model_folder import require_whole_settings

CONFIG = "config.json"


def require_model_folder_or_name(path: str) -> None:
    """Refuse a folder without a whole model, a hub name that does not exist, and a hub that cannot be reached.

    One request at most, without a retry; none for a folder or a model in the cache.

    Raises:
        UserError: says which of these it is, and what to do.
    """
    if Path(path).exists():
        if not (Path(path) / CONFIG).is_file():
            raise UserError(f"model.path {path}: no config.json in it; expected a Hugging Face model directory")
        require_whole_settings(Path(path))
        return
    if not _is_hub_name(path):
        hint = "; `make demo` writes the one of configs/tiny.yaml" if path.startswith("runs/") else ""
        raise UserError(f"model.path {path}: no such folder, and no hub name{hint}")
    if isinstance(try_to_load_from_cache(path, CONFIG), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"model.path {path}: no such folder, and not in the hub's cache; HF_HUB_OFFLINE is set: unset it to download"
        )
    try:
        get_hf_file_metadata(hf_hub_url(path, CONFIG))
    except GatedRepoError:
        reason = f"access to it is restricted; ask for it at https://huggingface.co/{path}, then `hf auth login`"
    except RepositoryNotFoundError:
        reason = "no such folder, and no such model on the hub; check the name (a private one needs `hf auth login`)"
    except EntryNotFoundError:
        reason = "has no config.json on the hub; expected a Hugging Face model"
    except Exception as error:  # network: the library passes on what its HTTP client raises
        said = shortened(error, 200) or type(error).__name__
        reason = f"no such folder, and the hub cannot be reached ({said}); give a folder, or check the connection"
    else:
        return
    raise UserError(f"model.path {path}: {reason}")


def _is_hub_name(path: str) -> bool:
    """Whether it is NAME or OWNER/NAME, and does not begin like a path."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not path.startswith((".", "~", "/"))
