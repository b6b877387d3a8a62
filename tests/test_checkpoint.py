"""Checkpoints: what is saved comes back to the last bit, and what was damaged does not."""

import io
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import (
    bits,
    blank,
    content_of,
    forge,
    read_tensors,
    small_state,
    states,
    with_checksums,
)
from hypothesis import given, settings
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from drifting.errors import UserError
from drifting.training import checkpoint_storage
from drifting.training.checkpoint import load_checkpoint, save_checkpoint
from drifting.training.distributed import Ranks


@settings(max_examples=60, deadline=None, derandomize=True)
@given(states)
def test_what_is_saved_comes_back(state):
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), state)
        template = blank(state)
        loaded = load_checkpoint(Path(folder), template)
    assert bits(loaded) == bits(state)
    assert list(loaded) == list(state)


def test_loads_into_the_tensors_it_is_given(tmp_path):
    """Also into parameters, and into what is no contiguous whole."""
    weight, columns = torch.nn.Parameter(torch.randn(3, 4)), torch.randn(4, 6)[:, ::2]
    save_checkpoint(tmp_path, {"step": 1, "weight": weight, "columns": columns})
    template = {"step": 0, "weight": torch.nn.Parameter(torch.zeros(3, 4)), "columns": torch.zeros(6, 4).T[:, ::2]}
    loaded = load_checkpoint(tmp_path, template)
    assert loaded["weight"] is template["weight"] and loaded["columns"] is template["columns"]
    assert torch.equal(loaded["weight"], weight) and torch.equal(loaded["columns"], columns)


def test_keeps_the_newest(tmp_path):
    for step in (5, 10, 900, 1000):
        save_checkpoint(tmp_path, small_state(step), keep=2)
    assert names(tmp_path) == ["step_00000900", "step_00001000"]
    assert names(tmp_path / "step_00001000") == [".metadata", "__0_0.distcp", "checkpoint.json"]
    assert bits(load_checkpoint(tmp_path, blank(small_state(0)))) == bits(small_state(1000))
    save_checkpoint(tmp_path, small_state(10**8), keep=1)  # a digit more than the others
    assert names(tmp_path) == ["step_100000000"]
    assert load_checkpoint(tmp_path, blank(small_state(0)))["step"] == 10**8
    assert load_checkpoint(tmp_path / "nothing here", {"step": 0}) is None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_step_is_saved_again(tmp_path):
    save_checkpoint(tmp_path, {"step": 1, "x": torch.zeros(2)})
    save_checkpoint(tmp_path, {"step": 1, "x": torch.ones(2)})
    assert names(tmp_path) == ["step_00000001"]
    assert torch.equal(load_checkpoint(tmp_path, {"step": 0, "x": torch.zeros(2)})["x"], torch.ones(2))


def test_remainders_of_a_killed_process(tmp_path):
    """One checkpoint half written, one being replaced, one being deleted."""
    for step in (1, 2):
        save_checkpoint(tmp_path, small_state(step))
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000003.part")
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.old")
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000001.part")
    assert bits(load_checkpoint(tmp_path, blank(small_state(0)))) == bits(small_state(2))
    save_checkpoint(tmp_path, small_state(2), keep=1)
    assert names(tmp_path) == ["step_00000002"]


def test_values_that_cannot_be_saved_are_named(tmp_path):
    for value in (lambda: None, {1}, b"x", [b"x"]):
        with pytest.raises(TypeError, match="a/b is a .*, expected a tensor, number"):
            save_checkpoint(tmp_path, {"step": 1, "a": {"b": value}})
    assert not names(tmp_path)


# --------------------------------------------------------------------------------------------------------- damage

DAMAGE = {
    "a byte": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "cut short": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "missing": lambda data: None,
    "a folder": lambda data: {},
}


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "checkpoint.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_a_damaged_checkpoint_is_used(tmp_path, capfd, file, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, small_state(step))
    path = tmp_path / "step_00000002" / file
    data = DAMAGE[damage](path.read_bytes())
    path.unlink()
    if data == {}:
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    assert bits(load_checkpoint(tmp_path, blank(small_state(0)))) == bits(small_state(1))
    output = capfd.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1
    assert f"checkpoint {path.parent} is damaged and left out: {file} " in output.err

    (tmp_path / "step_00000001" / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"step_00000002 is damaged .*step_00000001 is damaged .* or delete .* to"):
        load_checkpoint(tmp_path, blank(small_state(0)))


