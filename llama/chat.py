"""A conversation with a model: each turn is read once."""

from collections.abc import Callable, Iterator
from typing import Any

from llama.generation import LLaMA, Output, PromptCache, Stream
from llama.template import ChatTemplate


class Chat:
    """Turns of a user and a model, in a template. Used on every rank alike.

    params: those of LLaMA.generate, for every answer. When the context is full the oldest turns
    are left out, never the system message; .n_dropped says how many turns that were so far.
    """

    def __init__(
        self, generator: LLaMA, template: ChatTemplate, system: str | None = None, **params: Any
    ) -> None:
        self.generator, self.template, self.params = generator, template, params
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.cache = PromptCache(generator)
        self.output = Output()  # of the last answer
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.turns: list[dict[str, str]] = []
        self.n_dropped = 0
        # The conversation up to the last answer, this, and the ids of both, as they were read and
        # written: an answer's own ids need not be those that its text would get.
        self._asked, self._answered = "", ""
        self._ids: list[int] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, as the template takes it."""
        return [*self.system, *self.turns]

    def ask(self, text: str, interrupted: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Answer a message: the pieces as they come. .output is then the whole of it.

        Raises ValueError, and forgets the message, if it is too long or does not fit the template.
        """
        before = list(self.turns), self.n_dropped
        self.turns.append({"role": "user", "content": text})
        try:
            conversation, ids = self._fitting()
            stream = self.generator.stream(
                ids, cache=self.cache, interrupted=interrupted, **self.params
            )
        except ValueError:
            self.turns, self.n_dropped = before
            raise
        self.output = stream.output
        return self._answer(stream, conversation, ids)

    def _answer(self, stream: Stream, conversation: str, ids: list[int]) -> Iterator[str]:
        yield from stream
        answer = self.output.text
        self.turns.append({"role": "assistant", "content": answer})
        self._asked, self._answered = conversation, self.template.guard(answer)
        self._ids = ids + self.output.token

    def _fitting(self) -> tuple[str, list[int]]:
        """The conversation as a text and as ids, without the turns for which there is no room."""
        room = self.generator.max_seq_len - self.generator.num_virtual_tokens
        conversation, ids = self._read()
        if len(ids) + min(self.params["max_gen_len"], room // 4) > room:
            # To half, as what is left must be read again: not at every turn from now on.
            while len(ids) > room // 2 and len(self.turns) > 1:
                del self.turns[:2]  # a question and its answer
                self.n_dropped += 1
                conversation, ids = self._read()
        return conversation, ids

    def _read(self) -> tuple[str, list[int]]:
        text = self.template.text(self.messages)
        if self._ids and text.startswith(self._asked):
            # Templates strip answers, or put a space before them.
            rest = text[len(self._asked) :].lstrip()
            for answer in (self._answered.lstrip(), self._answered.strip()):
                if rest.startswith(answer):
                    return text, self._ids + self.template.encode(rest[len(answer) :])
        return text, self.template.encode(text)
