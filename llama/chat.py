"""A conversation with a model: each turn is read once."""

from collections.abc import Callable, Iterator
from typing import Any

from llama.generation import LLaMA, Output, PromptCache, Stream
from llama.options import SamplingParams
from llama.template import ChatTemplate


class Chat:
    """Turns of a user and a model, in a template. Used on every rank alike.

    template: by default the tokenizer's own, or that of models like it. params: those of
    LLaMA.generate, for every answer. When the context is full the oldest turns are left out, never
    the system message; .n_dropped says how many turns that were so far.
    """

    def __init__(
        self,
        generator: LLaMA,
        template: ChatTemplate | None = None,
        system: str | None = None,
        **params: Any,
    ) -> None:
        self.generator, self.params = generator, SamplingParams(**params)
        self.template = template or ChatTemplate.of(generator.tokenizer)
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
                ids, self.params, cache=self.cache, interrupted=interrupted
            )
        except ValueError:
            self.turns, self.n_dropped = before
            raise
        self.output = stream.output
        return self._answer(stream, conversation, ids)

    def _answer(self, stream: Stream, conversation: str, ids: list[int]) -> Iterator[str]:
        whole = False
        try:
            yield from stream
            # Behind a stop string the model wrote more than its text has.
            whole = not (self.params.stop and stream.output.finish_reason == "stop")
        finally:  # also where nobody reads on: a question without an answer fits no template
            answer = stream.output.text
            self.turns.append({"role": "assistant", "content": answer})
            self._asked, self._answered = conversation, self.template.guard(answer)
            self._ids = ids + stream.output.token if whole else []

    def _fitting(self) -> tuple[str, list[int]]:
        """The conversation as a text and as ids, without the turns for which there is no room."""
        room = self.generator.max_seq_len - self.generator.num_virtual_tokens
        conversation, ids = self._read(self.turns)
        longest = room - min(self.params.max_gen_len, room // 4)
        if len(ids) > longest:
            # To half, as what is left must be read again: not at every turn from now on.
            if len(self._read(self.turns[-1:])[1]) < room // 2:
                longest = room // 2
            while len(ids) > longest and len(self.turns) > 1:
                del self.turns[:2]  # a question and its answer
                self.n_dropped += 1
                conversation, ids = self._read(self.turns)
        return conversation, ids

    def _read(self, turns: list[dict[str, str]]) -> tuple[str, list[int]]:
        """Some turns as a text and as ids, with those of the last answer as they were written."""
        text = self.template.text([*self.system, *turns])
        ids = self.template.encode(text)
        if self._ids and text.startswith(self._asked):
            rest = text[len(self._asked) :]
            for answer in (self._answered.lstrip(), self._answered.strip()):
                # Templates strip answers, or put a space before them.
                if rest.lstrip().startswith(answer):
                    end = len(text) - len(rest.lstrip()) + len(answer)
                    before = self.template.encode(text[:end])
                    if ids[: len(before)] == before:  # no token lies across the answer's end
                        return text, self._ids + ids[len(before) :]
        return text, ids