def test_a_damaged_checkpoint_gives_way_when_its_step_comes_again(tmp_path, capfd):
    for step in (1, 3):
        save_checkpoint(tmp_path, small_state(step))
    (tmp_path / "step_00000003" / "checkpoint.json").unlink()
    save_checkpoint(tmp_path, small_state(2))
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]  # two good ones
    assert load_checkpoint(tmp_path, blank(small_state(0)))["step"] == 2
    save_checkpoint(tmp_path, small_state(3))
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    assert load_checkpoint(tmp_path, blank(small_state(0)))["step"] == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"new": torch.zeros(2)}, "it lacks 1 of the tensors: new"),
        ({"queue": {"a": torch.zeros(2), "b": torch.zeros(1)}}, "it lacks 2 of the tensors: queue/a, queue/b"),
        ({"model": {"weight": torch.zeros(5, 3)}}, "it has, unexpected, 1 of the tensors: model/a~1b"),
        ({"queue": torch.zeros(41, dtype=torch.uint8)}, r"queue is \['uint8', \[40\]\], expected \['uint8', \[41\]\]"),
        ({"queue": torch.zeros(40, dtype=torch.int8)}, r"queue is \['uint8', \[40\]\], expected \['int8', \[40\]\]"),
        ({"more": 1}, "it lacks 1 of the values: more"),
        ({"optimizer": {"lr": 0.5}}, "it has, unexpected, 3 of the values: optimizer/best, "),
        ({"optimizer": {"lr": "", "betas": (), "best": 0.0, "name": ""}}, "optimizer/lr is 0.1, expected a str"),
    ],
)
def test_a_checkpoint_of_another_trainer(tmp_path, change, message):
    """The one before it would not fit either: it is refused, and says what differs."""
    save_checkpoint(tmp_path, small_state(1))
    with pytest.raises(ValueError, match=f"checkpoint .*step_00000001 is of another trainer than this: {message}"):
        load_checkpoint(tmp_path, blank(small_state(0)) | change)


def test_a_checkpoint_of_another_version(tmp_path):
    path = save_checkpoint(tmp_path, small_state(1))
    forge(path, content_of(path) | {"format": 2})
    with pytest.raises(ValueError, match="of another version of this program: expected format 1"):
        load_checkpoint(tmp_path, blank(small_state(0)))


# ------------------------------------------------------------------------------------------------------- execution


class Call:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_executes_nothing(tmp_path):
    """Of a checkpoint made to be read here: neither DCP's index, which is a pickle, nor what stands for a tensor."""
    checkpoint = save_checkpoint(tmp_path / "run", small_state(1))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Call(tmp_path / "executed")))
    forge(checkpoint, with_checksums(checkpoint, content_of(checkpoint)))
    assert bits(load_checkpoint(tmp_path / "run", blank(small_state(0)))) == bits(small_state(1))

    buffer = io.BytesIO()
    torch.save(Call(tmp_path / "executed"), buffer)
    (checkpoint / "__0_0.distcp").write_bytes(buffer.getvalue())
    content = content_of(checkpoint)
    for tensor in content["tensors"].values():
        tensor["chunks"][0] |= {"start": 0, "length": len(buffer.getvalue())}
    forge(checkpoint, with_checksums(checkpoint, content))
    with pytest.raises(ValueError, match=r"__0_0.distcp does not hold .*\(UnpicklingError\)"):
        load_checkpoint(tmp_path / "run", blank(small_state(0)))
    assert not (tmp_path / "executed").exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert (tmp_path / "executed").exists()  # so it would have shown


def compressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as stored, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in stored.namelist():
            archive.writestr(entry, stored.read(entry))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["another tensor", "more than it is", "older"])
def test_what_stands_for_a_tensor_is_no_larger(tmp_path, kind):
    """Archives from which more comes than they are, and formats that say how much is to be allocated."""
    checkpoint = save_checkpoint(tmp_path, {"step": 1, "x": torch.zeros(100_000)})
    buffer = io.BytesIO()
    tensor = torch.zeros(100_001 if kind == "another tensor" else 100_000)
    torch.save(tensor, buffer, _use_new_zipfile_serialization=kind != "older")
    data = compressed(buffer.getvalue()) if kind == "more than it is" else buffer.getvalue()
    (checkpoint / "__0_0.distcp").write_bytes(data)
    content = content_of(checkpoint)
    content["tensors"]["x"]["chunks"][0] |= {"start": 0, "length": len(data)}
    forge(checkpoint, with_checksums(checkpoint, content))
    assert torch.equal(torch.load(io.BytesIO(data)), tensor)
    with pytest.raises(ValueError, match="__0_0.distcp does not hold x"):
        load_checkpoint(tmp_path, {"step": 0, "x": torch.zeros(100_000)})


def test_reads_nothing_but_its_own_files(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "run", small_state(1))
    shutil.copy(checkpoint / "__0_0.distcp", tmp_path / "__0_0.distcp")
    content = content_of(checkpoint)
    content["files"]["../../__0_0.distcp"] = content["files"].pop("__0_0.distcp")
    for tensor in content["tensors"].values():
        tensor["chunks"][0]["file"] = "../../__0_0.distcp"
    forge(checkpoint, content)
    with pytest.raises(ValueError, match="checkpoint.json is not one of step 1 with files"):
        load_checkpoint(tmp_path / "run", blank(small_state(0)))


