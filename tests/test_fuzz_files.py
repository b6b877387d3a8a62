"""Damaged and malicious files, thousands of each kind (see :mod:`fuzzing`): each is read, or refused with a reason.

What is read must be usable, and reading must execute nothing, come to an end and take bounded memory.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import zipfile

import msgpack
import numpy as np
import pytest
import torch
from checkpoint_cases import bits, small_state
from fuzzing import changes, damaged, edited, fuzzed, json_edits, json_values, watching
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from test_data_sources import Call, idx_bytes, pixels, write_batch

from drifting.config import Config, DataConfig, PretrainConfig, load_config, read_config, save_config
from drifting.config.reading import CONFIG_DIR
from drifting.data import open_dataset
from drifting.data.cifar10 import read_batch
from drifting.data.idx import read_idx
from drifting.data.latents import INDEX
from drifting.errors import UserError
from drifting.evaluation.archives import read_reference, read_samples
from drifting.generation import Generator
from drifting.hub.flax_msgpack import read_arrays
from drifting.hub.release import METADATA, WEIGHTS, write_artifact
from drifting.hub.run_directory import RunDirectory, save_generator
from drifting.hub.sources import load_generator, load_mae
from drifting.models import MAE, Classifier, DriftingDiT
from drifting.models.network_files import read_model, write_model
from drifting.training.checkpoint import load_checkpoint, save_checkpoint

UINT8 = np.uint8


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_generator() -> DriftingDiT:
    return DriftingDiT(
        img_size=4,
        patch_size=2,
        in_chans=1,
        num_classes=3,
        embed_dim=8,
        depth=1,
        num_heads=1,
        num_style_tokens=1,
        style_vocab=2,
        n_cls_tokens=1,
    )


def check_model(model: torch.nn.Module) -> None:
    """All there and finite, and a generator generates."""
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu" and tensor.isfinite().all(), name
    if isinstance(model, DriftingDiT):
        assert model.generate(1).shape == (1, model.out_chans, model.img_size, model.img_size)


# ---------------------------------------------------------------------------------------------- models of our own


@pytest.mark.parametrize("kind", ["gen", "mae", "classifier"])
def test_run_directories(tmp_path, kind):
    model = {
        "gen": tiny_generator,
        "mae": lambda: MAE(1, 32, (1, 1, 1, 1), 2),
        "classifier": lambda: Classifier(1, 2, (2, 3)),
    }[kind]()
    run = RunDirectory(tmp_path)
    write_model(run.path, model, {"step": 3, "data": "digits", "pixel_range": [-1.0, 1.0]})
    description, weights = json.loads(run.description.read_text()), run.weights.read_bytes()
    header_end = 8 + int.from_bytes(weights[:8], "little")
    one_in = 1 if kind != "mae" else 5  # whose smallest is large

    with watching(f"run directory of a {kind}", UserError) as watch:

        @fuzzed
        @given(json_edits, changes, changes, st.booleans())
        @example([(0, "set", 10**400)], [], [], False)
        @example([], [("insert", 0, 0, b"[" * 3000)], [], False)  # a RecursionError
        def fuzz(edits, text_changes, weight_changes, keep_weights):
            text = json.dumps(edited(description, edits), ensure_ascii=True).encode()
            run.description.write_bytes(damaged(text, text_changes))
            header = weights[:header_end] if keep_weights else damaged(weights[:header_end], weight_changes)
            run.weights.write_bytes(header + weights[header_end:])
            read, refusal = watch.call(read_model, tmp_path)
            if refusal is None and (watch.accepted % one_in == 0):
                check_model(read[0])
                assert type(read[1]["step"]) is int and read[1]["step"] >= 0
            if kind == "gen" and refusal is None:
                generator, _ = watch.call(load_generator, tmp_path)
                if generator is not None:
                    black, white = generator.pixel_range or (0, 1)
                    assert black < white and isinstance(generator.data, str)

        fuzz()


def test_run_directories_of_own_networks(tmp_path):
    """What the file says of a network that the user gives: as arguments of his class, and of its noise and samples."""

    class Net(torch.nn.Linear):
        def __init__(self, width: int = 3) -> None:
            super().__init__(4, width)

    run = RunDirectory(tmp_path)
    save_generator(run, Generator(Net(), (4,), (3,), ("a", 2), name="parts:Net", arguments={"width": 3}))
    description = json.loads(run.description.read_text())
    with watching("run directory of an own network", UserError) as watch:

        @fuzzed
        @given(json_edits, changes | st.just([]))
        @example([(2480, "set", [])], [])  # conditions that are single numbers
        @example([(217, "set", 2**63)], [])  # the guidance scale
        def fuzz(edits, text_changes):
            text = json.dumps(edited(description, edits), ensure_ascii=True).encode()
            run.description.write_bytes(damaged(text, text_changes))
            read, _ = watch.call(load_generator, tmp_path, Net)
            if read is not None:
                check_model(read.model)
                if read.noise_shape == (4,):
                    of_pairs = read.condition_shape is not None  # They may have any shape, without memory for it.
                    conditions = torch.zeros(()).expand(1, *read.condition_shape) if of_pairs else None
                    assert read.generate(1, conditions).shape == (1, 3)

        fuzz()


def test_weights_must_be_what_the_model_has(tmp_path):
    """Neither NaN nor another dtype, which would only show in what the model makes."""
    run = RunDirectory(tmp_path)
    for spoil, message in (
        (lambda weight: weight.mul_(float("nan")), "has NaN or infinity"),
        (lambda weight: weight[0].fill_(float("inf")), "has NaN or infinity"),
    ):
        model = tiny_generator()
        with torch.no_grad():
            spoil(model.class_embed.weight)
        write_model(run.path, model, {"step": 1})
        with pytest.raises(UserError, match=f"class_embed.weight {message}"):
            read_model(tmp_path)
    write_model(run.path, tiny_generator().half(), {"step": 1})
    with pytest.raises(UserError, match=r"is torch.float16 \[.*\], expected torch.float32 \["):
        read_model(tmp_path)


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    """A folder with those of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, small_state(step))
    return tmp_path


