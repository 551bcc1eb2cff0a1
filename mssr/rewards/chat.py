"""Asks a model at an OpenAI-compatible address, few requests at a time, and says what to do where that fails.

The `openai` client asks again, after growing pauses or when the server says so, where the address does not answer, is
overloaded (429) or has an error of its own (5xx).
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from mssr.errors import UserError, shortened
from mssr.extras import what_to_install


class Chat:
    """For one event loop. concurrency: most requests at a time. retries: how often a request is made again.

    key: (environment variable, its value) of the API key, or None.
    """

    def __init__(
        self, url: str, *, key: tuple[str, str] | None, timeout_s: float, retries: int, concurrency: int
    ) -> None:
        """Nothing is asked yet.

        Raises:
            UserError: the client is not installed.
        """
        try:
            import openai
        except ModuleNotFoundError:
            raise UserError(what_to_install("openai")) from None
        self._openai = openai
        self._url, self._key, self._timeout_s, self._retries = url, key and key[0], timeout_s, retries
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=key[1] if key else "none",  # the client wants one
            timeout=timeout_s,
            max_retries=retries,
            http_client=openai.DefaultAsyncHttpxClient(),  # its own one closes itself, maybe in another event loop
        )
        self._places = asyncio.Semaphore(concurrency)

    async def ask(self, request: Mapping[str, Any]) -> str:
        """Return the model's reply. request: model, messages and any other fields.

        Raises:
            UserError: there is none; one line that says what to do.
        """
        openai, where = self._openai, f"the judge at {self._url}"
        others = {name: value for name, value in request.items() if name not in ("model", "messages")}
        try:
            async with self._places:
                found = await self._client.chat.completions.create(
                    model=request["model"], messages=request["messages"], extra_body=others
                )
            reply = found.choices[0].message.content or ""
        except openai.APITimeoutError:
            raise UserError(
                f"{where}: no reply within {self._timeout_s:g} s, asked {self._retries + 1} times; "
                "raise request_timeout_s, or lower concurrency"
            ) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {shortened(cause)}"
            raise UserError(f"{where}: not reachable ({reason}); start the server, or correct url") from None
        except openai.APIStatusError as error:
            remedy = self._remedy(error.status_code, request["model"])
            raise UserError(f"{where}: HTTP {error.status_code}: {_said(error)}; {remedy}") from None
        except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: its reply is no chat completion ({type(error).__name__}: {shortened(error)}); "
                "url must be an OpenAI-compatible address, up to /v1"
            ) from None
        return reply

    def _remedy(self, status: int, model: str) -> str:
        match status:
            case 401 | 403 if self._key is None:
                return "name the environment variable with its API key as `key`"
            case 401 | 403:
                return f"check the API key in {self._key}"
            case 404:
                return f"{self._url.rstrip('/')}/models lists its models; is {model!r} one, and does url end with /v1?"
            case 429 | 500 | 502 | 503 | 504:
                return f"asked {self._retries + 1} times; lower concurrency, or raise retries"
            case _:
                return "it does not accept the request; check template, images and request"


def _said(error: Any) -> str:
    """Return the server's own words."""
    body = error.body
    return shortened((body.get("message") if isinstance(body, dict) else None) or error.message, 200)
