"""What data can be wrong with, DA1 to DA15: where each is tested, and the tests that need more than one module."""

import ast
import hashlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import make_shards, make_texts

from nanotrain import checkpoint, corpus, dataloader, dataset

TESTS = Path(__file__).parent
WHERE = {
    "DA1 no parquet, empty, cut, a corrupt footer": [
        "test_dataset: test_open_shards_says_what_is_wrong",
        "test_corpus: test_import_says_what_is_wrong_and_leaves_nothing",
    ],
    "DA2 a corrupt page": [
        "test_dataset: test_a_row_group_that_cannot_be_read_is_named",
        "test_dataset: test_verify_notices_any_flipped_bit_and_reading_gives_text_or_a_data_error",
        "test_base_train: test_a_shard_that_breaks_in_the_middle_ends_the_run_with_its_name",
    ],
    "DA3 no text column, or not of strings": [
        "test_dataset: test_open_shards_says_what_is_wrong",
        "test_dataset: test_every_kind_of_string_column_is_read",
    ],
    "DA4 null and empty text": [
        "test_dataloader: test_null_and_empty_documents_are_skipped_and_counted",
        "test_dataloader: test_shards_without_text_are_an_error_and_not_an_endless_search",
        "test_corpus: test_import_counts_what_it_leaves_out_by_reason",
    ],
    "DA5 very long documents and words": [
        "test_dataloader: test_a_long_document_is_one_document_tokenized_in_bounded_pieces",
        "test_corpus: test_cut_takes_time_and_memory_in_proportion_to_the_text",
        "test_corpus: test_import_holds_a_few_blocks_of_a_file_and_not_all_of_it",
        "test_hygiene: test_two_million_of_one_letter_are_read_as_they_are",
    ],
    "DA6 text that is not UTF-8": [
        "test_dataset: test_text_that_is_not_utf8_is_named_to_the_row",
        "test_corpus: test_import_leaves_out_only_the_documents_that_are_not_utf8",
    ],
    "DA7 lone surrogates": [
        "test_tokenizer: test_a_lone_surrogate_becomes_a_replacement_character",
        "test_corpus: test_import_makes_lone_surrogates_replacement_characters",
    ],
    "DA8 the text of a special token": [
        "test_tokenizer: test_the_literal_name_of_bos_is_text_and_stays_so_after_load",
        "test_hygiene: test_the_literal_name_of_bos_is_text_from_a_users_file_to_the_rows",
    ],
    "DA9 fewer row groups than ranks": [
        "test_dataloader: test_p2_the_order_of_sequences_does_not_depend_on_the_world_size",
        "test_corpus: test_import_of_little_text_still_has_many_row_groups",
    ],
    "DA10 too few shards, no or a repeated validation shard": [
        "test_dataset: test_open_shards_says_what_is_wrong",
        "test_dataset: test_validation_is_never_in_train",
        "test_dataset: test_a_train_shard_equal_to_the_validation_shard_is_an_error",
        "test_corpus: test_import_always_has_train_and_validation_and_no_text_in_both",
    ],
    "DA11 no rows": ["test_hygiene: test_row_groups_and_files_without_rows_change_nothing"],
    "DA12 a shard vanishes or is replaced": [
        "test_dataset: test_a_row_group_that_cannot_be_read_is_named",
        "test_dataset: test_a_shard_that_another_good_one_has_replaced_is_an_error",
        "test_dataloader: test_a_shard_that_is_replaced_is_a_data_error_and_not_other_sequences",
        "test_dataloader: test_a_shard_that_vanishes_is_a_data_error_of_every_later_batch",
        "test_base_train: test_a_shard_that_vanishes_costs_no_step",
    ],
    "DA13 a data error on one rank": ["test_hygiene: test_bad_data_of_one_rank_stops_all_in_the_same_step"],
    "DA14 a footer that declares too much": [
        "test_dataset: test_a_row_group_that_declares_too_much_text_is_refused",
    ],
    "DA15 another tokenizer": [
        "test_tokenizer: test_the_hash_is_that_of_the_saved_file",
        "test_base_train: test_another_tokenizer_or_other_data_are_refused_on_resume",
    ],
}


