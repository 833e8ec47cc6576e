"""Fetching files over HTTP so that each is there whole and right, or not there at all.

Every file goes to a temporary name of its own, is checked (size, SHA-256, or what the caller can check) and then
renamed. Transient faults are retried with growing, jittered pauses; what cannot get better (a 404, a full disk) fails
at once. URLs never appear in messages: a signed one is a secret.
"""

import contextlib
import email.utils
import errno
import hashlib
import json
import os
import random
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from nanotrain.errors import DataError, UserError

ATTEMPTS = 5  # in a row without progress
MAX_PAUSE_SECONDS = 60.0
MAX_SERVER_PAUSE_SECONDS = 15 * 60.0
SLOW_BYTES_PER_SECOND, SLOW_SECONDS = 10_000, 60.0
BLOCK_BYTES = 1 << 18
MAX_REDIRECTS = 5
STALE_SECONDS = 3600.0
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHA256 = re.compile(r"[0-9a-f]{64}")
PART_NAME = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{32}\.part")


@dataclass(frozen=True)
class Item:
    """One file to fetch. size and sha256 are None where they are not known beforehand."""

    name: str
    url: str
    size: int | None = None
    sha256: str | None = None


class TransientError(Exception):
    """Something that may go better the next time."""


class ConnectError(TransientError):
    """The host did not answer."""


class StoppedError(Exception):
    """Another thread asked this one to end."""


@dataclass
class Clock:
    """Time and waiting, which a test replaces."""

    now: object = time.monotonic
    wall: object = time.time
    jitter: object = random.random  # of a pause, in [0, 1)
    stop: threading.Event = field(default_factory=threading.Event)
    gate_until: float = 0.0  # no worker starts a request before

    def sleep(self, seconds):
        """Wait, unless asked to stop."""
        if self.stop.wait(seconds):
            raise StoppedError

    def pause_everyone(self, seconds):
        """The host asked for it: no worker goes on before."""
        self.gate_until = max(self.gate_until, self.now() + seconds)

    def pass_gate(self):
        """Wait until a pause that the host asked for is over."""
        while (left := self.gate_until - self.now()) > 0:
            self.sleep(left)


def fetch_all(items, folder, check, on_bytes=None, workers=4, token=None, clock=None):
    """Fetch the items into `folder`, several at a time. Returns {name: reason} of what could not be had.

    check(path) raises DataError for a file that is not what it should be; on_bytes(n) is told of progress, with n < 0
    when a try is lost. `token` goes to the items' own host and nowhere else. On KeyboardInterrupt no temporary file
    stays.
    """
    clock = clock or Clock()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_parts(folder, clock)
    waiting, failed, parts, lock = list(items)[::-1], {}, set(), threading.Lock()

    def work():
        while True:
            with lock:
                if not waiting or clock.stop.is_set():
                    return
                item = waiting.pop()
            try:
                _fetch(item, folder, check, on_bytes or (lambda count: None), token, clock, parts)
            except DataError as error:
                with lock:
                    failed[item.name] = str(error)
                if isinstance(error, FullDiskError):
                    clock.stop.set()
            except StoppedError:
                with lock:
                    failed[item.name] = "stopped"

    # Not a pool: its threads are waited for at exit, and one may sit in a read for a minute.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(waiting)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
    except KeyboardInterrupt:
        clock.stop.set()
        deadline = time.monotonic() + 1
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        for part in list(parts):
            part.unlink(missing_ok=True)
        raise
    for item in waiting:
        failed[item.name] = "not tried"
    return failed


class FullDiskError(DataError):
    """No retry will help."""


class AbsentError(DataError):
    """The host does not have it."""