def test_other_programs_can_read_it(tmp_path):
    """PyTorch's own converter."""
    checkpoint = save_checkpoint(tmp_path, small_state(1))
    assert torch.equal(read_tensors(checkpoint)["model/weight"], small_state(1)["model"]["weight"])


# ----------------------------------------------------------------------------------------------- at other numbers

SHAPES = {"even": (8, 3), "uneven": (5, 2), "fewer": (2,), "one": (1, 4), "columns": (2, 7)}


def whole(step: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(*shape, generator=torch.Generator().manual_seed(step)) for name, shape in SHAPES.items()}


def sharded_state(step: int, mesh: DeviceMesh) -> dict:
    """Shards as FSDP2 makes them, along the first dimension or another, and tensors that all ranks have alike."""
    shards = {
        name: distribute_tensor(tensor, mesh, [Shard(1 if name == "columns" else 0)], src_data_rank=None)
        for name, tensor in whole(step).items()
    }
    return {"shards": shards, "alike": torch.full((3,), float(step)), "lr": step / 10, "step": step}


def blank_shards(mesh: DeviceMesh) -> dict:
    state = sharded_state(0, mesh)
    for shard in state["shards"].values():
        shard.to_local().zero_()
    return state


def is_state(state: dict, step: int) -> bool:
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state["shards"].items()}
    alike = torch.equal(state["alike"], torch.full((3,), float(step)))
    shards = all(torch.equal(full[name], tensor) for name, tensor in whole(step).items())
    return alike and shards and (state["lr"], state["step"]) == (step / 10, step)


def refusal(action) -> str:
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def worker(rank: int, folder: Path) -> None:
    """Four processes, of which the first two, and each alone, also save and load among themselves."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    groups = {size: dist.new_group(list(range(size)), backend="gloo") for size in (2, 4)}
    meshes = {size: DeviceMesh("cpu", list(range(size))) for size in (2, 4)}
    ranks = {size: Ranks(rank, size, groups[size], groups[size]) for size in (2, 4)}
    results = {}
    if rank < 2:
        save_checkpoint(folder / "of_two", sharded_state(1, meshes[2]), ranks[2])
    save_checkpoint(folder / "of_four", sharded_state(2, meshes[4]), ranks[4])
    dist.barrier()
    loaded = load_checkpoint(folder / "of_two", blank_shards(meshes[4]), ranks[4])
    results["two on four"] = is_state(loaded, 1)
    if rank < 2:
        results["four on two"] = is_state(load_checkpoint(folder / "of_four", blank_shards(meshes[2]), ranks[2]), 2)
        results["one on two"] = is_state(load_checkpoint(folder / "of_one", blank_shards(meshes[2]), ranks[2]), 3)

    # What fails on one rank fails on all, and none is left waiting.
    if rank == 3:
        checkpoint_storage._Stream.write = full_disk
    results["full disk"] = refusal(lambda: save_checkpoint(folder / "of_four", sharded_state(3, meshes[4]), ranks[4]))
    results["left"] = names(folder / "of_four")
    dist.barrier()
    if rank == 0:
        (folder / "of_four" / "step_00000002" / "__2_0.distcp").write_bytes(b"")
    dist.barrier()
    results["damaged"] = refusal(lambda: load_checkpoint(folder / "of_four", blank_shards(meshes[4]), ranks[4]))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def full_disk(self, data):
    raise OSError(28, "No space left on device")


def test_at_other_numbers_of_ranks(tmp_path):
    alone = {"shards": whole(3), "alike": torch.full((3,), 3.0), "lr": 0.3, "step": 3}
    save_checkpoint(tmp_path / "of_one", alone)
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["drifting.training.checkpoint"])
    torch.multiprocessing.start_processes(worker, (tmp_path,), nprocs=4, start_method="forkserver")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    for rank, result in enumerate(results):
        assert result["two on four"] and (rank >= 2 or (result["four on two"] and result["one on two"]))
        folder = tmp_path / "of_four"
        assert result["full disk"] == (
            f"UserError: cannot save the checkpoint step_00000003: {folder}/.step_00000003.part/__3_0.distcp: "
            f"No space left on device; the checkpoint {folder}/step_00000002 is intact"
        )
        assert result["damaged"].startswith(f"ValueError: checkpoint {folder}/step_00000002 is damaged and left out: ")
        assert "__2_0.distcp has 0 bytes, expected " in result["damaged"]
    assert results[0]["left"] == ["step_00000002"]
    fresh = {"shards": {name: torch.zeros(shape) for name, shape in SHAPES.items()}, "alike": torch.zeros(3)}
    assert is_state(load_checkpoint(tmp_path / "of_two", fresh | {"lr": 0.0, "step": 0}), 1)
    files = content_of(tmp_path / "of_two" / "step_00000001")["files"]
    assert sorted(files) == [".metadata", "__0_0.distcp", "__1_0.distcp"]


def test_errors_in_saving_are_user_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save .*: .*file: .*; there is no earlier checkpoint"):
        save_checkpoint(tmp_path / "file", small_state(1))
