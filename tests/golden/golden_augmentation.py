"""Comparisons of the augmentation of images with that of EDM."""

import torch

from consistency.augmentation import EDMAugmentation
from golden_harness import Archive, Tolerance, read_json

IMAGES, LABELS = Tolerance(absolute=2e-5), Tolerance(absolute=1e-6)
UNUSED = {"rotate_int", "translate_int", "brightness", "contrast", "lumaflip", "hue", "saturation"}
"""Transformations of the released code that no published run used."""
FACTORS = ("xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac")


def compare_augmentation(archive: Archive) -> None:
    """Images and labels of every case, from its draws."""
    configs = read_json(archive.path.with_name("augment_configs.json"))["cases"]
    for case, config in configs.items():
        file, _, name = case.partition("/")
        if file != archive.path.stem:
            continue
        images, pipe = archive.tensor(config["images"]), config["pipe"]
        if UNUSED & pipe.keys():
            archive.read.update(archive.matching(f"{name}.*"))
            continue
        augmentation = EDMAugmentation(**(dict.fromkeys(FACTORS, 0.0) | pipe))
        draws = {draw: archive.tensor(f"{name}.{draw}") for draw in config["draw_order"]}
        draws = {
            draw: values if draw == "translate_frac.value" else values.flatten()
            for draw, values in draws.items()
        }
        out, labels = augmentation(images, draws)
        archive.compare(f"{name}.labels", labels, LABELS)
        for result in archive.matching(f"{name}.out*"):
            if result.endswith("one_by_one"):
                alone = [
                    augmentation(image[None], {d: v[..., i : i + 1] for d, v in draws.items()})[0]
                    for i, image in enumerate(images)
                ]
                archive.compare(result, torch.cat(alone), IMAGES)
            else:
                archive.compare(result, out, IMAGES)
