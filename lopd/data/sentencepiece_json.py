"""A SentencePiece model as the files from which Transformers makes the same tokenizer.

`AutoTokenizer` reads a lone `tokenizer.model` by rules of the model's family, which give other ids
without an error. A `tokenizer.json` says itself how text becomes ids. Transformers' own converter
writes it; here it is corrected where it differs from SentencePiece, and then compared with it.
"""

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, normalizers, pre_tokenizers

from lopd.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Types of pieces, as in SentencePiece's protocol buffer."""
_UNIGRAM, _BPE = 1, 2
"""Types of models: the best sum of the pieces' scores, or merges that follow from them."""
_TIE = 1e-5
"""Relative difference of two sums that float32 cannot tell apart."""
_SPACE = "▁"
"""Stands for a space in pieces."""
_RANDOM_TEXTS, _SPELLED_PIECES = 3000, 20_000
"""Of the comparison: random texts, and at most so many pieces spelled out."""

_HARD_TEXTS = (
    *("", " ", "  ", "   ", "a", " a", "a ", "  a  b   c  ", "a\tb", "x" * 3000, "ab " * 2000),
    *("\n", "\n\n", "\t", "\r\n", " \n ", "\n a", "a\n", "1234567890" * 300, " " * 500),
    *("▁", "▁▁", "▁a", "a▁", " ▁ ", "\xa0x\xa0", "x\u2003y\u3000z\u2028w\u2029\x85"),
    *("\u200b\ufeff", "数学の問題：求めよ。한국어", "ﬁ ① Ａｂ ㍿ ½ …", "\u0e33\u0e4d\u0e32"),
    *("é e\u0301 e\u0327\u0301", "a" + 8 * "\u0301" + "b", "\u1112\u1161\u11ab", "\u212b\u212a"),
    *("👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈🇩🇪", "क्षि"),
    *("\x00", "a\x00b", "\x01\x02\x7f\x80\x9f", "\x08", "\U0010ffff", "\u2047", " \u2047 "),
    *("</s>", "a</s>b", "<s>", "<unk>", "<pad>", "<0x0A>", "<|im_end|>"),
)  # fmt: skip