def _fetch(item, folder, check, on_bytes, token, clock, parts, connect_attempts=ATTEMPTS):
    """Fetch one item, with retries; of a host that does not even answer no more than `connect_attempts`."""
    host = urlsplit(item.url).hostname
    failures, rejected = 0, 0
    while True:
        part = folder / f".{item.name}.{socket.gethostname().replace('.', '-')}.{os.getpid()}.{uuid.uuid4().hex}.part"
        parts.add(part)
        counted = 0

        def count(received):
            nonlocal counted
            counted += received
            on_bytes(received)

        try:
            clock.pass_gate()
            _fetch_once(item, part, token, clock, count)
            try:
                check(part)
            except DataError as error:
                rejected += 1
                if rejected >= 2:
                    raise DataError(f"{item.name} from {host} is not what it should be: {error}") from None
                raise TransientError(str(error)) from None
            os.replace(part, folder / item.name)
            return
        except TransientError as error:
            on_bytes(-counted)
            failures += 1
            if failures >= (connect_attempts if isinstance(error, ConnectError) else ATTEMPTS):
                raise DataError(f"{item.name} from {host}: {error} ({failures} attempts)") from None
            clock.sleep(min(MAX_PAUSE_SECONDS, 2.0 ** (failures - 1)) * (0.5 + 0.5 * clock.jitter()))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FullDiskError(_full_disk(folder, item.size)) from None
            raise DataError(f"{item.name}: {error.strerror}: {folder}") from None
        finally:
            part.unlink(missing_ok=True)
            parts.discard(part)


def _fetch_once(item, part, token, clock, on_bytes):
    """One attempt: request, body, size and hash."""
    import requests  # both are slow to import, and most programs never download
    import urllib3

    try:
        with contextlib.closing(_open(item.url, token, clock)) as response:
            size, sha256 = _expected(item, response)
            if size is not None and shutil.disk_usage(part.parent).free < size:
                raise FullDiskError(_full_disk(part.parent, size))
            received, digest = _receive(response, part, clock, on_bytes)
            kind = response.headers.get("Content-Type", "no content type")
    except (requests.ConnectionError, requests.ConnectTimeout) as error:
        raise ConnectError(f"{host_of(item.url)} cannot be reached ({type(error).__name__})") from None
    except (requests.Timeout, urllib3.exceptions.HTTPError) as error:
        raise TransientError(type(error).__name__) from None
    except requests.RequestException as error:
        raise DataError(f"{item.name}: {type(error).__name__}") from None
    if size is not None and received != size:
        raise TransientError(f"{received} of {size} bytes, {kind}")
    if sha256 is not None and digest != sha256:
        raise TransientError(f"{received} bytes with another SHA-256 than expected, {kind}")


def check_url(url):
    """Raise UserError if `url` is not an https one (or one of this machine), or carries a password."""
    parsed = urlsplit(url)
    local = parsed.scheme == "http" and parsed.hostname in LOOPBACK
    if not parsed.hostname or parsed.username or not (parsed.scheme == "https" or local):
        raise UserError("the host of shards must be given as https://host/path, without a user name or password")


def host_of(url):
    """The host of a URL, which may be shown."""
    return urlsplit(url).netloc


def json_beside(url, token, clock):
    """The JSON document at `url`, or None where the host has none. Raises DataError, soon if the host is silent."""
    with tempfile.TemporaryDirectory() as folder:
        item, found = Item(Path(urlsplit(url).path).name, url), []

        def keep(path):
            with contextlib.suppress(ValueError):
                found.append(json.loads(path.read_bytes()))

        try:
            _fetch(item, Path(folder), keep, lambda count: None, token, clock, set(), connect_attempts=2)
        except AbsentError:
            return None
    return found[0] if found and isinstance(found[0], dict) else None


def size_of(item, token, clock):
    """The size in bytes that the host announces for an item; 0 if it does not, or is not in the mood."""
    with contextlib.suppress(TransientError, DataError), contextlib.closing(_open(item.url, token, clock)) as response:
        return _expected(item, response)[0] or 0
    return 0


