"""The names that other trainers use are answered with ours."""

from collections import Counter

import pytest

from fastvit_train.cli.flags import option_names
from fastvit_train.cli.main import main
from fastvit_train.cli.verbs import VERBS, verb_types
from fastvit_train.config import synonyms
from fastvit_train.config.overrides import override
from fastvit_train.config.schema import TrainConfig
from fastvit_train.utils.errors import UserError

OURS = {name for takes in verb_types().values() for name in option_names(takes)}


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        ("--learning-rate 3", "did you mean --lr?"),
        ("--learningRate=3", "did you mean --lr?"),
        ("--LR 3", "did you mean --lr?"),
        ("--wd 3", "did you mean --weight-decay?"),
        ("-b 3", "did you mean --batch-size?"),
        ("--bs 3", "did you mean --batch-size?"),
        ("--per_device_train_batch_size 3", "did you mean --batch-size? (it counts the images of all processes"),
        ("--num-train-epochs 3", "did you mean --epochs?"),
        ("--max_epochs 3", "did you mean --epochs?"),
        ("--pretrained-weights x", "did you mean --weights?"),
        ("--finetune x", "did you mean --init-from? (it takes the folder of a run)"),
        ("--arch vit", "did you mean --model?"),
        ("--img-size 3", "did you mean --image-size?"),
        ("--drop-path 3", "did you mean --drop-path-rate?"),
        ("--dropout 3", "did you mean --drop-rate?"),
        ("--n_layer 3", "did you mean --depth?"),
        ("--hidden-size 3", "did you mean --embed-dim?"),
        ("--warmup-epochs 3", "did you mean --warmup? (it is a fraction of all steps)"),
        ("--amp", "did you mean --precision? (as in --precision bf16)"),
        ("--output-dir x", "did you mean --runs-dir?"),
        ("--channels 3", "did you mean --in-chans"),
        ("--workers 3", "there is nothing to set"),
        ("-j 3", "there is nothing to set"),
        ("--gpus 3", "accelerate launch --multi_gpu --num_processes N"),
        ("--device cpu", "accelerate launch --cpu"),
        ("--mixup-alpha 0.8", "did you mean --mixup?"),
        ("--aa x", "did you mean --auto-augment?"),
        ("--reprob 0.2", "did you mean --random-erasing?"),
        ("--vflip 1", "--mixup, --cutmix"),
        ("train learning-rate 3", "did you mean --lr?"),
        ("profile --bs 3", "did you mean --batch-size?"),
        ("eval --bs 3", "did you mean --batch-size?"),
        ("evaluate", "unknown verb 'evaluate' (did you mean eval?)"),
        ("tensorboard", "unknown verb 'tensorboard' (did you mean watch?)"),
        ("infer", "unknown verb 'infer' (did you mean predict?)"),
        ("eval --learning-rate 3", "eval --help lists the flags"),
    ],
)
def test_a_name_of_another_trainer_is_answered_with_ours(
    capsys: pytest.CaptureFixture[str], args: str, answer: str
) -> None:
    with pytest.raises(SystemExit):
        main(args.split())
    assert answer in capsys.readouterr().err


def test_keyword_arguments_and_yaml_are_answered_alike() -> None:
    with pytest.raises(UserError, match=r"unknown key 'learning_rate' in train\(\); did you mean lr\?"):
        override(TrainConfig(), {"learning_rate": 1}, "train()")
    with pytest.raises(UserError, match=r"unknown key 'wd' in a.yaml; did you mean weight_decay\?"):
        override(TrainConfig(), {"wd": 1}, "a.yaml")
    with pytest.raises(UserError, match="unknown key 'num_workers' in a.yaml; images are kept in memory"):
        override(TrainConfig(), {"num_workers": 1}, "a.yaml")


def test_the_table_names_flags_that_exist_and_each_name_once() -> None:
    rows = [*synonyms.FLAGS, *(ours for ours, _ in synonyms.WITH_NOTES)]
    assert {f"--{ours}" for ours in rows} <= OURS
    assert synonyms.VERBS.keys() <= VERBS.keys()
    lists = [*synonyms.FLAGS.values(), *synonyms.WITH_NOTES.values(), *synonyms.ADVICE.values()]
    names = Counter(name for names in lists for name in {synonyms.squeeze(word) for word in names.split()})
    assert [name for name, count in names.items() if count > 1] == []
    train = {synonyms.squeeze(name) for name in option_names(VERBS["train"][0])}
    assert not names.keys() & train, "a flag of ours is called a synonym of another"
