"""The reader of torch's legacy files: the same bits as torch, and no harm from hostile files."""

import gc
import hashlib
import re
import zipfile

import numpy as np
import pretrained
import pytest
import torch_file
from helpers import legacy_torch as legacy
from helpers.legacy_torch import group, number, numbers, storage, tensor, text
from torch_file import TorchFileError

PAYLOAD = np.array([0x7FC12345, 0x80000000, 1, 0xFF812345], np.uint32).view(np.float32)
X = np.arange(24, dtype=np.float32)


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """The garbage collector looks at what a file makes, and not through all of JAX each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def read(content, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    return torch_file.read(path)


def small_file():
    values = {
        "a.weight": tensor(storage("Float", "1", 24), (2, 3, 4), (12, 4, 1)),
        "a.count": tensor(storage("Long", "2", 1), (), ()),
        "a.bias": tensor(storage("Float", "3", 24), (3,), (1,)),
    }
    return legacy.file(legacy.named(values), {"1": X, "2": np.array(7), "3": X})


@pytest.mark.parametrize("kind", legacy.KINDS)
def test_every_dtype(kind, tmp_path):
    values = np.arange(6).astype(legacy.KINDS[kind]).reshape(2, 3)
    content = legacy.named({"a": tensor(storage(kind, "7", 6), (2, 3), (3, 1))})
    result = read(legacy.file(content, {"7": values}), tmp_path)
    assert result["a"].dtype == values.dtype
    np.testing.assert_array_equal(result["a"], values, strict=True)


def test_views_of_one_storage(tmp_path):
    views = {
        "whole": ((2, 3, 4), (12, 4, 1), 0, X.reshape(2, 3, 4)),
        "channels last": ((2, 4, 3), (12, 1, 4), 0, X.reshape(2, 3, 4).transpose(0, 2, 1)),
        "part": ((3,), (8,), 5, X[5::8]),
        "scalar": ((), (), 23, X[23]),
        "expanded": ((4, 2), (0, 1), 22, np.broadcast_to(X[22:], (4, 2))),
        "no rows": ((0, 9), (1, 1), 0, X[:0].reshape(0, 9)),
        "no columns": ((9, 0), (1, 1), 20, X[:0].reshape(9, 0)),
    }
    content = {name: tensor(storage("Float", "x", 24), *view[:3]) for name, view in views.items()}
    result = read(legacy.file(legacy.named(content), {"x": X}), tmp_path)
    assert list(result) == list(views)
    for name, (*_, expected) in views.items():
        np.testing.assert_array_equal(result[name], expected, strict=True)
        assert not result[name].flags.writeable


def test_every_bit_survives(tmp_path):
    content = legacy.named({"a": tensor(storage("Float", "x", 4), (4,), (1,))})
    result = read(legacy.file(content, {"x": PAYLOAD}), tmp_path)
    assert result["a"].tobytes() == PAYLOAD.tobytes()


def test_the_file_is_as_torch_writes_it(tmp_path):
    """What the other tests write by hand is read alike by torch."""
    torch = pytest.importorskip("torch", reason="compares with torch")
    ours = read(small_file(), tmp_path)
    theirs = torch.load(tmp_path / "model.pt")
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value.numpy(), strict=True)


def test_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch")
    path = tmp_path / "model.pt"
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(4).double(), torch.nn.Linear(300, 2))
    row = torch.arange(10, dtype=torch.int16)
    values = {
        **model.state_dict(),
        "payload": torch.from_numpy(PAYLOAD.copy()),
        "row": row,
        "view": row[3:8:2],
        "transposed": torch.randn(4, 5).half().T,
        "bool": torch.tensor([True, False]),
        "no rows": torch.zeros(0, 3, dtype=torch.uint8),
        "no columns": torch.zeros(3, 0),
        "parameter free": torch.tensor(3, dtype=torch.int32),
    }
    for state_dict in (values, model.state_dict(), {"one": row}):
        torch.save(state_dict, path, _use_new_zipfile_serialization=False)
        result = torch_file.read(path)
        assert list(result) == list(state_dict)
        for name, value in state_dict.items():
            expected = value.numpy()
            assert result[name].dtype == expected.dtype
            assert result[name].shape == expected.shape
            assert result[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("what", ["bfloat16", "model", "checkpoint", "number"])
def test_what_torch_writes_and_is_refused(what, tmp_path):
    torch = pytest.importorskip("torch", reason="writes with torch")
    model, half = torch.nn.Linear(2, 2), torch.zeros(2, dtype=torch.bfloat16)
    value, message = {
        "bfloat16": ({"half": half}, "GLOBAL torch BFloat16Storage"),
        "model": (model, "GLOBAL torch.nn.modules.linear Linear"),
        "checkpoint": ({"model": model.state_dict(), "epoch": 3}, "one dict, of names and tensors"),
        "number": (3, "one dict, of names and tensors"),
    }[what]
    path = tmp_path / "model.pt"
    torch.save(value, path, _use_new_zipfile_serialization=False)
    with pytest.raises(TorchFileError, match=re.escape(message)):
        torch_file.read(path)


def test_the_weights_are_those_that_torch_reads():
    torch = pytest.importorskip("torch", reason="compares with torch")
    try:
        path = pretrained.path()
    except pretrained.NotInstalledError as reason:
        pytest.skip(str(reason))
    ours, theirs = torch_file.read(path, pretrained.SHA256), torch.load(path)
    assert list(ours) == list(theirs)
    assert len(ours) == 312
    for name, value in theirs.items():
        assert ours[name].dtype == value.numpy().dtype
        assert ours[name].shape == value.shape
        assert ours[name].tobytes() == value.numpy().tobytes(), name


def test_truncation_everywhere(tmp_path):
    whole = small_file()
    assert read(whole, tmp_path)["a.count"] == 7
    for length in range(len(whole)):
        with pytest.raises(TorchFileError, match="not a state_dict in torch's legacy format"):
            read(whole[:length], tmp_path)


def test_truncated_weights(tmp_path):
    try:
        whole = pretrained.path().read_bytes()
    except pretrained.NotInstalledError as reason:
        pytest.skip(str(reason))
    for length in [*range(0, len(whole), 200_000), len(whole) - 1]:
        with pytest.raises(TorchFileError, match="not a state_dict in torch's legacy format"):
            read(whole[:length], tmp_path)


def test_flipped_bytes(tmp_path):
    """Other numbers or an error of ours, whatever byte of the pickles is another."""
    whole = small_file()
    refused = 0
    for position in range(len(whole)):
        for flip in (0x01, 0x20, 0xFF):
            content = bytearray(whole)
            content[position] ^= flip
            try:
                result = read(content, tmp_path)
            except TorchFileError:
                refused += 1
            else:
                assert all(isinstance(array, np.ndarray) for array in result.values())
    assert refused > len(whole)


A = {"x": X}
FLOATS = storage("Float", "x", 24)


def one(value):
    """The file of one tensor, or of something that claims to be one."""
    return legacy.file(legacy.named({"a": value}), A)


HUGE = 1 << 62
DEEP = b")" + b"\x85" * 200_000
HOSTILE = {
    "a function": (one(legacy.called("os system", text("exit 1"))), "no GLOBAL os system"),
    "a function of Python": (
        one(legacy.called("builtins eval", text("1"))),
        "needs no GLOBAL builtins eval",
    ),
    "a function of torch": (one(legacy.function("torch load")), "needs no GLOBAL torch load"),
    "a module of ours": (one(legacy.function("torch_file read")), "no GLOBAL torch_file read"),
    "a function by a string": (one(text("os") + text("system") + b"\x93"), "needs no STACK_GLOBAL"),
    "a function by a number": (one(b"\x82\x01"), "needs no EXT1 1"),
    "a call of a string": (one(text("exit") + b")R"), "'str' object is not callable"),
    "a call of a storage": (one(FLOATS + b")R"), "'Storage' object is not callable"),
    "a new object": (one(legacy.function("collections OrderedDict") + b")\x81"), "no NEWOBJ"),
    "an old instance": (one(b"(ios\nsystem\n"), "needs no INST os system"),
    "bytes": (one(b"C\x01x"), "needs no SHORT_BINBYTES"),
    "text of another kind": (one(b"V1\n"), "needs no UNICODE 1"),
    "an unknown opcode": (one(b"\xff"), "opcode b'\\xff' unknown"),
    "endless text": (one(b"X\xff\xff\xff\xff"), "expected 4294967295 bytes"),
    "an endless number": (one(b"\x8b\xff\xff\xff\x7f"), "not enough data in stream to read long4"),
    "an enormous memo": (one(b"Nr\xff\xff\xff\xff"), "must hold one dict"),
    "an empty memo": (one(b"h\x09"), "can be read: 9"),
    "an empty stack": (legacy.file(b"0", A), "needs no POP"),
    "nothing": (legacy.file(b"", A), "pop from empty list"),
    "no mark": (legacy.file(b"}t", A), "pop from empty list"),
    "a deep key": (legacy.file(b"}" + DEEP + b"Ns", A), "keys of a dict must be strings"),
    "a deep value": (one(DEEP), "must hold one dict"),
    "a deep dict": (legacy.file(DEEP, A), "must hold one dict"),
    "a deep magic number": (
        legacy.pickle(DEEP) + small_file()[15:],
        "must begin with torch's magic number",
    ),
    "a deep storage": (one(DEEP + b"Q"), "storage must have one dtype"),
    "a deep shape": (one(tensor(FLOATS, DEEP, (1,))), "tensor must have a storage"),
    "a deep name": (
        legacy.file(legacy.named({"a": tensor(FLOATS, (1,), (1,))}), A, b"](" + DEEP + b"e"),
        "must be those that the tensors name",
    ),
    "an update of a list": (one(b"]" + text("a") + b"Ns"), "no attribute 'update'"),
    "half an item": (legacy.file(b"}(" + text("a") + b"u", A), "is shorter than argument 1"),
    "another magic number": (
        legacy.pickle(number(1)) + small_file()[15:],
        "must begin with torch's magic number",
    ),
    "no dict": (legacy.file(b"]", {}), "must hold one dict"),
    "no tensor": (one(number(1)), "must hold one dict"),
    "a storage for a tensor": (one(FLOATS), "must hold one dict"),
    "a list for a storage": (one(tensor(b"]", (1,), (1,))), "a tensor must have a storage"),
    "numbers for a storage": (
        one(group(text("storage"), *[number(1)] * 5) + b"Q"),
        "a storage must have one dtype",
    ),
    "a view": (one(storage("Float", "x", 24, numbers((1, 2)))), "a storage must have one dtype"),
    "a module": (
        one(group(text("module"), *[text("x")] * 5) + b"Q"),
        "a storage must have one dtype",
    ),
    "a negative size": (one(storage("Float", "x", -1)), "a storage must have one dtype"),
    "two dtypes": (
        legacy.file(
            legacy.named({"a": tensor(FLOATS, (1,), (1,)), "b": storage("Int", "x", 24)}), A
        ),
        "a storage must have one dtype",
    ),
    "two sizes": (
        legacy.file(
            legacy.named({"a": tensor(FLOATS, (1,), (1,)), "b": storage("Float", "x", 25)}), A
        ),
        "a storage must have one dtype",
    ),
    "too small": (one(tensor(FLOATS, (5, 5), (4, 1))), "beyond the 24 elements"),
    "one too far": (one(tensor(FLOATS, (24,), (1,), 1)), "beyond the 24 elements"),
    "a scalar too far": (one(tensor(FLOATS, (), (), 24)), "beyond the 24 elements"),
    "a negative offset": (one(tensor(FLOATS, (1,), (1,), -1)), "a tensor must have a storage"),
    "a negative shape": (one(tensor(FLOATS, (-1,), (1,))), "a tensor must have a storage"),
    "a negative stride": (one(tensor(FLOATS, (2,), (-1,), 9)), "a tensor must have a storage"),
    "words for a shape": (one(tensor(FLOATS, text("ab"), text("ab"))), "must have a storage"),
    "more strides": (one(tensor(FLOATS, (2,), (1, 1))), "zip() argument 2 is longer"),
    "strides that overflow": (one(tensor(FLOATS, (5,), (HUGE,))), "beyond the 24 elements"),
    "an offset that overflows": (one(tensor(FLOATS, (1,), (1,), HUGE)), "beyond the 24 elements"),
    "one value for ever": (one(tensor(FLOATS, (HUGE,), (0,))), "beyond the 24 elements"),
    "enormous and empty": (one(tensor(FLOATS, (0, HUGE, HUGE), (1, 1, 1))), "can be read"),
    "too many dimensions": (one(tensor(FLOATS, (1,) * 99, (1,) * 99)), "can be read"),
    "an enormous storage": (one(tensor(storage("Float", "x", HUGE), (1,), (1,))), "can be read"),
    "a storage of another size": (
        one(tensor(storage("Float", "x", 23), (1,), (1,))),
        "the 23 elements of storage x are cut off, or something else",
    ),
    "no storages": (
        legacy.file(legacy.named({"a": tensor(FLOATS, (1,), (1,))}), {}),
        "must be those that the tensors name",
    ),
    "another storage": (
        legacy.file(legacy.named({"a": tensor(FLOATS, (1,), (1,))}), {"y": X}),
        "must be those that the tensors name",
    ),
    "no names of storages": (
        legacy.file(legacy.named({"a": tensor(FLOATS, (1,), (1,))}), A, text("x")),
        "must be those that the tensors name",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case, tmp_path):
    content, message = HOSTILE[case]
    with pytest.raises(TorchFileError, match=re.escape(message)):
        read(content, tmp_path)


def test_a_shape_that_grows_after_its_check(tmp_path):
    shape = b"]q\x01(" + number(2) + number(3) + b"e"
    values = legacy.named({"a": tensor(FLOATS, shape, (3, 1))})
    appended = b"h\x01(" + number(HUGE) + number(HUGE) + b"e"
    result = read(legacy.file(values + appended + b"b", A), tmp_path)
    np.testing.assert_array_equal(result["a"], X[:6].reshape(2, 3), strict=True)


def test_the_zip_format(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"")
    with pytest.raises(TorchFileError, match=r"got the zip format.*Read it with torch\.load, or"):
        torch_file.read(path)
    torch = pytest.importorskip("torch", reason="writes with torch")
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(TorchFileError, match=r"_use_new_zipfile_serialization=False"):
        torch_file.read(path)


def test_another_file(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(small_file())
    digest = hashlib.sha256(small_file()).hexdigest()
    assert torch_file.read(path, digest).keys() == {"a.weight", "a.count", "a.bias"}
    message = f"{path}: its SHA-256 must be {'0' * 64}; got {digest}, of {len(small_file())} bytes"
    with pytest.raises(TorchFileError, match=re.escape(message)):
        torch_file.read(path, "0" * 64)
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "nowhere.pt")
    for content in (b"", b"text", b"\x93NUMPY", bytes(100), np.random.RandomState(0).bytes(999)):
        with pytest.raises(TorchFileError, match="not a state_dict in torch's legacy format"):
            read(content, tmp_path)
