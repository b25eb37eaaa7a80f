"""The tokenizer a run uses, behind the few calls that the stages need.

Two kinds: a SentencePiece `.model` file, and a checkpoint folder with a Hugging Face
`tokenizer.json`, read by Transformers' tokenizer (which needs no torch).

Special tokens in text. `encode` and `render` give the ids that Transformers gives: text that
spells a special token of a `tokenizer.json`, such as `<|im_end|>`, becomes that token, also inside
a user's message. Teachers and students were trained and are served that way, so anything else
would put the prompts off their distribution. The price: whoever writes a prompt can close its turn
and open another. Filter untrusted prompts before they come here. A SentencePiece model keeps such
text as text.
"""

import abc
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence

import sentencepiece
from etils import epath

from lopd.errors import UserError, one_line
from lopd.machine.limits import limited
from lopd.machine.reading import check_regular, read_json_object
from lopd.machine.storage import check_url

# Of Transformers only tokenizers are used, so it need not say that PyTorch is not there.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_BUNDLED = {"tiny": epath.resource_path("lopd") / "data" / "tiny_tokenizer" / "tiny.model"}
_JSON = "tokenizer.json"
_READ_BY_TRANSFORMERS = (
    _JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_MODEL = "tokenizer.model"
_OF_OTHER_PROGRAMS = (_MODEL, "vocab.json", "merges.txt")
"""The same tokenizer once more, as some checkpoints have it for programs other than these."""
# Far beyond any prompt: what a template may take that loops, or grows, without end.
_TEMPLATE_SECONDS = 10.0
_TEMPLATE_BYTES = 2 << 30
_TEMPLATE_CHARACTERS = 1 << 24


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Tokenizer(abc.ABC):
    """Text to ids and back, the end tokens, the chat template, and identities.

    Attributes:
      tokens: the token of each id, special ones included; "" for an id that has none. Pieces as
        the tokenizer stores them, not text.
      end_ids: every token that may end a response, the canonical one first.
      files: the files it was read from, by name.
    """

    tokens: Sequence[str]
    end_ids: tuple[int, ...]
    files: Mapping[str, bytes]
    turn_end: int | None = None
    """The token that the chat template puts behind an assistant's turn; None without one."""

    @property
    def vocab_size(self) -> int:
        """The largest id + 1. An embedding may have more rows, never fewer."""
        return len(self.tokens)

    @property
    def end_id(self) -> int:
        """The canonical end token: the one to train responses to end with."""
        return self.end_ids[0]

    @functools.cached_property
    def export_files(self) -> Mapping[str, bytes]:
        """The files to write beside exported weights, by name: its own, and what they lack.

        Raises:
          UserError: if no files make Transformers give the same ids.
        """
        return self.files

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identity of the id → token map: equal exactly when every id means the same token."""
        return _digest("\0".join(self.tokens))

    @property
    @abc.abstractmethod
    def template_fingerprint(self) -> str:
        """Identity of the chat template's text; "" without one."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing added in front or behind."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids; ids without a token, and special tokens unless asked for, give nothing."""

    @abc.abstractmethod
    def render(self, messages: Sequence[Mapping[str, str]], *, thinking: bool) -> list[int]:
        """Ids of a conversation up to where the assistant's next turn begins.

        The checkpoint's own template writes one text, which is tokenised once. Keep the ids:
        rendering again from decoded text may give others.

        Args:
          messages: `role` ("system", "user", "assistant") and `content` of each turn.
          thinking: the template's `enable_thinking`; templates that do not know it ignore it.

        Raises:
          UserError: if there is no template, or it refuses the conversation.
        """


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, model_path: epath.PathLike):
        path = epath.Path(model_path)
        if not path.is_file():
            raise UserError(f"tokenizer={path}: no such file; give the path of a .model file")
        self.files = {_MODEL: path.read_bytes()}
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.files[_MODEL])
        except RuntimeError as error:
            raise UserError(f"tokenizer={path}: not a SentencePiece model") from error
        if self._processor.eos_id() < 0:
            raise UserError(f"tokenizer={path}: the model has no end-of-sentence piece")
        self._path = path
        self.tokens = self._processor.id_to_piece(list(range(self._processor.vocab_size())))
        self.end_ids = (self._processor.eos_id(),)

    @functools.cached_property
    def export_files(self) -> Mapping[str, bytes]:
        # Imported here: only an export needs it.
        from lopd.data.sentencepiece_json import transformers_files

        model = self.files[_MODEL]
        return {**self.files, **transformers_files(model, f"tokenizer={self._path}")}

    @property
    def template_fingerprint(self) -> str:
        return ""

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        if special:
            return "".join(self.tokens[i] for i in ids)
        return self._processor.decode([int(i) for i in ids])

    def render(self, messages: Sequence[Mapping[str, str]], *, thinking: bool) -> list[int]:
        raise UserError(
            f"tokenizer={self._path}: a SentencePiece model has no chat template; "
            "use the tokenizer.json folder of a chat checkpoint"
        )


