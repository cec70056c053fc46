"""The listing of a training set in little memory."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from array import array

import numpy as np
import pytest

from pipeline.data.batches import block_numbers
from pipeline.data.packed import PackedStrings, packed_numbers
from pipeline.run_folder import listing_hash

NAMES = ["train/a/1.jpg", 'train/é/2 "x".png', "train/b/\udcff.jpg", "", "s3://bucket/k#3:17"]


def test_strings_come_back_as_they_were() -> None:
    packed = pickle.loads(pickle.dumps(PackedStrings(NAMES)))
    assert list(packed) == NAMES and len(packed) == 5 and packed[-2] == "" and packed[np.int64(1)] == NAMES[1]
    assert packed[1:3] == NAMES[1:3] and packed == PackedStrings(NAMES) != PackedStrings(NAMES[:4])
    assert copy.deepcopy(packed) is packed, "a plan is copied at every checkpoint"
    with pytest.raises(IndexError):
        packed[5]


def test_a_picture_of_a_large_set_takes_fifty_bytes() -> None:
    count = 100_000
    paths = PackedStrings(f"train/n01440764/n01440764_{k}.JPEG" for k in range(count))
    labels = packed_numbers(k % 1000 for k in range(count))
    assert (len(pickle.dumps(paths)) + len(pickle.dumps(labels))) / count < 50


def test_the_hash_of_a_listing_is_that_of_its_json() -> None:
    for names, labels in ((NAMES, array("i", [3, 0, 1, 2, 2])), ([], [])):
        whole = hashlib.sha256(json.dumps([list(names), list(labels)]).encode()).hexdigest()
        assert listing_hash(PackedStrings(names), labels) == whole


def test_blocks_of_a_packed_listing() -> None:
    assert block_numbers(PackedStrings(NAMES)) is None
    rows = PackedStrings(["a.parquet#0:1", "a.parquet#0:2", "x.jpg", "a.parquet#1:0", "a.parquet#0:0"])
    assert block_numbers(rows).tolist() == [0, 0, 1, 2, 0]
