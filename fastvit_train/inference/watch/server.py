"""Show the runs in a folder on a page of this machine, and their curves as they come. The verb `watch`."""

import errno
import signal
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from threading import Thread
from urllib.parse import parse_qs

from fastvit_train.inference.watch.answers import TEXT, Answer, answer
from fastvit_train.inference.watch.listing import RunList, digest
from fastvit_train.runs.results import RUN_FILES
from fastvit_train.utils.errors import UserError, printable

HOST = "127.0.0.1"
MAX_PORT = 65535
METHODS = ("GET", "HEAD")
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def serve(runs_dir: Path, port: int) -> None:
    """Serve a page about the runs in a folder until Ctrl-C or SIGTERM; nothing is written.

    Args:
        runs_dir: the folder that holds the runs, or folders of runs, such as those of sweeps.
        port: the port on 127.0.0.1, which other machines can't reach; 0 takes one that is free.

    Raises:
        UserError: if the folder does not exist, or if the port can't be used.
        KeyboardInterrupt: after Ctrl-C.
    """
    _check_folder(runs_dir)
    with _listen(runs_dir, port) as server:
        # `shutdown` waits for the loop below, which this handler interrupts: it needs a thread of its own.
        signal.signal(signal.SIGTERM, lambda *_: Thread(target=server.shutdown).start())
        print(f"watching {printable(str(runs_dir))} at {server.url} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


class WatchServer(ThreadingHTTPServer):
    """Server of the page about the runs in `runs`, on this machine alone.

    Args:
        runs: the runs to show.
        port: the port, or 0 for one that is free.
    """

    daemon_threads = True
    allow_reuse_port = False

    def __init__(self, runs: RunList, port: int) -> None:
        self.runs = runs
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        """Bind without looking up the name of this machine, which HTTPServer does and which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Report an error of a request, unless the browser has hung up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: WatchServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fastvit", ""
    timeout = 60  # a connection that is silent for so long is closed, and the browser opens another one

    def parse_request(self) -> bool:
        """Read a request; False if it is answered already, because it is not allowed."""
        if not super().parse_request():
            return False
        if not self._is_ours():
            self.send_error(
                HTTPStatus.FORBIDDEN,
                f"only {self.server.url} itself may ask; open that address in a browser, and with ssh forward the "
                f"same port: ssh -L {self.server.server_port}:{HOST}:{self.server.server_port} MACHINE",
            )
        elif self.command not in METHODS:
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is not allowed; this page only reads")
        else:
            return True
        return False

    def _is_ours(self) -> bool:
        """Return whether a request is from our page or from the address bar, under one of our own names.

        A page of another site can lead the browser here, even under a name of its own that it lets point to 127.0.0.1.
        """
        host, port = self.headers.get("Host"), self.server.server_port
        return (
            host in (f"{HOST}:{port}", f"localhost:{port}")
            and self.headers.get("Origin") in (None, f"http://{host}")
            and self.headers.get("Sec-Fetch-Site") in (None, "none", "same-origin")
        )

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        try:
            found = answer(path, self.server.runs, parse_qs(query).get("run", []))
        except UserError as error:
            self.send_error(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except FileNotFoundError:  # a run may be removed at any time
            self.send_error(HTTPStatus.NOT_FOUND, f"there is nothing at this address; go to {self.server.url}")
        except OSError as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"a file can't be read: {error}")
        else:
            self._send(HTTPStatus.OK, found)

    do_HEAD = do_GET

    def _send(self, status: HTTPStatus, found: Answer) -> None:
        """Send an answer, or only that the browser has it already."""
        tag = f'"{digest(found.content)}"'
        if status == HTTPStatus.OK and self.headers.get("If-None-Match") == tag:
            status = HTTPStatus.NOT_MODIFIED
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", found.policy)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", ", ".join(METHODS))
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", f"{found.type}; charset=utf-8")
            self.send_header("Content-Length", str(len(found.content)))
        self.send_header("ETag", tag)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if status != HTTPStatus.NOT_MODIFIED and self.command != "HEAD":
            self.wfile.write(found.content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error as a line of text; the base class calls this too, for requests that it can't read."""
        status = HTTPStatus(code)
        self.close_connection = True  # what follows the request, such as a form, has not been read
        self._send(status, Answer(f"{message or status.phrase}\n".encode(errors="backslashreplace"), TEXT))

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the page asks every few seconds."""


def _check_folder(runs_dir: Path) -> None:
    if not runs_dir.is_dir():
        reason = "is not a folder" if runs_dir.exists() else "does not exist"
        raise UserError(
            f"{runs_dir} {reason}; give the folder that holds the runs, as in: watch runs, which a training writes"
        )
    if any((runs_dir / name).exists() for name in RUN_FILES):
        raise UserError(f"{runs_dir} is a run; give the folder that holds it: watch {runs_dir.resolve().parent}")


def _listen(runs_dir: Path, port: int) -> WatchServer:
    allowed = f"allowed: 1 to {MAX_PORT}, or 0, which takes one that is free"
    if not 0 <= port <= MAX_PORT:
        raise UserError(f"--port {port} is out of range; {allowed}")
    try:
        return WatchServer(RunList(runs_dir), port)
    except OSError as error:
        reason = "in use" if error.errno == errno.EADDRINUSE else f"not available ({error.strerror})"
        raise UserError(f"--port {port} is {reason}; give another one; {allowed}") from None
