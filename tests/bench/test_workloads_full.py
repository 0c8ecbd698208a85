"""The published workloads: readers of data that is given, augmentation, timm's models on meta."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import struct

import pytest
import torch
from helpers.bench import CPU
from helpers.timm_alone import import_timm

from bench import layouts
from bench.workloads.papers import WORKLOADS, augment, data

FULL = [name for name, workload in WORKLOADS.items() if workload.needs_data]
# Elements and tensors of the parameters, and axes above 2048.
SIZES = {
    "cifar_vgg16_bn": (14_774_436, 54, 8),
    "cifar_resnet34": (21_328_292, 110, 17),
    "cifar_densenet121": (7_048_676, 364, 0),
    "cifar_resnet50": (23_705_252, 161, 9),
    "cifar_resnet50_squared": (23_705_252, 161, 9),
    "cifar_convmixer": (911_204, 102, 0),
    "imagewoof_swin": (27_527_044, 173, 6),
    "imagewoof_focalnet": (27_665_806, 212, 4),
    "imagewoof_gcvit": (11_487_558, 226, 1),
}


def of(name, folder=None):
    """A workload that needs no package."""
    workload = copy.copy(WORKLOADS[name].with_data(folder))
    workload.needs = ()
    return workload


# Models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_models_of_timm_build_on_meta_and_their_factors_are_dense_or_in_blocks(name):
    import_timm()
    workload = WORKLOADS[name]
    side, classes = (32, 100) if name.startswith("cifar") else (224, 10)
    with torch.device("meta"):
        model = workload.build_model()
        assert model(torch.empty(2, 3, side, side)).shape == (2, classes)
    parameters = list(model.parameters())
    large = 0
    for p in parameters:
        layout = layouts._layout(layouts.Stack(tuple(p.shape)), 2048)
        for size, structure in zip(layout.sizes, layout.structures, strict=True) if layout else ():
            assert structure.name == ("block" if size > 2048 else "dense")
            large += size > 2048
    assert (sum(p.numel() for p in parameters), len(parameters), large) == SIZES[name]


def test_recipes_are_those_published():
    assert SIZES.keys() == set(FULL)
    assert {WORKLOADS[name].batch_size for name in FULL} == {128}
    epochs = {name: WORKLOADS[f"cifar_{name}"].rounds for name in ("vgg16_bn", "resnet50")}
    assert epochs == {"vgg16_bn": 210, "resnet50": 120}
    swin, focal, gcvit = (WORKLOADS[f"imagewoof_{n}"] for n in ("swin", "focalnet", "gcvit"))
    assert [round(w.rounds * w.warm_up) for w in (swin, focal, gcvit)] == [30, 5, 20]
    assert [w.clip for w in (swin, focal, gcvit)] == [None, None, 5.0]


# CIFAR-100 ------------------------------------------------------------------------------------


def python2_pickle(images, labels):
    """The bytes that Python 2 and its numpy wrote, as CIFAR-100's files are."""

    def text(value):
        return b"U" + struct.pack("B", len(value)) + value

    n = len(labels)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", d) for d in (n, 3072)) + b"t"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = b"T" + struct.pack("<i", 3072 * n) + images.numpy().tobytes()
    array += b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb"
    listed = b"(" + b"".join(b"K" + struct.pack("B", label) for label in labels) + b"l"
    return b"\x80\x02}(" + text(b"data") + array + text(b"fine_labels") + listed + b"u."


def write(folder, part, content):
    folder = folder / "cifar-100-python"
    folder.mkdir(exist_ok=True)
    (folder / part).write_bytes(content)


def test_the_pickle_of_cifar_is_read(tmp_path):
    images = torch.randint(256, (5, 3072), dtype=torch.uint8)
    labels = [0, 99, 7, 7, 50]
    write(tmp_path, "train", python2_pickle(images, labels))
    read = data.cifar100(tmp_path, "train")
    assert read[0].shape == (5, 3, 32, 32)
    assert torch.equal(read[0].flatten(1), images)
    assert read[1].tolist() == labels


