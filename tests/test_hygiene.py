"""What can be wrong with data, as far as it takes more than one module: a row group, a file, a rank, BOS as text."""

import hashlib
import itertools
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY_RUN, make_shards, make_texts

from nanotrain import config, corpus, dataloader, dataset
from nanotrain.store import Store


def documents_of_an_epoch(folder, tokenizer, num_tokens, seq_len=64):
    """The documents that a single stream reads first, split at each BOS."""
    slices = dataloader.slices_of(dataset.open_shards(folder).train, 1)
    sequences = np.empty((num_tokens // seq_len + 1, seq_len + 1), dtype=np.int64)
    dataloader.SequenceReader(slices, tokenizer, seq_len, 1, 3).fill(sequences)
    tokens = sequences[:, :seq_len].flatten().tolist()[:num_tokens]
    begins = [place for place, token in enumerate(tokens) if token == tokenizer.bos]
    assert begins[0] == 0
    return [tokenizer.decode(tokens[begin + 1 : end]) for begin, end in itertools.pairwise([*begins, num_tokens])]


def tokens_of(texts, tokenizer):
    return sum(len(tokenizer.encode(text)) + 1 for text in texts)


def test_the_literal_name_of_bos_is_text_from_a_users_file_to_the_rows(tokenizer, tmp_path):
    texts = ["one <|bos|> two", "<|bos|>", "three"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "data").mkdir()
    corpus.import_text(tmp_path / "a.jsonl", tmp_path / "data")
    in_train = [text for group in dataset.row_groups(sorted((tmp_path / "data").iterdir())[:-1]) for text in group]
    assert any("<|bos|>" in text for text in in_train)
    found = documents_of_an_epoch(tmp_path / "data", tokenizer, tokens_of(in_train, tokenizer))
    assert sorted(found) == sorted(in_train)


def test_row_groups_and_files_without_rows_change_nothing(tokenizer, tmp_path):
    texts = make_texts(12)
    for name, sizes in (("plain", [5, 7]), ("holes", [0, 5, 0, 0, 7, 0])):
        (tmp_path / name).mkdir()
        dataset.write_shard(tmp_path / name / "shard_00003.parquet", ["validation"])
        rest = pa.table({"text": texts})
        with pq.ParquetWriter(tmp_path / name / "shard_00001.parquet", rest.schema) as writer:
            for size in sizes:
                writer.write_table(rest.slice(0, size))
                rest = rest.slice(size)
    for number in (0, 2):
        dataset.write_shard(tmp_path / "holes" / f"shard_{number:05d}.parquet", [])
    assert 0 in dataset.open_shards(tmp_path / "holes").train[1].group_rows
    for name in ("plain", "holes"):
        found = documents_of_an_epoch(tmp_path / name, tokenizer, tokens_of(texts, tokenizer))
        assert sorted(found) == sorted(texts)


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
    assert 64 * last_step < tokens_of(read_by_rank_0, tokenizer), "so far rank 0 had no need of the bad one"
