"""Files over HTTPS, each of them whole or not there at all.

A file goes to a temporary name, is checked (size, SHA-256 and whatever the caller checks) and then renamed. A failure
that may pass is retried from the beginning. No message shows a URL: a signed one is a secret.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from urllib3.exceptions import HTTPError

from nanotrain.errors import DataError, UserError

RETRY = urllib3.Retry(4, backoff_factor=1, backoff_jitter=1, backoff_max=60)  # five attempts in all
TIMEOUT_SECONDS = 5.0, 60.0  # to connect, to read
MAX_RETRY_AFTER_SECONDS = 120.0
SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 60.0, 10_000
NOT_TRIED = "not tried"
SHA256 = re.compile(r"[0-9a-f]{64}")
SAFE_URL = re.compile(r"(https://[^/@?#\\]+|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?)([/?#].*)?")


@dataclass(frozen=True)
class Item:
    """One file to fetch; size (in bytes) and sha256 (in hex) are None where they are not known beforehand."""

    name: str
    url: str
    size: int | None = None
    sha256: str | None = None


class TransientError(HTTPError):
    """A failure that another attempt may not have."""


class AbsentError(DataError):
    """The host does not have a file, or does not show it."""


def check_url(url: str) -> None:
    """Raise UserError if `url` is not an https one (or one of this machine), or has a user name or password."""
    if not SAFE_URL.fullmatch(url):
        raise UserError("the host of shards must be given as https://host/path, without a user name or password")


def host_of(url: str) -> str:
    """The host of a URL, which may be shown."""
    return urlsplit(url).netloc


def full_disk(folder: Path, needed: int | None) -> str:
    """What to say of a disk that has no room for `needed` bytes, where that is known."""
    asked = f"{needed / 1e6:.1f} MB needed, " if needed else ""
    return f"the disk is full: {asked}{shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder}"


def fetch_all(
    items: Sequence[Item],
    folder: Path,
    check: Callable[[Path], object],
    on_bytes: Callable[[int], object],
    workers: int = 4,
    token: str | None = None,
    first_contact: bool = False,
) -> tuple[dict[str, str], dict[str, str]]:
    """Fetch the items into `folder`, `workers` at a time.

    Returns ({name: SHA-256} of what was fetched, {name: reason} of what was not). check(path) raises DataError for a
    file that is not what it should be; on_bytes(n) is told of progress, with n < 0 for a lost attempt. `token` goes to
    the items' own host alone. At the first contact an unreachable host is given up soon. Ctrl-C and SIGTERM leave no
    temporary file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".*.{socket.gethostname()}.*.part"):
        with contextlib.suppress(ValueError, PermissionError):
            try:
                os.kill(int(left.name.split(".")[-2]), 0)
            except ProcessLookupError:  # it was killed
                left.unlink(missing_ok=True)
    download, done, failed = _Download(folder, check, on_bytes, token, first_contact), {}, {}

    def work(item):
        try:
            done[item.name] = download.fetch(item)
        except DataError as error:
            failed[item.name] = str(error)

    with ThreadPool(workers) as pool:  # of daemon threads: one that waits for a silent host does not delay the exit
        try:
            pool.map(work, items, chunksize=1)
        finally:
            download.stop.set()
            for item in items:
                download.part(item).unlink(missing_ok=True)
    return done, failed


def json_beside(url: str, token: str | None) -> dict | None:
    """The JSON object at `url`, or None where the host has none. Raises DataError, soon if the host is unreachable."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(AbsentError):
        item = Item("manifest.json", url)
        _Download(Path(folder), _read_json, lambda count: None, token, first_contact=True).fetch(item)
        return _read_json(Path(folder, item.name))
    return None


def _read_json(path):
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_bytes()), dict):
            return found
    raise DataError("no JSON object")


def size_of(item: Item, token: str | None) -> int:
    """The size in bytes that the host announces for an item; 0 if it does not."""
    with contextlib.suppress(DataError, requests.RequestException, HTTPError, ValueError):
        with _Download(None, None, None, token).get(item) as response:
            return _expected(item, response)[0] or int(response.headers.get("Content-Length", 0))
    return 0


def _expected(item, response):
    """(size, SHA-256) of the body, None if unknown: the item's, or what Hugging Face says where it redirects."""
    headers = ChainMap(*(hop.headers for hop in (*response.history, response)))  # the first host has the last word
    size, etag = headers.get("X-Linked-Size", ""), headers.get("X-Linked-Etag", "").strip('"')
    size, sha256 = int(size) if size.isdecimal() else None, etag if SHA256.fullmatch(etag) else None
    return size if item.size is None else item.size, item.sha256 or sha256


