"""Resolve the settings that a user wrote: check them, and fill in what they leave open."""

from dataclasses import replace
from pathlib import Path

from fastvit_train.config.overrides import validate
from fastvit_train.config.resolved import InputSize, ResolvedConfig
from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.datasets import count_classes
from fastvit_train.models.build import check_model, native_input_size, normalization, pretrained_cfg_of
from fastvit_train.models.pretrained.source import resolve_source
from fastvit_train.runs.run_names import default_name


def fill_defaults(config: TrainConfig) -> TrainConfig:
    """Return `config` with the run name and the image size filled in.

    Raises:
        UserError: if a setting is out of range, or if the model is unknown.
    """
    config = validate(config)
    config = validate(resolve_source(config))  # which a file describes, with any values
    check_model(config.model.model)
    image_size = config.model.image_size or native_input_size(config.model.model).image_size
    return replace(
        config,
        run=replace(config.run, exp_name=config.run.exp_name or default_name(config)),
        model=replace(config.model, image_size=image_size),
    )


def resolve(config: TrainConfig, num_classes: int | None = None) -> ResolvedConfig:
    """Resolve `config`. Call this once per run, before anything else uses the settings.

    The attention is not resolved here: "auto" measures the model on its device, see `models.attention`.

    Args:
        config: the settings as the user wrote them.
        num_classes: outputs of the model, if they are known; by default those that `config` asks for, or as many as
            the data set has classes.

    Raises:
        UserError: if a setting is out of range, if the model is unknown, or if the classes of a folder of images
            cannot be read.
    """
    settings = fill_defaults(config)
    run, model = settings.run, settings.model
    assert model.image_size is not None
    input_size = InputSize.of(model.in_chans or native_input_size(model.model).channels, model.image_size)
    return ResolvedConfig(
        settings,
        run_dir=Path(run.runs_dir) / str(run.exp_name),
        input_size=input_size,
        num_classes=num_classes or settings.model.num_classes or count_classes(settings.data),
        **normalization(model, pretrained_cfg_of(model.model).to_dict(), input_size.channels),
        last_epoch=min(run.total_epochs, run.stop_after or run.total_epochs),
    )
