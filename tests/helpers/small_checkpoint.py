"""A small Qwen3 as Transformers writes it."""

import torch
import transformers


def save_small_qwen3(folder, seed: int, hidden_size: int, vocab_size: int, eos_token_id: int):
    """Random weights of two layers, without a tokenizer."""
    torch.manual_seed(seed)
    shape = transformers.Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=eos_token_id,
    )
    transformers.Qwen3ForCausalLM(shape).save_pretrained(folder)
