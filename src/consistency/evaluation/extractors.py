"""Networks whose features measure images: the published Inception, those of torchvision, DINOv2, and a small classifier."""

import hashlib
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url
from torch.nn import functional
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torchvision.transforms import v2
from tqdm import tqdm

from consistency.data.digits import Digits
from consistency.data.source import Classes, Images, downloading
from consistency.errors import UserError, require
from consistency.evaluation.results import INCEPTION, named
from consistency.pixels import IMAGENET_MEAN, IMAGENET_STD, to_unit
from consistency.randomness import generator
from consistency.runtime.files import path_of
from consistency.runtime.ranks import gathered, print_once

URL_INCEPTION_V3 = fidelity.URL_INCEPTION_V3
BY_HAND = "on a machine with a network download {} and put it there (TORCH_HOME moves the folder)"
CLASSIFIER = "classifier"
OWN_CLASSIFIER = "own_classifier"
DINOV2 = ("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14")


class Extracted(NamedTuple):
    """The output of an extractor; logits are None for a network without classes."""

    features: Float[Tensor, "b f"]
    logits: Float[Tensor, "b k"] | None


class Extractor(nn.Module):
    """uint8 images (b, 1 or 3, h, w) of any size -> `Extracted`.

    extract: (network, images of three channels, equal ones of grey) -> features and logits.
    name: ends the names of the metrics, except for the published Inception.
    resize: how images are resized, for the protocol.
    trained_on_train_set: whether the network was trained on the training images, so that others must be the reference.
    """

    def __init__(
        self,
        network: nn.Module,
        extract: Callable[[nn.Module, Tensor], Extracted],
        *,
        name: str,
        resize: str,
        trained_on_train_set: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.extract = network.eval().requires_grad_(False), extract
        self.name, self.trained_on_train_set = name, trained_on_train_set
        weights = hashlib.sha256()
        for key, value in sorted(network.state_dict().items()):
            weights.update(key.encode())
            weights.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        digest = weights.hexdigest()
        self.protocol = {"extractor": name, "weights_sha256": digest, "resize": resize}

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.parameters()).device

    @property
    def summing(self) -> torch.device:
        """The device that sums statistics: the network's, or the CPU if that has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Extracted:
        return self.extract(self.network, images.expand(-1, 3, -1, -1))

    def named(self, metric: str) -> str:
        """Return the full name of a metric in these features."""
        return named(metric, self.name)


def extractor_of(name: str) -> Extractor:
    """Return the extractor of that name.

    name: inception, classifier, a file of weights of Inception in torch-fidelity's layout, a model of torchvision such as
        resnet50, or a DINOv2 such as dinov2_vitl14.
    """
    if name == CLASSIFIER:
        return small_classifier()
    if name in DINOV2:
        return dinov2(name)
    if name in torchvision.models.list_models(module=torchvision.models):
        return torchvision_model(name)
    path = inception_weights() if name == INCEPTION else path_of(name)
    known = f"{INCEPTION}, {CLASSIFIER}, {OWN_CLASSIFIER}, a file of Inception's weights, a classifier of torchvision"
    expected = f"{known} or one of {', '.join(DINOV2)} in evaluation.extractor"
    remedy = "check the name or the path; a path is relative to the folder the command runs in"
    require(path.is_file(), expected, name, remedy)
    return inception(path)


def inception_file() -> Path:
    """Return torch hub's path of the published weights: those of 2015-12-05, behind all published FID."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name


def inception_weights() -> Path:
    """Return the file of the published weights. Downloads it if it is missing."""
    path = inception_file()
    if not path.is_file():
        needed = f"Inception's weights, the file {path}"
        with downloading(needed, BY_HAND.format(URL_INCEPTION_V3)):
            load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True)
    return path


def inception(path: Path) -> Extractor:
    """Return the network of the published FID, with weights from a file in torch-fidelity's layout."""
    try:
        # torch-fidelity would unpickle anything.
        torch.load(path, map_location="cpu", weights_only=True)
        outputs = ["2048", "logits_unbiased"]
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", outputs, str(path))
    except Exception as error:  # damaged and foreign files fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        expected = f"weights of Inception in torch-fidelity's layout at {path}"
        remedy = f"download {URL_INCEPTION_V3}, or name another evaluation.extractor"
        raise UserError(expected, reason, remedy) from error
    resize = "299x299, bilinear as TensorFlow 1 did it, inside the network"
    return Extractor(
        network, lambda n, images: Extracted(*n(images)), name=INCEPTION, resize=resize
    )


