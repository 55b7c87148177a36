"""Images from a folder that the tests make: splits, decoding, augmentation, and what is damaged or missing."""

import numpy as np
import pytest
import torch
from PIL import Image

from attnbench.errors import UserError
from attnbench.nn import Architecture, TinyTransformer
from attnbench.tasks import _augment, _mix, images

COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 40), "red": (210, 30, 20)}


def paint(path, colour, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for colour, values in COLOURS.items():
        for number in range(40):
            paint(tmp_path / colour / f"{number}.{'jpg' if number % 2 else 'png'}", values, number)
    return tmp_path


@pytest.fixture
def split_folder(tmp_path):
    for part, count in (("train", 60), ("val", 3)):
        for colour, values in COLOURS.items():
            for number in range(count):
                paint(tmp_path / part / colour / f"{number}.png", values, number)
    return tmp_path


def test_a_folder_is_split_once_by_the_names_of_its_images(folder):
    data = images.open_folder(folder)
    assert data.classes == ("blue", "green", "red")
    names = {split: {name for name, _ in files} for split, files in data.files.items()}
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == 120
    assert len(names["train"]) > 80
    assert data.files == images.open_folder(folder).files
    assert all(name.startswith(data.classes[label] + "/") for files in data.files.values() for name, label in files)
    (folder / "blue" / "0.png").unlink()
    again = {split: {name for name, _ in files} for split, files in images.open_folder(folder).files.items()}
    assert all(again[split] == names[split] - {"blue/0.png"} for split in names), "an image that goes moves no other"


def test_folders_of_splits_are_kept(split_folder):
    data = images.open_folder(split_folder)
    assert (data.task.available("test"), data.task.available("validation")) == (9, min(9, len(data.files["validation"])))
    assert sorted(name for name, _ in data.files["test"]) == sorted(f"val/{c}/{i}.png" for c in COLOURS for i in range(3))
    assert all(name.startswith("train/") for split in ("train", "validation") for name, _ in data.files[split])
    assert len(data.files["train"]) + len(data.files["validation"]) == 180
    assert len(data.files["train"]) > 150


def test_batches_of_a_folder_are_pure_patches_of_what_was_painted(folder):
    data = images.open_folder(folder)
    task = data.task
    assert (task.classes, task.chance, task.examples) == (3, 1 / 3, len(data.files["train"]))
    assert task.held_out == min(len(data.files["validation"]), len(data.files["test"]))
    batch = task.batch("test", 0, 6, 4, 0)
    assert batch.inputs.shape == (6, 4, 768)
    assert batch.targets.tolist() == [label for _, label in data.files["test"][:6]]
    means = batch.inputs.unflatten(2, (3, 256)).mean((1, 3)).numpy() * _augment.DEVIATION + _augment.MEAN
    for mean, label in zip(means, batch.targets, strict=True):
        assert np.abs(mean * 255 - COLOURS[data.classes[label]]).max() < 15
    train = task.batch("train", 2, 6, 4, 7)
    assert train.digest == task.batch("train", 2, 6, 4, 7).digest
    assert len({train.digest, task.batch("train", 2, 6, 4, 8).digest, task.batch("train", 3, 6, 4, 7).digest}) == 3
    halves = [task.batch("test", i, 3, 4, 7).inputs for i in (4, 5)]
    assert torch.equal(task.batch("test", 2, 6, 4, 7).inputs, torch.cat(halves)), "an example does not depend on its batch"


def test_an_epoch_sees_every_image_three_times_in_a_row(folder):
    data = images.open_folder(folder)
    count = len(data.files["train"])
    read = [data._example("train", number, 16, 0) for number in range(3 * count)]
    labels = np.array([label for _, label in read]).reshape(count, 3)
    assert (labels == labels[:, :1]).all()
    assert np.bincount(labels[:, 0]).tolist() == np.bincount([label for _, label in data.files["train"]]).tolist()
    assert all(len({image.tobytes() for image, _ in read[i : i + 3]}) > 1 for i in range(0, len(read), 3)), "augmented anew"
    again = [data._example("train", number, 16, 0)[1] for number in range(3 * count, 6 * count, 3)]
    assert sorted(again) == sorted(labels[:, 0].tolist())
    assert again != labels[:, 0].tolist()


def own_share(images, partner, out):
    """How much of each pixel of `out` is its own, where the two differ."""
    return ((out - partner) / (images - partner)).double()


def test_mixing_blends_or_pastes_and_the_classes_say_how_much():
    """Images and classes are put together again from what was drawn, by the definition of either."""
    whole, labels = torch.rand(6, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3, 0])
    kinds = set()
    for seed in range(40):
        out, targets = _mix.mixed(whole, labels, 5, np.random.default_rng(seed))
        share = own_share(whole, whole.flip(0), out)
        kept = float(share.mean())
        want = torch.full((6, 5), 0.02, dtype=torch.float64)
        for i, label in enumerate(labels.tolist()):
            want[i, label] += 0.9 * kept
            want[i, labels[5 - i]] += 0.9 * (1 - kept)
        torch.testing.assert_close(targets.double(), want, rtol=0, atol=1e-6)
        pasted = bool(((share - share.round()).abs() < 1e-9).all())
        kinds.add(pasted)
        if pasted:  # a box: rows times columns
            gone = share[0, 0].round() == 0
            assert gone.sum() == gone.any(0).sum() * gone.any(1).sum()
        else:
            assert float(share.std()) < 1e-9
    assert kinds == {True, False}


