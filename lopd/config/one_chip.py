"""The recipe for one chip, which the configs of its model pairs start from."""

import ml_collections

from lopd.config.config_dict import base_config, training_recipe


def one_chip_config() -> ml_collections.ConfigDict:
    """The method (arXiv 2604.13010) on GSM8K (arXiv 2110.14168) in hours of one chip, sans models.

    As the paper's math recipe (`lopd.config.paper_config`), but for: school problems instead of
    competitions; answers without thinking, of at most 1,024 tokens; 14,000 SFT responses instead of
    300,000 and 300 steps instead of 3,000; OPD batches of 64. Nobody has tuned it yet.
    """
    config = base_config()
    config.stages = ("sft_data", "sft", "precompute", "heldout", "opd", "export", "eval")
    config.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)  # several chips share the weights
    config.prompt_length = 512
    config.task.update(
        name="math",
        thinking=False,
        sft_prompts="hf:openai/gsm8k/main/train",
        opd_prompts="hf:openai/gsm8k/main/train",
        problems="hf:openai/gsm8k/main/test",
        long_prompts="leave_out",
    )
    length, row_length = 1024, 2048
    config.sft_data.update(
        prompts=7_000, samples=2, temperature=0.7, top_p=0.9, response_length=length
    )
    config.sft.update(
        training_recipe(
            steps=300,
            batch_size=64,
            learning_rate=2e-5,
            schedule="cosine",
            warmup_steps=30,
            reduction="token_mean",
            row_length=row_length,
        )
    )
    config.precompute.update(
        prompts=7_000, temperature=0.8, response_length=length, row_length=row_length
    )
    config.heldout.update(prompts=256, response_length=length, row_length=row_length)
    config.opd.update(batch_size=64, row_length=row_length)
    config.eval.update(samples=4, temperature=0.6, top_p=0.95, response_length=length)
    config.runtime.rows_per_micro = 4
    return config
