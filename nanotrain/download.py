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
import logging
import os
import random
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from nanotrain.errors import DataError, UserError
from nanotrain.files import STALE_SECONDS

ATTEMPTS = 5  # for one file
WRONG_CONTENT_ATTEMPTS = 2
FIRST_CONTACT_SECONDS = 2.0  # after which a host that nobody has reached yet is given up
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
MAX_PAUSE_SECONDS = 60.0
MAX_SERVER_PAUSE_SECONDS = 15 * 60.0
SLOW_BYTES_PER_SECOND, SLOW_SECONDS = 10_000, 60.0
BLOCK_BYTES = 1 << 18
MAX_REDIRECTS = 5
NOT_TRIED = "not tried"
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHA256 = re.compile(r"[0-9a-f]{64}")
PART_NAME = re.compile(r"\..+?(?:\.(?P<host>[^.]+)\.(?P<pid>\d+))?\.[0-9a-f]{32}\.part")


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
    """There is no connection to the host."""


class WrongContentError(TransientError):
    """A whole answer that is not the file, as the login page of a hotel is."""


class StoppedError(Exception):
    """Another thread asked this one to end."""


@dataclass
class Clock:
    """Time and waiting, which a test replaces."""

    now: Callable[[], float] = time.monotonic  # seconds
    wall: Callable[[], float] = time.time  # seconds since 1970
    jitter: Callable[[], float] = random.random  # of a pause, in [0, 1)
    stop: threading.Event = field(default_factory=threading.Event)
    gate_until: float = 0.0  # no worker starts a request before

    def sleep(self, seconds: float) -> None:
        """Wait, unless asked to stop."""
        if self.stop.wait(seconds):
            raise StoppedError

    def pause_everyone(self, seconds: float) -> None:
        """The host asked for it: no worker goes on before."""
        self.gate_until = max(self.gate_until, self.now() + seconds)

    def pass_gate(self) -> None:
        """Wait until a pause that the host asked for is over."""
        while (left := self.gate_until - self.now()) > 0:
            self.sleep(left)


def fetch_all(
    items: Iterable[Item],
    folder: str | Path,
    check: Callable[[Path], object],
    on_bytes: Callable[[int], object] | None = None,
    workers: int = 4,
    token: str | None = None,
    clock: Clock | None = None,
    first_contact: bool = False,
) -> tuple[dict[str, str], dict[str, str]]:
    """Fetch the items into `folder`, several at a time.

    Returns ({name: SHA-256} of what was fetched, {name: reason} of what could not be had). check(path) raises DataError
    for a file that is not what it should be; on_bytes(n) is told of progress, with n < 0 when a try is lost. `token`
    goes to the items' own host and nowhere else. At the first contact a silent host is given up soon. On
    KeyboardInterrupt no temporary file stays.
    """
    clock = clock or Clock()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_parts(folder, clock)
    waiting, done, failed, parts, lock = list(items)[::-1], {}, {}, set(), threading.Lock()

    def report(count):
        with lock:
            if on_bytes:
                on_bytes(count)

    def work():
        while True:
            with lock:
                if not waiting or clock.stop.is_set():
                    return
                item = waiting.pop()
            try:
                done[item.name] = _fetch(item, folder, check, report, token, clock, parts, first_contact)
            except DataError as error:
                failed[item.name] = str(error)
                if isinstance(error, FullDiskError):
                    clock.stop.set()
            except StoppedError:
                return

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
        raise
    finally:
        for part in list(parts):
            part.unlink(missing_ok=True)
    return done, {item.name: failed.get(item.name, NOT_TRIED) for item in items if item.name not in done}


class FullDiskError(DataError):
    """No retry will help."""


class AbsentError(DataError):
    """The host does not have it, or does not show it."""