def test_training_batches_are_mixed_and_held_out_ones_are_not(folder):
    data = images.open_folder(folder)
    train, test = (data.task.batch(split, 0, 6, 4, 0) for split in ("train", "test"))
    assert train.targets.shape == (6, 3)
    torch.testing.assert_close(train.targets.sum(1), torch.ones(6))
    assert test.targets.dtype == train.groups.dtype == torch.long


def test_patches_are_what_a_convolution_reads():
    several = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    weight = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    want = torch.nn.functional.conv2d(several, weight, stride=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(images.patches(several) @ weight.flatten(1).T, want)
    assert torch.equal(images.patches(several[1]), images.patches(several)[1])


@pytest.mark.parametrize("threads", [1, 5])
def test_damaged_images_are_skipped_and_counted_whatever_reads_them(folder, threads, monkeypatch):
    monkeypatch.setattr(images.os, "cpu_count", lambda: threads)
    images._pool.cache_clear()
    data = images.open_folder(folder)
    names = [name for name, _ in data.files["test"]]
    (folder / names[0]).write_bytes(b"no image at all")
    whole = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(whole[: len(whole) // 2])
    (folder / names[2]).write_bytes(b"")
    assert data.skipped == []
    batch = data.task.batch("test", 0, len(names), 4, 0)
    images._pool.cache_clear()
    assert data.skipped == names[:3]
    assert data.task.notes() == [f"skipped 3 images that cannot be decoded: {', '.join(names[:3])}"]
    assert batch.targets.tolist() == [label for _, label in [data.files["test"][3]] * 3 + data.files["test"][3:]]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of large and of strange files
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tiff", "webp", "bmp", "ppm"])
def test_no_damage_is_fatal(tmp_path, suffix):
    path, rng = tmp_path / f"image.{suffix}", np.random.default_rng(0)
    paint(path, COLOURS["red"], 0)
    whole, found = path.read_bytes(), []
    for number in range(60):
        damaged = bytearray(whole)
        if number % 3:
            for place in rng.integers(0, min(len(damaged), 400), 4):
                damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged if number % 3 else damaged[: rng.integers(0, len(damaged))])
        found.append(images.decoded(path))
    assert any(image is None for image in found)
    assert all(image.mode == "RGB" for image in found if image is not None)


def test_a_split_without_a_good_image_is_an_error(folder):
    data = images.open_folder(folder)
    for name, _ in data.files["test"]:
        (folder / name).write_bytes(b"?")
    with pytest.raises(UserError, match="can be decoded"):
        data.batch("test", 0, 1, 4, 0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_red_green_and_blue(folder, mode):
    data = images.open_folder(folder)
    name = data.files["test"][0][0]
    suffix = ".jpg" if mode == "CMYK" else ".png"
    image = Image.new(mode, (33, 50)) if mode != "I;16" else Image.fromarray(np.full((50, 33), 40000, np.uint16))
    image.save(folder / (name + suffix))
    (folder / name).unlink()
    (folder / (name + suffix)).rename(folder / name)
    assert data.batch("test", 0, 1, 4, 0).inputs.isfinite().all()
    assert data.skipped == []


def test_what_is_no_folder_of_classes_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        images.open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no classes but no folders"):
        images.open_folder(tmp_path)
    paint(tmp_path / "one" / "a.png", (1, 2, 3), 0)
    with pytest.raises(UserError, match="has no classes but one folder, one"):
        images.open_folder(tmp_path)
    (tmp_path / "two").mkdir()
    with pytest.raises(UserError, match="has no images for"):
        images.open_folder(tmp_path)


def test_every_operation_of_the_augmentation_changes_a_picture_and_not_its_size():
    picture = Image.fromarray(np.random.default_rng(0).integers(20, 200, (24, 36, 3)).astype(np.uint8))
    for name, operation in _augment.OPERATIONS.items():
        for sign in (1, -1):
            out = operation(picture, 0.9, sign)
            assert (out.size, out.mode) == (picture.size, "RGB"), name
            assert out.tobytes() != picture.tobytes(), name


@pytest.mark.parametrize("size", [(300, 20), (20, 300), (1, 1), (64, 64)])
def test_crops_lie_within_the_picture_and_have_allowed_shapes(size):
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = _augment._crop(size, rng)
        assert 0 <= left < right <= size[0] + 1e-9
        assert 0 <= top < bottom <= size[1] + 1e-9
        assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9
    assert _augment.for_training(Image.new("RGB", size), 32, rng).shape == (3, 32, 32)
    assert _augment.for_evaluation(Image.new("RGB", size), 32).shape == (3, 32, 32)


def test_deit_tiny_has_the_parameters_that_its_paper_states():
    """5.7 million: Touvron et al. 2021, table 1."""
    with torch.device("meta"):
        model = TinyTransformer(Architecture(tokens=196, grid=(14, 14), features=768, classes=1000, **images.DEIT_TINY))
    assert round(model.parameter_count / 1e5) == 57