def load_quietly(folder):
    with contextlib.redirect_stderr(io.StringIO()):  # where damage is reported
        return load_checkpoint(folder)


def test_damaged_checkpoints(checkpoints):
    """One of step 2 is read if it holds what it held; otherwise that of step 1, and refused for it here."""
    path = checkpoints / "step_00000002.pt"
    data, good = path.read_bytes(), {step: bits(small_state(step)) for step in (1, 2)}

    def load():
        loaded = load_quietly(checkpoints)
        assert bits(loaded) == good[loaded["step"]]
        if loaded["step"] == 1:
            raise ValueError("damaged")

    with watching("damaged checkpoint", ValueError) as watch:

        @fuzzed
        @given(changes, st.integers(0, 10**6))
        def fuzz(edits, place):
            place %= len(data)  # one bit, if there are no edits: anywhere
            flipped = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
            path.write_bytes(damaged(data, edits) if edits else flipped)
            watch.call(load)
            path.write_bytes(data)

        watch.call(load)
        fuzz()


def test_forged_checkpoints(checkpoints):
    """Whose checksums are right, whatever their pickle says: read as a state of its step, or refused."""
    (checkpoints / "step_00000001.pt").unlink()
    path = checkpoints / "step_00000002.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in entries if name.endswith("data.pkl"))
    with watching("forged checkpoint", ValueError) as watch:

        @fuzzed
        @given(changes | st.just([]))
        @example([("set", 0, 0, pickle.dumps(Call(eval, "1")))])
        def fuzz(edits):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
                for name, content in entries.items():
                    archive.writestr(name, damaged(content, edits) if name == pickled else content)
            loaded, _ = watch.call(load_quietly, checkpoints)
            assert loaded is None or loaded["step"] == 2

        fuzz()


# ------------------------------------------------------------------------------------------- models of the release