def _fetch(item, folder, check, on_bytes, token, clock, parts, first_contact=False):
    """Fetch one item, with retries; returns its SHA-256. At the first contact a silent host is given up soon."""
    host, begin, failures = host_of(item.url), clock.now(), Counter()
    while True:
        part = folder / f".{item.name}.{socket.gethostname().replace('.', '-')}.{os.getpid()}.{uuid.uuid4().hex}.part"
        parts.add(part)
        counted = []
        try:
            clock.pass_gate()
            connect_seconds = FIRST_CONTACT_SECONDS if first_contact else CONNECT_SECONDS
            digest = _fetch_once(item, part, check, token, clock, counted, on_bytes, connect_seconds)
            os.replace(part, folder / item.name)
            counted.clear()
            return digest
        except TransientError as error:
            failures[type(error)] += 1
            pause = min(MAX_PAUSE_SECONDS, 2.0 ** (failures.total() - 1)) * (0.5 + 0.5 * clock.jitter())
            silent = first_contact and isinstance(error, ConnectError)
            if (
                failures.total() >= ATTEMPTS
                or failures[WrongContentError] >= WRONG_CONTENT_ATTEMPTS
                or (silent and clock.now() + pause > begin + FIRST_CONTACT_SECONDS)
            ):
                raise DataError(f"{item.name} from {host}: {error} ({failures.total()} attempts)") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FullDiskError(full_disk(folder, item.size)) from None
            raise DataError(f"{item.name}: {error.strerror}: {folder}") from None
        finally:
            on_bytes(-sum(counted))
            part.unlink(missing_ok=True)
            parts.discard(part)
        clock.sleep(pause)


def _fetch_once(item, part, check, token, clock, counted, on_bytes, connect_seconds):
    """One attempt: request, body, size, hash and the caller's check; returns the SHA-256."""
    with _plain_errors(item), contextlib.closing(_open(item.url, token, clock, connect_seconds)) as response:
        size, sha256 = _expected(item, response)
        if size is not None and shutil.disk_usage(part.parent).free < size:
            raise FullDiskError(full_disk(part.parent, size))
        received, digest = _receive(response, part, size, clock, counted, on_bytes)
        kind = response.headers.get("Content-Type", "no content type")
    if size is not None and received != size:
        wrong = f"{received} of {size} bytes"
    elif sha256 is not None and digest != sha256:
        wrong = f"{received} bytes with another SHA-256 than expected"
    else:
        try:
            check(part)
            return digest
        except DataError as error:
            wrong = str(error).replace(str(part), "it").removesuffix(": delete it and get it again")
    with open(part, "rb") as file:
        start = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in file.read(80))
    page = kind.startswith(("text/html", "application/json")) and not item.name.endswith(".json")
    whole = size is None or received == size
    raise (WrongContentError if whole or page else TransientError)(f"{wrong}; {_printable(kind)}, begins {start!r}")


@contextlib.contextmanager
def _plain_errors(item):
    """Turn the errors of requests and urllib3, whose texts hold URLs, into ours, which do not."""
    import requests  # both are slow to import, and most programs never download
    import urllib3

    try:
        yield
    except ValueError as error:  # a redirect to what is no URL
        raise DataError(f"{item.name}: {type(error).__name__}") from None
    except requests.ConnectionError as error:
        cause = error.args[0] if error.args else error
        if isinstance(cause, urllib3.exceptions.ProtocolError):  # there was a connection
            raise TransientError(f"the connection broke ({type(cause).__name__})") from None
        reason = type(getattr(cause, "reason", cause)).__name__
        raise ConnectError(f"{host_of(item.url)} cannot be reached ({reason})") from None
    except (requests.Timeout, urllib3.exceptions.HTTPError) as error:
        raise TransientError(f"the connection broke ({type(error).__name__})") from None
    except requests.RequestException as error:
        raise DataError(f"{item.name}: {type(error).__name__}") from None


def check_url(url: str) -> None:
    """Raise UserError if `url` is not an https one (or one of this machine), or carries a password."""
    parsed = urlsplit(url)
    local = parsed.scheme == "http" and parsed.hostname in LOOPBACK
    if not parsed.hostname or "@" in parsed.netloc or not (parsed.scheme == "https" or local):
        raise UserError("the host of shards must be given as https://host/path, without a user name or password")


def host_of(url: str) -> str:
    """The host of a URL, which may be shown."""
    return urlsplit(url).netloc


def json_beside(url: str, token: str | None, clock: Clock) -> dict | None:
    """The JSON document at `url`, or None where the host has none. Raises DataError, soon if the host is silent."""
    item, found = Item(Path(urlsplit(url).path).name, url), []

    def keep(path):
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(path.read_bytes()))
        if not found or not isinstance(found[-1], dict):
            raise DataError("no JSON object")

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(AbsentError):
        _fetch(item, Path(folder), keep, lambda count: None, token, clock, set(), first_contact=True)
    return found[-1] if found else None


def size_of(item: Item, token: str | None, clock: Clock) -> int:
    """The size in bytes that the host announces for an item; 0 if it does not, or is not in the mood."""
    with contextlib.suppress(TransientError, DataError), _plain_errors(item):
        with contextlib.closing(_open(item.url, token, clock)) as response:
            return _expected(item, response)[0] or 0
    return 0