def transformers_files(model: bytes, where: str) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`, from which `AutoTokenizer` gives the same ids.

    Nothing is put in front of a text or behind it, as SentencePiece does by default. Text that
    spells a control piece, such as `</s>`, stays text.

    Args:
      model: the bytes of the `.model` file.
      where: names it in messages.

    Raises:
      UserError: if the ids of some text differ by more than a tie, as those of models that
        normalise by NFKC do; the message shows the text.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    tokenizer = _convert(proto)
    text = _differing_text(proto, tokenizer)
    if text is not None:
        raise UserError(
            f"{where}: no tokenizer.json gives the ids of this SentencePiece model for the text "
            f"{text[:40]!r}, so Transformers would read an export wrongly; leave export out of "
            "--stages, or train the model with normalization_rule_name=identity"
        )
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode() + b"\n",
        "tokenizer_config.json": json.dumps(_config(proto, tokenizer), indent=2).encode() + b"\n",
    }


def _convert(proto: sentencepiece_model_pb2.ModelProto) -> tokenizers.Tokenizer:
    # Imported here: it takes a second, and only an export needs it.
    from transformers.convert_slow_tokenizer import SpmConverter

    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if proto.trainer_spec.model_type == _BPE:
        pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(proto, pieces)
    normal, split = [tokenizer.normalizer], [tokenizer.pre_tokenizer]
    if proto.normalizer_spec.remove_extra_whitespaces:  # also those that a text spells as ▁
        normal.append(normalizers.Replace(tokenizers.Regex(rf"{_SPACE}+\z"), ""))
    hidden, pattern = _hide_reserved(proto)
    normal += hidden
    if pattern:
        split.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "merged_with_previous"))
    tokenizer.normalizer = normalizers.Sequence([x for x in normal if x is not None])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([x for x in split if x is not None])
    tokenizer.add_tokens(
        [AddedToken(piece, normalized=True, special=False) for piece in _whole_pieces(proto)]
    )
    return tokenizer


def _whole_pieces(proto: sentencepiece_model_pb2.ModelProto) -> list[str]:
    """Pieces to list as added tokens, which nothing is merged with and nothing put in front of.

    For llama.cpp, whose conversion takes user-defined pieces from that list only, and which puts a
    space in front of whatever it splits itself, as no file but those of some families can tell it
    not to. Without pieces to merge, everything can be listed.
    """
    if proto.normalizer_spec.add_dummy_prefix:
        return []
    normal = [p.piece for p in proto.pieces if p.type == _NORMAL]
    merged = any(len(piece) > 1 for piece in normal)
    return [p.piece for p in proto.pieces if p.type == _USER_DEFINED] + ([] if merged else normal)


def _hide_reserved(
    proto: sentencepiece_model_pb2.ModelProto,
) -> tuple[list[normalizers.Replace], str]:
    """How text that spells a control, unknown or byte piece is kept from becoming that piece.

    SentencePiece never finds these in a text; the `tokenizers` library finds all that is in the
    vocabulary. The text is cut in two where no other piece could lie across the cut. If all its
    characters are unknown, they make one unknown token together, as the first of them does alone.

    Returns:
      What replaces such a text, and a pattern of what to cut behind.
    """
    spelled = [p.piece for p in proto.pieces if p.type in (_NORMAL, _USER_DEFINED, _UNUSED)]
    together = {pair for piece in spelled for pair in itertools.pairwise(piece)}
    known, fallback = {*spelled}, proto.trainer_spec.byte_fallback
    replaced, cuts = [], {}
    for piece in (p.piece for p in proto.pieces if p.type in (_UNKNOWN, _CONTROL, _BYTE)):
        pairs = list(itertools.pairwise(piece))
        if not (fallback or known & {*piece} or together & {*pairs}):
            replaced.append(normalizers.Replace(piece, piece[0]))
            continue
        for cut, pair in enumerate(pairs, start=1):
            if pair not in together and (fallback or known & {*pair}):
                cuts.setdefault(piece[:cut], []).append(re.escape(piece[cut:]))
                break
    return replaced, "|".join(f"{re.escape(a)}(?={'|'.join(b)})" for a, b in cuts.items())


def _config(proto: sentencepiece_model_pb2.ModelProto, tokenizer: tokenizers.Tokenizer) -> dict:
    """The entries of `tokenizer_config.json`."""
    trainer = proto.trainer_spec
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id}
    ids["unk"] = trainer.unk_id
    named = {f"{name}_token": proto.pieces[i].piece for name, i in ids.items() if i >= 0}
    control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    added = tokenizer.get_added_tokens_decoder().items()
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        "added_tokens_decoder": {str(i): {k: getattr(x, k) for k in flags} for i, x in added},
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [x for x in control if x not in named.values()],
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": proto.normalizer_spec.add_dummy_prefix,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that spells one stays text
    }


def _texts(proto: sentencepiece_model_pb2.ModelProto) -> Iterator[str]:
    """Texts to compare on: hard ones, the pieces themselves, overlaps, and random mixtures."""
    yield from _HARD_TEXTS
    rng = random.Random(0)
    pieces = [piece.piece.replace(_SPACE, " ") for piece in proto.pieces]
    whole = [p.piece.replace(_SPACE, " ") for p in proto.pieces if p.type == _USER_DEFINED]
    yield from rng.sample(pieces, min(len(pieces), _SPELLED_PIECES))
    for piece in rng.sample(whole, min(len(whole), 100)):
        # Where another piece overlaps it, a unigram model may prefer that one.
        for cut in range(1, len(piece)):
            yield from (piece[:cut] + x for x in pieces if x.startswith(piece[cut:]))
            yield from (x + piece[cut:] for x in pieces if x.endswith(piece[:cut]))
    characters = [*map(chr, range(128)), *"  \n\t▁?,éかﬁ한🙂", "\u0301", "\u00a0", "\u200d", "</s>"]
    for number in range(_RANDOM_TEXTS):
        some = rng.choices(pieces, k=100) + (whole and rng.choices(whole, k=10))
        pool = (characters, some, characters + some)[number % 3]
        yield "".join(rng.choices(pool, k=rng.randint(1, 30)))


def _differing_text(
    proto: sentencepiece_model_pb2.ModelProto, tokenizer: tokenizers.Tokenizer
) -> str | None:
    """The first text of which the two make other ids; None if there is none."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = list(_texts(proto))
    found = tokenizer.encode_batch(texts, add_special_tokens=False)
    pairs = zip(texts, processor.encode(texts), found, strict=True)
    return next((text for text, ids, other in pairs if not _alike(proto, ids, other.ids)), None)


def _alike(
    proto: sentencepiece_model_pb2.ModelProto, ids: Sequence[int], others: Sequence[int]
) -> bool:
    """Whether ids are the same, or as good: of a unigram model, pieces of one text and one score.

    Between such the last bit of a sum decides, which the two libraries add up differently.
    """
    if [*ids] == [*others] or proto.trainer_spec.model_type != _UNIGRAM:
        return [*ids] == [*others]
    texts, scores = zip(
        *(
            ("".join(proto.pieces[i].piece for i in some), sum(proto.pieces[i].score for i in some))
            for some in (ids, others)
        ),
        strict=True,
    )
    return texts[0] == texts[1] and math.isclose(*scores, rel_tol=_TIE)
