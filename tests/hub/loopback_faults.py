"""Ways in which the loopback Hub misbehaves."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler


@dataclass
class Fault:
    """What happens to the next requests of one kind.

    Attributes:
        pattern: regular expression, found in "METHOD /path?query".
        times: how many requests it meets.
        status: answered instead of doing anything; None closes the connection without an answer.
        headers: of the answer, such as Retry-After.
        share: of the request's body that is read before that, in [0, 1].
        done: whether the request is carried out first, so that only its answer is lost.
        first: is called before a request that is then answered as usual: what somebody else does meanwhile.
        met: how many requests it has met.
    """

    pattern: str
    times: int = 1
    status: int | None = 500
    headers: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    done: bool = False
    first: Callable[[], object] | None = None
    met: int = 0

    def meets(self, request: str) -> bool:
        """Whether it happens now; counts."""
        if self.met >= self.times or not re.search(self.pattern, request):
            return False
        self.met += 1
        return True

    def happen(self, handler: BaseHTTPRequestHandler) -> None:
        """Read a part of the body, then answer with the status, or with nothing; the connection ends."""
        size = int(handler.headers.get("Content-Length") or 0)
        handler.rfile.read(int(size * self.share))
        handler.close_connection = True
        if self.status is None:
            return
        body = b'{"error": "made up for a test"}'
        handler.send_response(self.status)
        for name, value in {"Content-Type": "application/json", "Connection": "close", **self.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
