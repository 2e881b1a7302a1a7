"""Where image, question and answer stand in a chat: read off the template of a model's processor."""

from typing import Any

from fl_dualpriv.errors import ConfigError

_SLOT = "QUESTION"


class ChatLayout:
    """The tokens around an image, a question and an answer.

    One user message with an image and a text is rendered, followed by what asks the model to answer. Without a template
    it is the image, the question and a line each.

    Args:
        name: Of the model, for messages.
        processor: Of transformers, with a tokenizer.
        image_id: Id that stands for an image.
        vocabulary: Ids that the model knows.

    Raises:
        ConfigError: If the template does not put one image in front of the question, or if the tokenizer does not fit.
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
        """Ids of a text alone; ConfigError if one of them is no word."""
        ids = self._ids(text, False)
        bad = [i for i in ids if i in self._special or i >= self._vocabulary]
        if bad:
            raise ConfigError(
                f"backbone.name = {self._name!r}: {text!r} has words that are not in its vocabulary, or its special "
                f"tokens (ids {', '.join(map(str, bad[:3]))}); write it otherwise"
            )
        return ids

    def question(self, text: str) -> list[int]:
        """Ids of everything between image and answer; ConfigError as `words`, or if it is empty or cannot be laid out.

        A tokenizer may join words of a question and what stands around it: then others stand before the image, or ids
        that the model does not know behind it.
        """
        if not self.words(text):
            raise ConfigError(f"backbone.name = {self._name!r}: a question must have words; {text!r} has none")
        before, behind = self._split(text.strip())
        if before != self.before or any(i == self._image_id or i >= self._vocabulary for i in behind):
            raise ConfigError(f"backbone.name = {self._name!r}: {text!r} cannot stand in its chat template")
        return behind

    def answer(self, text: str) -> list[int]:
        """Ids of an answer and the end; ConfigError as `words`, or if there is none."""
        ids = self.words(text.strip())
        if not ids:
            raise ConfigError(f"backbone.name = {self._name!r}: an answer must have words; {text!r} has none")
        return [*ids, self.end]

    def text(self, ids: list[int]) -> str:
        """What ids of words say; special tokens say nothing."""
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _render(self, processor: Any) -> str:
        content = [{"type": "image"}, {"type": "text", "text": _SLOT}]
        try:
            return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        except Exception as error:  # whatever a template raises
            reason = f"{type(error).__name__}: {str(error).strip()}"
            raise ConfigError(
                f"backbone.name = {self._name!r}: its chat template cannot be rendered: {reason}"
            ) from error

    def _split(self, question: str) -> tuple[list[int], list[int]]:
        """Ids before and behind the image, of the whole text as the model would read it."""
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
        except BaseException as error:  # a panic in Rust is no `Exception`, and must not tell whose text it was
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"backbone.name = {self._name!r}: its tokenizer cannot read {text!r}: {reason}"
            ) from error
