"""Messages between the trainer and a worker, over a socket: four bytes of length, then the message."""

import socket

_CHUNK = 1 << 18
_HEADER = 4


class Channel:
    """One end. `send` and `receive` never wait, unless the receiver asks for it.

    `unsent`: whether `flush` must be called when the socket can be written.
    """

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._received = bytearray()
        self._unsent = bytearray()

    @property
    def unsent(self) -> bool:
        return bool(self._unsent)

    def send(self, message: bytes) -> None:
        self._unsent += len(message).to_bytes(_HEADER, "big") + message
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now."""
        while self._unsent:
            try:
                sent = self.end.send(self._unsent, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            del self._unsent[:sent]

    def send_all(self, message: bytes) -> None:
        """Send the message and wait until the socket has taken it."""
        self.end.sendall(len(message).to_bytes(_HEADER, "big") + message)

    def receive(self, wait: bool = False) -> list[bytes]:
        """Return the messages that have arrived. wait: for at least one part of a message.

        Raises:
            EOFError: the other end is closed.
        """
        try:
            while chunk := self.end.recv(_CHUNK, 0 if wait else socket.MSG_DONTWAIT):
                self._received += chunk
                if wait or len(chunk) < _CHUNK:
                    return self._complete()
        except BlockingIOError:
            return self._complete()
        except ConnectionResetError:
            pass
        if messages := self._complete():
            return messages
        raise EOFError

    def _complete(self) -> list[bytes]:
        messages, start, received = [], 0, self._received
        while len(received) >= start + _HEADER:
            end = start + _HEADER + int.from_bytes(received[start : start + _HEADER], "big")
            if len(received) < end:
                break
            messages.append(bytes(received[start + _HEADER : end]))
            start = end
        del received[:start]
        return messages
