"""Weights in Hugging Face's format, in and out; `lopd.models.parameters` says where each lies.

Weights travel one tensor at a time from the files straight into their sharding on the mesh, and
one file at a time back, so that the host never holds a model.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from lopd.artefacts.artefact import MANIFEST, open_complete
from lopd.checkpoints import safetensors_file
from lopd.checkpoints.hf_config import CONFIG, checkpoint_config, config_to_hf, read_json
from lopd.checkpoints.safetensors_file import StoredTensor
from lopd.errors import UserError
from lopd.machine import hub, processes, sharding
from lopd.machine.reading import check_file_names
from lopd.machine.storage import check_url, is_local, write_atomically
from lopd.models.decoder_config import DecoderConfig
from lopd.models.low_rank import merged_layer
from lopd.models.parameters import HEAD_NAME, Params, parameters
from lopd.models.shardings import abstract_params_on, check_divisible

WEIGHTS = "model.safetensors"
"""The file of a checkpoint whose weights are in one."""
INDEX = "model.safetensors.index.json"
"""The file that says which weights are in which of several."""
GENERATION = "generation_config.json"
"""The file with the end tokens and defaults of sampling."""
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
"""Patterns of a checkpoint's files that are downloaded; its README.md names its licence."""
MAX_SHARD_BYTES = 2_000_000_000
"""Export holds one shard in host memory."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """The part of one of our parameters that a file's tensor holds."""

    param: tuple[str, ...]
    index: tuple[int, ...]
    """Along the leading axes: layer, or layer and expert."""
    shape: tuple[int, ...]
    """In the file."""
    transposed: bool
    """The file has PyTorch's [out, in], where we have [in, out] with heads as their own axis."""


def _places(config: DecoderConfig) -> dict[str, _Place]:
    """Where every tensor of a checkpoint goes, by its name in the file."""
    places = {}
    for param, row in parameters(config).items():
        leading = (config.num_hidden_layers,) * row.stacked + row.shape[: row.listed]
        for index in np.ndindex(*leading):
            place = _Place(param, index, row.file_shape, transposed=row.contracted > 0)
            places[row.name.format(*index)] = place
    return places


def _file_shardings(config: DecoderConfig, mesh: Mesh) -> dict[tuple[str, ...], NamedSharding]:
    """For each parameter, the sharding of one of its tensors in the file's layout.

    Of our axes that make up one of a file's, only the first is ever split.
    """
    return {
        param: NamedSharding(mesh, sharding.spec(*(row.axes[group[0]] for group in row.file_axes)))
        for param, row in parameters(config).items()
    }


# Import


def is_hub_name(name: str) -> bool:
    """Whether a checkpoint of that name is looked for at the Hugging Face hub, as ORG/MODEL."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not epath.Path(name).is_dir()


def resolve_checkpoint(name_or_path: str) -> epath.Path:
    """The folder of a checkpoint: an existing folder, or a model of the Hugging Face hub.

    A hub name (`organisation/model`) is downloaded through `huggingface_hub`, with its own
    conventions for the token (`HF_TOKEN`), the cache (`HF_HOME`) and working offline.

    Raises:
      UserError: if there is no such folder and it cannot be had from the hub; for a URL; or if
        it is an unfinished artefact of `export`.
    """
    check_url(name_or_path)
    if not is_local(name_or_path):
        raise UserError(
            f"checkpoint {name_or_path}: safetensors are read from a local folder or the Hugging "
            "Face hub; copy it here (gcloud storage cp -r), or give its name at the hub"
        )
    path = epath.Path(name_or_path)
    if (path / MANIFEST).exists():
        open_complete(path, "checkpoint")
    if path.is_dir():
        return path
    if not is_hub_name(name_or_path):
        raise UserError(f"checkpoint {name_or_path}: there is no such folder")
    try:
        return hub.download(hub.Repository(name_or_path, "model"), None, WANTED)
    except UserError as error:
        raise UserError(f"checkpoint {name_or_path}: there is no such folder; {error}") from error


def resolve_tokenizer(name_or_path: str) -> str:
    """A tokenizer's bundled name or path as it is; of a model of the hub, the folder of its files.

    Raises:
      UserError: if the hub does not give it.
    """
    if not is_hub_name(name_or_path) or epath.Path(name_or_path).exists():
        return name_or_path
    wanted = [pattern for pattern in WANTED if pattern not in ("*.safetensors", "README.md")]
    try:
        return str(hub.download(hub.Repository(name_or_path, "model"), None, wanted))
    except UserError as error:
        raise UserError(f"tokenizer={name_or_path}: there is no such path; {error}") from error


def _index(path: epath.Path) -> dict[str, str]:
    """Tensor → file, as the index of a checkpoint says.

    Raises:
      UserError: if it says anything else, or names a file that is not there or not in the folder.
    """
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path / INDEX}: weight_map must be an object, tensor to file")
    check_file_names(weight_map.values(), str(path / INDEX))
    missing = [name for name in sorted({*weight_map.values()}) if not (path / name).exists()]
    if missing:
        raise UserError(f"{path / INDEX} names {', '.join(missing)}, which is not there")
    return weight_map


def _stored_tensors(path: epath.Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint's files, by name; reads headers only."""
    if (path / WEIGHTS).exists():
        return safetensors_file.read_header(path / WEIGHTS)
    if not (path / INDEX).exists():
        raise UserError(f"{path} has neither {WEIGHTS} nor {INDEX}: no weights to read")
    stored: dict[str, StoredTensor] = {}
    weight_map = _index(path)
    for file in sorted({*weight_map.values()}):
        for name, tensor in safetensors_file.read_header(path / file).items():
            if name in stored:
                raise UserError(f"{name} is in both {stored[name].path.name} and {path / file}")
            stored[name] = tensor
    for name, file in weight_map.items():
        if name not in stored or stored[name].path.name != file:
            raise UserError(f"{path / INDEX} says that {name} is in {file}, which lacks it")
    return stored


