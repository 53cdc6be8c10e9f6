"""Text to token ids and back, and back again while a reply is still being drawn.

A token of a Llama's vocabulary is a fixed string of bytes, whether byte-level BPE (GPT-2, Llama 3)
or sentencepiece with byte fallback (Llama 2) made it, and a text is their concatenation, without
special tokens and without the space that sentencepiece puts before a text. So decoding is done by
bytes, here, for both kinds: an incremental UTF-8 decoder then gives each character as soon as its
last byte is there, at a cost that does not grow with the reply. vLLM (`detokenize_incrementally`)
and text-generation-inference (`decode_token`) instead decode a sliding window of tokens twice and
compare; that costs more, and loses spaces after skipped tokens and the end of invalid UTF-8.
The result equals `tokenizers`' and `sentencepiece`'s own `decode` wherever the bytes are UTF-8.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from p2pinfer.errors import InvalidRequestError, ModelError
from p2pinfer.model.config import LlamaConfig, read_json

FAST_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"

SPACE_MARK = "\u2581"
"""What sentencepiece writes for a space."""

ALL_SPACES = 1 << 30

AGAIN = "download the model's tokenizer again"


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes (GPT-2's
    `bytes_to_unicode`, Radford et al., 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_alphabet())}


class Tokenizer:
    """One model's tokenizer. Make it by `Tokenizer.load`.

    `kind` is the file it came from, `size` the number of its tokens, `eos_ids` the ids that end a
    reply (the configuration's), `bos_id` the id that begins a text, if any.
    """

    def __init__(
        self,
        *,
        kind: str,
        size: int,
        encoder: Callable[[str], list[int]],
        token_bytes: Callable[[int], bytes],
        leading_spaces: int,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
    ) -> None:
        self.kind = kind
        self.size = size
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.leading_spaces = leading_spaces
        self._encoder = encoder
        self._token_bytes = token_bytes
        self._known: dict[int, bytes] = dict.fromkeys(eos_ids, b"")

    @classmethod
    def load(cls, folder: Path, config: LlamaConfig) -> Tokenizer:
        """Read `tokenizer.json`, or else `tokenizer.model`.

        Raises `ModelError`: no tokenizer, a damaged one, one of a kind that is not decoded here, or
        one whose ids do not fit `config.vocab_size`.
        """
        if (folder / FAST_FILE).is_file():
            return _load_fast(folder, config)
        if (folder / SENTENCEPIECE_FILE).is_file():
            return _load_sentencepiece(folder, config)
        raise ModelError(
            f"{folder} holds no tokenizer: neither {FAST_FILE} nor {SENTENCEPIECE_FILE}; "
            "copy it from the model's source"
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, begun by `bos_id` exactly once where the model wants it.

        With `tokenizer.json`, special tokens written out in the text become their ids, as in
        `transformers`. Raises `InvalidRequestError` for text that is no Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the prompt is not valid Unicode text: {error}") from error
        return tuple(self._encoder(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens; ids that the tokenizer lacks are empty."""
        data = b"".join(map(self.token_bytes, ids))
        return _strip_spaces(data.decode("utf-8", "replace"), self.leading_spaces)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for special tokens and unknown ids."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._token_bytes(token_id)
        return known


class IncrementalDetokenizer:
    """Text of one reply while its tokens come in, cut before the first stop string.

    Whatever way the ids are grouped into pushes, the pieces add up to `tokenizer.decode(all ids)`,
    or, once a stop string is complete in it, to the text before that stop string. Held back is only
    what may still change: the bytes of an unfinished character, and an end that may be the
    beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces_left = tokenizer.leading_spaces
        self._held = ""

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens; returns the text that is certain now and was not returned before."""
        return self._add(b"".join(map(self._tokenizer.token_bytes, ids)), final=False)

    def finish(self) -> str:
        """The reply is over: the rest of its text (an unfinished character becomes U+FFFD)."""
        return self._add(b"", final=True)

    def _add(self, data: bytes, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += self._without_leading(self._utf8.decode(data, final))
        end = _first_stop(self._held, self._stop)
        if end is not None:
            self.stopped = True
        elif final:
            end = len(self._held)
        else:
            end = len(self._held) - _possible_stop(self._held, self._stop)
        ready, self._held = self._held[:end], self._held[end:]
        return ready

    def _without_leading(self, text: str) -> str:
        """Take off what is left of the leading spaces; nothing more once other text has come."""
        rest = _strip_spaces(text, self._spaces_left)
        self._spaces_left = 0 if rest else self._spaces_left - len(text)
        return rest


def _strip_spaces(text: str, most: int) -> str:
    spaces = len(text) - len(text.lstrip(" "))
    return text[min(spaces, most) :]


def _first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the stop string that is complete first begins; of several, the longest."""
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(found)[1] if found else None


def _possible_stop(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = max((len(s) for s in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0


# --- tokenizer.json -------------------------------------------------------------------------------


def _load_fast(folder: Path, config: LlamaConfig) -> Tokenizer:
    import tokenizers

    path = folder / FAST_FILE
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path} is damaged ({error}); {AGAIN}") from error
    library.no_truncation()
    library.no_padding()
    ids = library.get_vocab(with_added_tokens=True).values()
    _check_fits(path, max(ids, default=-1), config)
    to_bytes, leading_spaces = _piece_decoder(path, library)
    special = {i for i, t in library.get_added_tokens_decoder().items() if t.special}
    settings = _settings(folder)
    bos_text = settings.get("bos_token")
    if isinstance(bos_text, dict):
        bos_text = bos_text.get("content")
    bos_id = library.token_to_id(bos_text) if isinstance(bos_text, str) else config.bos_token_id
    add_bos = settings.get("add_bos_token")

    def encode(text: str) -> list[int]:
        # As a batch of one: alone, the library holds the interpreter's lock until it is done.
        (encoding,) = library.encode_batch_fast([text], add_special_tokens=add_bos is not False)
        ids: list[int] = encoding.ids
        return _with_bos(ids, bos_id, add_bos)

    def token_bytes(token_id: int) -> bytes:
        piece = None if token_id in special else library.id_to_token(token_id)
        return b"" if piece is None else to_bytes(piece)

    return Tokenizer(
        kind=FAST_FILE,
        size=len(ids),
        encoder=encode,
        token_bytes=token_bytes,
        leading_spaces=leading_spaces,
        bos_id=bos_id,
        eos_ids=config.eos_token_ids,
    )


def _piece_decoder(path: Path, library: Any) -> tuple[Callable[[str], bytes], int]:
    """How the file's decoder turns one piece into bytes, and how many leading spaces it takes off.

    Raises `ModelError` for a decoder whose tokens are no fixed bytes (WordPiece, say).
    """
    whole: Any = None
    if library.decoder is not None:
        whole = json.loads(library.decoder.__getstate__())
    steps: list[Any] = whole["decoders"] if whole and "decoders" in whole else [whole]
    replaced: list[tuple[str, str]] = []
    byte_level = False
    leading_spaces = 0
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replaced.append((old, new))
            case {"type": "Metaspace"}:
                replaced.append((step.get("replacement", SPACE_MARK), " "))
                scheme = step.get("prepend_scheme", "always")
                leading_spaces = int(scheme != "never" and step.get("add_prefix_space", True))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                leading_spaces = start
            case _:
                kind = step.get("type") if isinstance(step, dict) else step
                raise ModelError(
                    f"{path}: decoder {kind!r} is not supported; a Llama's is ByteLevel, Metaspace "
                    "or a Sequence of Replace, ByteFallback, Fuse and Strip"
                )
    if byte_level:
        return _byte_level_piece, leading_spaces

    def to_bytes(piece: str) -> bytes:
        fallback = _fallback_byte(piece)
        if fallback is not None:
            return fallback
        for old, new in replaced:
            piece = piece.replace(old, new)
        return piece.encode()

    return to_bytes, leading_spaces


def _byte_level_piece(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in piece)
    except KeyError:  # an added token is written as it is
        return piece.encode()


def _fallback_byte(piece: str) -> bytes | None:
    """The byte that a piece like `<0x0A>` stands for; None for any other piece."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return None
    return None


# --- tokenizer.model ------------------------------------------------------------------------------


def _load_sentencepiece(folder: Path, config: LlamaConfig) -> Tokenizer:
    path = folder / SENTENCEPIECE_FILE
    try:
        import sentencepiece
    except ImportError as error:
        raise ModelError(
            f"{path} needs the package sentencepiece: pip install 'p2pinfer[sentencepiece]'"
        ) from error
    library: Any = sentencepiece.SentencePieceProcessor()
    try:
        library.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path} is damaged ({error}); {AGAIN}") from error
    size: int = library.GetPieceSize()
    _check_fits(path, size - 1, config)
    bos_id: int | None = library.bos_id() if library.bos_id() >= 0 else config.bos_token_id
    # Llama's own tokenizer begins every text by BOS unless its settings deny it.
    add_bos = _settings(folder).get("add_bos_token", True)

    def encode(text: str) -> list[int]:
        return _with_bos(library.EncodeAsIds(text), bos_id, add_bos)

    def token_bytes(token_id: int) -> bytes:
        if not 0 <= token_id < size:
            return b""
        if library.IsControl(token_id) or library.IsUnknown(token_id) or library.IsUnused(token_id):
            return b""
        piece: str = library.IdToPiece(token_id)
        fallback = _fallback_byte(piece) if library.IsByte(token_id) else None
        return piece.replace(SPACE_MARK, " ").encode() if fallback is None else fallback

    return Tokenizer(
        kind=SENTENCEPIECE_FILE,
        size=size,
        encoder=encode,
        token_bytes=token_bytes,
        leading_spaces=_sentencepiece_leading_spaces(library),
        bos_id=bos_id,
        eos_ids=config.eos_token_ids,
    )


def _sentencepiece_leading_spaces(library: Any) -> int:
    """How many leading spaces the library's decoder takes off: none without a dummy prefix, all
    where extra spaces are removed, else one. It is asked, for its settings lie in a protocol
    buffer."""
    spaces = 4
    text: str = library.DecodePieces([SPACE_MARK] * spaces + ["a"])
    taken = spaces - text.count(" ")
    return ALL_SPACES if taken == spaces else taken


# --- both -----------------------------------------------------------------------------------------


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    return read_json(path, limit=16 << 20) if path.is_file() else {}


def _check_fits(path: Path, largest: int, config: LlamaConfig) -> None:
    if largest < 0:
        raise ModelError(f"{path} has no tokens; {AGAIN}")
    if largest >= config.vocab_size:
        raise ModelError(
            f"{path} does not fit the model: its largest token id is {largest}, but config.json's "
            f"vocab_size is {config.vocab_size}; take the tokenizer that belongs to the model"
        )


def _with_bos(ids: list[int], bos_id: int | None, add_bos: object) -> list[int]:
    """`ids` begun by `bos_id` once, if they begin by it already or `add_bos` is true.

    So a text that itself begins by the token (a chat template's) does not get a second one.
    """
    if bos_id is None or not (add_bos or ids[:1] == [bos_id]):
        return ids
    start = next((i for i, token_id in enumerate(ids) if token_id != bos_id), len(ids))
    return [bos_id, *ids[start:]]