def _open(url, token, clock, connect_seconds=CONNECT_SECONDS):
    """The response to a GET, after redirects. Raises TransientError or DataError for any status but 200."""
    import requests

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a warning of it shows the URL
    own, name = urlsplit(url), Path(urlsplit(url).path).name
    linked, secure = {}, False
    for _ in range(MAX_REDIRECTS + 1):
        parsed = urlsplit(url)
        if parsed.scheme == "https":
            secure = True
        elif secure or parsed.hostname not in LOOPBACK:
            raise DataError(f"{name}: a redirect to {_printable(parsed.hostname)} without https is refused")
        headers = {"Accept-Encoding": "identity"}
        if token and parsed.netloc == own.netloc:
            headers["Authorization"] = f"Bearer {token}"
        response = requests.get(
            url,
            headers=headers,
            stream=True,
            timeout=(connect_seconds, READ_SECONDS),
            allow_redirects=False,
            auth=lambda request: request,  # none: requests would look into ~/.netrc
        )
        for header in ("X-Linked-Size", "X-Linked-Etag"):
            if header in response.headers:
                linked.setdefault(header, response.headers[header])  # the word of the first host counts
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
        if pause := _asked_pause(status, response.headers, clock):
            clock.pause_everyone(min(pause, MAX_SERVER_PAUSE_SECONDS) * (1 + 0.1 * clock.jitter()))
        raise TransientError(f"{host} answers {status}")
    fix = ": set HF_TOKEN to a token that may read this data set" if status in (401, 403) else ""
    absent = status in (403, 404, 410)  # some hosts say 403 for what is not there
    raise (AbsentError if absent else DataError)(f"{_printable(host)} answers {status} for {name}{fix}")


def _printable(text):
    return "".join(character if character.isprintable() else "." for character in str(text)[:80])


def _asked_pause(status, headers, clock):
    """The seconds that Retry-After (a number or a date) or, with 429, RateLimit (t=seconds) ask for, else 0."""
    asked = headers.get("Retry-After", "").strip()
    if asked.isdecimal():
        return float(asked)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return max(email.utils.parsedate_to_datetime(asked).timestamp() - clock.wall(), 0.0)
    limit = re.search(r"\bt=(\d+)", headers.get("RateLimit", "")) if status == 429 else None
    return float(limit[1]) if limit else 0.0


def _expected(item, response):
    """(size, sha256) that the body must have, as far as the item or the host's headers say."""
    size, sha256 = item.size, item.sha256
    if size is None and response.headers.get("X-Linked-Size", "").isdecimal():
        size = int(response.headers["X-Linked-Size"])
    etag = response.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
    if sha256 is None and SHA256.fullmatch(etag):
        sha256 = etag
    if size is None and response.headers.get("Content-Length", "").isdecimal():
        size = int(response.headers["Content-Length"])
    return size, sha256


def _receive(response, part, size, clock, counted, on_bytes):
    """Write the body to `part`, synced, and stop beyond `size`; returns (bytes, SHA-256 in hex)."""
    digest, received = hashlib.sha256(), 0
    window_start, window_bytes = clock.now(), 0
    if clock.stop.is_set():
        raise StoppedError
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o644)
    with open(handle, "wb") as file:
        while block := response.raw.read1(BLOCK_BYTES):  # what is there: a full block may take a slow host for ever
            if clock.stop.is_set():
                raise StoppedError
            file.write(block)
            digest.update(block)
            received += len(block)
            window_bytes += len(block)
            counted.append(len(block))
            on_bytes(len(block))
            if size is not None and received > size:
                break
            elapsed = clock.now() - window_start
            if elapsed >= SLOW_SECONDS:
                if window_bytes < SLOW_BYTES_PER_SECOND * elapsed:
                    raise TransientError(f"slower than {SLOW_BYTES_PER_SECOND / 1000:.0f} kB/s for {elapsed:.0f} s")
                window_start, window_bytes = clock.now(), 0
        file.flush()
        os.fsync(file.fileno())
    return received, digest.hexdigest()


def full_disk(folder: Path, needed: int | None) -> str:
    """What to say of a disk that has no room for `needed` bytes, where that is known."""
    free = shutil.disk_usage(folder).free
    asked = f"{needed / 1e6:.1f} MB needed, " if needed else ""
    return f"the disk is full: {asked}{free / 1e6:.1f} MB free in {folder}"


def remove_stale_parts(folder: Path, clock: Clock) -> None:
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
