import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae import UsageError
from sae.arrays import Rows, open_rows, open_truth

X = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


def write(path, kind):
    file = path / f"x.{kind.split()[0]}"
    if kind == "npy":
        np.save(file, X)
    elif kind == "npz":
        np.savez(file, acts=X, other=X[:3])
    elif kind == "npz compressed":
        np.savez_compressed(file, acts=X)
    else:
        save_file({"acts": torch.from_numpy(X), "other": torch.zeros(3)}, file)
    return file


@pytest.mark.parametrize("kind", ["npy", "npz", "npz compressed", "safetensors"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    rows = open_rows(write(tmp_path, kind), None if kind in ("npy", "npz compressed") else "acts")
    assert (len(rows), rows.d_in) == (50, 6)
    assert torch.equal(rows.read(0, 50), torch.from_numpy(X))
    order = torch.randperm(50)
    assert torch.equal(rows.take(order), torch.from_numpy(X)[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_types(tmp_path, dtype):
    x = torch.from_numpy(X).to(dtype)
    save_file({"acts": x}, tmp_path / "x.safetensors")
    rows = open_rows(tmp_path / "x.safetensors")
    assert torch.equal(rows.read(3, 9), x[3:9])
    assert torch.equal(rows.take(torch.tensor([7, 0])), x[[7, 0]].float())


def test_a_glob_is_one_table(tmp_path):
    for number, part in enumerate(np.array_split(X, [7, 30])):
        np.save(tmp_path / f"part-{number}.npy", part)
    rows = open_rows(tmp_path / "part-*.npy")
    assert torch.equal(rows.read(5, 33), torch.from_numpy(X[5:33]))
    order = torch.randperm(50)
    assert torch.equal(rows.take(order), torch.from_numpy(X)[order])


def test_files_are_mapped_not_read(tmp_path):
    np.save(tmp_path / "x.npy", X)
    part = open_rows(tmp_path / "x.npy").parts[0]
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r+")
    mapped[4, 2] = 7.0
    mapped.flush()
    assert part[4, 2] == 7.0


def bad_rows():
    x = X.copy()
    x[31, 4] = np.nan
    x[40, 0] = np.inf
    return x


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (X[None], r"must have shape \[rows, d_in\], got \[1, 50, 6\]"),
        (X[:, 0], r"must have shape"),
        (X[:0], r"has no values"),
        (X.astype(np.int64), r"holds torch.int64; it must be floating point"),
        (X.astype(str), r"it must be floating point"),
        (X.astype(">f4"), r"holds >f4, the bytes of another machine; convert it to float32"),
        (
            np.array([[None, "a"]]),
            r"x.npy holds Python objects; they are not loaded, as that could run code: save float32",
        ),
        (np.full((50, 6), 1e300), r"x.npy row 0 holds a number that float32 cannot hold \(and 49 more"),
    ],
)
def test_arrays_that_are_no_activations(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(UsageError, match=message):
        open_rows(tmp_path / "x.npy").check_all()


def test_features_without_a_direction_are_told(tmp_path, caplog):
    np.save(tmp_path / "truth.npy", np.array([[1.0, 0.0], [0.0, 0.0], [0.0, -2.0]]))
    assert torch.equal(open_truth(tmp_path / "truth.npy"), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, -2.0]]))
    (said,) = caplog.messages
    assert said.endswith("truth.npy: 1 of 3 true features are 0 everywhere and count as missed")
    np.save(tmp_path / "truth.npy", np.eye(3))
    open_truth(tmp_path / "truth.npy")
    assert len(caplog.messages) == 1


def test_nan_and_infinity_are_named_by_file_and_row(tmp_path):
    np.save(tmp_path / "a.npy", X)
    np.save(tmp_path / "b.npy", bad_rows())
    with pytest.raises(UsageError, match=r"b\.npy row 31 holds NaN or infinity \(and 1 more near it\)"):
        open_rows(tmp_path / "*.npy").check_all()


def test_large_finite_values_are_not_taken_for_infinity():
    rows = Rows([torch.full((3, 4), 3e38)], ["x"])
    rows.check_all()


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_truncated_and_empty_files(tmp_path, kind):
    file = write(tmp_path, kind)
    whole = file.read_bytes()
    for n_bytes, message in (
        (0, "is empty"),
        (5, "truncated or damaged"),
        (len(whole) // 2, "truncated or damaged"),
    ):
        file.write_bytes(whole[:n_bytes])
        with pytest.raises(UsageError, match=message):
            open_rows(file, None if kind == "npy" else "acts")


def test_keys_and_names_that_do_not_exist(tmp_path):
    file = write(tmp_path, "npz")
    with pytest.raises(
        UsageError, match=r"holds acts, other and there is no 'act'; set source.key, or source.target_key"
    ):
        open_rows(file, "act")
    with pytest.raises(UsageError, match="no key was given"):
        open_rows(file)
    with pytest.raises(UsageError, match="no file matches"):
        open_rows(tmp_path / "absent.npy")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(UsageError, match=r"cannot read '.csv'"):
        open_rows(tmp_path / "x.csv")


def test_parts_must_fit_together(tmp_path):
    np.save(tmp_path / "a.npy", X)
    np.save(tmp_path / "b.npy", X[:, :5])
    with pytest.raises(UsageError, match="all parts must share d_in and dtype"):
        open_rows(tmp_path / "*.npy")
