"""Prompts that come as messages: verl's and TRL's `prompt`, OpenAI's `messages`, ShareGPT's `conversations`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

IMAGE_MARKER = "<image>"  # where the text puts an image (EasyR1 and verl)
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# Fields of a message that the model would have to see, and that no chat template is given.
_UNREAD = ("tool_calls", "function_call", "tool_call_id", "thinking", "reasoning_content", "audio")


class Unusable(Exception):
    """Says why a row cannot be used; becomes a BadRow where the row's index is known."""


class Turn(NamedTuple):
    """role: system, user or assistant. text: with a marker for every image, or none at all: then all images come first."""

    role: str
    text: str


class Conversation(NamedTuple):
    """turns: up to the last user turn. solution: what the assistant says after it, or None."""

    turns: tuple[Turn, ...]
    solution: str | None


def hoisted(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with the pictures of its messages' content parts in `images`; the parts stay, as places for them.

    Raises:
        Unusable: there are pictures in `images` as well.
    """
    images, messages = [], []
    for message in row["problem"]:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            own = [_own_image(part) for part in content]
            images += [image for image in own if image]
            parts = [{"type": "image"} if image else part for part, image in zip(content, own)]
            message = {**message, "content": parts}
        messages.append(message)
    if not images:
        return row
    if row.get("images"):
        raise Unusable("has pictures in the parts of its messages and in `images`; keep one of them")
    return row | {"problem": messages, "images": images}


def read_conversation(messages: list[Any]) -> Conversation:
    """Return the turns of messages; a last turn of the assistant is the solution.

    Raises:
        Unusable: a message has a role or content that no prompt can have; names the turn.
    """
    turns = [_read_turn(message, number) for number, message in enumerate(messages, start=1)]
    for number, turn in enumerate(turns, start=1):
        if turn.role == "system" and number > 1:
            raise Unusable(f"message {number} is a system turn; only the first can be one: move it there")
    solution = turns.pop().text if turns and turns[-1].role == "assistant" else None
    if not turns or turns[-1].role != "user":
        raise Unusable("its messages have no user turn at the end that the model could answer; remove the row")
    return Conversation(tuple(turns), solution)


def read_completion(value: list[Any]) -> str:
    """Return the text of a solution that comes as messages (TRL's `completion`).

    Raises:
        Unusable: it is anything but one turn of the assistant.
    """
    turns = [_read_turn(message, number) for number, message in enumerate(value, start=1)]
    if [turn.role for turn in turns] != ["assistant"]:
        raise Unusable("`solution` is a list; it must be text, or one message of the assistant")
    return turns[0].text


def is_sharegpt(messages: list[Any]) -> bool:
    return bool(messages) and isinstance(messages[0], Mapping) and "from" in messages[0]


def _read_turn(message: Any, number: int) -> Turn:
    if not isinstance(message, Mapping) or not ("role" in message or "from" in message):
        raise Unusable(
            f"`problem` is a list whose item {number} is no message; it must be text, a number or a list of messages, "
            "each with a role and content"
        )
    given = message.get("role") or message.get("from")
    role = _ROLES.get(given) if isinstance(given, str) else None
    where = f"message {number} ({given})"
    if role is None:
        raise Unusable(f"{where} has a role that is not read; only system, user and assistant are: remove the row")
    for name in _UNREAD:
        if message.get(name):
            raise Unusable(f"{where} has `{name}`, which is not read; remove it, or the row")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    text = content if isinstance(content, str) else _text_of(content, role, where)
    if not text.strip() and role != "system":
        raise Unusable(f"{where} is empty; fill it in or remove the row")
    return Turn(role, text)


def _text_of(content: Any, role: str, where: str) -> str:
    if content is None:
        raise Unusable(f"{where} has no content; fill it in or remove the row")
    if not isinstance(content, list):
        raise Unusable(f"{where} is a {type(content).__name__}; it must be text, or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and kind in ("text", None) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, Mapping) and kind in ("image", "image_url") and role != "assistant":
            texts.append(IMAGE_MARKER)
        else:
            of_role = " of the assistant" if role == "assistant" and kind in ("image", "image_url") else ""
            raise Unusable(f"{where} has a part of type {kind}{of_role}, which is not read; only text and image are")
    return "".join(texts)


def _own_image(part: Any) -> Any:
    """Return the picture in a part, as `image_bytes` takes it; None if it has none, or is no picture."""
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
        return None
    for name in ("image", "image_url", "url", "path"):
        image = part.get(name)
        image = image.get("url") if name == "image_url" and isinstance(image, Mapping) else image
        if image:
            return image
    return {"bytes": part["base64"]} if part.get("base64") else None