@pytest.mark.parametrize("kind", ["gen", "mae"])
def test_artifacts_of_the_release(tmp_path, kind):
    write_artifact(tmp_path, tiny_generator() if kind == "gen" else MAE(1, 32, (1, 1, 1, 1), 2), {"step": 3})
    metadata = json.loads((tmp_path / METADATA).read_text())
    load = load_generator if kind == "gen" else load_mae
    with watching(f"artifact of a {kind}", UserError) as watch:

        @fuzzed
        @given(json_edits, changes)
        @example([(1308, "set", 0.0)], [])  # num_style_tokens, in place of 0
        def fuzz(edits, text_changes):
            (tmp_path / METADATA).write_bytes(damaged(json.dumps(edited(metadata, edits)).encode(), text_changes))
            read, refusal = watch.call(load, tmp_path)
            if refusal is None and kind == "gen":
                check_model(read.model)

        fuzz()


def packed(tree) -> bytes:
    return msgpack.packb(tree)


arrays = st.builds(
    lambda shape, dtype, content, code: msgpack.ExtType(code, msgpack.packb((shape, dtype, content))),
    st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**40, 2**62, -1]), max_size=4) | st.integers(0, 4),
    st.sampled_from(["float32", "float64", "bfloat16", "int8", "uint8", "bool", "object", "V8", ""]) | st.none(),
    st.binary(max_size=24) | st.none() | st.text(max_size=3),
    st.sampled_from([1, 1, 1, 3, 2, 5]),
)
trees = st.recursive(
    arrays | st.none() | st.integers(0, 3) | st.binary(max_size=3),
    lambda of: (
        st.dictionaries(
            st.sampled_from(["a", "b", "a/b", "shape", "chunks", "0", "1", "__msgpack_chunked_array__"]), of, max_size=4
        )
        | st.lists(of, max_size=2)
        | st.builds(
            lambda shape, chunks: {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks},
            st.dictionaries(st.sampled_from(["0", "1"]), st.sampled_from([0, 1, 2, 4, -1]), max_size=2),
            st.dictionaries(st.sampled_from(["0", "1", "2"]), arrays, max_size=3),
        )
    ),
    max_leaves=8,
)


def test_weights_in_msgpack(tmp_path):
    write_artifact(tmp_path, tiny_generator(), {"step": 3})
    content, path = (tmp_path / WEIGHTS).read_bytes(), tmp_path / "x"
    with watching("msgpack", UserError) as watch:

        @fuzzed
        @given(st.one_of(st.just(content), trees.map(packed)), changes)
        @example(packed({"a": msgpack.ExtType(1, packed(([2**62, 2**62, 0], "float32", b"")))}), [])  # RuntimeError
        @example(packed(msgpack.ExtType(1, packed(([0], "float32", b"")))), [])  # an array in no dictionary
        @example(b"\xdd\x00\x10\x00\x00" * 500 + bytes(2**20), [])  # lists of 2²⁰ in one another: 4 GB of them
        @example(
            packed(
                {
                    "a": {"b": msgpack.ExtType(1, packed(([], "uint8", b"x")))},
                    "a/b": msgpack.ExtType(1, packed(([], "uint8", b"y"))),
                }
            ),
            [],
        )
        @example(b"\x82\xa1a" + packed(msgpack.ExtType(1, packed(([], "uint8", b"x")))) * 2, [])
        def fuzz(data, edits):
            data = damaged(data, edits)
            path.write_bytes(data)
            read, _ = watch.call(read_arrays, path)
            if read is not None:
                assert sum(array.numel() * array.element_size() for array in read.values()) <= len(data)

        fuzz()


def test_two_arrays_of_one_name(tmp_path):
    array = msgpack.ExtType(1, packed(([], "uint8", b"x")))
    (tmp_path / "x").write_bytes(packed({"a": {"b": array}, "a/b": array}))
    with pytest.raises(UserError, match="two arrays are called a/b"):
        read_arrays(tmp_path / "x")


# ------------------------------------------------------------------------------------------------------ archives


def npy_bytes(header: str, content: bytes) -> bytes:
    text = header.encode("latin1", "replace")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) % 2**16) + text + content


