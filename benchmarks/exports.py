"""An export in other programs: the same ids of a prompt, and the same greedy tokens.

    python benchmarks/exports.py FOLDER [--convert=convert_hf_to_gguf.py] [--tokens=32]

FOLDER is what `export` wrote. Compared with lopd's own sampler are Transformers, mlx-lm and
llama.cpp, as far as they are installed:

    pip install torch "mlx[cpu]" mlx-lm llama-cpp-python

llama.cpp's converter is no package. It is in its repository, and in the source archive of
llama-cpp-python (`pip download --no-deps --no-binary=:all: llama-cpp-python`), as
vendor/llama.cpp/convert_hf_to_gguf.py.

Everything computes in float32, so that a difference is one of the files and not of rounding.
"""

import argparse
import dataclasses
import importlib.metadata
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import transformers
from etils import epath

from lopd.checkpoints import hugging_face
from lopd.data.tokenizers import load_tokenizer
from lopd.machine import devices
from lopd.models import inference
from lopd.sampling.engine import Request, Sampling, generate

PROMPTS = ["What is 357+846?\n", "What is 12+345?\n", "What is 9+1?\n", "What is 999+999?\n"]
Answers = list[tuple[list[int], list[int]]]
"""Per prompt its ids and those of the response, without the token that ended it."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The prompts that every program gets."""

    folder: pathlib.Path
    texts: list[str]
    """Prompts, rendered by the chat template if there is one."""
    chat: bool
    tokens: int
    """Most of a response."""
    end_ids: tuple[int, ...]
    convert: str | None

    def until_end(self, tokens: list[int]) -> list[int]:
        """The tokens before the first that ends a response."""
        ends = [i for i, token in enumerate(tokens) if token in self.end_ids]
        return tokens[: ends[0]] if ends else tokens


def make_task(folder: pathlib.Path, tokens: int, convert: str | None) -> Task:
    """The prompts as text, by the export's own template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    chat = bool(tokenizer.chat_template)
    texts = PROMPTS
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in PROMPTS
        ]
    end_ids = load_tokenizer(str(folder)).end_ids
    return Task(folder, texts, chat, tokens, end_ids, convert)


def ask_lopd(task: Task) -> Answers:
    """lopd's sampler."""
    tokenizer = load_tokenizer(str(task.folder))
    mesh = devices.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    config, params = hugging_face.load_checkpoint(epath.Path(task.folder), mesh)
    config = dataclasses.replace(config, dtype="float32")
    asked = [Request(i, 0, tokenizer.encode(text)) for i, text in enumerate(task.texts)]
    sampling = Sampling(0.0, task.tokens, 0, task.end_ids)
    capacity = max(len(request.prompt_tokens) for request in asked) + task.tokens
    params = inference.inference_params(config, params)
    sizes = dict(slots=len(asked), capacity=capacity, decode_steps=8)
    responses = generate(config, params, asked, sampling, **sizes)
    found = sorted(responses, key=lambda response: response.index)
    return [
        (list(x.request.prompt_tokens), task.until_end([int(i) for i in x.tokens])) for x in found
    ]


def ask_transformers(task: Task) -> Answers:
    """`AutoTokenizer` and `generate`."""
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(task.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32)
    answers = []
    for text in task.texts:
        ids = tokenizer.encode(text, return_tensors="pt", add_special_tokens=not task.chat)
        out = model.generate(ids, max_new_tokens=task.tokens, do_sample=False)
        answers.append((ids[0].tolist(), task.until_end(out[0, ids.shape[1] :].tolist())))
    return answers


def ask_mlx(task: Task) -> Answers:
    """mlx-lm."""
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    model, tokenizer = mlx_lm.load(str(task.folder))
    model.set_dtype(mx.float32)
    answers = []
    for text in task.texts:
        ids, out = tokenizer.encode(text, add_special_tokens=not task.chat), []
        for token, _ in generate_step(mx.array(ids), model, max_tokens=task.tokens):
            if int(token) in tokenizer.eos_token_ids:
                break
            out.append(int(token))
        answers.append((ids, out))
    return answers


def ask_llama_cpp(task: Task) -> Answers:
    """llama.cpp, after its own conversion."""
    import llama_cpp

    if not task.convert:
        raise ImportError("--convert=convert_hf_to_gguf.py is not given")
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/model.gguf"
        command = [sys.executable, task.convert, str(task.folder), f"--outfile={file}"]
        subprocess.run([*command, "--outtype=f32"], check=True, capture_output=True)
        model = llama_cpp.Llama(
            file, n_ctx=1024, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )  # fmt: skip
        answers = []
        for text in task.texts:
            ids, out = model.tokenize(text.encode(), add_bos=True, special=task.chat), []
            model.reset()
            for token in model.generate(ids, temp=0.0):
                if llama_cpp.llama_vocab_is_eog(model._model.vocab, token):
                    break
                out.append(int(token))
                if len(out) == task.tokens:
                    break
            answers.append((ids, out))
        return answers


PROGRAMS: dict[str, Callable[[Task], Answers]] = {
    "transformers": ask_transformers,
    "mlx-lm": ask_mlx,
    "llama-cpp-python": ask_llama_cpp,
}


def main() -> None:
    """Asks every program that is there, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--convert", help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of a response")
    arguments = parser.parse_args()
    task = make_task(arguments.folder, arguments.tokens, arguments.convert)
    expected = ask_lopd(task)
    print(f"{len(expected)} prompts, {sum(len(out) for _, out in expected)} greedy tokens by lopd")
    print(f"{'program':20}{'version':12}{'same prompt ids':>17}{'same tokens':>13}")
    differ = False
    for name, ask in PROGRAMS.items():
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                answers = alone.submit(ask, task).result()
        except ImportError as error:
            print(f"{name:20}not compared ({error})")
            continue
        except BrokenProcessPool:
            print(f"{name:20}aborted")
            differ = True
            continue
        pairs = list(zip(answers, expected, strict=True))
        same = [sum(a[part] == b[part] for a, b in pairs) for part in (0, 1)]
        version = importlib.metadata.version(name)
        print(f"{name:20}{version:12}{same[0]:>12} of {len(pairs)}{same[1]:>8} of {len(pairs)}")
        differ |= any(a != b for a, b in pairs)
    sys.exit(differ)


if __name__ == "__main__":
    main()