def _some(names: set[str]) -> str:
    """A few of the names, and how many more there are."""
    first = sorted(names)[:3]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _check_tensors(
    path: epath.Path, places: Mapping[str, _Place], stored: Mapping[str, StoredTensor]
) -> None:
    """Every tensor of the table is there once, with its shape, and there is no other."""
    if missing := places.keys() - stored.keys():
        raise UserError(f"{path} lacks {_some(missing)}")
    if unexpected := stored.keys() - places.keys():
        raise UserError(
            f"{path} has {_some(unexpected)}, which its config.json does not account for"
        )
    for name, place in places.items():
        if stored[name].shape != place.shape:
            raise UserError(
                f"{path}: {name} has shape {list(stored[name].shape)}, its config.json says "
                f"{list(place.shape)}"
            )


def _checked(
    path: epath.Path,
) -> tuple[DecoderConfig, dict[str, _Place], dict[str, StoredTensor], StoredTensor | None]:
    """A checkpoint's shape, where its tensors go, and they; the head of a tied model apart."""
    config, stored = checkpoint_config(path), _stored_tensors(path)
    if config.num_hidden_layers * max(1, config.num_experts) > len(stored):
        raise UserError(
            f"{path} holds {len(stored)} tensors, too few for the {config.num_hidden_layers} "
            "layers of its config.json"
        )
    places = _places(config)
    # Some files of tied models repeat the embedding as the head.
    repeated_head = stored.pop(HEAD_NAME, None) if config.tie_word_embeddings else None
    _check_tensors(path, places, stored)
    if repeated_head and repeated_head.shape != (config.vocab_size, config.hidden_size):
        raise UserError(
            f"{path}: {HEAD_NAME} has another shape than the embedding, but its config.json says "
            "tie_word_embeddings; one of them is wrong"
        )
    return config, places, stored, repeated_head


def check_checkpoint(path: epath.PathLike, model: DecoderConfig, what: str) -> None:
    """Refuses a checkpoint that cannot be read as `model`; reads headers only.

    Raises:
      UserError: as `load_checkpoint`, for all that it can be refused for without its values; or if
        parameters have other shapes than in `model`, which is `what` in the message.
    """
    config = _checked(epath.Path(path))[0]
    found, wanted = (
        {key: (x.num_hidden_layers * row.stacked, row.shape) for key, row in parameters(x).items()}
        for x in (config, model)
    )
    if found != wanted:
        fields = [f.name for f in dataclasses.fields(model) if f.name != "dtype"]
        differ = [(n, getattr(config, n), getattr(model, n)) for n in fields]
        said = ", ".join(f"{n}={a}, not {b}" for n, a, b in differ if a != b)
        raise UserError(f"{path} has another shape than {what}: {said}")


def _put(tensor: StoredTensor, sharding: NamedSharding) -> jax.Array:
    """A tensor on the devices; each takes its part only."""
    values = tensor.read()
    return jax.make_array_from_callback(tensor.shape, sharding, values.__getitem__)


@functools.partial(jax.jit, static_argnames=("transposed", "sharding"), donate_argnums=0)
def _insert(param, tensor, index, *, transposed, sharding):
    """`param` with one file tensor written into it, in place."""
    part = tensor.T if transposed else tensor
    part = part.astype(param.dtype).reshape((1,) * len(index) + param.shape[len(index) :])
    start = (*index, *(0,) * (param.ndim - len(index)))
    return jax.lax.with_sharding_constraint(
        jax.lax.dynamic_update_slice(param, part, start), sharding
    )


@jax.jit
def _all_equal(param, tensor):
    return jnp.all(param == tensor.astype(param.dtype))


def stored_dtype(path: epath.Path) -> str:
    """The type of most of a checkpoint's weights; reads headers only.

    Raises:
      UserError: if a file is missing, cut short or of a type that cannot be read.
    """
    counts = collections.Counter()
    for tensor in _stored_tensors(path).values():
        counts[tensor.dtype.name] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]


