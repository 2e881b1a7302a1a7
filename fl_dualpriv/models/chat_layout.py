"""Positions of image, question and answer in a chat, read from the chat template of a model's processor."""

from typing import Any

from fl_dualpriv.errors import ConfigError

_SLOT = "QUESTION"


class ChatLayout:
    """The tokens around an image, a question and an answer.

    The template renders one user message with an image and a text, followed by the generation prompt, which asks the
    model to answer. Without a template the text is the image and the question, one per line.

    Args:
        name: Name of the model, for messages.
        processor: Processor of transformers, with a tokenizer.
        image_id: Id that stands for an image.
        vocabulary: Number of ids that the model knows.

    Raises:
        ConfigError: If the template does not put one image before the question, or if the tokenizer does not fit.
    """

    def __init__(self, name: str, processor: Any, image_id: int, vocabulary: int) -> None:
        self._name, self._image_id, self._vocabulary = name, image_id, vocabulary
        self._tokenizer = processor.tokenizer
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(f"backbone.name = {name!r}: its tokenizer has no end token (eos_token)")
        self.end: int = self._tokenizer.eos_token_id
        self._special = frozenset({*self._tokenizer.all_special_ids, image_id})
        image = self._tokenizer.convert_ids_to_tokens(image_id) if image_id < len(self._tokenizer) else None
        if image is None or self._ids(image, False) != [image_id]:
            raise ConfigError(
                f"backbone.name = {name!r}: its tokenizer has no image token, which is id {image_id} in the model's "
                "configuration"
            )
        text = self._render(processor) if processor.chat_template else f"{image}\n{_SLOT}\n"
        where = [text.find(part) for part in (image, _SLOT)]
        if not 0 <= where[0] < where[1] or text.count(image) != 1 or text.count(_SLOT) != 1:
            raise ConfigError(
                f"backbone.name = {name!r}: its chat template must put one image token {image!r} and then the question "
                f"into a user's message; it makes {text!r}"
            )
        start = self._tokenizer.bos_token
        self._adds_start = not (start and text.startswith(start))
        self._text = text
        self.before, _ = self._split("")

    def words(self, text: str) -> list[int]:
        """Return the ids of a text, without added special tokens; ConfigError if an id is special or unknown."""
        ids = self._ids(text, False)
        bad = [i for i in ids if i in self._special or i >= self._vocabulary]
        if bad:
            raise ConfigError(
                f"backbone.name = {self._name!r}: {text!r} has words that are not in its vocabulary, or its special "
                f"tokens (ids {', '.join(map(str, bad[:3]))}); use other words"
            )
        return ids

    def question(self, text: str) -> list[int]:
        """Return the ids of all tokens between image and answer.

        A tokenizer may join words of a question with the text around it. The ids before the image then change, or ids
        that the model does not know follow the image.

        Raises:
            ConfigError: If `words` raises it, if the question is empty, or if it does not fit into the template.
        """
        if not self.words(text):
            raise ConfigError(f"backbone.name = {self._name!r}: a question must have words; {text!r} has none")
        before, behind = self._split(text.strip())
        if before != self.before or any(i == self._image_id or i >= self._vocabulary for i in behind):
            raise ConfigError(f"backbone.name = {self._name!r}: {text!r} does not fit into its chat template")
        return behind

    def answer(self, text: str) -> list[int]:
        """Return the ids of an answer and the end token; ConfigError if `words` raises it or the answer is empty."""
        ids = self.words(text.strip())
        if not ids:
            raise ConfigError(f"backbone.name = {self._name!r}: an answer must have words; {text!r} has none")
        return [*ids, self.end]

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids; special tokens are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _render(self, processor: Any) -> str:
        content = [{"type": "image"}, {"type": "text", "text": _SLOT}]
        try:
            return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        except Exception as error:  # a template may raise any kind
            reason = f"{type(error).__name__}: {str(error).strip()}"
            raise ConfigError(
                f"backbone.name = {self._name!r}: its chat template cannot be rendered: {reason}"
            ) from error

    def _split(self, question: str) -> tuple[list[int], list[int]]:
        """Tokenize the whole text as the model would read it; return the ids before and after the image."""
        ids = self._ids(self._text.replace(_SLOT, question), self._adds_start)
        if self._image_id not in ids:
            raise ConfigError(
                f"backbone.name = {self._name!r}: its tokenizer loses the image token before {question!r}"
            )
        at = ids.index(self._image_id)
        return ids[:at], ids[at + 1 :]

    def _ids(self, text: str, special: bool) -> list[int]:
        try:
            return self._tokenizer(text, add_special_tokens=special)["input_ids"]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is not an `Exception`, and must not reveal whose text it was
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"backbone.name = {self._name!r}: its tokenizer cannot read {text!r}: {reason}"
            ) from error
