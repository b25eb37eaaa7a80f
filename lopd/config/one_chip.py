"""The recipe for one chip, which the configs of its model pairs start from."""

import ml_collections

from lopd.config.paper import paper_config


def one_chip_config() -> ml_collections.ConfigDict:
    """The method (arXiv 2604.13010) on GSM8K (arXiv 2110.14168) in hours of one chip, sans models.

    As the paper's math recipe (`lopd.config.paper_config`), but for: school problems instead of
    competitions; answers without thinking, of at most 1,024 tokens; 14,000 SFT responses instead of
    300,000 and 300 steps instead of 3,000; OPD batches of 64. Nobody has tuned it yet.
    """
    config = paper_config()
    config.prompt_length = 512
    config.task.update(
        thinking=False,
        sft_prompts="hf:openai/gsm8k/main/train",
        opd_prompts="hf:openai/gsm8k/main/train",
        problems="hf:openai/gsm8k/main/test",
    )
    length, row_length = 1024, 2048
    config.sft_data.update(prompts=7_000, samples=2, response_length=length)
    config.sft.update(
        steps=300, batch_size=64, learning_rate=2e-5, warmup_steps=30, row_length=row_length
    )
    config.precompute.update(prompts=7_000, response_length=length, row_length=row_length)
    config.heldout.update(response_length=length, row_length=row_length)
    config.opd.update(batch_size=64, row_length=row_length)
    config.eval.update(samples=4, response_length=length)
    config.runtime.rows_per_micro = 4
    return config
