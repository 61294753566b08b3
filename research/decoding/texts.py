"""The text of a row while its tokens come."""

from collections.abc import Sequence

STEPS_AT_ONCE = 16  # passes between two looks at the texts


class Growing:
    """The text of all tokens so far, cut before the first of the texts that end it."""

    def __init__(self, tokenizer, until: Sequence[str]):
        self._tokenizer, self._until, self.text, self.over = tokenizer, until, "", False

    def __call__(self, tokens: list[int]) -> bool:
        """Takes all tokens so far; returns whether the row is to stop."""
        if not self.over:
            self.text = self._tokenizer.decode(tokens)
            found = [self.text.index(end) for end in self._until if end in self.text]
            if found:
                self.text, self.over = self.text[:min(found)], True
        return self.over
