"""HTTP to vLLM servers: one call to one, one call to all of them at once, and what counts as a server that is lost."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp  # a requirement of vLLM and of datasets

from mssr.errors import UserError


@dataclass(eq=False)
class ServerLost(Exception):
    """A server that cannot be counted on any more: it refuses, resets, is silent, or fails by its own account (5xx)."""

    server: str
    reason: str

    def __str__(self) -> str:
        return f"{self.server}: {self.reason}"


@asynccontextmanager
async def http_session():
    # A connection for each request: one that idles is closed by the server after seconds, and a request on its way at
    # that moment would look like a server that died.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        yield session


async def call(
    session: aiohttp.ClientSession,
    server: str,
    path: str,
    body: Any = None,
    *,
    method: str = "POST",
    timeout_s: float | None = None,
    missing_ok: bool = False,
) -> Any:
    """The decoded answer; None for an empty one, and with `missing_ok` where the server knows no such path.

    server: http://host:port. body: sent as JSON.

    Raises:
        ServerLost: see there.
        UserError: the server refuses this very request (4xx), with its own words.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.request(method, server + path, json=body, timeout=timeout) as answer:
            text = await answer.text()
            if answer.status >= 500:
                raise ServerLost(server, f"{path} failed with {answer.status}: {_line(text)}")
            if missing_ok and answer.status in (404, 405):
                return None
            if answer.status != 200:
                raise UserError(
                    f"rollout.servers {server}: {path} was refused with {answer.status}: {_line(text)}; "
                    "is it a server that this trainer's `mssr serve` started with this config?"
                )
            return await answer.json(content_type=None) if text else None
    except TimeoutError:
        raise ServerLost(server, f"no answer to {path} within {timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise ServerLost(server, _line(str(error)) or type(error).__name__) from None
    except ValueError:  # neither JSON nor text
        raise UserError(f"rollout.servers {server}: {path} answers in no format of vLLM's") from None


def call_all(
    servers: Mapping[str, Any], path: str, *, on_lost: Callable[[], None] = lambda: None, **settings
) -> dict[str, Any]:
    """`call` to all servers at the same time; their answers, where one is lost its ServerLost.

    servers: address to body. on_lost: called at the moment one is lost, while others may still be waited for.
    """

    async def one(session: aiohttp.ClientSession, server: str, body: Any) -> Any:
        try:
            return await call(session, server, path, body, **settings)
        except ServerLost:
            on_lost()
            raise

    async def everyone() -> list[Any]:
        async with http_session() as session:
            calls = [one(session, server, body) for server, body in servers.items()]
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = dict(zip(servers, asyncio.run(everyone()), strict=True))
    for answer in answers.values():
        if isinstance(answer, BaseException) and not isinstance(answer, ServerLost):
            raise answer
    return answers


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