class HuggingFaceTokenizer(Tokenizer):
    """The `tokenizer.json` of a checkpoint folder, with its chat template and end tokens.

    `end_ids` holds the token that the template puts behind an assistant's turn, then the
    `eos_token_id` of `generation_config.json`, or the tokenizer's own if there is none. For Qwen3:
    `<|im_end|>`, `<|endoftext|>`. (A base checkpoint names only `<|endoftext|>`, which is not how
    its chat template ends a turn.)
    """

    def __init__(self, folder: epath.PathLike):
        folder = epath.Path(folder)
        self._where = f"tokenizer={folder}"
        if not (folder / _JSON).is_file():
            raise UserError(f"{self._where}: no such folder, or it holds no {_JSON}")
        self.files = {
            name: (folder / name).read_bytes()
            for name in (*_READ_BY_TRANSFORMERS, *_OF_OTHER_PROGRAMS)
            if (folder / name).is_file()
        }
        self._tokenizer, ids = self._read()
        added = self._tokenizer.added_tokens_decoder.items()
        self._special = {*self._tokenizer.all_special_ids, *(i for i, t in added if t.special)}
        self.tokens = [""] * (max(ids.values()) + 1)
        for token, i in ids.items():
            self.tokens[i] = token
        self.turn_end = self._find_turn_end()
        self.end_ids = self._find_end_ids(folder / "generation_config.json")

    def _read(self):
        # Without torch, which is not needed here, the import would advise to install it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        # Imported here: it takes seconds, and runs on a SentencePiece model do without it.
        from transformers import PreTrainedTokenizerFast

        with tempfile.TemporaryDirectory() as copy:  # Transformers reads no object stores
            for name in self.files.keys() & {*_READ_BY_TRANSFORMERS}:
                (epath.Path(copy) / name).write_bytes(self.files[name])
            try:
                # This class takes tokenizer.json as it is; the per-model ones rebuild parts.
                read = PreTrainedTokenizerFast.from_pretrained(copy, local_files_only=True)
                ids = read.get_vocab()
                if not ids:
                    raise ValueError("it has no tokens")
                return read, ids
            except Exception as error:  # the Rust reader raises plain Exception
                raise UserError(
                    f"{self._where}: Transformers cannot read its {_JSON} ({one_line(error)})"
                ) from error

    def _find_turn_end(self) -> int | None:
        if not self._tokenizer.chat_template:
            return None
        answer = "lopd-answer"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        text = self._apply_template(turns, add_generation_prompt=False)
        behind = self.encode(text.rpartition(answer)[2])[:1]
        return next((i for i in behind if i in self._special), None)

    def _find_end_ids(self, generation_config: epath.Path) -> tuple[int, ...]:
        stated, where = self._tokenizer.eos_token_id, self._where
        check_regular(generation_config)
        if generation_config.is_file():
            named = read_json_object(generation_config)
            if "eos_token_id" in named:
                stated, where = named["eos_token_id"], str(generation_config)
        found = [self.turn_end, *(stated if isinstance(stated, list) else [stated])]
        found = [i for i in found if i is not None]
        for i in found:
            whole = isinstance(i, int) and not isinstance(i, bool)
            if not (whole and 0 <= i < len(self.tokens) and self.tokens[i]):
                raise UserError(
                    f"{where}: eos_token_id={stated!r:.80} is no token of {self._where}"
                )
        if not found:
            raise UserError(
                f"{self._where}: names no end token; add generation_config.json with eos_token_id"
            )
        return tuple(dict.fromkeys(found))

    def _apply_template(self, messages: Sequence[Mapping[str, str]], **settings) -> str:
        try:
            with limited(_TEMPLATE_SECONDS, _TEMPLATE_BYTES):
                text = self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, **settings
                )
        except MemoryError as error:
            raise UserError(f"{self._where}: the chat template grows without end") from error
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"{self._where}: the chat template refuses a conversation of "
                f"{len(messages)} messages ({one_line(error)})"
            ) from error
        if not isinstance(text, str) or len(text) > _TEMPLATE_CHARACTERS:
            raise UserError(
                f"{self._where}: the chat template writes more than {_TEMPLATE_CHARACTERS:,} "
                f"characters for a conversation of {len(messages)} messages"
            )
        return text

    @property
    def template_fingerprint(self) -> str:
        template = self._tokenizer.chat_template
        return _digest(json.dumps(template, sort_keys=True)) if template else ""

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return self._tokenizer.decode(
            [int(i) for i in ids],
            skip_special_tokens=not special,
            clean_up_tokenization_spaces=False,
        )

    def render(self, messages: Sequence[Mapping[str, str]], *, thinking: bool) -> list[int]:
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{self._where}: no chat template in tokenizer_config.json or chat_template.jinja; "
                "copy them from the chat checkpoint of the same family"
            )
        return self.encode(
            self._apply_template(messages, add_generation_prompt=True, enable_thinking=thinking)
        )


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The bundled tokenizer of that name, or the one at that path.

    A path is a `.model` file, or a folder with a `tokenizer.json` or a `tokenizer.model`.

    Raises:
      UserError: if nothing is there, or it cannot be read.
    """
    check_url(name_or_path)
    path = epath.Path(_BUNDLED.get(name_or_path, name_or_path))
    for file in (path, *(path / name for name in (*_READ_BY_TRANSFORMERS, *_OF_OTHER_PROGRAMS))):
        check_regular(file)
    if (path / _JSON).is_file():
        return HuggingFaceTokenizer(path)
    if (path / _MODEL).is_file():
        return SentencePieceTokenizer(path / _MODEL)
    if path.is_dir():
        raise UserError(f"tokenizer={path}: the folder holds neither {_JSON} nor {_MODEL}")
    return SentencePieceTokenizer(path)


def has_tokenizer(folder: epath.PathLike) -> bool:
    """Whether a folder holds a tokenizer that `load_tokenizer` would read."""
    return any((epath.Path(folder) / name).is_file() for name in (_JSON, _MODEL))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, what: str) -> None:
    """Refuses an embedding of `vocab_size` rows that some id would not fit into.

    More rows than ids are normal: Qwen3 has 151,936 for 151,669.

    Raises:
      UserError: naming both sizes; `what` says whose embedding it is.
    """
    if vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{what} has {vocab_size} rows, the tokenizer's ids go up to "
            f"{tokenizer.vocab_size - 1}: use the tokenizer that belongs to the model"
        )


def check_same_vocabulary(a: Tokenizer, b: Tokenizer, what: str) -> None:
    """Refuses two tokenizers in which some id means different tokens.

    Equal sizes prove nothing: a teacher's log-probabilities of ids that mean something else would
    train without any error.

    Raises:
      UserError: naming the first id that differs; `what` says whose tokenizers they are.
    """
    shared = min(a.vocab_size, b.vocab_size)
    for i, (left, right) in enumerate(zip(a.tokens[:shared], b.tokens[:shared], strict=True)):
        if left != right:
            raise UserError(f"{what}: id {i} is {left!r} in the one and {right!r} in the other")
    if a.vocab_size != b.vocab_size:
        raise UserError(
            f"{what}: one has {a.vocab_size} ids, the other {b.vocab_size}; "
            f"id {shared} is in one only"
        )
