"""A tracker on loopback that fails as real ones do, and the sink plug-in that delivers to it.

The server reads a whole request before it commits it, and then does what its plan says: answer; commit and never
answer, so that the client times out; answer 500; answer 429 with Retry-After. What it committed it keeps in order,
with the request each row came in: every row that is there twice can be asked why.

The plug-in is a package of its own, found through the entry-point group `ddplog.sinks`: `tracker://host:port/path`.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Row = tuple[int, str, int, float, int, int]
"""id, key, step, value, n, time_unix_ns."""

PLUGIN = """
import http.client, json, os, sys
from ddplog.core.delivery import Limits, Point
from ddplog.errors import PermanentSinkError, RetryableSinkError
from ddplog.sinks import Capabilities

class TrackerSink:
    capabilities = Capabilities(can_overwrite=True, promise="as the server has it")
    limits = Limits(max_items=int(os.environ.get("TRACKER_ITEMS", "1000")))
    detail = ""

    def __init__(self, target=""):
        self._address, _, self._path = target.partition("/")
        self._timeout_s = float(os.environ["TRACKER_TIMEOUT_S"])
        self._connection = None
        self._unanswered = None

    def open(self, run, folder, position):
        self._position = position or {"posts": 0}

    def write(self, batch):
        rows = [(e.id, e.key, e.step, e.value, e.n, e.time_unix_ns) for e in batch if type(e) is Point]
        bounds = [batch[0].id, batch[-1].id]
        headers = {"X-Pid": str(os.getpid()), "X-Unanswered": str(int(self._unanswered == bounds))}
        try:
            status, after_s = self._post(json.dumps(rows), headers)
        except (OSError, http.client.HTTPException) as exc:
            self._connection, self._unanswered = None, bounds
            raise RetryableSinkError(f"no answer: {exc!r}") from exc
        if status in (429, 500):
            raise RetryableSinkError(str(status), after_s)
        if status != 200:
            raise PermanentSinkError(str(status))
        self._unanswered = None
        self._position = {"posts": self._position["posts"] + 1}
        return self._position

    def _post(self, body, headers):
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._address, timeout=self._timeout_s)
        self._connection.request("POST", "/" + self._path, body, headers)
        answer = self._connection.getresponse()
        answer.read()
        wish = answer.getheader("Retry-After")
        return answer.status, float(wish) if wish else None

    def close(self, status):
        pass
"""


def install_plugin(folder: Path) -> Path:
    """Write the plug-in as an installed package; return what has to be on PYTHONPATH."""
    site = folder / "site"
    info = site / "tracker_sink-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "tracker_sink.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tracker-sink\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ddplog.sinks]\ntracker = tracker_sink:TrackerSink\n")
    return site


@dataclass(frozen=True, slots=True)
class Post:
    """A request that was committed."""

    pid: int
    rows: tuple[Row, ...]
    is_retry: bool
    """The sink had sent the same batch before, and a time got no answer."""


@dataclass(slots=True)
class Project:
    """What one path of the tracker has.

    Args:
        is_keyed: A row whose id is there already changes nothing; it has to be the same row. Else rows are appended.
        plan: (probability, what) of commit-and-timeout, 500, 429; the rest is answered.
        seed: Of the plan's chance.
    """

    is_keyed: bool
    plan: tuple[tuple[float, str], ...] = ()
    seed: int = 0
    table: dict[int, Row] = field(default_factory=dict)
    """What a keyed one has."""
    posts: list[Post] = field(default_factory=list)
    """Every commit, in order: what one that appends has."""
    seen: Counter[str] = field(default_factory=Counter)
    is_hanging: threading.Event = field(default_factory=threading.Event)
    was_released: threading.Event = field(default_factory=threading.Event)
    last_pid: int = 0
    """Of the newest request."""
    _chance: random.Random = field(init=False)
    _not_before: dict[int, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def take(self, pid: int, rows: list[Row], *, is_retry: bool) -> tuple[str, float]:
        """Take a request; return what to do with it, and after how long the client may come again."""
        with self._lock:
            self.seen["requests"] += 1
            self.last_pid = pid
            # A lower bound only, so that it holds on a slow machine too.
            self.seen["too early after 429"] += time.monotonic() < self._not_before.pop(pid, 0.0)
            draw = self._chance.random()
            what = "200"
            for probability, name in self.plan:
                if draw < probability:
                    what = name
                    break
                draw -= probability
            self.seen[what] += 1
            if what in ("200", "timeout"):
                self.posts.append(Post(pid, tuple(rows), is_retry))
                if self.is_keyed:
                    self.seen["wrong"] += sum(self.table.setdefault(row[0], row) != row for row in rows)
            after_s = self._chance.uniform(0.05, 0.3) if what == "429" else 0.0
            if what == "429":
                self._not_before[pid] = time.monotonic() + after_s - 0.001  # the header has milliseconds
            return what, after_s


class Tracker:
    """The server; `projects` by path."""

    def __init__(self, projects: dict[str, Project]) -> None:
        self.projects = projects
        self.is_over = threading.Event()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve; gives host:port."""
        tracker = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                tracker.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that was killed in the midst of a request is what this is about."""

        with Server(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            thread.start()
            try:
                yield f"127.0.0.1:{server.server_port}"
            finally:
                self.is_over.set()
                for project in self.projects.values():
                    project.was_released.set()
                server.shutdown()
                thread.join()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Handle one request, in a thread of its connection."""
        project = self.projects[handler.path.strip("/")]
        size = int(handler.headers["Content-Length"])
        body = handler.rfile.read(size)
        if len(body) < size:  # killed while it sent
            handler.close_connection = True
            return
        if project.is_hanging.is_set():
            project.seen["hung"] += 1
            project.was_released.wait()
            handler.close_connection = True
            return
        rows = [tuple(row) for row in json.loads(body)]
        is_retry = handler.headers["X-Unanswered"] == "1"
        what, after_s = project.take(int(handler.headers["X-Pid"]), rows, is_retry=is_retry)
        if what == "timeout":
            handler.connection.settimeout(60)
            handler.rfile.read(1)  # until the client has had enough, or was killed
            handler.close_connection = True
            return
        handler.send_response(int(what))
        if what == "429":
            handler.send_header("Retry-After", f"{after_s:.3f}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
