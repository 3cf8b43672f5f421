"""Files that are whole or absent."""

import errno

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from toymodels import ToyModel
from toymodels.files import save_tensors, write_text


def test_half_a_text_is_not_left(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "taken", "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_tensors_that_do_not_fit_the_disk_are_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("toymodels.files.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "x.safetensors"))


def test_other_faults_of_tensors_stay_what_they_are(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise SafetensorError("broken")

    monkeypatch.setattr("toymodels.files.save_file", broken)
    with pytest.raises(SafetensorError, match="broken"):
        save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})


def test_tensors_that_could_not_be_written_leave_those_before(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(2)})
    real = save_file

    def halfway(tensors, name, metadata):
        real(tensors, name, metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr("toymodels.files.save_file", halfway)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(path, {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_file(path)["a"], torch.zeros(2))


def test_what_is_saved_can_be_read_by_whom_the_umask_allows(tmp_path):
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    ToyModel(3, 2).save(tmp_path / "model.safetensors")
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {usual}