def test_every_number_has_its_tests():
    assert [re.match(r"DA(\d+) ", name)[1] for name in WHERE] == [str(number) for number in range(1, 16)]
    for module, name in (place.split(": ") for places in WHERE.values() for place in places):
        tree = ast.parse((TESTS / f"{module}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, module


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


def test_two_million_of_one_letter_are_read_as_they_are(tokenizer, tmp_path):
    """DA5."""
    dataset.write_shard(tmp_path / "shard_00000.parquet", ["a" * 2_000_000])
    dataset.write_shard(tmp_path / "shard_00001.parquet", ["validation"])
    num_tokens = 20 * len(tokenizer.encode("a" * 100_000)) + 1
    assert documents_of_an_epoch(tmp_path, tokenizer, num_tokens, seq_len=4096) == ["a" * 2_000_000]


def test_the_literal_name_of_bos_is_text_from_a_users_file_to_the_rows(tokenizer, tmp_path):
    """DA8."""
    texts = ["one <|bos|> two", "<|bos|>", "three"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "data").mkdir()
    corpus.import_text(tmp_path / "a.jsonl", tmp_path / "data")
    in_train = [text for group in dataset.row_groups(sorted((tmp_path / "data").iterdir())[:-1]) for text in group]
    assert any("<|bos|>" in text for text in in_train)
    found = documents_of_an_epoch(tmp_path / "data", tokenizer, tokens_of(in_train, tokenizer))
    assert sorted(found) == sorted(in_train)


def test_row_groups_and_files_without_rows_change_nothing(tokenizer, tmp_path):
    """DA11."""
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
    slices = [dataloader.slices_of(dataset.open_shards(tmp_path / name).train, 2) for name in ("plain", "holes")]
    rows = [sorted((part.start, part.stop) for part in found) for found in slices]
    assert rows[0] == rows[1]


def test_bad_data_of_one_rank_stops_all_in_the_same_step(run_script, tokenizer, base_dir, tmp_path):
    """DA13: with two streams rank 1 reads the slices at odd positions, rank 0 the others."""
    tokenizer.save(base_dir / "tokenizer")
    folder = make_shards(tmp_path / "folder", train=1)
    path = folder / "shard_00000.parquet"
    order = sorted(range(8), key=lambda group: hashlib.sha256(f"1 0 {path.name}:{group}:0".encode()).hexdigest())
    place = pq.ParquetFile(path).metadata.row_group(order[3]).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    flags = ["--seed=1", "--num-streams=2", "--depth=1", "--aspect-ratio=16", "--head-dim=8", "--max-seq-len=16"]
    flags += ["--device-batch-size=4", "--total-batch-size=128", "--num-iterations=300", "--eval-every=0"]
    flags += [
        "--compile=off",
        "--dtype=float32",
        "--device=cpu",
        "--spectral-tokens=0",
        "--run-name=r",
        "--report=false",
        f"--data-dir={folder}",
    ]
    done = run_script("scripts.base_train", *flags, ranks=2, OMP_NUM_THREADS="1")
    assert done.returncode != 0
    said = re.findall(r"^(.*error: .*row group (\d).*)$", done.stderr, re.MULTILINE)
    # torchrun ends the others when one has ended, which may come before what they have to say
    assert len({line.removeprefix("[rank 1] ") for line, _ in said}) == 1, done.stderr
    assert int(said[0][1]) == order[3]
    run = base_dir / "runs" / "r"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last_step = max(row["step"] for row in rows if "train/loss" in row)
    assert checkpoint.steps(run) == [last_step]
    read_by_rank_0 = [text for group in order[::2] for text in dataset.read_texts(path, group)]
    assert 64 * last_step < tokens_of(read_by_rank_0, tokenizer), "so far rank 0 had no need of the bad one"
