"""Bad data that only one of two ranks reads."""

import hashlib
import json
import re

import pyarrow.parquet as pq
import pytest
from conftest import TINY_RUN, make_shards

from nanotrain import config, dataset
from nanotrain.store import Store


@pytest.mark.slow
def test_bad_data_of_one_rank_stops_all_in_the_same_step(run_script, tokenizer, base_dir, tmp_path):
    """With two streams rank 1 reads the slices at odd positions, rank 0 the others."""
    tokenizer.save(base_dir / "tokenizer")
    folder = make_shards(tmp_path / "folder", train=1)
    path = folder / "shard_00000.parquet"
    order = sorted(range(8), key=lambda group: hashlib.sha256(f"1 0 {path.name}:{group}:0".encode()).hexdigest())
    place = pq.ParquetFile(path).metadata.row_group(order[3]).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    settings = {**TINY_RUN, "SEED": 1, "NUM_STREAMS": 2, "NUM_ITERATIONS": 300, "EVAL_EVERY": 0, "BIGRAM_ROWS": 0}
    settings |= {"SPECTRAL_TOKENS": 0, "RUN_NAME": "r", "DATA_DIR": folder, "DEVICE": "cpu"}
    flags = [f"{config.flag_of(name)}={value}" for name, value in settings.items()]
    done = run_script("scripts.base_train", *flags, ranks=2, OMP_NUM_THREADS="1")
    assert done.returncode != 0
    said = re.findall(r"^(.*error: .*row group (\d).*)$", done.stderr, re.MULTILINE)
    # torchrun ends the others when one has ended, which may come before what they have to say
    assert len({line.removeprefix("[rank 1] ") for line, _ in said}) == 1, done.stderr
    assert int(said[0][1]) == order[3]
    run = base_dir / "runs" / "r"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last_step = max(row["step"] for row in rows if "train/loss" in row)
    assert Store(run).steps() == [last_step]
    read_by_rank_0 = [text for group in order[::2] for text in dataset.read_texts(path, group)]
    num_tokens = sum(len(tokenizer.encode(text)) + 1 for text in read_by_rank_0)
    assert 64 * last_step < num_tokens, "so far rank 0 had no need of the bad one"