class SmallClassifier(nn.Module):
    """uint8 images -> 64 features of the last hidden layer: three 3x3 convolutions and one hidden linear layer.

    size: side of the images; the first convolution has a stride that leaves at most 27 rows.
    """

    def __init__(self, *, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        self.channels, self.size = channels, size

        def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
            return [layer, nn.GroupNorm(8, outputs), nn.SiLU()]

        first = convolution(channels, 32, stride=max(1, size // 14))
        second = convolution(32, 64)
        third = [nn.MaxPool2d(2), *convolution(64, 64), nn.AdaptiveAvgPool2d(2)]
        self.trunk = nn.Sequential(*first, *second, *third, nn.Flatten(), nn.Linear(256, 64))
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        return self.trunk(to_unit(images))

    def logits(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        """Return the logits of the classes."""
        return self.head(functional.silu(features))


def small_classifier() -> Extractor:
    """Return the small classifier of the default data set; it takes images as grey and small."""
    print_once("Training the small classifier whose features measure the samples ...")
    network = deepcopy(digits_classifier())
    # Roundings differ between machines and numbers of threads, so all ranks take the weights of rank 0.
    network.load_state_dict(gathered(network.state_dict())[0])
    return extractor_with(network, CLASSIFIER)


def extractor_with(network: SmallClassifier, name: str) -> Extractor:
    """Return the extractor of that name with a trained classifier."""
    size = network.size

    def extract(network: nn.Module, images: Tensor) -> Extracted:
        if network.channels == 1:
            images = images.float().mean(1, keepdim=True).round().to(torch.uint8)
        if images.shape[-2:] != (size, size):
            images = v2.functional.resize(images, [size, size], antialias=True)
        features = network(images)
        return Extracted(features, network.logits(features))  # type: ignore[operator]

    grey = "mean of the channels, " if network.channels == 1 else ""
    resize = f"{grey}{size}x{size} where images are not, bilinear with antialiasing"
    return Extractor(network, extract, name=name, resize=resize, trained_on_train_set=True)


def torchvision_model(name: str) -> Extractor:
    """Return a classifier of torchvision; its features are the input of its last linear layer."""
    choice: Any = torchvision.models.get_model_weights(name).DEFAULT
    needed = f"the weights of torchvision's {name} in {inception_file().parent}"
    with downloading(needed, BY_HAND.format(choice.url)):
        network = torchvision.models.get_model(name, weights=choice)
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    require(bool(linear), "a model with a last linear layer", name, "choose another")
    preprocess, taken = choice.transforms(), []
    linear[-1].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))

    def extract(network: nn.Module, images: Tensor) -> Extracted:
        logits = network(preprocess(images))
        return Extracted(taken.pop().float(), logits.float())

    return Extractor(network, extract, name=name, resize=" ".join(str(preprocess).split()))


def dinov2(name: str) -> Extractor:
    """Return a DINOv2 [Oquab et al. 2023, arXiv:2304.07193] of torch hub.

    FD-DINOv2 of Stein et al. 2023, arXiv:2306.04675, is the Fréchet distance in the features of dinov2_vitl14.
    """
    repository, needed = "facebookresearch/dinov2", f"{name} in torch hub's {torch.hub.get_dir()}"
    by_hand = BY_HAND.format(f"github.com/{repository}")
    with redirect_stdout(sys.stderr), downloading(needed, by_hand):
        network: Any = torch.hub.load(repository, name, trust_repo=True, verbose=False)
    resize = v2.Resize([224, 224], v2.InterpolationMode.BICUBIC, antialias=True)
    scale = v2.ToDtype(torch.float32, scale=True)
    preprocess = v2.Compose([resize, scale, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def extract(network: nn.Module, images: Tensor) -> Extracted:
        return Extracted(network(preprocess(images)), None)

    return Extractor(network, extract, name=name, resize="224x224, bicubic with antialiasing")


def train_classifier(
    images: Images, labels: Classes, *, num_classes: int, epochs: int = 24
) -> SmallClassifier:
    """Train by AdamW with a one-cycle rate, in batches of 64, each shifted by up to a pixel with its border repeated.

    The result is a function of the arguments: it computes on one thread, because sums differ with the number of threads.
    """
    with torch.random.fork_rng(devices=[]), ExitStack() as after:
        after.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        torch.manual_seed(0)
        channels, size = images.shape[1:3]
        classifier = SmallClassifier(channels=channels, size=size, num_classes=num_classes)
        padded = functional.pad(images.float(), (1, 1, 1, 1), mode="replicate").to(images.dtype)
        height, width = images.shape[-2:]
        draw, steps = generator(0, "classifier"), epochs * -(-len(images) // 64)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        shown = tqdm(total=steps, desc="Classifier", unit="step", disable=steps < 500)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), generator=draw).split(64):
                shown.update()
                top, left = torch.randint(3, (2,), generator=draw).tolist()
                shifted = padded[chosen, :, top : top + height, left : left + width]
                logits = classifier.logits(classifier(shifted))
                loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
    return classifier.eval().requires_grad_(False)


@cache
def digits_classifier() -> SmallClassifier:
    """Return the classifier of the default data set, trained once a process in seconds."""
    digits = Digits(split="train")
    return train_classifier(digits.images, digits.labels, num_classes=len(digits.class_names))