headers = st.builds(
    lambda descr, fortran, shape, tail: f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}{tail}",
    st.sampled_from(["'|u1'", "'<f8'", "'<i8'", "'|O'", "[('a', '<f8')]", "'<U4'", "'<f2'", "'<c16'", "'<M8[s]'", "1"]),
    st.sampled_from(["False", "True", "1"]),
    st.sampled_from(
        [
            "(2, 4, 4, 3)",
            "(2,)",
            "(3,)",
            "(3, 3)",
            "()",
            "(0,)",
            "(-1,)",
            "(-1, -9)",
            "(2**40,)",
            "(True, 2)",
            "(1099511627776, 1099511627776)",
            "(99999999999, 0)",
            "(" * 300,
            "[3]",
            str((1,) * 70),
        ]
    ),
    st.sampled_from(["\n", "", " " * 9000, "#"]),
)


@pytest.mark.parametrize("reader", [read_samples, read_reference], ids=["images", "reference"])
def test_npz_archives(tmp_path, reader):
    good = {
        "arr_0": pixels(2, 4, 4, 3),
        "arr_1": np.arange(2),
        "mu": np.zeros(3),
        "sigma": np.eye(3),
        "mu_s": np.zeros(2),
        "sigma_s": np.eye(2),
    }
    stored = {}
    for name, array in good.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        stored[name] = buffer.getvalue()
    path = tmp_path / "x.npz"

    with watching(f"npz ({reader.__name__})", UserError) as watch:

        @fuzzed
        @given(
            st.sets(st.sampled_from(sorted(good))),
            st.sampled_from(sorted(good)),
            st.one_of(st.none(), st.tuples(headers, st.binary(max_size=96) | st.just(bytes(96)))),
            changes,
            st.booleans(),
            changes | st.just([]),
        )
        def fuzz(left_out, replaced, replacement, inner, compressed, outer):
            method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            with zipfile.ZipFile(path, "w", method) as archive:
                for name, content in stored.items():
                    if name == replaced:
                        content = damaged(npy_bytes(*replacement) if replacement else content, inner)
                    if name not in left_out:
                        archive.writestr(f"{name}.npy", content)
            path.write_bytes(damaged(path.read_bytes(), outer))
            read, _ = watch.call(reader, path)
            if read is not None and reader is read_samples:
                images, labels = read
                assert images.size and (images.dtype == np.float32 or (images.dtype == UINT8 and images.ndim == 4))
                assert labels is None or (labels.dtype == np.int64 and labels.min() >= -(2**31))
            elif read is not None:
                for gaussian in (read.statistics, read.spatial_statistics):
                    assert gaussian is None or np.isfinite(gaussian.mean).all()
                    assert gaussian is None or np.isfinite(gaussian.covariance).all()

        fuzz()


