"""Data sets: what a split holds, what augmentation does to an image, and what bad folders say."""

import gross
import pytest
import torch
from gross.data import HALF, Augmentation, Data, ImageFiles, Images, Shard, augmented
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import hflip, pad, to_tensor


def coloured(count: int, side: int = 8) -> Images:
    """Images of random pixels that are all different."""
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    return Images(pixels, torch.arange(count))


def tree(folder, splits=("train", "test"), classes=("cat", "dog"), count=5, size=(8, 8)):
    """A folder of images whose red channel counts them."""
    for split in splits:
        for label in classes:
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                colour = (10 * i, 100 * classes.index(label), 0)
                Image.new("RGB", size, colour).save(folder / split / label / f"{i}.png")
    return f"folder:{folder}"


# Splits -----------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all():
    """Catches splits that share images, lose some, or depend on torch's generator."""
    data = gross.data.load("digits")
    torch.manual_seed(5)
    again = gross.data.load()
    parts = (data.train, data.validation, data.test)
    assert tuple(map(len, parts)) == (1197, 300, 300)
    assert torch.equal(data.test.pixels, again.test.pixels)
    rows = torch.cat([part.pixels.flatten(1) for part in parts])
    assert len(rows) == 1797
    assert len(rows.unique(dim=0)) == len(gross_digits().unique(dim=0))
    assert data.input_size == data.train.pixels.shape[1:]
    assert not torch.equal(gross.data.load(seed=1).test.labels, data.test.labels)


def gross_digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().data)


def test_tensors_are_normalised_and_channels_last():
    """Catches another mean or deviation, and a layout that costs a copy in every layer."""
    data = coloured(6)
    inputs, labels = data.tensors(4)
    expected = (data.pixels[:4].float() / 255 - 0.5) / 0.225
    torch.testing.assert_close(inputs, expected)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [0, 1, 2, 3]
    batches = list(data.batches(4))
    assert [len(labels) for _, labels in batches] == [4, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), data.tensors()[0])
    assert torch.equal(next(data.batches(4, start=1))[1], labels.new_tensor([4, 5]))


def test_augmentation_is_a_crop_of_the_padded_image_and_a_flip():
    """Catches a crop that reads beside the image, one offset for a whole batch, a flip of rows, and
    offsets or flips that never happen: every one of the 50 results is compared with torchvision's
    pad, crop and hflip."""
    data = coloured(1, side=6)
    rows = torch.zeros(600, dtype=torch.int64)
    seen = augmented(data.pixels, rows, Augmentation(), torch.Generator().manual_seed(0))
    padded = pad(data.pixels[0], [2])
    crops = [padded[:, i : i + 6, j : j + 6] for i in range(5) for j in range(5)]
    possible = torch.stack([image for crop in crops for image in (crop, hflip(crop))])
    same = (seen[:, None] == possible).flatten(2).all(-1)
    assert same.any(1).all(), "an image that is no crop"
    assert same.any(0).all(), "a crop that never happens"
    still = augmented(data.pixels, rows, Augmentation(0, False), torch.Generator())
    assert (still == data.pixels).all()


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    """Catches images drawn twice, epochs that are alike, and a part of a batch at the end."""
    data = coloured(25)
    epochs = [
        torch.cat([labels for _, labels in data.epoch(8, seed=0, epoch=epoch)]) for epoch in (0, 1)
    ]
    for labels in epochs:
        assert len(labels.unique()) == len(labels) == 24
    assert not torch.equal(*epochs)
    other = torch.cat([labels for _, labels in data.epoch(8, seed=1, epoch=0)])
    assert not torch.equal(other, epochs[0])


