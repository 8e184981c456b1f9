"""Turns a conversation with images into the token ids that MedGemma continues, and its ids into text.

The format is Gemma 3's: the chat template of google/gemma-3-4b-it's `tokenizer_config.json`, the image
places of `transformers`' `Gemma3Processor`, and one `<bos>`. Text is written by users, so it may not
contain the tokens that structure a prompt. Messages about a conversation count turns and never quote them.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from medgemma_runtime.errors import TextError
from medgemma_runtime.manifest import PromptSpec
from medgemma_runtime.tokenizer_faults import tokenizer_faults

__all__ = [
    "Message",
    "Text",
    "Image",
    "Prompt",
    "PromptTokenizer",
    "load_prompt_tokenizer",
    "render",
    "expand_images",
    "image_blocks",
    "Detokenizer",
    "Thinking",
    "split_thinking",
]

_BOS = "<bos>"
_START, _END = "<start_of_turn>", "<end_of_turn>"
_IMAGE_START, _IMAGE_PLACE, _IMAGE_END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"

# Every entry of Gemma 3's vocabulary that means something other than its spelling. Files disagree on which
# of them are flagged `special`, so they are named here.
_CONTROL = re.compile(
    r"<(?:pad|eos|bos|unk|mask|(?:start|end)_of_(?:turn|image)|image_soft_token|unused\d+)>|\[multimodal\]"
)
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")

# MedGemma's notebooks (quick_start_with_model_garden.ipynb) look for these in the decoded answer.
_THOUGHT_START, _THOUGHT_END = "<unused94>", "<unused95>"
_THOUGHT_LABEL = re.compile(r"\s*thought(?:\n|\Z)")

# A tokenizer that strips, lower-cases or lacks the byte fallback does not give this back.
_PROBE = " A  b\n\n\U0001313c "


@dataclass(frozen=True)
class Text:
    """A piece of a message; white space at its ends is removed, as the template does."""

    text: str


@dataclass(frozen=True)
class Image:
    """Where an image stands in a message; the images themselves are given apart, in this order."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Consecutive texts are joined without a space.

    Attributes:
        role: `user`, or `model` for what the model answered; `assistant` is another name for `model`.
        parts: Texts and images in reading order. An earlier answer is given without its thought.
    """

    role: Literal["user", "model", "assistant"]
    parts: tuple[Text | Image, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A tokenized conversation.

    Attributes:
        ids: `[S]` int64.
        image_blocks: `[S]` int64: 0 for the places of the first image, 1 for those of the second, and so on;
            -1 for everything else, the tokens before and after an image's places included. Tokens of one
            block attend to each other in both directions.
        image_count: Images in the prompt.
    """

    ids: NDArray[np.int64]
    image_blocks: NDArray[np.int64]
    image_count: int


def render(messages: Sequence[Message], *, system: str | None = None) -> str:
    """The conversation in the words of the chat template, ready for the model's turn.

    Args:
        messages: Turns of user and model, the first and the last the user's.
        system: Instructions; Gemma has no such role, so they open the first turn, followed by a blank line.
            Unlike other text they keep the white space at their ends.

    Returns:
        The text from `<bos>` to the model's opening; each image is one `<start_of_image>`.

    Raises:
        TextError: If turns are missing or out of order, or a text is no text or contains a control token.
    """
    if not messages:
        raise TextError("the conversation is empty; give at least one user message")
    prefix = "" if system is None else _checked_system(system) + "\n\n"
    turns = [_BOS]
    for number, message in enumerate(messages, start=1):
        role = "user" if number % 2 else "model"
        turns.append(f"{_START}{role}\n{prefix}{_turn_content(message, role, number)}{_END}\n")
        prefix = ""
    if len(messages) % 2 == 0:
        raise TextError("the conversation ends with the model's turn; end it with a user message to answer")
    return "".join(turns) + f"{_START}model\n"


def expand_images(text: str, tokens_per_image: int) -> str:
    """A rendered conversation with each image marker replaced by all of an image's places.

    As in `transformers`' `processing_gemma3.py` (`full_image_sequence`), this happens before tokenization, so
    that newlines around the places merge with their neighbours into single tokens.
    """
    places = f"\n\n{_IMAGE_START}{_IMAGE_PLACE * tokens_per_image}{_IMAGE_END}\n\n"
    return text.replace(_IMAGE_START, places)


