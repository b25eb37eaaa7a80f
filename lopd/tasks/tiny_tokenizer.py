"""Trains the SentencePiece model of the tiny setting: `python -m lopd.tasks.tiny_tokenizer`.

The corpus is the addition task itself, so words are single pieces and every digit stands alone.
The model is committed (`tiny.model`); this script is how it was made and how to make another.
"""

import io
import pathlib

import sentencepiece

from lopd import data
from lopd.tasks.addition import Addition

MODEL = pathlib.Path(data.__file__).parent / "tiny_tokenizer" / "tiny.model"
"""Where it is committed."""


def train() -> bytes:
    """The model: a function of the task alone."""
    model = io.BytesIO()
    problems = list(Addition(3).problems("teacher", 2000, seed=0))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for p in problems for line in (p.prompt.strip(), p.response)),
        model_writer=model,  # a path would be stored in the model
        model_type="bpe",
        vocab_size=40,
        hard_vocab_limit=False,
        split_digits=True,
        user_defined_symbols=["\n", "What▁is▁", ",▁so▁", ",▁"],  # ▁ stands for a space
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    MODEL.write_bytes(train())