def _open(url, token, clock):
    """The response to a GET, after redirects. Raises TransientError or DataError for any status but 200."""
    import requests

    own_host, name = urlsplit(url).netloc, Path(urlsplit(url).path).name
    linked = {}
    for _ in range(MAX_REDIRECTS + 1):
        parsed = urlsplit(url)
        if parsed.scheme != "https" and parsed.hostname not in LOOPBACK:
            raise DataError(f"{name}: {parsed.hostname} without https is refused")
        headers = {"Accept-Encoding": "identity"}
        if token and parsed.netloc == own_host:
            headers["Authorization"] = f"Bearer {token}"
        response = requests.get(url, headers=headers, stream=True, timeout=(10, 60), allow_redirects=False)
        for header in ("X-Linked-Size", "X-Linked-Etag"):
            if header in response.headers:
                linked[header] = response.headers[header]
        if response.status_code == 200:
            response.headers.update(linked)
            return response
        response.close()
        if response.is_redirect:
            url = urljoin(url, response.headers["Location"])
            continue
        _refuse(response, name, parsed.hostname, clock)
    raise DataError(f"{name}: more than {MAX_REDIRECTS} redirects")


def _refuse(response, name, host, clock):
    status = response.status_code
    if status in TRANSIENT_STATUS:
        pause = _asked_pause(response.headers, clock)
        if pause:
            clock.pause_everyone(min(pause, MAX_SERVER_PAUSE_SECONDS) * (1 + 0.1 * clock.jitter()))
        raise TransientError(f"{host} answers {status}")
    if status in (404, 410):
        raise AbsentError(f"{host} answers {status} for {name}")
    fix = ": set HF_TOKEN to a token that may read this data set" if status in (401, 403) else ""
    raise DataError(f"{host} answers {status} for {name}{fix}")


def _asked_pause(headers, clock):
    """The seconds that Retry-After (a number or a date) or RateLimit (t=seconds) ask for, else 0."""
    asked = headers.get("Retry-After", "")
    if asked.strip().isdigit():
        return float(asked)
    with contextlib.suppress(TypeError, ValueError):
        return max(email.utils.parsedate_to_datetime(asked).timestamp() - clock.wall(), 0.0)
    limit = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else 0.0


def _expected(item, response):
    """(size, sha256) that the body must have, as far as the item or the host's headers say."""
    size, sha256 = item.size, item.sha256
    if size is None and response.headers.get("X-Linked-Size", "").isdigit():
        size = int(response.headers["X-Linked-Size"])
    etag = response.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
    if sha256 is None and SHA256.fullmatch(etag):
        sha256 = etag
    if size is None and response.headers.get("Content-Length", "").isdigit():
        size = int(response.headers["Content-Length"])
    return size, sha256


def _receive(response, part, clock, on_bytes):
    """Write the body to `part`, synced; returns (bytes, SHA-256 in hex)."""
    digest, received = hashlib.sha256(), 0
    window_start, window_bytes = clock.now(), 0
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o644)
    with open(handle, "wb") as file:
        while block := response.raw.read1(BLOCK_BYTES):  # what is there: a full block may take a slow host for ever
            if clock.stop.is_set():
                raise StoppedError
            file.write(block)
            digest.update(block)
            received += len(block)
            window_bytes += len(block)
            on_bytes(len(block))
            elapsed = clock.now() - window_start
            if elapsed >= SLOW_SECONDS:
                if window_bytes < SLOW_BYTES_PER_SECOND * elapsed:
                    raise TransientError(f"slower than {SLOW_BYTES_PER_SECOND / 1000:.0f} kB/s for {elapsed:.0f} s")
                window_start, window_bytes = clock.now(), 0
        file.flush()
        os.fsync(file.fileno())
    return received, digest.hexdigest()


def _full_disk(folder, needed):
    free = shutil.disk_usage(folder).free
    asked = f"{needed / 1e6:.1f} MB needed, " if needed else ""
    return f"the disk is full: {asked}{free / 1e6:.1f} MB free in {folder}"


def remove_stale_parts(folder, clock):
    """Remove temporary files of processes that are gone: dead on this host, or untouched for an hour on another."""
    for path in folder.glob(".*.part"):
        match = PART_NAME.fullmatch(path.name)
        if not match:
            continue
        with contextlib.suppress(FileNotFoundError):
            if match["host"] == socket.gethostname().replace(".", "-"):
                gone = not _alive(int(match["pid"]))
            else:
                gone = clock.wall() - path.stat().st_mtime > STALE_SECONDS
            if gone:
                path.unlink()


def _alive(pid):
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False
    except OSError:
        return True