class PromptTokenizer:
    """Encodes conversations and decodes answers; made by `load_prompt_tokenizer`."""

    def __init__(self, tokenizer: Tokenizer, spec: PromptSpec) -> None:
        self.spec = spec
        # A table may have spare rows past the last token; an answer never contains one.
        self.token_count = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._tokenizer = tokenizer
        self._control_tokens = {
            token_id: piece
            for piece, token_id in tokenizer.get_vocab(with_added_tokens=True).items()
            if _CONTROL.fullmatch(piece)
        }

    def encode(
        self, messages: Sequence[Message], *, system: str | None = None, image_count: int = 0
    ) -> Prompt:
        """The ids of a conversation, ending where the model's answer begins.

        Args:
            messages: See `render`.
            system: See `render`.
            image_count: How many images are given along with the conversation.

        Raises:
            TextError: If the conversation cannot be rendered, has another number of images, or does not fit
                the context.
        """
        text = render(messages, system=system)
        markers = text.count(_IMAGE_START)
        if markers and self.spec.image_id is None:
            raise TextError(f"the conversation has {_images(markers)} and this model reads text only")
        if markers != image_count:
            raise TextError(
                f"the conversation has places for {_images(markers)} and {image_count} "
                f"{'is' if image_count == 1 else 'are'} given; put one Image part where each image stands"
            )
        expanded = expand_images(text, self.spec.tokens_per_image)
        return self._encode(expanded, turns=len(messages), images=markers)

    def encode_text(self, text: str) -> Prompt:
        """The ids of `<bos>` and a text, which the model goes on with: no chat, for models that know none.

        Raises:
            TextError: If the text contains a control token, or does not fit the context.
        """
        _check_text(text, "the text")
        return self._encode(_BOS + text, turns=None, images=0)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens stay, because `split_thinking` looks for them.

        Raises:
            TextError: If an id is not in the tokenizer.
        """
        detokenizer = self.detokenizer()
        return "".join([*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()])

    def detokenizer(self) -> "Detokenizer":
        """A new `Detokenizer`, for one answer."""
        return Detokenizer(self._tokenizer)

    def _encode(self, text: str, *, turns: int | None, images: int) -> Prompt:
        """The ids of a rendered prompt of so many turns, or of a text without any."""
        # The one <bos> is written; the tokenizer would add another.
        with tokenizer_faults(f"{self.spec.tokenizer} cannot encode the prompt"):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        self._check_control_tokens(ids, turns=turns, images=images)
        if len(ids) > self.spec.context:
            raise TextError(
                f"the prompt has {len(ids)} tokens, {_images(images)} included, and this artifact takes "
                f"{self.spec.context}, the answer's included; shorten it, or export with a larger context"
            )
        array = np.array(ids, dtype=np.int64)
        return Prompt(ids=array, image_blocks=image_blocks(array, self.spec.image_id), image_count=images)

    def _check_control_tokens(self, ids: Sequence[int], *, turns: int | None, images: int) -> None:
        """Whatever a text contains or a tokenizer does, only the template structures a prompt."""
        expected = Counter({_BOS: 1})
        if turns is not None:
            expected.update({_START: turns + 1, _END: turns})
        expected.update({_IMAGE_START: images, _IMAGE_END: images})
        expected.update({_IMAGE_PLACE: images * self.spec.tokens_per_image})
        actual = Counter(
            self._control_tokens[token_id] for token_id in ids if token_id in self._control_tokens
        )
        for piece in expected | actual:
            if actual[piece] != expected[piece]:
                raise TextError(
                    f"{self.spec.tokenizer} finds {piece} {actual[piece]} times in a prompt that has it "
                    f"{expected[piece]} times; export the model again"
                )


def image_blocks(ids: NDArray[np.int64], image_id: int | None) -> NDArray[np.int64]:
    """Which image each token belongs to, as `Prompt.image_blocks` says.

    Args:
        ids: `[S]` token ids; places of different images have other tokens between them.
        image_id: The id of an image's places, None for a model that reads text only.
    """
    is_place = ids == (-1 if image_id is None else image_id)
    is_first = is_place & ~np.concatenate(([False], is_place[:-1]))
    return np.where(is_place, np.cumsum(is_first, dtype=np.int64) - 1, np.int64(-1))


def load_prompt_tokenizer(artifact_dir: Path, spec: PromptSpec) -> PromptTokenizer:
    """Load the tokenizer that an artifact carries.

    Args:
        artifact_dir: The artifact's directory.
        spec: Its manifest's `prompt`.

    Raises:
        TextError: If the file is absent or damaged, or is not the tokenizer that the manifest describes.
    """
    path = artifact_dir / spec.tokenizer
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextError(f"the tokenizer {path} cannot be read ({error.strerror})") from None
    unusable = f"{path} is no Hugging Face tokenizer.json"
    with tokenizer_faults(unusable):
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    _check_ids(tokenizer, spec, path)
    loaded = PromptTokenizer(tokenizer, spec)
    with tokenizer_faults(unusable):
        probed = loaded.decode(tokenizer.encode(_PROBE, add_special_tokens=False).ids)
    if probed != _PROBE:
        raise TextError(f"{path} does not give a text back as it was; export the model again")
    return loaded


class Detokenizer:
    """Turns the ids of one answer into text as they come.

    The pieces, put together, are the text that the tokenizer decodes from all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that an id completes.

        A character that the vocabulary lacks comes as several ids, one for each byte of its UTF-8. Whether
        they are characters shows when they end, so until then the text is empty.

        Raises:
            TextError: If the id is not in the tokenizer.
        """
        piece = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if piece is None:
            raise TextError(f"the tokenizer has no token {token_id}; it is not the model's, export again")
        if _BYTE_PIECE.fullmatch(piece):
            self._bytes.append(token_id)
            return ""
        return self.finish() + self._decode([token_id])

    def finish(self) -> str:
        """The text of the bytes that are left when the answer ends; bytes that are no text become U+FFFD."""
        held, self._bytes = self._bytes, []
        return self._decode(held)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """An answer and what the model thought before it.

    Attributes:
        thought: None if the model did not think.
        answer: Empty if the token limit cut the thought off.
    """

    thought: str | None
    answer: str


def split_thinking(text: str) -> Thinking:
    """Separate the thought `<unused94>thought ... <unused95>` from the answer in a decoded text.

    The closing token is missing when the token limit cut the thought off, the opening one when the prompt
    ended with it. White space around both parts is removed.
    """
    before, opened, after = text.partition(_THOUGHT_START)
    if not opened:
        before, after = "", text
    thought, closed, answer = after.partition(_THOUGHT_END)
    if not opened and not closed:
        return Thinking(thought=None, answer=text.strip())
    if (label := _THOUGHT_LABEL.match(thought)) is not None:
        thought = thought[label.end() :]
    return Thinking(thought=thought.strip(), answer=(before + answer).strip())


def _checked_system(system: str) -> str:
    _check_text(system, "the system text")
    if not system.strip():
        raise TextError("the system text is blank; leave it out, or write instructions")
    return system


def _turn_content(message: Message, role: str, number: int) -> str:
    """The parts of a turn, joined."""
    if message.role == "assistant":
        said = "model"
    elif message.role in ("user", "model"):
        said = message.role
    else:
        raise TextError(
            f"turn {number} has the role {message.role!r}; it must be user or model, "
            "and instructions go into the system text"
        )
    if said != role:
        raise TextError(
            f"turn {number} is the {said}'s and must be the {role}'s; "
            "user and model alternate, the user first"
        )
    if not message.parts:
        raise TextError(f"turn {number} has no parts; give it a Text or an Image")
    content, since_image = "", ""
    for part in message.parts:
        if isinstance(part, Text):
            _check_text(part.text, f"turn {number}")
            content += part.text.strip()
            # A control token in two halves is one when they are joined.
            since_image += part.text.strip()
            _check_text(since_image, f"turn {number}")
        elif isinstance(part, Image) and role == "user":
            content += _IMAGE_START
            since_image = ""
        elif isinstance(part, Image):
            raise TextError(f"turn {number} is the model's and has an image; images go into user turns")
        else:
            raise TextError(f"turn {number} has a part of type {type(part).__name__}; use Text and Image")
    return content


def _check_text(text: str, name: str) -> None:
    if not isinstance(text, str):
        raise TextError(f"{name} must be a string and is {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise TextError(
            f"{name} has half of a surrogate pair, which is no character; read it as UTF-8"
        ) from None
    if (control := _CONTROL.search(text)) is not None:
        raise TextError(f"{name} contains {control[0]}, which is a control token; remove it")


def _check_ids(tokenizer: Tokenizer, spec: PromptSpec, path: Path) -> None:
    """The manifest's ids must be what the tokenizer file calls by their names."""
    named = {"bos_id": (_BOS, spec.bos_id)}
    if spec.image_id is not None:
        named["image_id"] = (_IMAGE_PLACE, spec.image_id)
    for field, (piece, token_id) in named.items():
        if tokenizer.token_to_id(piece) != token_id:
            raise TextError(
                f"{path} has {piece} as {tokenizer.token_to_id(piece)} and the manifest's {field} is "
                f"{token_id}; export the model again"
            )
    needed = [_START, _END] + ([] if spec.image_id is None else [_IMAGE_START, _IMAGE_END])
    for piece in needed:
        if tokenizer.token_to_id(piece) is None:
            raise TextError(f"{path} has no token {piece}; export the model again")
    for token_id in spec.stop_ids:
        if tokenizer.id_to_token(token_id) is None:
            raise TextError(
                f"{path} has no token {token_id} and the manifest's stop_ids name it; export the model again"
            )


def _images(count: int) -> str:
    return "no image" if count == 0 else f"{count} image{'s' if count > 1 else ''}"
