"""Architecture of a model by its path, for planning and tests; two published models are known without the hub."""

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, Qwen2_5_VLConfig

from mssr.errors import UserError, shortened
from mssr.policy.hub import require_model_folder_or_name

# Qwen2.5-VL as published, where it differs from the defaults of its transformers classes.
_TEXT = {
    "max_position_embeddings": 128_000,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
}
_VISION = {"hidden_size": 1280, "tokens_per_second": 2}
_SIZES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11_008,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}


PUBLISHED_PIXELS = (3_136, 12_845_056)  # min_pixels and max_pixels of both in their preprocessor_config.json


def is_published(path: str) -> bool:
    """Whether `path` is the hub name of a model that is known here, and no folder."""
    return path in _SIZES and not Path(path).exists()


def model_config(path: str) -> PretrainedConfig:
    """Return the transformers config of a directory or hub name; the two models above need no hub.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    if is_published(path):
        return _published(path)
    require_model_folder_or_name(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {path}: {shortened(error, 300)}") from None


def _published(name: str) -> Qwen2_5_VLConfig:
    size = _SIZES[name]
    return Qwen2_5_VLConfig(
        text_config=_TEXT | size,
        vision_config=_VISION | {"out_hidden_size": size["hidden_size"]},
        tie_word_embeddings=size["tie_word_embeddings"],
    )