@pytest.mark.parametrize("protocol", [3, 4])
def test_the_pickle_of_todays_numpy_is_read(protocol, tmp_path):
    images = torch.randint(256, (3, 3072), dtype=torch.uint8)
    content = {b"data": images.numpy(), b"fine_labels": [1, 2, 3]}
    write(tmp_path, "test", pickle.dumps(content, protocol=protocol))
    assert torch.equal(data.cifar100(tmp_path, "test")[0].flatten(1), images)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_calls_anything_is_refused(tmp_path):
    trace = tmp_path / "was here"
    write(tmp_path, "train", pickle.dumps({b"data": Malicious(trace), b"fine_labels": [1]}))
    with pytest.raises(SystemExit, match=r"train is not CIFAR-100's: it calls posix\.mkdir"):
        data.cifar100(tmp_path, "train")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": 1}),
        pickle.dumps({b"data": [[1.0] * 3072], b"fine_labels": [1]}),
        python2_pickle(torch.zeros(2, 3072, dtype=torch.uint8), [1, 100]),
        python2_pickle(torch.zeros(2, 3072, dtype=torch.uint8), [1, 2])[:-500],
    ],
    ids=["empty", "text", "list", "no labels", "floats", "label 100", "cut"],
)
def test_another_file_is_refused(content, tmp_path):
    write(tmp_path, "train", content)
    with pytest.raises(SystemExit, match="train is not CIFAR-100's"):
        data.cifar100(tmp_path, "train")


def test_what_is_missing_is_named_with_the_cure(tmp_path, monkeypatch):
    absent = copy.copy(WORKLOADS["cifar_resnet34"])
    absent.needs = ("no_such_package",)
    assert absent.missing() == "no no_such_package; pip install rootfree-fused[bench,timm]"
    assert (
        of("cifar_resnet34").missing().startswith("no data; pass --data DIR, a folder with cifar")
    )
    given = of("cifar_resnet34", tmp_path)
    assert "cifar-100-python/train and no" in given.missing()
    with pytest.raises(SystemExit, match=r"cifar_resnet34: no .*cifar-100-python/test; pass --d"):
        given.load(CPU, tuning=True)
    with pytest.raises(SystemExit, match="train is missing; pass --data DIR, a folder with cifar"):
        data.cifar100(tmp_path, "train")
    assert of("imagewoof_swin", tmp_path).missing().endswith("fastai/imagenette has them")


def test_cifar_is_divided_and_trained_on_in_bfloat16(tmp_path):
    images = torch.randint(256, (300, 3072), dtype=torch.uint8)
    write(tmp_path, "train", python2_pickle(images, [i % 100 for i in range(300)]))
    write(tmp_path, "test", python2_pickle(images[:20], list(range(20))))
    workload = of("cifar_resnet34", tmp_path)
    assert workload.missing() is None
    tuning, comparison = (workload.load(CPU, tuning=tuning) for tuning in (True, False))
    assert [len(y) for _, y in (*tuning, *comparison)] == [270, 30, 300, 20]
    parts = torch.cat([tuning[0][0], tuning[1][0]]).flatten(1)
    assert sorted(parts.tolist()) == sorted(images.tolist())
    batches = list(workload.batches(tuning[0], torch.Generator().manual_seed(0)))
    assert [(x.shape, x.dtype) for x, _ in batches] == [((128, 3, 32, 32), torch.uint8)] * 2
    originals = set(map(tuple, images.tolist()))
    assert sum(tuple(x) in originals for x in batches[0][0].flatten(1).tolist()) < 10  # shifted
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 100))
    seen = []
    model[1].register_forward_hook(lambda module, given, found: seen.append((given[0], found)))
    loss = workload.loss(model, batches[0])
    assert loss.dtype == torch.float32
    assert seen[0][1].dtype == torch.bfloat16
    mean, deviation = torch.tensor(workload.colours)[:, :, None, None]
    expected = ((batches[0][0].double() / 255 - mean) / deviation).flatten(1)
    torch.testing.assert_close(seen[0][0].double(), expected, rtol=0, atol=1e-6)
    assert workload.evaluate(model, tuning[1]).keys() == {"loss", "accuracy"}


# ImageWoof ------------------------------------------------------------------------------------


