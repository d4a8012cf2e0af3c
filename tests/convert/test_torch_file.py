"""The reader of torch's legacy files: the same bits as torch, and no functions but torch's."""

import io
import pickle
import struct

import numpy as np
import pretrained
import pytest
import torch_file


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        expected = value.numpy()
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        assert ours[name].tobytes() == expected.tobytes(), name


def test_what_torch_writes():
    torch = pytest.importorskip("torch", reason="writes with torch")
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(4), torch.nn.Linear(300, 2))
    row = torch.arange(10)
    bits = np.array([0x7FC12345, 0x80000000, 1, 0xFF812345], np.uint32)  # NaNs, −0, a denormal
    views = {"row": row, "view": row[3:8:2], "transposed": torch.randn(4, 5).T}
    others = {"bits": torch.from_numpy(bits.view(np.float32)), "empty": torch.zeros(0, 3)}
    for state_dict in (model.state_dict(), model.state_dict() | views | others):
        file = io.BytesIO()
        torch.save(state_dict, file, _use_new_zipfile_serialization=False)
        file.seek(0)
        assert_same(torch_file.read(file), state_dict)


def test_the_weights_are_those_that_torch_reads():
    torch = pytest.importorskip("torch", reason="compares with torch")
    try:
        path = pretrained.path()
    except pretrained.NotInstalledError as reason:
        pytest.skip(str(reason))
    ours, theirs = pretrained.state_dict(), torch.load(path)
    assert len(ours) == 312
    assert_same(ours, theirs)


def with_state_dict(program, *storages):
    """The bytes of a file: `program` is the pickle of its state_dict."""
    keys = [key for key, _ in storages]
    pickles = pickle.dumps(1), pickle.dumps(2), pickle.dumps({}), program, pickle.dumps(keys)
    elements = [struct.pack("<q", array.size) + array.tobytes() for _, array in storages]
    return io.BytesIO(b"".join([*pickles, *elements]))


VIEW = (
    b"}X\x01\x00\x00\x00a"  # {"a":
    b"ctorch._utils\n_rebuild_tensor_v2\n"  # _rebuild_tensor_v2(
    b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00xX\x03\x00\x00\x00cpu"
    b"K\x06NtQ"  # FloatStorage "x" of 6 elements,
    b"K\x01(K\x02K\x02t(K\x01K\x02t\x89}tRs."  # offset 1, shape (2, 2), strides (1, 2), …)}
)


def test_a_view_of_a_storage():
    x = np.arange(6, dtype=np.float32)
    read = torch_file.read(with_state_dict(b"\x80\x02" + VIEW, ("x", x)))
    np.testing.assert_array_equal(read["a"], np.float32([[1, 3], [2, 4]]), strict=True)


@pytest.mark.parametrize("function", ["os system", "builtins eval", "torch load"])
def test_no_other_function_is_called(function):
    called = b"c" + function.replace(" ", "\n").encode() + b"\n(X\x04\x00\x00\x00exittR."
    with pytest.raises(pickle.UnpicklingError, match=f"needs no {function.replace(' ', '.')}"):
        torch_file.read(with_state_dict(b"\x80\x02" + called))


def test_a_view_beyond_its_storage():
    x = np.arange(6, dtype=np.float32)
    beyond = VIEW.replace(b"K\x01(", b"K\x03(")
    with pytest.raises((TypeError, ValueError)):
        torch_file.read(with_state_dict(b"\x80\x02" + beyond, ("x", x)))
    with pytest.raises(ValueError, match="broadcast"):
        torch_file.read(with_state_dict(b"\x80\x02" + VIEW, ("x", x[:5])))