def test_an_archive_speaks_of_more_than_it_holds(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    huge = "{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 1, 1, 1), }\n"
    bomb = io.BytesIO()
    np.save(bomb, np.zeros((2**10, 4, 4, 3), UINT8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", npy_bytes(huge, b"1"))
    with pytest.raises(UserError, match="x.npz cannot be read as an .npz file: (MemoryError|ValueError)"):
        read_samples(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", bomb.getvalue())
    # the directory of the archive says that one byte more comes out of the entry than is in it, times 2³⁰
    data = path.read_bytes()
    size = struct.pack("<I", len(bomb.getvalue()))
    path.write_bytes(data.replace(size * 2, size + struct.pack("<I", 2**31)))
    assert (read_samples(path)[0] == np.zeros((2**10, 4, 4, 3))).all()  # which is read for what it is
    # an entry, under whatever name, that is more than the memory once it is unpacked
    monkeypatch.setattr("drifting.evaluation.archives.MOST_BYTES", 40_000)
    for name in ("arr_0.npy", "arr_0", "other.npy"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, bomb.getvalue())
        assert path.stat().st_size < 1000
        with pytest.raises(UserError, match="its arrays take 49280 bytes, expected at most 40000 on this machine"):
            read_samples(path)


def test_a_header_that_keeps_python_busy_is_refused(tmp_path):
    """numpy reads damaged headers with Python's tokenizer, whose time is quadratic in the spaces before a `$`."""
    path = tmp_path / "x.npz"
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4 4" + " " * 9900 + "$"
    with watching("slow header", UserError) as watch:
        for name, text in (("arr_1", header), ("other", header)):  # what nobody asks for is not read
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(f"{name}.npy", npy_bytes(text, bytes(96)))
                archive.writestr("arr_0.npy", npy_bytes(str({"descr": "|u1", "fortran_order": False,
                                                             "shape": (2, 4, 4, 3)}) + "\n", bytes(96)))  # fmt: skip
            _, refusal = watch.call(read_samples, path)
            assert (refusal is not None) == (name == "arr_1")
    assert watch.slowest < 5


def test_an_encrypted_archive_is_told(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, pixels(2, 4, 4, 3))
    content = bytearray(path.read_bytes())
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # both headers say that there is a password
        content[content.index(start) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="encrypted, password required"):
        read_samples(path)


# ------------------------------------------------------------------------------------------------------ data sets


def read_all(config: DataConfig) -> list[torch.Tensor]:
    dataset = open_dataset(config)
    assert all(
        0 <= split.labels.min() and split.labels.max() < dataset.num_classes for split in (dataset.train, dataset.test)
    )
    return [split.samples() for split in (dataset.train, dataset.test)]


def test_latents(tmp_path):
    index = {
        "complete": True,
        "settings": {"shard_size": 2},
        "dtype": "float16",
        "shape": [1, 2, 2],
        "scaling_factor": 0.18,
        "class_names": ["a", "b"],
        "splits": {
            "train": {
                "shards": [{"file": "train/00000.npy", "count": 2}, {"file": "train/00001.npy", "count": 1}],
                "labels": [0, 1, 1],
                "skipped": [],
            },
            "test": {"shards": [{"file": "test/00000.npy", "count": 1}], "labels": [0], "skipped": ["x"]},
        },
    }
    shards = {}
    for split in index["splits"].values():
        for shard in split["shards"]:
            file = tmp_path / shard["file"]
            file.parent.mkdir(exist_ok=True)
            np.save(file, np.ones((shard["count"], 2, 1, 2, 2), np.float16))
            shards[file] = file.read_bytes()
    (tmp_path / INDEX).write_text(json.dumps(index))
    with watching("latents", UserError) as watch:

        @fuzzed
        @given(json_edits, changes | st.just([]), st.sampled_from(sorted(shards)), changes | st.just([]))
        @example([(11, "set", "/etc/passwd")], [], sorted(shards)[0], [])
        def fuzz(edits, text_changes, shard, shard_changes):
            (tmp_path / INDEX).write_bytes(damaged(json.dumps(edited(index, edits)).encode(), text_changes))
            shard.write_bytes(damaged(shards[shard], shard_changes))
            read, _ = watch.call(read_all, DataConfig("latents", path=str(tmp_path)))
            shard.write_bytes(shards[shard])
            if read is not None:
                assert all(len(samples) and samples.dtype == torch.float32 for samples in read)

        fuzz()


@pytest.mark.parametrize(
    "file", ["../outside.npy", "/tmp/x.npy", "test/00000.npy", "train/0.txt", "train/../train/00000.npy"]
)
def test_latents_are_read_from_their_own_folder_only(tmp_path, file):
    (tmp_path / "in" / "train").mkdir(parents=True)
    np.save(tmp_path / "outside.npy", np.ones((1, 2, 1, 2, 2), np.float16))
    split = {"shards": [{"file": file, "count": 1}], "labels": [0]}
    index = {
        "complete": True,
        "settings": {},
        "shape": [1, 2, 2],
        "class_names": ["a"],
        "splits": {"train": split, "test": split},
    }
    (tmp_path / "in" / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="is damaged .*shards of train are not files in its folder.*: empty it"):
        open_dataset(DataConfig("latents", path=str(tmp_path / "in")))


def test_idx(tmp_path):
    content = idx_bytes(pixels(5, 3, 3))
    with watching("idx", UserError) as watch:

        @fuzzed
        @given(changes, st.booleans(), changes | st.just([]))
        @example([("set", 3, 0, b"\xff")], False, [])  # 255 dimensions, which numpy cannot have
        @example([("cut", 9, 0, b"")], False, [])  # a header of three sizes that holds one: no values, as it seemed
        def fuzz(inner, compressed, outer):
            path = tmp_path / ("x.gz" if compressed else "x")
            data = damaged(content, inner)
            path.write_bytes(damaged(gzip.compress(data, 1) if compressed else data, outer))
            array, _ = watch.call(read_idx, path)
            if array is not None:
                assert array.dtype == UINT8 and 1 <= array.ndim <= 4

        fuzz()


def pickled(content) -> bytes:
    return pickle.dumps(content, protocol=2)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.binary(max_size=4) | st.text(max_size=4) | st.floats(),
    lambda of: st.lists(of, max_size=3) | st.dictionaries(st.binary(max_size=2), of, max_size=3) | st.tuples(of, of),
    max_leaves=6,
)
batches = st.builds(
    lambda data, labels, more: {b"data": data, b"labels": labels, b"more": more},
    st.sampled_from(
        [np.zeros((2, 3072), UINT8), np.zeros((2, 3072)), np.array([None]), np.zeros(3, UINT8), Call(eval, "1")]
    )
    | plain,
    st.sampled_from([[0, 1], [0, 10], [1.0, 2], [[0], [1]]]) | plain,
    plain,
)


def nested_tuples(depth: int) -> bytes:
    """A dictionary with a key of ``depth`` tuples, each twice in the next: its hash takes 2**depth steps."""
    return b"\x80\x02}(K\x01" + b"2\x86" * depth + b"K\x01u."


def test_cifar10(tmp_path):
    path = tmp_path / "batch"
    write_batch(path, pixels(2, 32, 32, 3), [3, 9])
    content = path.read_bytes()
    with watching("cifar10", UserError) as watch:

        @fuzzed
        @given(st.one_of(st.just(content), batches.map(pickled)), changes)
        @example(b"\x80\x02]r\xff\xff\xff\x7f.", [])  # a memo of 2³¹ entries: 34 GB in Python's unpickler
        @example(nested_tuples(64), [])
        @example(b"\x80\x02}(" + b"K\x01" + b"q\x00h\x00\x86" * 64 + b"K\x01u.", [])  # the same by way of the memo
        @example(b"\x80\x02Nt.", [])  # a tuple from a mark that is not there
        @example(b"\x80\x04\x8e\xff\xff\xff\xff\x07\x00\x00\x00x.", [])  # 34 GB of bytes announced
        @example(b"\x80\x05\x96\xff\xff\xff\xff\x07\x00\x00\x00x.", [])  # and of mutable ones
        @example(b"\x80\x02" + b"(" * 100_000 + b"t" * 99_999 + b".", [])
        def fuzz(data, edits):
            path.write_bytes(damaged(data, edits))
            read, _ = watch.call(read_batch, path)
            if read is not None:
                images, labels = read
                assert images.shape == (len(labels), 32, 32, 3) and 0 <= labels.min() and labels.max() <= 9

        fuzz()


FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "ppm": "PPM", "tif": "TIFF"}


def test_images(tmp_path):
    colours = Image.fromarray(pixels(9, 12, 3))
    files = []
    for suffix, name in FORMATS.items():
        for image in (colours, colours.convert("L"), colours.convert("P") if suffix in ("png", "tif") else colours):
            buffer = io.BytesIO()
            image.save(buffer, name)
            files.append((suffix, buffer.getvalue()))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    (tmp_path / "val" / "a" / "0.png").write_bytes(files[0][1])
    with watching("images", UserError) as watch:

        @fuzzed
        @given(st.sampled_from(files), changes, st.sampled_from([1, 5, 8]))
        @example(("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"), [], 8)
        @example(("ppm", b"P6 1 1000000 255\n" + bytes(3_000_000)), [], 8)
        @example(("ppm", b"P1 60000 60000\n1"), [], 8)
        def fuzz(file, edits, size):
            suffix, content = file
            path = tmp_path / "train" / "a" / f"0.{suffix}"
            path.write_bytes(damaged(content, edits))
            read, _ = watch.call(read_all, DataConfig("folder", path=str(tmp_path), image_size=size))
            path.unlink()
            if read is not None:
                assert read[0].shape == (1, 3, size, size) and read[0].abs().max() <= 1

        fuzz()


def test_a_folder_of_links_and_pipes_comes_to_an_end(tmp_path):
    """Links back to a folder above are 2⁴⁰ folders to one who follows them; a pipe never ends, nor does /dev/zero."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "a" / "0.png")
    for name in ("x", "y", "z"):
        (tmp_path / "train" / "a" / name).symlink_to(".")
    config = DataConfig("folder", path=str(tmp_path), image_size=8)
    assert len(open_dataset(config).train) == 1
    os.mkfifo(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "train" / "a" / "2.png").symlink_to("/dev/zero")
    dataset = open_dataset(config)
    for index in (1, 2):
        with pytest.raises(UserError, match=rf"{index}.png is no file of at most"):
            dataset.train[index]


# -------------------------------------------------------------------------------------------------- configurations

yaml_values = json_values.map(lambda value: json.dumps(value)) | st.sampled_from(
    [
        "${seed}",
        "${oc.env:HOME}",
        "${data.path}",
        "!!python/object/apply:os.system ['true']",
        "&a [*a]",
        "*a",
        "0x10",
        "1e3",
        ".nan",
        ".inf",
        "2020-01-01",
        "{a: ",
        "'",
        "- 1",
        "???",
        "1_000",
        "0o17",
        "12:30",
        "!!binary aGk=",
        "<<: 1",
        "own_parts:Net",
        "'1e-3'",
    ]
)
KEYS = [
    "seed",
    "data",
    "data.name",
    "data.path",
    "model",
    "model.name",
    "model.width",
    "model.depth",
    "model.embed_dim",
    "loss.temperatures",
    "loss",
    "train.steps",
    "train",
    "optimizer.learning_rate",
    "guidance.cfg_scale_range",
    "evaluation.reference",
    "x",
    "",
    ".",
    "a.b.c",
    "model.",
]


@pytest.mark.parametrize(("schema", "name"), [(Config, "digits"), (PretrainConfig, "mae_fashion_mnist")])
def test_configurations(tmp_path, schema, name):
    path, content = tmp_path / "config.yaml", (CONFIG_DIR / f"{name}.yaml").read_bytes()
    with watching(f"YAML ({schema.__name__})", UserError) as watch:

        @fuzzed
        @given(
            changes | st.just([]),
            st.lists(st.tuples(st.sampled_from(KEYS), yaml_values), max_size=2),
            st.lists(st.tuples(st.sampled_from(KEYS), yaml_values), max_size=1),
        )
        def fuzz(edits, lines, overrides):
            text = "".join(f"{key}: {value}\n" for key, value in lines).encode("utf-8", "replace")
            path.write_bytes(damaged(content, edits) + b"\n" + text)
            texts = [f"{key}={value}" for key, value in overrides]
            config, refusal = watch.call(read_config, str(path), texts, schema)
            assert refusal is None or "\n" not in str(refusal)
            if config is not None:
                assert type(config.train.steps) is int and config.train.steps >= 1
                assert 0 < config.optimizer.learning_rate < float("inf")
                save_config(config, path)
                assert repr(read_config(str(path), (), schema)) == repr(config)

        fuzz()


def test_a_configuration_of_aliases_is_refused_at_once(tmp_path):
    """Each line holds the one before nine times: 9⁹ values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    with watching("aliases", UserError) as watch:
        assert watch.call(load_config, "digits")[1] is None
        assert "aliases" in str(watch.call(load_config, str(tmp_path / "x.yaml"))[1])
