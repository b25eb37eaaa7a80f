"""The tokenizer a run uses, behind the few calls that the stages need."""

import hashlib
from collections.abc import Sequence

import sentencepiece
from etils import epath

from lopd.errors import UserError

_BUNDLED = {"tiny": epath.resource_path("lopd") / "data" / "tiny_tokenizer" / "tiny.model"}


class SentencePieceTokenizer:
    """A SentencePiece model: text to ids and back, the end token, and an identity."""

    def __init__(self, model_path: epath.PathLike):
        path = epath.Path(model_path)
        if not path.is_file():
            raise UserError(f"tokenizer={path}: no such file; give the path of a .model file")
        self.serialized = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.serialized)
        except RuntimeError as error:
            raise UserError(f"tokenizer={path}: not a SentencePiece model") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.end_id: int = self._processor.eos_id()
        if self.end_id < 0:
            raise UserError(f"tokenizer={path}: the model has no end-of-sentence piece")

    @property
    def fingerprint(self) -> str:
        """Identity of the id → piece map: equal exactly when every id means the same piece."""
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        return hashlib.sha256("\0".join(pieces).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token added."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens give nothing."""
        return self._processor.decode([int(i) for i in ids])


def load_tokenizer(name_or_path: str) -> SentencePieceTokenizer:
    """The bundled tokenizer of that name, or the one at that path."""
    return SentencePieceTokenizer(_BUNDLED.get(name_or_path, name_or_path))
