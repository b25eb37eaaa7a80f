"""The paper's math recipe (arXiv 2604.13010), which the configs of its model pairs start from."""

import ml_collections

from lopd.config.config_dict import base_config, training_recipe


def paper_config() -> ml_collections.ConfigDict:
    """The paper's math recipe (arXiv 2604.13010, section 4 and appendix), but for the models.

    Departures, each with its reason: `batch_size` of SFT counts responses and not packed rows,
    because a step's loss must not depend on packing; the 300,000 SFT responses are five to each of
    60,000 questions, because OpenThoughts3-1.2M has each question sixteen times; training prompts
    of more than 1,024 tokens are left out; a response stops at the 4,096 tokens that are trained
    on, where the released code samples 16,384 and cuts; rollouts are drawn at the paper's T = 0.8,
    top-p = 1 and not the released code's 0.7 and 0.9; evaluation stops at 31,744 tokens and not at
    32,768, because with a prompt of 1,024 that is the last of the 32,768 positions that the base
    students were trained for.

    Names and columns of the data sets are from their cards and from code that reads them; the sets
    themselves were not downloaded by us. That OpenThoughts3 has at least 60,000 different questions
    follows from its card (1.2 million answers, sixteen to a question) and was not counted.
    """
    config = base_config()
    config.stages = ("sft_data", "sft", "precompute", "heldout", "opd", "export", "eval")
    config.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)  # weights over all devices
    config.task.update(
        name="math",
        thinking=True,
        sft_prompts="hf:open-thoughts/OpenThoughts3-1.2M",
        opd_prompts="hf:BytedTsinghua-SIA/DAPO-Math-17k",
        problems="hf:HuggingFaceH4/aime_2024,hf:math-ai/aime25,hf:MathArena/hmmt_feb_2025",
        long_prompts="leave_out",
    )
    config.sft_data.update(
        prompts=60_000, samples=5, temperature=0.7, top_p=0.9, response_length=16_384
    )
    config.sft.update(
        training_recipe(
            steps=3000,
            learning_rate=8e-5,
            schedule="cosine",
            warmup_steps=300,
            reduction="token_mean",
            row_length=17_408,
        )
    )
    config.precompute.update(temperature=0.8, response_length=4096, row_length=5120)
    config.heldout.update(prompts=256, response_length=4096, row_length=5120)
    config.eval.update(samples=32, temperature=0.6, top_p=0.95, response_length=31_744)
    return config
