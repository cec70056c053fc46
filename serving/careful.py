"""Decoding in a process that may die: for shards that have killed their worker before.

A picture that makes a decoder crash, run out of memory or never return becomes an error row like any other; it cannot take
the job with it.
"""

from __future__ import annotations

import pickle
import queue
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.data.decode import ImageError
from serving import watchdog
from serving.rows import Seen

if TYPE_CHECKING:
    from serving.decoder import DecoderConfig


class CarefulDecoder:
    """Decodes one picture at a time in a process of its own, which is started again when it dies."""

    def __init__(self, config: DecoderConfig) -> None:
        self._arguments = [str(config.size), config.geometry, str(config.max_pixels), str(int(config.draft))]
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def see(self, data: bytes) -> Seen:
        """As `serving.decoder.Decoder.see`.  Raises `ImageError`, of kind ``undecodable`` when the process dies."""
        with self._lock:
            process = self._process or self._start()
            try:
                _send(process.stdin, data)
                answer = self._answer(process)
            except (OSError, EOFError, struct.error) as error:
                self.close()
                raise ImageError("undecodable", "the decoder died of it") from error
        if isinstance(answer, ImageError):
            raise answer
        return answer

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "serving.careful", *self._arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return self._process

    def _answer(self, process: subprocess.Popen[bytes]) -> Any:
        found: queue.Queue[bytes | None] = queue.Queue()

        def read() -> None:
            try:
                found.put(_receive(process.stdout))
            except (OSError, EOFError, struct.error, ValueError):
                found.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            message = found.get(timeout=watchdog.SECONDS)
        except queue.Empty:
            self.close()
            raise ImageError("undecodable", f"not decoded in {watchdog.SECONDS:.0f} s") from None
        if message is None:
            raise EOFError
        return pickle.loads(message)  # noqa: S301 - of our own child


def _send(stream: BinaryIO | Any, data: bytes) -> None:
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> bytes:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", header)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _serve() -> None:
    from serving.decoder import Decoder, DecoderConfig, single_threaded

    single_threaded()
    size, geometry, max_pixels, draft = sys.argv[1:]
    config = DecoderConfig(size=int(size), geometry=geometry, max_pixels=int(max_pixels), draft=draft == "1")  # type: ignore[arg-type]
    decoder = Decoder(config)
    while True:
        try:
            data = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Seen | ImageError = decoder.see(data)
        except ImageError as error:
            answer = error
        _send(sys.stdout.buffer, pickle.dumps(answer))


if __name__ == "__main__":
    _serve()