def test_crops_differ_from_batch_to_batch_and_epoch_to_epoch():
    """Catches draws that begin anew with every batch: all the images here are one."""
    one = coloured(1)
    data = Images(one.pixels.repeat(24, 1, 1, 1), torch.arange(24))
    first, second, third = (x for x, _ in data.epoch(8, seed=0, epoch=0))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(first, next(data.epoch(8, seed=0, epoch=1))[0])


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_batches_depend_on_their_number_alone_and_shards_are_their_parts(kind, tmp_path):
    """Catches augmentation that depends on what was drawn before: a resumed run would go another
    way; and processes that augment the same batch differently."""
    data = coloured(24)
    if kind == "files":
        gross_data = gross.data.load(tree(tmp_path, count=12, size=(20, 14)), size=80)
        data = ImageFiles(gross_data.train.paths, gross_data.train.labels, 8, workers=0)
    whole = list(data.epoch(6, seed=3, epoch=2))
    resumed = list(data.epoch(6, seed=3, epoch=2, start=2))
    for (x, y), (a, b) in zip(whole[2:], resumed, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    for index in (0, 1):
        part = data.epoch(6, seed=3, epoch=2, shard=Shard(index, 2))
        for (x, y), (a, b) in zip(whole, part, strict=True):
            assert torch.equal(x[index::2], a)
            assert torch.equal(y[index::2], b)


# Folders ----------------------------------------------------------------------------------------


def test_a_folder_without_validation_images_gives_up_a_fifth(tmp_path):
    """Catches validation images that are trained on, and pixels that are not the file's."""
    data = gross.data.load(tree(tmp_path))
    assert data.classes == ("cat", "dog")
    assert tuple(map(len, (data.train, data.validation, data.test))) == (8, 2, 10)
    files = {
        tuple(pixels[:, 0, 0].tolist())
        for part in (data.train, data.validation)
        for pixels in part.pixels
    }
    assert files == {(10 * i, 100 * label, 0) for i in range(5) for label in (0, 1)}
    for pixels, label in zip(data.train.pixels, data.train.labels, strict=True):
        assert pixels[1, 0, 0] == 100 * label


def test_imagenets_layout_has_its_validation_images_as_the_test(tmp_path):
    """Catches a fifth taken from the training images where val/ is there."""
    data = gross.data.load(tree(tmp_path, splits=("train", "val")))
    assert tuple(map(len, (data.train, data.validation, data.test))) == (10, 10, 10)
    assert data.test is data.validation


def test_large_images_stream_through_the_papers_transform(tmp_path):
    """Catches images that are all read at once, workers that decode another crop than the process
    itself, and a centre crop of something else than the middle."""
    name = tree(tmp_path, splits=("train", "val"), count=3, size=(100, 70))
    data = gross.data.load(name)
    assert data.input_size == (3, 224, 224)
    assert isinstance(data.train, ImageFiles)
    inputs, _ = next(data.validation.batches(6))
    assert inputs.shape == (6, 3, 224, 224)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(inputs, data.validation.tensors()[0])
    image = Image.new("RGB", (320, 240))
    for x in range(320):
        image.paste((x // 2, 0, 0), (x, 0, x + 1, 240))
    image.save(tmp_path / "ramp.png")
    resized = to_tensor(image.resize((341, 256)))
    middle = resized[:, 16:240, 58:282]
    files = ImageFiles([tmp_path / "ramp.png"], torch.tensor([0]), 224, HALF, workers=0)
    torch.testing.assert_close(files.tensors()[0][0], (middle - 0.5) / 0.225, rtol=0, atol=1e-5)
    crops = {files_epoch(files, epoch) for epoch in range(12)}
    assert len(crops) > 6
    with_workers = ImageFiles([tmp_path / "ramp.png"] * 4, torch.arange(4), 224, workers=2)
    alone = ImageFiles([tmp_path / "ramp.png"] * 4, torch.arange(4), 224, workers=0)
    for one, other in zip(
        with_workers.epoch(2, seed=0, epoch=0), alone.epoch(2, seed=0, epoch=0), strict=True
    ):
        assert torch.equal(one[0], other[0])


def files_epoch(files: ImageFiles, epoch: int) -> float:
    """Which crop it was: the ramp's value in a corner."""
    ((inputs, _),) = files.epoch(1, seed=0, epoch=epoch)
    return inputs[0, 0, 0, 0].item()


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("mnist", {}, ValueError, "name: got 'mnist', accepted are 'digits'"),
        ("folder:", {}, ValueError, "name: got 'folder:'"),
        ("folder:absent", {}, FileNotFoundError, "no folder at absent"),
        ("cifar10", {"root": "absent"}, FileNotFoundError, "no CIFAR-10 in absent.*download=True"),
        ("digits", {"size": 64}, ValueError, "size: got 64 for 'digits'"),
    ],
)
def test_unknown_data_are_named_before_any_download(name, options, error, message):
    """Catches a download that nobody asked for, and a reason that does not name the argument."""
    with pytest.raises(error, match=message):
        gross.data.load(name, **options)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no classes", "without classes"),
        ("no images", "without images"),
        ("other classes", "got other classes in .*test"),
        ("train alone", r"accepted is one with train/ and val/ or test/"),
        ("broken image", "0.png is not a whole image"),
    ],
)
def test_bad_folders_are_refused_with_a_reason(tmp_path, fault, message):
    """Catches labels that mean other classes in another split, and a traceback of pillow's."""
    if fault == "no classes":
        (tmp_path / "train").mkdir()
        (tmp_path / "test").mkdir()
    elif fault == "train alone":
        tree(tmp_path, splits=("train",))
    else:
        tree(tmp_path)
    if fault == "no images":
        for file in (tmp_path / "test" / "dog").iterdir():
            file.unlink()
    elif fault == "other classes":
        (tmp_path / "test" / "fox").mkdir()
    elif fault == "broken image":
        (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=message):
        gross.data.load(f"folder:{tmp_path}")


def test_data_say_what_they_are():
    """Catches a description without the counts."""
    data = gross.data.load()
    assert isinstance(data, Data)
    assert str(data) == "digits: 1197, 300, 300 images of 10 classes, (3, 32, 32)"