def test_folders_of_images_are_read(tmp_path):
    from PIL import Image

    for part in ("train", "val"):
        for i, colour in enumerate(((200, 0, 0), (0, 200, 0))):
            folder = tmp_path / part / f"n{i}"
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("no image")
            for j in range(3):
                picture = Image.new("RGB", (600, 300))
                picture.paste(colour, (150, 0, 450, 300))
                picture.save(folder / f"{j}.JPEG")
            Image.new("L", (100, 260), 77).save(folder / "gray.png")
    images, labels = data.imagewoof(tmp_path, "train")
    assert images.shape == (8, 3, 256, 256)
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert images[1].float().mean((1, 2)).round().tolist() == pytest.approx([200, 0, 0], abs=3)
    assert images[4].float().mean((1, 2)).round().tolist() == pytest.approx([0, 200, 0], abs=3)
    assert (images[3] == 77).all()
    workload = of("imagewoof_gcvit", tmp_path)
    train_set, test = workload.load(CPU, tuning=False)
    assert len(train_set[1]) == len(test[1]) == 8
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    sides = []
    model[0].register_forward_hook(lambda module, given, found: sides.append(given[0].shape))
    workload.evaluate(model, (test[0], test[1]))
    assert sides == [(8, 3, 224, 224)]
    (tmp_path / "val" / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty has no image"):
        workload.load(CPU, tuning=False)


def test_labels_are_smoothed_in_training_alone():
    workload = of("imagewoof_swin")
    logits = torch.tensor([[4.0, 0.0, -1.0]])
    expected = -logits.log_softmax(1)[0]
    batch = torch.zeros(1, 3, 224, 224, dtype=torch.uint8), torch.tensor([0])
    smoothed = float(0.9 * expected[0] + 0.1 * expected.mean())

    def model(images):
        return logits.to(images.device)

    assert float(workload.loss(model, batch)) == pytest.approx(smoothed, rel=1e-5)
    found = workload.evaluate(model, batch)["loss"]
    assert found == pytest.approx(float(expected[0]), rel=1e-5)


# Augmentation ---------------------------------------------------------------------------------


def test_images_are_shifted_by_at_most_four_pixels_and_turned():
    images = torch.randint(1, 256, (40, 3, 8, 8), dtype=torch.uint8)
    found = augment.shifted(images, torch.Generator().manual_seed(0))
    seen = set()
    for before, after in zip(images, found, strict=True):
        padded = torch.nn.functional.pad(before, (4, 4, 4, 4))
        candidates = {
            (y, x, turned): part.flip(2) if turned else part
            for y, x, turned in itertools.product(range(9), range(9), (False, True))
            for part in [padded[:, y : y + 8, x : x + 8]]
        }
        matches = [key for key, part in candidates.items() if torch.equal(part, after)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 30
    assert {turned for _, _, turned in seen} == {False, True}


def test_parts_of_images_are_scaled_and_turned():
    columns = torch.arange(256, dtype=torch.uint8).expand(64, 3, 256, 256)
    found = augment.resized_crops(columns, torch.Generator().manual_seed(0)).int()
    assert found.shape == (64, 3, 224, 224)
    across = (found[..., -1] - found[..., 0])[:, 0, 0]
    assert (found.diff(dim=2) == 0).all()
    assert (found.diff(dim=3) * across.sign()[:, None, None, None] >= 0).all()
    width = across.abs() / 255
    assert 0.2 < width.min() < 0.45 < 0.9 < width.max() <= 1
    assert 16 < (across < 0).sum() < 48


def test_colours_change_and_gray_stays_gray():
    images = torch.randint(256, (6, 3, 9, 9), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment.jittered(images, generator, 0.0), images)
    assert not torch.equal(augment.jittered(images, generator), images)
    gray = augment.jittered(images[:, :1].expand(-1, 3, -1, -1), generator)
    assert (gray.amax(1).int() - gray.amin(1).int()).max() <= 1


def test_a_rectangle_is_erased_in_a_share_of_images():
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    found = augment.erased(images, torch.Generator().manual_seed(0)) != 0
    shares = found.any(1).double().mean((-2, -1))
    assert images.max() == 0
    assert 70 < (shares > 0).sum() < 130
    assert 0.01 < shares[shares > 0].min() < 0.05 < 0.3 < shares.max() < 0.37
    assert found[shares > 0].any(1).any(1).sum(-1).max() <= 32
