"""A study of seconds for test_study.py: a one-layer model that learns nothing."""

from lopd import config as lopd_config
from lopd.study import Arm, Section, Study


def get_config():
    config = lopd_config.base_config()
    config.tokenizer = "tiny"
    config.task.digits = 2
    config.prompt_length = 10
    shape = dict(
        vocab_size=21, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    for section in (config.teacher, config.student):
        section.model = lopd_config.model_section(**shape)
    recipe = lopd_config.training_recipe(
        steps=3, batch_size=8, learning_rate=1e-3, row_length=32, reduction="token_mean"
    )
    config.teacher.problems = 50
    for section in (config.teacher, config.sft, config.opd, config.control):
        section.update(recipe)
    for name in ("sft_data", "precompute", "heldout", "eval"):
        config[name].update(prompts=8, temperature=1.0, top_p=1.0, response_length=8)
    for name in ("precompute", "heldout"):
        config[name].row_length = 32
    config.metrics.tensorboard = False
    config.runtime.update(slots=8, checkpoint_every=100, rows_per_micro=8)
    return config


def get_study(base):
    return Study(
        base=base,
        seeds=(1, 2),
        teachers={"plain": {}, "b": {"teacher.swapped": 1.0}},
        arms=[
            Arm("sft", student="sft"),
            Arm("lightning"),
            Arm("crossed", teacher="b", sft_teacher="plain"),
        ],
        sections=[
            Section("core", "Core", arms=("sft", "lightning"), pairs=(("lightning", "sft"),)),
            Section("gap", "Gap", arms=("lightning",), pairs=(("lightning", "sft"),),
                    figure="pairs"),
        ],
    )  # fmt: skip
