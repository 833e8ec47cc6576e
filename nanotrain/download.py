"""Downloads over HTTPS: each file arrives whole or not at all.

A file is written under a temporary name, checked (size, SHA-256 and the caller's own check) and then renamed. Transient
failures are retried from the beginning. Messages never show a URL, because a signed URL is a secret.
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

RETRY = urllib3.Retry(4, backoff_factor=1, backoff_jitter=1, backoff_max=60)  # five attempts in total
WORKERS = 4
TIMEOUT_SECONDS = 5.0, 60.0  # connect, read
MAX_RETRY_AFTER_SECONDS = 120.0
STALE_SECONDS = 3600.0  # age of a temporary file that must belong to a killed process
NOT_TRIED = "not tried"
# Environment variables that requests reads, in its order of precedence.
CERTIFICATES = "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"
PROXIES = "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"
SAFE_URL = re.compile(r"(https://[^/@?#\\]+|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?)([/?#].*)?")


class RefusedError(DataError):
    """The host refuses a file; retrying would not help."""


def check_url(url: str, source: str = "") -> None:
    """Raise UserError, its message ending in `source`, unless `url` is https (or local http) without a user name."""
    if not SAFE_URL.fullmatch(url):
        raise UserError(f"--base-url and HF_ENDPOINT must be https://host/path, without user name or password{source}")


def setting(*names: str) -> str:
    """The first of these environment variables that is set, as " (NAME=value)" without a password; "" if none is."""
    name = next(filter(os.environ.get, names), None)
    return f" ({name}={os.environ[name].rpartition('@')[2]})" if name else ""


def host_of(url: str) -> str:
    """The host (and port) of a URL, safe to show in messages."""
    return urlsplit(url).netloc


def fetch_all(
    urls: Mapping[str, str], folder: Path, check: Callable, on_bytes: Callable, token: str | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Download each {name: url} into `folder`; return ({name: SHA-256} downloaded, {name: reason} failed).

    check(path) raises DataError for an invalid file; on_bytes(n) reports progress. `token` is sent only to the host of
    the URL. Ctrl-C leaves no partial files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(".*.part"):
        if time.time() - part.stat().st_mtime > STALE_SECONDS:
            part.unlink(missing_ok=True)
    session, done, failed = _Session(folder, check, on_bytes, token), {}, {}

    def work(name):
        try:
            done[name] = session.fetch(name, urls[name])
        except DataError as error:
            failed[name] = str(error)

    with ThreadPool(WORKERS) as pool:  # daemon threads: one waiting for a silent host does not delay the exit
        try:
            pool.map(work, urls, chunksize=1)
        finally:
            session.stop.set()
            for part in folder.glob(f".*.{os.getpid()}.part"):
                part.unlink(missing_ok=True)
    return done, failed


class _Session(requests.Session):
    """A session that uses the environment's proxies but no netrc, keeps the token to its host, and stays on https."""

    def __init__(self, folder, check, on_bytes, token):
        super().__init__()
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings contain URLs
        self.headers["Accept-Encoding"] = "identity"
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self.auth = lambda request: request  # otherwise requests reads netrc
        self.folder, self.check, self.on_bytes = folder, check, on_bytes
        self.stop = threading.Event()

    def rebuild_auth(self, prepared_request, response):
        before, url = response.request.url, prepared_request.url
        if not SAFE_URL.fullmatch(url) or (before.startswith("https:") and not url.startswith("https:")):
            raise RefusedError(f"{host_of(before)} redirects to a URL without https")
        if self.should_strip_auth(before, url):
            prepared_request.headers.pop("Authorization", None)

    def fetch(self, name, url):
        """Download one file, with retries; return its SHA-256. Raises DataError."""
        part, retry = self.folder / f".{name}.{os.getpid()}.part", RETRY
        while not self.stop.wait(retry.get_backoff_time()):
            try:
                digest = self.attempt(url, part)
                os.replace(part, self.folder / name)
                return digest
            except RefusedError:
                raise
            except (DataError, requests.RequestException, HTTPError, ValueError) as error:
                permanent = isinstance(error, InvalidSchema | InvalidURL) or "CERTIFICATE_VERIFY_FAILED" in str(error)
                if permanent or not retry.total:
                    own = isinstance(error, DataError)  # messages of other libraries may contain a URL
                    setter = setting(*(CERTIFICATES if isinstance(error, SSLError) else PROXIES))
                    kind = "SOCKS needs pip install pysocks" if "SOCKS support" in str(error) else type(error).__name__
                    reason = str(error).replace(str(part), "it") if own else f"incomplete response ({kind}){setter}"
                    raise DataError(f"{name} from {host_of(url)}: {reason}") from None
                retry = retry.increment()
            except OSError as error:  # such as a full disk; without strerror, requests found no certificates
                self.stop.set()
                reason = f"{error.strerror}: {self.folder}" if error.strerror else f"{error}{setting(*CERTIFICATES)}"
                raise DataError(reason) from None
            finally:
                part.unlink(missing_ok=True)
        raise DataError(NOT_TRIED)

    def attempt(self, url, part):
        """Download one file to `part` and check it; return its SHA-256."""
        with self.get(url, stream=True, timeout=TIMEOUT_SECONDS) as response, open(part, "wb") as file:
            self.check_status(response)
            for block in response.iter_content(1 << 18):
                file.write(block)
                self.on_bytes(len(block))
        # Hugging Face sends size and hash with its redirect; headers of the first response take precedence.
        headers, received = ChainMap(*(hop.headers for hop in (*response.history, response))), part.stat().st_size
        size, etag = headers.get("X-Linked-Size", received), headers.get("X-Linked-Etag", "").strip('"')
        if str(size) != str(received):
            raise DataError(f"received {received} of {size} bytes")
        digest = file_sha256(part)
        if len(etag) == len(digest) and etag != digest:  # other ETags are not SHA-256
            raise DataError("unexpected SHA-256")
        self.check(part)
        return digest

    def check_status(self, response):
        """Raise DataError unless the status is 200, after waiting as long as a Retry-After header asks."""
        status = response.status_code
        message = f"{urlsplit(response.url).hostname} answers {status}"
        if status in (408, 429) or status >= 500:
            with contextlib.suppress(HTTPError, ValueError, OverflowError):
                self.stop.wait(min(RETRY.get_retry_after(response) or 0, MAX_RETRY_AFTER_SECONDS))
            raise DataError(message)
        if status != 200:
            fix = ": set HF_TOKEN to a token that can read this data set" if status in (401, 403) else ""
            raise RefusedError(f"{message}{fix}")
