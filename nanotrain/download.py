"""Files over HTTPS, each of them whole or not there at all.

A file goes to a temporary name, is checked (size, SHA-256 and whatever the caller checks) and then renamed. A failure
that may pass is retried from the beginning. No message shows a URL: a signed one is a secret.
"""

import contextlib
import logging
import os
import re
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from requests.exceptions import InvalidSchema, InvalidURL, SSLError
from urllib3.exceptions import HTTPError

from nanotrain.errors import DataError, UserError
from nanotrain.files import file_sha256

RETRY = urllib3.Retry(4, backoff_factor=1, backoff_jitter=1, backoff_max=60)  # five attempts in all
WORKERS = 4
TIMEOUT_SECONDS = 5.0, 60.0  # to connect, to read
MAX_RETRY_AFTER_SECONDS = 120.0
STALE_SECONDS = 3600.0  # without a change, after which a temporary file belongs to a killed process
NOT_TRIED = "not tried"
CERTIFICATES = "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"  # environment variables that requests reads
PROXIES = "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"  # in the order in which it reads them
SHA256 = re.compile(r"[0-9a-f]{64}")
SAFE_URL = re.compile(r"(https://[^/@?#\\]+|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?)([/?#].*)?")


class RefusedError(DataError):
    """The host does not give a file, and another attempt would not change that."""


def check_url(url: str, source: str = "") -> None:
    """Raise UserError if `url`, of that `source`, is not an https one (or of this machine), or has a user name."""
    if not SAFE_URL.fullmatch(url):
        raise UserError(
            f"--base-url and HF_ENDPOINT must be https://host/path, without a user name or password{source}"
        )


def setting(*names: str) -> str:
    """The first of these environment variables that is set, with its value but no password, in brackets; else ""."""
    name = next(filter(os.environ.get, names), None)
    return f" ({name}={os.environ[name].rpartition('@')[2]})" if name else ""


def host_of(url: str) -> str:
    """The host of a URL, which may be shown."""
    return urlsplit(url).netloc


def fetch_all(
    urls: Mapping[str, str],
    folder: Path,
    check: Callable[[Path], object],
    on_bytes: Callable[[int], object],
    token: str | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Fetch each {name: url} into `folder`: ({name: SHA-256} of what was fetched, {name: reason} of what was not).

    check(path) raises DataError for a wrong file; on_bytes(n) is told of progress. `token` goes to the host of the URL
    alone. Ctrl-C leaves no piece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            left.unlink(missing_ok=True)
    session, done, failed = _Session(folder, check, on_bytes, token), {}, {}

    def work(name):
        try:
            done[name] = session.fetch(name, urls[name])
        except DataError as error:
            failed[name] = str(error)

    with ThreadPool(WORKERS) as pool:  # of daemon threads: one that waits for a silent host does not delay the exit
        try:
            pool.map(work, urls, chunksize=1)
        finally:
            session.stop.set()
            for left in folder.glob(f".*.{os.getpid()}.part"):
                left.unlink(missing_ok=True)
    return done, failed


class _Session(requests.Session):
    """Proxies as the environment says, but no netrc; a token only for its own host, and no redirect away from https."""

    def __init__(self, folder, check, on_bytes, token):
        super().__init__()
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show URLs
        self.headers["Accept-Encoding"] = "identity"
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self.auth = lambda request: request  # without any, requests looks into netrc
        self.folder, self.check, self.on_bytes = folder, check, on_bytes
        self.stop = threading.Event()

    def rebuild_auth(self, prepared_request, response):
        before, url = response.request.url, prepared_request.url
        if not SAFE_URL.fullmatch(url) or (before.startswith("https:") and not url.startswith("https:")):
            raise RefusedError(f"{host_of(before)} redirects to a URL without https, which is refused")
        if self.should_strip_auth(before, url):
            prepared_request.headers.pop("Authorization", None)

    def fetch(self, name, url):
        """Fetch one file, attempt by attempt; returns its SHA-256. Raises DataError."""
        part, retry = self.folder / f".{name}.{os.getpid()}.part", RETRY
        while not self.stop.wait(retry.get_backoff_time()):
            try:
                digest = self.attempt(url, part)
                os.replace(part, self.folder / name)
                return digest
            except RefusedError:
                raise
            except (DataError, requests.RequestException, HTTPError, ValueError) as error:
                lasting = isinstance(error, InvalidSchema | InvalidURL) or "CERTIFICATE_VERIFY_FAILED" in str(error)
                if lasting or not retry.total:
                    own = isinstance(error, DataError)  # what others say may show a URL
                    setter = setting(*(CERTIFICATES if isinstance(error, SSLError) else PROXIES))
                    kind = "SOCKS needs pip install pysocks" if "SOCKS support" in str(error) else type(error).__name__
                    reason = str(error).replace(str(part), "it") if own else f"no whole answer ({kind}){setter}"
                    raise DataError(f"{name} from {host_of(url)}: {reason}") from None
                retry = retry.increment()
            except OSError as error:  # such as a full disk; requests says in words that certificates are not there
                self.stop.set()
                said = f"{error.strerror}: {self.folder}" if error.strerror else f"{error}{setting(*CERTIFICATES)}"
                raise DataError(said) from None
            finally:
                part.unlink(missing_ok=True)
        raise DataError(NOT_TRIED)

    def attempt(self, url, part):
        """Write one file to `part` and check it; returns its SHA-256."""
        with self.get(url, stream=True, timeout=TIMEOUT_SECONDS) as response, open(part, "wb") as file:
            self.check_status(response)
            for block in response.iter_content(1 << 18):
                file.write(block)
                self.on_bytes(len(block))
        # Hugging Face says size and hash where it redirects, and the first host has the last word.
        headers, received = ChainMap(*(hop.headers for hop in (*response.history, response))), part.stat().st_size
        size, etag = headers.get("X-Linked-Size", received), headers.get("X-Linked-Etag", "").strip('"')
        if str(size) != str(received):
            raise DataError(f"{received} of {size} bytes")
        digest = file_sha256(part)
        if SHA256.fullmatch(etag) and etag != digest:
            raise DataError("another SHA-256 than expected")
        self.check(part)
        return digest

    def check_status(self, response):
        """Raise DataError unless the status is 200, after as long as the host asks to wait before another request."""
        status = response.status_code
        said = f"{urlsplit(response.url).hostname} answers {status}"
        if status in (408, 429) or status >= 500:
            with contextlib.suppress(HTTPError, ValueError, OverflowError):
                self.stop.wait(min(RETRY.get_retry_after(response) or 0, MAX_RETRY_AFTER_SECONDS))
            raise DataError(said)
        if status != 200:
            fix = ": set HF_TOKEN to a token that may read this data set" if status in (401, 403) else ""
            raise RefusedError(f"{said}{fix}")
