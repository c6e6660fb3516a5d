"""--preview: a picture of the training images as the first step sees them."""

from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed.process_state import unchanged
from fastvit_train.models.resolve import resolve
from fastvit_train.runs.plots.figures import plot_images
from fastvit_train.training.setup import load_inputs, start_launch

MAX_IMAGES = 36
MAX_CLASSES = 2
"""an image is a mixture of two at most"""


def preview(config: TrainConfig, output: Path) -> None:
    """Draw the images of the first training step, augmented, with their classes, as a PNG; nothing is trained.

    Raises:
        UserError: if something is wrong with the settings or the data, or if the picture can't be written.
    """
    with unchanged(), ExitStack() as stack:
        resolved = resolve(config)
        launch = start_launch(resolved, stack)
        inputs = load_inputs(resolved, launch.accelerator)
        loader = inputs.train_loader
        samples = loader.start_epoch(0)[0, 0, :MAX_IMAGES]
        images, labels = next(loader.batches([samples]))
        captions = [_describe(label, inputs.dataset.classes) for label in labels.cpu()]
        if launch.accelerator.is_main_process:
            plot_images(loader.to_pixels(images).cpu(), captions, output)
        launch.log.line(f"written to {output}: {len(captions)} images of the first training step")


def _describe(label: Tensor, classes: tuple[str, ...]) -> str:
    """Return the class of an image, or its classes with their shares, the largest first."""
    if label.ndim == 0:
        return classes[int(label)]
    shares, indices = label.topk(min(MAX_CLASSES, len(label)))
    named = zip(indices.tolist(), shares.tolist(), strict=True)
    return "\n".join(f"{classes[index]} {share:.0%}" for index, share in named if share >= 0.005)
