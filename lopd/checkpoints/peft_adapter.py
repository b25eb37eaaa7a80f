"""Low-rank adapters in PEFT's format, in and out: a config and one safetensors file."""

import json

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lopd.checkpoints import safetensors_file
from lopd.checkpoints.hf_config import read_json
from lopd.checkpoints.safetensors_file import StoredTensor
from lopd.config.settings import ADAPTED_MODULES, LoraSettings
from lopd.errors import UserError
from lopd.machine import processes
from lopd.machine.storage import write_atomically
from lopd.models.decoder_config import DecoderConfig
from lopd.models.low_rank import Adapter, abstract_adapters_on, adapter_rows
from lopd.models.parameters import Parameter, Params

CONFIG = "adapter_config.json"
"""The file that makes a folder an adapter."""
WEIGHTS = "adapter_model.safetensors"
"""The file of A and B of every adapted matrix."""

_NOT_OURS = (
    *("use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "lora_bias", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("layer_replication", "trainable_token_indices", "target_parameters"),
    *("alora_invocation_tokens", "arrow_config", "megatron_config"),
)
"""Fields of PEFT's that change what an adapter computes, and must be off."""


def is_adapter(folder: epath.Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (epath.Path(folder) / CONFIG).exists()


def read_base(folder: epath.Path) -> str:
    """The checkpoint that an adapter was trained on, as its config names it.

    Raises:
      UserError: if it names none.
    """
    found = read_json(epath.Path(folder) / CONFIG).get("base_model_name_or_path")
    if not found:
        raise UserError(
            f"{epath.Path(folder) / CONFIG} names no base_model_name_or_path: give the checkpoint "
            "that the adapter was trained on in student.checkpoint"
        )
    return found


def read_config(folder: epath.Path) -> LoraSettings:
    """An adapter's rank, alpha and matrices.

    Raises:
      UserError: for another kind than plain LoRA on matrices of attention and MLP.
    """
    path = epath.Path(folder) / CONFIG
    config = read_json(path)
    kind, bias = config.get("peft_type"), config.get("bias", "none")
    others = [key for key in _NOT_OURS if config.get(key)]
    modules = config.get("target_modules")
    if kind != "LORA" or bias != "none" or others or not isinstance(modules, list):
        what = f"peft_type={kind!r}" if kind != "LORA" else ", ".join(others)
        what = what or (f"bias={bias!r}" if bias != "none" else f"target_modules={modules!r}")
        raise UserError(
            f"{path}: {what} cannot be read; only plain LoRA can (peft_type LORA with a list of "
            "target_modules, no biases, no patterns, no DoRA or rsLoRA)"
        )
    if unknown := {*modules} - {*ADAPTED_MODULES}:
        raise UserError(
            f"{path}: target_modules has {', '.join(sorted(unknown))}; there are adapters for "
            f"{', '.join(ADAPTED_MODULES)}"
        )
    targets = tuple(name for name in ADAPTED_MODULES if name in modules)
    return LoraSettings(int(config["r"]), float(config["lora_alpha"]), targets)


def _names(row: Parameter, config: DecoderConfig) -> list[str]:
    return [row.name.format(layer) for layer in range(config.num_hidden_layers)]


def load_adapters(folder: epath.Path, config: DecoderConfig, mesh: Mesh) -> Params:
    """An adapter's weights, in their sharding on the mesh, under the paths of their matrices.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      config: the base model's shape.
      mesh: the devices.

    Raises:
      UserError: as `read_config`; or if a tensor is missing, unknown, misshapen or cut short.
    """
    path = epath.Path(folder) / WEIGHTS
    lora = read_config(folder)
    if not path.exists():
        raise UserError(f"{path.parent} has no {WEIGHTS}: no adapter to read")
    stored, rows = safetensors_file.read_header(path), adapter_rows(config, lora)
    halves = [row for pair in rows.values() for row in (pair.a, pair.b)]
    expected = {name: row.file_shape for row in halves for name in _names(row, config)}
    found = {name: tensor.shape for name, tensor in stored.items()}
    if found != expected:
        wrong = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        name = wrong[0]
        raise UserError(
            f"{path}: {name} has shape {found.get(name)}, the base model and {CONFIG} say "
            f"{expected.get(name)} ({len(wrong)} such tensors; None: not there)"
        )
    abstract = flatten_dict(abstract_adapters_on(config, lora, mesh))

    def put(row: Parameter, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.stack([_read(stored[name], row) for name in _names(row, config)])
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, values.__getitem__)

    return unflatten_dict(
        {
            path: Adapter(put(pair.a, abstract[path].a), put(pair.b, abstract[path].b), lora.alpha)
            for path, pair in rows.items()
        }
    )


def _read(tensor: StoredTensor, row: Parameter) -> np.ndarray:
    return tensor.read().astype(np.float32).T.reshape(row.shape)


def save_adapters(
    folder: epath.Path,
    config: DecoderConfig,
    lora: LoraSettings,
    adapters: Params,
    base: str | None,
) -> None:
    """Writes a folder that PEFT's `from_pretrained` loads. All processes call it, the first writes.

    Args:
      folder: is made if need be.
      config: the base model's shape.
      lora: rank, alpha and targets of the adapters.
      adapters: from `low_rank.adapters_of`, on any mesh.
      base: the base model, a folder or a name at the hub; None if it has none.
    """
    rows, flat, tensors = adapter_rows(config, lora), flatten_dict(adapters), {}
    for path, pair in rows.items():
        for row, half in ((pair.a, flat[path].a), (pair.b, flat[path].b)):
            values = np.asarray(multihost_utils.process_allgather(half, tiled=True))
            for name, layer in zip(_names(row, config), values, strict=True):
                tensors[name] = layer.reshape(row.file_shape[::-1]).T
    if not processes.is_main():
        return
    modules = {pair.a.name.split(".")[-3] for pair in rows.values()}
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [name for name in ADAPTED_MODULES if name in modules],
        "bias": "none",
        "inference_mode": True,
    }
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors_file.write(folder / WEIGHTS, tensors)
    write_atomically(folder / CONFIG, json.dumps(peft, indent=2) + "\n")