def load_checkpoint(
    path: epath.Path, mesh: Mesh, *, param_dtype: str = "float32"
) -> tuple[DecoderConfig, Params]:
    """A checkpoint's shape and weights, read straight into their sharding on the mesh.

    All headers are checked before any weight is read. The host holds one tensor at a time.

    Args:
      path: a folder with `config.json` and safetensors, in one file or in shards with an index
        (`resolve_checkpoint` finds it from a hub name).
      mesh: the devices.
      param_dtype: type of the parameters: float32 for training, bfloat16 for a frozen model.

    Raises:
      UserError: if the config is refused (`config_from_hf`), if the shape does not divide over
        the mesh, or if a tensor is missing, unknown, there twice, misshapen or cut short.
    """
    config, places, stored, repeated_head = _checked(epath.Path(path))
    check_divisible(config, mesh, str(path))
    file_shardings = _file_shardings(config, mesh)
    params = {
        param: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for param, leaf in flatten_dict(abstract_params_on(config, mesh, param_dtype)).items()
    }
    for name, tensor in sorted(stored.items(), key=lambda x: (str(x[1].path), x[0])):
        place = places[name]
        params[place.param] = _insert(
            params[place.param],
            _put(tensor, file_shardings[place.param]),
            place.index,
            transposed=place.transposed,
            sharding=params[place.param].sharding,
        )
        # Dispatch is asynchronous: without this, tensors would queue up on the host.
        params[place.param].block_until_ready()
    if repeated_head is not None:
        _check_repeated_head(path, params[("embed",)], repeated_head)
    return config, unflatten_dict(params)


def _check_repeated_head(path: epath.Path, embed: jax.Array, head: StoredTensor) -> None:
    """Refuses a head that is not the embedding, in a model that says they are tied."""
    if not bool(_all_equal(embed, _put(head, embed.sharding))):
        raise UserError(
            f"{path}: {HEAD_NAME} differs from the embedding, but its config.json says "
            "tie_word_embeddings; one of them is wrong"
        )


# Export


@functools.partial(jax.jit, static_argnames=("shape", "transposed", "dtype"))
def _extract(param, index, *, shape, transposed, dtype):
    """One tensor in the file's layout and type, its adapter merged into it."""

    def take(x):
        sizes = (1,) * len(index) + x.shape[len(index) :]
        start = (*index, *(0,) * (x.ndim - len(index)))
        return jax.lax.dynamic_slice(x, start, sizes).reshape(x.shape[len(index) :])

    part = merged_layer(jax.tree.map(take, param)).astype(dtype)
    return part.reshape(shape[::-1]).T if transposed else part.reshape(shape)


def _shards(places: Mapping[str, _Place], itemsize: int, limit: int) -> list[dict[str, tuple]]:
    """The tensors' shapes in groups of at most `limit` bytes (a larger tensor stands alone)."""
    shards, used = [{}], 0
    for name, place in places.items():
        nbytes = math.prod(place.shape) * itemsize
        if shards[-1] and used + nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = place.shape
        used += nbytes
    return shards


def save_checkpoint(
    path: epath.Path,
    config: DecoderConfig,
    params: Params,
    *,
    end_id: int,
    dtype: str | None = None,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that Transformers' `from_pretrained` loads; the host holds one file of it.

    With several processes, all must call it, and the first one writes.

    Args:
      path: the folder; it must exist.
      config: the model's shape.
      params: its (stacked) parameters, on any mesh; adapters are merged.
      end_id: the token that ends a response.
      dtype: type of the stored weights; that of the parameters when None.
      generation: the content of generation_config.json; greedy up to `end_id` when None.
      max_shard_bytes: weights beyond this go to further files, listed in an index.

    Raises:
      UserError: if a weight is too large for float16.
      OSError: if the disk is full.
    """
    path = epath.Path(path)
    flat, places = flatten_dict(params), _places(config)
    dtype = jnp.dtype(dtype or flat[("embed",)].dtype)
    shards = _shards(places, dtype.itemsize, max_shard_bytes)

    def load(name: str) -> np.ndarray:
        place = places[name]
        part = _extract(
            flat[place.param],
            place.index,
            shape=place.shape,
            transposed=place.transposed,
            dtype=dtype,
        )
        values = multihost_utils.process_allgather(part, tiled=True)
        if dtype == np.float16 and not np.isfinite(values).all():
            raise UserError(f"{name} holds values beyond float16: set export.dtype=bfloat16")
        return values

    count, files = len(shards), [WEIGHTS]
    if count > 1:
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if not processes.is_main():
        for name in itertools.chain(*shards):
            load(name)  # takes part in the gathering
        return
    for file, shapes in zip(files, shards, strict=True):
        safetensors_file.write(path / file, {name: load(name) for name in shapes})
    if count > 1:
        total = sum(math.prod(place.shape) for place in places.values()) * dtype.itemsize
        weight_map = {name: f for f, names in zip(files, shards, strict=True) for name in names}
        _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(path / CONFIG, config_to_hf(config, end_id, dtype.name))
    generation = generation or {"eos_token_id": end_id, "do_sample": False}
    _write_json(path / GENERATION, dict(generation))


def _write_json(path: epath.Path, value: dict) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")
