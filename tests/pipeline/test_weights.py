"""A classifier's own weights, from files and from object stores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.backbone import create_classifier
from pipeline.data import store
from pipeline.errors import UsageError
from pipeline.weights import is_weight_file, load_weights, read_state_dict, weights_of
from tests.s3_server import s3_server


def test_state_dicts(tmp_path: Path) -> None:
    source = create_classifier("torchvision", "resnet18", outputs=10, arguments={})
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        other = create_classifier("torchvision", "resnet18", outputs=10, arguments={})
        assert load_weights(other, read_state_dict(tmp_path / name), where=name) == []
        assert torch.equal(other.state_dict()["fc.weight"], source.state_dict()["fc.weight"])
    smaller = create_classifier("torchvision", "resnet18", outputs=5, arguments={})
    assert load_weights(smaller, source.state_dict(), where="w") == ["fc.weight", "fc.bias"]
    with pytest.raises(UsageError, match=r"lacks|unknown|misfits"):
        load_weights(
            create_classifier("torchvision", "resnet34", outputs=10, arguments={}), source.state_dict(), where="w"
        )
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="not a readable state dict"):
        read_state_dict(tmp_path / "bad.safetensors")
    with pytest.raises(UsageError, match="no such file"):
        read_state_dict(tmp_path / "none.pt")
    torch.save({"a": 1}, tmp_path / "odd.pt")
    with pytest.raises(UsageError, match="no state dict"):
        read_state_dict(tmp_path / "odd.pt")


def test_weights_in_an_object_store(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    state = create_classifier("torchvision", "resnet18", outputs=10, arguments={}).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    with s3_server():
        files, _ = store.filesystem("s3://weights")
        files.mkdir("weights")
        for name in ("w.safetensors", "w.pt"):
            place = f"s3://weights/{name}"
            store.write_bytes(place, (tmp_path / name).read_bytes())
            assert is_weight_file(place)
            read = weights_of("torchvision", "resnet18", place)
            assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)
        store.write_bytes("s3://weights/odd.pt", b"nonsense")
        with pytest.raises(UsageError, match=r"^--weights s3://weights/odd\.pt: not a readable state dict"):
            read_state_dict("s3://weights/odd.pt")
        with pytest.raises(UsageError, match=r"^--weights s3://weights/none\.pt: cannot be read \(no such object\)"):
            read_state_dict("s3://weights/none.pt")
    with pytest.raises(UsageError, match="cannot use nostore://"):
        read_state_dict("nostore://weights/w.pt")