class _Session(requests.Session):
    """Proxies as the environment says, but no netrc; a token only for its own host, and no redirect away from https."""

    def __init__(self, token):
        super().__init__()
        self.headers["Accept-Encoding"] = "identity"
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self.auth = lambda request: request  # without any, requests looks into netrc

    def rebuild_auth(self, prepared_request, response):
        before, url = response.request.url, prepared_request.url
        if not SAFE_URL.fullmatch(url) or (before.startswith("https:") and not url.startswith("https:")):
            raise DataError(f"{host_of(before)} redirects to a URL without https, which is refused")
        if self.should_strip_auth(before, url):
            prepared_request.headers.pop("Authorization", None)


class _Download:
    """What the workers of one download share: where to, from whom, and when they wait or stop."""

    def __init__(self, folder, check, on_bytes, token, first_contact=False):
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show URLs
        self.folder, self.check, self.on_bytes, self.first_contact = folder, check, on_bytes, first_contact
        self.session, self.stop = _Session(token), threading.Event()
        self.open_at = 0.0  # on the monotonic clock: no request before, for the host asked to wait

    def part(self, item):
        """The temporary file of an item, which only this process writes."""
        return self.folder / f".{item.name}.{socket.gethostname()}.{os.getpid()}.part"

    def fetch(self, item):
        """Fetch one item, attempt by attempt; returns its SHA-256. Raises DataError."""
        part, retry = self.part(item), RETRY
        while True:
            try:
                self.wait(retry.get_backoff_time())
                digest = self.attempt(item, part)
                os.replace(part, self.folder / item.name)
                return digest
            except (requests.RequestException, HTTPError, ValueError) as error:
                reason = getattr(error.args[0] if error.args else None, "reason", None)  # why there was no connection
                if not retry.total or (reason and self.first_contact and retry.history):
                    kind = "the host cannot be reached" if reason else "the connection broke"
                    said = error if isinstance(error, TransientError) else f"{kind} ({type(reason or error).__name__})"
                    attempts = len(retry.history) + 1
                    raise DataError(f"{item.name} from {host_of(item.url)}: {said} ({attempts} attempts)") from None
                retry = retry.increment("GET", error=error)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(f"{item.name}: {error.strerror}: {self.folder}") from None
                self.stop.set()
                raise DataError(full_disk(self.folder, item.size)) from None
            finally:
                part.unlink(missing_ok=True)

    def wait(self, seconds):
        """Wait at least `seconds`, and until the host wants requests again."""
        end = time.monotonic() + seconds
        while (left := max(end, self.open_at) - time.monotonic()) > 0 and not self.stop.wait(left):
            pass
        self.check_stop()

    def check_stop(self):
        if self.stop.is_set():
            raise DataError(NOT_TRIED)

    def attempt(self, item, part):
        """Write one item to `part` and check it; returns its SHA-256."""
        received, digest = 0, hashlib.sha256()
        try:
            with self.get(item) as response, open(part, "wb") as file:
                (size, sha256), begin = _expected(item, response), time.monotonic()
                while block := response.raw.read1(1 << 18):  # what is there: a slow host may never fill a block
                    self.check_stop()
                    file.write(block)
                    digest.update(block)
                    received += len(block)
                    self.on_bytes(len(block))
                    seconds = time.monotonic() - begin
                    if seconds > SLOW_SECONDS and received < SLOW_BYTES_PER_SECOND * seconds:
                        raise TransientError(f"slower than {SLOW_BYTES_PER_SECOND / 1000:.0f} kB/s")
                file.flush()
                os.fsync(file.fileno())
            if not received or size not in (None, received):
                raise TransientError(f"{received} of {size or 'some'} bytes")
            if sha256 not in (None, digest.hexdigest()):
                raise TransientError("another SHA-256 than expected")
            try:
                self.check(part)
            except DataError as error:
                raise TransientError(str(error).replace(str(part), "it").partition(": delete it")[0]) from None
            return digest.hexdigest()
        except BaseException:
            self.on_bytes(-received)
            raise

    def get(self, item):
        """The response to a GET, with status 200."""
        response = self.session.get(item.url, stream=True, timeout=TIMEOUT_SECONDS)
        status, headers = response.status_code, response.headers
        page = headers.get("Content-Type", "").startswith("text/html")
        if status == 200 and not page:
            return response
        response.close()
        said = f"{urlsplit(response.url).hostname} answers {'with a web page' if status == 200 else status}"
        if status in (200, 408, 429) or status >= 500:
            limit = re.findall(r"r=0;t=(\d+)", headers.get("RateLimit", ""))  # as Hugging Face says it
            asked = headers.get("Retry-After") or (limit or ["0"])[0]
            with contextlib.suppress(HTTPError, ValueError, OverflowError):
                seconds = min(RETRY.parse_retry_after(asked), MAX_RETRY_AFTER_SECONDS)
                self.open_at = max(self.open_at, time.monotonic() + seconds)
            raise TransientError(said)
        fix = ": set HF_TOKEN to a token that may read this data set" if status in (401, 403) else ""
        absent = status in (403, 404, 410)  # some hosts say 403 for what is not there
        raise (AbsentError if absent else DataError)(f"{said} for {item.name}{fix}")
