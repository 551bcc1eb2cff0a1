"""Damaged settings in a model's folder: transformers goes on without some of them, and responses would end elsewhere."""

import json
from pathlib import Path

from mssr.errors import UserError

_JSON = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "model.safetensors.index.json",
)
_TEMPLATE = "chat_template.jinja"


def require_whole_settings(folder: Path) -> None:
    """Raise a UserError that names the first file that is cut or empty. Weights and tokenizer.json say so when they load."""
    for name in filter(lambda name: (folder / name).is_file(), (*_JSON, _TEMPLATE)):
        try:
            content = (folder / name).read_text(encoding="utf-8")
            whole = bool(content.strip()) if name == _TEMPLATE else isinstance(json.loads(content), dict)
        except OSError as error:
            raise UserError(f"model.path {folder}: {name} cannot be read: {error.strerror}") from None
        except ValueError:
            whole = False
        if not whole:
            size = (folder / name).stat().st_size
            raise UserError(f"model.path {folder}: {name} is damaged ({size} bytes); copy the model again")
