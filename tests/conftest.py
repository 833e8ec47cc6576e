"""Shared by all tests: no network, a folder of its own for every test, and tiny generated data."""

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanotrain import dataset
from nanotrain.checkpoint import build_model
from nanotrain.dist import DistContext
from nanotrain.tokenizer import BPETokenizer

ROOT = Path(__file__).parent.parent
WORDS = "river stone light walks under the a seven 12 blue ships über 日 🙂 never old".split()
TINY_RUN = {  # settings of base_train with which a step takes milliseconds
    "DEPTH": 1,
    "ASPECT_RATIO": 16,
    "HEAD_DIM": 16,
    "BIGRAM_ROWS": 61,
    "SPECTRAL_TOKENS": 1000,
    "MAX_SEQ_LEN": 16,
    "NUM_STREAMS": 4,
    "DEVICE_BATCH_SIZE": 4,
    "TOTAL_BATCH_SIZE": 128,
    "EVAL_TOKENS": 64,
    "DTYPE": "float32",
    "COMPILE": "off",
    "REPORT": False,
}
SLOW_FILES = {f"test_{name}.py" for name in ("worlds", "base_train", "faults", "gpu_check", "scripts", "soak")}


def pytest_collection_modifyitems(items):
    """The slow files come first, so that where processes share the files none is alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)


@pytest.fixture(scope="session", autouse=True)
def _signals_end_programs():
    """A shell starts what runs in its background with Ctrl-C ignored, nohup what it runs with SIGHUP ignored, and the
    programs of the tests would inherit that.
    """
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A connection to anything but loopback fails the test."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    """NANOTRAIN_DIR of this test."""
    folder = tmp_path / "nanotrain"
    monkeypatch.setenv("NANOTRAIN_DIR", str(folder))
    return folder


@pytest.fixture
def own_process_state(monkeypatch):
    """No rank from outside, and torch's settings back as they were."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic, random_state = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.set_rng_state(random_state)


def make_model(config, head_std):
    """A model of small random weights with a head that prefers some tokens: a fresh one may be zero."""
    model = build_model(config, "cpu")
    model.init_weights(3)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=head_std, generator=torch.Generator().manual_seed(5))
    return model


def make_texts(count, seed=0):
    """`count` documents of some 20 to 120 words, all different."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(20, 120))) + f" end{n}." for n in range(count)]


def make_shards(folder, train=2, documents=40, rows_per_group=5):
    """Write `train` train shards and a validation shard, without a manifest; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(train + 1):
        texts = make_texts(documents, seed=number)
        dataset.write_shard(folder / f"shard_{number:05d}.parquet", texts, rows_per_group)
    return folder


ALONE = DistContext(0, 1, torch.device("cpu"), torch.float32, "test")


class Rank(DistContext):
    """One rank of several, whose sums are handed over instead of reduced."""

    def all_reduce_sum(self, values):
        self.handed.append([float(value) for value in values])
        return self.totals or [1.0] * len(values)


def on_every_rank(world_size, function):
    """[function(dist)] of each rank, the sums of all of them being added by hand."""
    handed, totals, results = [], [], []
    for _ in range(2):  # first to learn what they hand over, then to give each the totals
        results.clear()
        for number in range(world_size):
            rank = Rank(number, world_size, torch.device("cpu"), torch.float32, "test")
            vars(rank).update(handed=handed, totals=totals)
            results.append(function(rank))
        totals = totals or [sum(column) for column in zip(*handed, strict=True)]
    assert len(handed) == 2 * world_size, "every rank joins the sum once, also one without anything to add"
    return results


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with two train shards and a validation shard."""
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tokenizer():
    """A small tokenizer that knows the words of the test texts."""
    return BPETokenizer.train(make_texts(50), 320)


@pytest.fixture
def run_script(base_dir):
    """Run `python -m MODULE ARGUMENTS` as a user would; returns the CompletedProcess with text output."""

    def run(module, *arguments, timeout=100, ranks=1, **environment):
        launch = [sys.executable]
        if ranks > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
            launch += [f"--nproc_per_node={ranks}"]
        settings = {**os.environ, "NANOTRAIN_DIR": str(base_dir), **environment}
        command = [*launch, "-m", module, *arguments]
        return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=timeout)

    return run
