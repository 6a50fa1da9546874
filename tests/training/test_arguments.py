"""The training block: names, types, ranges, and what transformers itself refuses."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from molora.errors import ConfigError
from molora.training import MoloraTrainingSettings, build_arguments


def test_fields_reach_both_classes(tmp_path: Path) -> None:
    arguments, settings = build_arguments(
        {
            "output_dir": str(tmp_path),
            "learning_rate": "3e-4",
            "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": 3,
            "bf16": False,
            "collapse_window": 7,
        }
    )
    assert isinstance(arguments, TrainingArguments)
    assert arguments.learning_rate == 3e-4
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.per_device_train_batch_size == 3
    assert settings == MoloraTrainingSettings(collapse_window=7)


def test_defaults(tmp_path: Path) -> None:
    arguments, settings = build_arguments({"output_dir": str(tmp_path)})
    assert arguments.report_to == ["tensorboard"]
    assert arguments.logging_nan_inf_filter is False
    assert arguments.remove_unused_columns is False
    assert arguments.label_names == ["labels"]
    theirs = TrainingArguments(output_dir=str(tmp_path))
    assert arguments.learning_rate == theirs.learning_rate
    assert arguments.save_strategy == theirs.save_strategy
    assert settings.max_skipped_steps == 10


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"learning_rat": 1}, r"training\.learning_rat: unknown.*'learning_rate'"),
        ({"max_skiped_steps": 1}, "max_skiped_steps: .*'max_skipped_steps'"),
        ({"learning_rate": "fast"}, r"training\.learning_rate: .*number.*'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate: must be finite"),
        ({"learning_rate": -1.0}, "learning_rate: must not be negative"),
        ({"seed": 1.5}, "seed: .*integer"),
        ({"bf16": "perhaps"}, "bf16: .*boolean"),
        ({"label_names": "labels"}, "label_names: .*list"),
        ({"optim": "adamw_torhc"}, "optim: unknown value.*'adamw_torch'"),
        ({"eval_strategy": "stepz"}, "eval_strategy: unknown value.*'steps'"),
        ({"report_to": "tensorbord"}, "report_to: unknown value.*'tensorboard'"),
        ({"gradient_accumulation_steps": 0}, "accumulation_steps: must be above 0"),
        ({"max_skipped_steps": 0}, "max_skipped_steps: .*greater than or equal to 1"),
        ({"collapse_weight": 1.5}, "collapse_weight: .*less than 1"),
        ({"do_train": True}, "do_train: has no effect"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter: must be false"),
        ({"load_best_model_at_end": True}, "training: .*save and eval strategy"),
    ],
)
def test_mistakes_are_named(raw: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_arguments({"output_dir": "unused", **raw})


def test_all_mistakes_come_at_once_under_the_given_name() -> None:
    with pytest.raises(ConfigError) as caught:
        build_arguments({"lr": 1, "seed": "x"}, where="run.training")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "run.training.lr",
        "run.training.seed",
    ]
    with pytest.raises(ConfigError, match="expected a mapping"):
        build_arguments([1])  # type: ignore[arg-type]


def test_bare_no_of_yaml_means_the_word(tmp_path: Path) -> None:
    arguments, _ = build_arguments(
        {"output_dir": str(tmp_path), "save_strategy": False, "use_cpu": True}
    )
    assert arguments.save_strategy == "no"
