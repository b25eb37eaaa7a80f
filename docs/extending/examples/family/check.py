"""A small random Seed-OSS of Transformers against the same weights here, there and back."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from lopd.checkpoints import hugging_face
from lopd.machine.devices import make_mesh
from lopd.models import decoder

folder = pathlib.Path(tempfile.mkdtemp())
shape = transformers.SeedOssConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
torch.manual_seed(0)
theirs = transformers.SeedOssForCausalLM(shape).eval()
for name, x in theirs.named_parameters():
    if "bias" in name:
        torch.nn.init.normal_(x, std=0.5)
theirs.save_pretrained(folder)
mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1})

config, params = hugging_face.load_checkpoint(folder, mesh)
tokens = np.random.default_rng(0).integers(0, 40, (2, 12))
with torch.no_grad():
    wanted = torch.log_softmax(theirs(torch.tensor(tokens)).logits, -1).numpy()
positions = np.broadcast_to(np.arange(12), tokens.shape)
hidden, _ = decoder.forward(config, params, jnp.asarray(tokens), positions, np.ones_like(tokens))
ours = jax.nn.log_softmax(hidden @ decoder.output_head(params).T, -1)
print("largest difference", np.abs(np.asarray(ours) - wanted).max())
np.testing.assert_allclose(ours, wanted, atol=1e-4)
