"""Token ids into text while they come: no character is split, and stop strings end it."""

from collections.abc import Sequence

from llama.tokenizer import Tokenizer

CONTEXT = 8  # tokens of a prompt behind which its continuation is decoded
REPLACEMENT = "\ufffd"  # for bytes that are no UTF-8, as those of a character cut in two


class TextStream:
    """The text of a continuation, handed out in pieces as its tokens come.

    Joined, the pieces are its whole text. stop: strings that end it, and are not in it; .stopped
    says that one has come.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        # Tokens are decoded behind those of the piece before: by itself a continuation loses the
        # space that SentencePiece drops in front of a text.
        self._context = list(prompt_ids[-CONTEXT:])
        if not tokenizer.decode(self._context):  # special tokens alone
            self._context = list(prompt_ids)
        self._ids: list[int] = []  # behind the context, not in any piece yet
        self._held = ""  # may be the beginning of a stop string

    def add(self, token: int) -> str:
        """What can be shown now that this token has come: often nothing, never half a character."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(REPLACEMENT):  # more bytes may make a character of it
            return ""
        if text:
            self._context, self._ids = self._ids, []
        return self._until_stop(text)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        text = self._until_stop(self._decode())
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self) -> str:
        before = self.tokenizer.decode(self._context)
        whole = self.tokenizer.decode(self._context + self._ids)
        if whole.startswith(before):
            return whole[len(before) :]
        return self.tokenizer.decode(self._ids)  # the context ended inside a character

    def _until_stop(self, text: str) -> str:
        """The text held back and this one, up to a stop string or what may become one."""
        text, self._held = self._held + text, ""
        found = [at for word in self.stop if (at := text.find(word)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        longest = max((len(word) for word in self.stop), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(word.startswith(text[-n:]) for word in self.stop):
                self._held = text[-n:]
                return text[:-n]
        return text
