"""Extractors: found by name or path, the same as the network that they name, refused in one message."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from consistency.data.digits import Digits
from consistency.data.memory import InMemory, noise
from consistency.errors import UserError
from consistency.evaluation import extractors, metrics
from consistency.evaluation.extractors import extractor_of, inception_file, small_classifier
from consistency.evaluation.metrics import available, own_classifier
from consistency.pixels import IMAGENET_MEAN, IMAGENET_STD
from inception import write_random_inception

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


def images(channels: int = 3, size: int = 32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, channels, size, size), generator=draw, dtype=torch.uint8)


def test_inception_is_torch_fidelitys_and_grey_is_grey_in_three_channels(weights: Path) -> None:
    extractor = extractor_of(str(weights))
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
    )
    for mine, other in zip(extractor(images()), theirs(images()), strict=True):
        assert torch.equal(mine, other)
    grey = images(channels=1)
    assert torch.equal(extractor(grey).features, extractor(grey.repeat(1, 3, 1, 1)).features)
    assert extractor.named("frechet") == "fid"


def test_the_published_weights_are_found_where_torch_hub_keeps_them(weights: Path) -> None:
    inception_file().parent.mkdir(parents=True)
    inception_file().write_bytes(weights.read_bytes())
    assert available("inception").protocol == extractor_of(str(weights)).protocol


def test_without_inceptions_weights_one_line_says_so_and_the_small_classifier_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    extractor = available("inception")
    assert extractor.named("frechet") == "frechet_classifier"
    told = [line for line in capsys.readouterr().out.splitlines() if "No FID" in line]
    assert len(told) == 1
    assert str(inception_file()) in told[0]
    assert extractors.URL_INCEPTION_V3 in told[0]


def test_a_file_that_executes_code_is_refused_and_executes_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"fc.weight": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match="expected weights of Inception"):
        extractor_of(str(tmp_path / "hostile.pth"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a file of weights", None])
def test_a_file_of_something_else_is_one_message(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content is None:
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="torch-fidelity's layout"):
        extractor_of(str(path))


def test_a_model_of_torchvision_gives_the_input_of_its_last_layer() -> None:
    choice = torchvision.models.get_model_weights("resnet18").DEFAULT
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    place = inception_file().parent / Path(choice.url).name
    place.parent.mkdir(parents=True)
    torch.save(model.state_dict(), place)
    extractor = extractor_of("resnet18")
    features, logits = extractor(images(size=40))
    x = choice.transforms()(images(size=40))
    assert logits is not None
    torch.testing.assert_close(logits, model.eval()(x))
    model.fc = nn.Identity()
    torch.testing.assert_close(features, model(x))
    assert extractor.named("frechet") == "frechet_resnet18"
    assert "crop_size=[224]" in extractor.protocol["resize"]


def test_dinov2_comes_from_torch_hub(tmp_path: Path) -> None:
    """A repository in hub's folder, of the same name, stands in for the published one."""
    hub = Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
    hub.mkdir(parents=True)
    (hub / "hubconf.py").write_text(
        "import torch\n"
        "class Pooled(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x):\n"
        "        assert x.shape[1:] == (3, 224, 224)\n"
        "        return self.scale * x.mean((2, 3))\n"
        "def dinov2_vits14():\n"
        "    return Pooled()\n"
    )
    extractor = extractor_of("dinov2_vits14")
    features, logits = extractor(images())
    assert logits is None
    mean = images().float().mean((2, 3)) / 255
    expected = (mean - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(features, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "dinov2_vits14"])
def test_other_weights_that_cannot_be_had_are_one_message(name: str) -> None:
    with pytest.raises(UserError, match="the download failed"):
        extractor_of(name)


def test_an_unknown_extractor_is_one_message() -> None:
    with pytest.raises(UserError, match=r"in evaluation\.extractor"):
        extractor_of("inceptoin")


def test_the_small_classifier_takes_images_of_any_kind() -> None:
    extractor = small_classifier()
    small = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(extractor(small).features, extractor(small.repeat(1, 3, 1, 1)).features)
    flat = torch.tensor([0, 90, 255], dtype=torch.uint8).view(-1, 1, 1, 1)
    assert torch.equal(
        extractor(flat.expand(-1, 1, 8, 8)).features,
        extractor(flat.expand(-1, 3, 50, 50)).features,
    )


def test_an_own_classifier_learns_the_classes_and_is_trained_once_for_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "OWN_STEPS", 120)
    train, held_out = Digits(split="train"), Digits(split="held_out")
    colours = InMemory(train.images.repeat(1, 3, 1, 1), train.labels, train.class_names)
    for source in (train, train, colours):
        extractor = own_classifier(source, tmp_path)
        logits = extractor(held_out.images).logits
        assert logits is not None
        assert float((logits.argmax(1) == held_out.labels).float().mean()) > 0.9
        assert extractor.trained_on_train_set
        assert extractor.named("frechet") == "frechet_own_classifier"
    assert capsys.readouterr().out.count("Training a classifier") == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_an_own_classifier_needs_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="images with classes"):
        own_classifier(noise(count=3, channels=1, image_size=8, num_classes=2), tmp_path)
