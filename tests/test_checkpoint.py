"""Checkpoints: what is saved comes back to the last bit, and what was damaged does not."""

import io
import os
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_cases import bits, small_state, states
from hypothesis import given, settings

from drifting.errors import UserError
from drifting.training.checkpoint import load_checkpoint, save_checkpoint


@settings(max_examples=60, deadline=None, derandomize=True)
@given(states)
def test_what_is_saved_comes_back(state):
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), state)
        loaded = load_checkpoint(Path(folder))
        assert bits(loaded) == bits(state)
        assert list(loaded) == list(state)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_keeps_the_newest(tmp_path):
    for step in (5, 10, 900, 1000):
        save_checkpoint(tmp_path, small_state(step), keep=2)
    assert names(tmp_path) == ["step_00000900.pt", "step_00001000.pt"]
    assert bits(load_checkpoint(tmp_path)) == bits(small_state(1000))
    save_checkpoint(tmp_path, small_state(10**8), keep=1)  # a digit more than the others
    assert names(tmp_path) == ["step_100000000.pt"]
    assert load_checkpoint(tmp_path)["step"] == 10**8
    assert load_checkpoint(tmp_path / "nothing here") is None


def test_a_step_is_saved_again(tmp_path):
    save_checkpoint(tmp_path, {"step": 1, "x": torch.zeros(2)})
    save_checkpoint(tmp_path, {"step": 1, "x": torch.ones(2)})
    assert names(tmp_path) == ["step_00000001.pt"]
    assert torch.equal(load_checkpoint(tmp_path)["x"], torch.ones(2))


def test_remainders_of_a_killed_process(tmp_path):
    """A checkpoint that is half written has no name of one."""
    save_checkpoint(tmp_path, small_state(1))
    (tmp_path / ".step_00000003.pt.part").write_bytes((tmp_path / "step_00000001.pt").read_bytes()[:1000])
    assert bits(load_checkpoint(tmp_path)) == bits(small_state(1))
    save_checkpoint(tmp_path, small_state(2), keep=1)
    assert names(tmp_path) == ["step_00000002.pt"]


# --------------------------------------------------------------------------------------------------------- damage

DAMAGE = {
    "a byte of a tensor": lambda data: data.replace(b"\x7b" * 64, b"\x7b" * 63 + b"\x7a"),
    "the middle": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "cut short": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "other": lambda data: b"no archive",
    "a folder": None,
}


def with_pattern(step: int) -> dict:
    return small_state(step) | {"pattern": torch.full((4096,), 0x7B, dtype=torch.uint8)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_a_damaged_checkpoint_is_used(tmp_path, capfd, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, with_pattern(step))
    path = tmp_path / "step_00000002.pt"
    data = path.read_bytes()
    path.unlink()
    if DAMAGE[damage] is None:
        path.mkdir()
    else:
        assert DAMAGE[damage](data) != data
        path.write_bytes(DAMAGE[damage](data))
    assert bits(load_checkpoint(tmp_path)) == bits(with_pattern(1))
    output = capfd.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1
    assert f"checkpoint {path} is damaged and left out: " in output.err

    (tmp_path / "step_00000001.pt").write_bytes(b"")
    with pytest.raises(UserError, match="step_00000002.pt is damaged .*step_00000001.pt is damaged .* or delete .* to"):
        load_checkpoint(tmp_path)


def test_every_byte_of_the_tensors_counts(tmp_path):
    path = save_checkpoint(tmp_path, with_pattern(1))
    data = path.read_bytes()
    start = data.index(b"\x7b" * 4096)
    for at in (0, 1, 2047, 4094, 4095):
        path.write_bytes(data[: start + at] + b"\x7a" + data[start + at + 1 :])
        with pytest.raises(UserError, match="the checksum of .* is another"):
            load_checkpoint(tmp_path)


def test_a_damaged_checkpoint_gives_way_when_its_step_comes_again(tmp_path):
    for step in (1, 3):
        save_checkpoint(tmp_path, small_state(step))
    (tmp_path / "step_00000003.pt").write_bytes(b"")
    save_checkpoint(tmp_path, small_state(2))
    assert names(tmp_path) == [f"step_0000000{step}.pt" for step in (1, 2, 3)]  # two good ones
    assert load_checkpoint(tmp_path)["step"] == 2
    save_checkpoint(tmp_path, small_state(3))
    assert names(tmp_path) == ["step_00000002.pt", "step_00000003.pt"]
    assert load_checkpoint(tmp_path)["step"] == 3


# ------------------------------------------------------------------------------------------------------- execution


class Call:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_executes_nothing(tmp_path):
    path = save_checkpoint(tmp_path / "run", small_state(1))
    torch.save(small_state(1) | {"x": Call(tmp_path / "executed")}, path)
    with pytest.raises(UserError, match="is damaged and left out: UnpicklingError"):
        load_checkpoint(tmp_path / "run")
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()  # so it would have shown


def test_what_unpacks_to_more_than_it_is(tmp_path):
    path = save_checkpoint(tmp_path, {"step": 1, "x": torch.zeros(100_000)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in stored.namelist():
            archive.writestr(entry, stored.read(entry))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="it is compressed"):
        load_checkpoint(tmp_path)


def test_a_state_of_another_kind(tmp_path):
    path = save_checkpoint(tmp_path, {"step": 1})
    for content in ([1], {"step": 2}, {"step": True}, {}, torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(UserError, match="it does not hold the state of step 1"):
            load_checkpoint(tmp_path)


def test_errors_in_saving_are_user_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save .*/file/step_00000001.pt: File exists; there is no earlier"):
        save_checkpoint(tmp_path / "file", small_state(1))
