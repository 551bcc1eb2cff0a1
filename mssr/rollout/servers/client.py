"""HTTP calls to one vLLM server or to all of them at once, and when a server counts as lost."""

import asyncio
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp  # a requirement of vLLM and of datasets

from mssr.errors import UserError, shortened


@dataclass(eq=False)
class ServerLost(Exception):
    """A server can no longer be used: it refuses or resets connections, is silent, or reports a failure of its own (5xx)."""

    server: str
    reason: str

    def __str__(self) -> str:
        return f"{self.server}: {self.reason}"


def not_listening(servers: Iterable[str], timeout_s: float = 1.0) -> dict[str, str]:
    """Return the servers that accept no connection, which may still be starting, with the reason.

    Raises:
        UserError: an address that can never be one: an unknown host, a port above 65535.
    """
    missing = {}
    for server in servers:
        try:
            address = urlsplit(server)
            socket.create_connection((address.hostname, address.port), timeout_s).close()
        except (socket.gaierror, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"rollout.servers {server}: {reason}; correct the address") from None
        except OSError as error:
            missing[server] = error.strerror or str(error)
    return missing


@asynccontextmanager
async def http_session():
    # One connection per request: a server closes an idle one after seconds, and a request sent at that moment would look
    # like a server that died.
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
    """Return the decoded answer; None for an empty one, and with `missing_ok` if the server has no such path.

    server: http://host:port. body: sent as JSON.

    Raises:
        ServerLost: the server can no longer be used.
        UserError: the server refuses this request (4xx); quotes its answer.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.request(method, server + path, json=body, timeout=timeout) as answer:
            text = await answer.text()
            if answer.status >= 500:
                raise ServerLost(server, f"{path} failed with {answer.status}: {shortened(text, 300)}")
            if missing_ok and answer.status in (404, 405):
                return None
            if answer.status != 200:
                raise UserError(
                    f"rollout.servers {server}: {path} was refused with {answer.status}: {shortened(text, 300)}; "
                    "is it a server that this trainer's `mssr serve` started with this config?"
                )
            return await answer.json(content_type=None) if text else None
    except TimeoutError:
        raise ServerLost(server, f"no answer to {path} within {timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise ServerLost(server, shortened(error, 300) or type(error).__name__) from None
    except ValueError:  # neither JSON nor text
        raise UserError(f"rollout.servers {server}: {path} does not answer as vLLM does") from None


def call_all(
    servers: Mapping[str, Any], path: str, *, on_lost: Callable[[], None] = lambda: None, **settings
) -> dict[str, Any]:
    """`call` all servers at the same time and return their answers, or the ServerLost of one that is lost.

    servers: address to body. on_lost: called as soon as one is lost, while other answers may still be awaited.
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
