"""A model for EleutherAI's lm-evaluation-harness (requirements-eval.txt), registered there as `parsimony`.

`python -m research.harness` is the command. From Python, once this module is imported:
`lm_eval.simple_evaluate(model="parsimony", model_args={"checkpoint": DIR}, tasks=[...])`.
"""

from pathlib import Path

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from research.data.chat import rendered, template_of
from research.errors import RequestError
from research.generate import load
from research.interop.evaluator import Evaluator


@register_model("parsimony")
class ParsimonyLM(LM):
    """A workdir or a Hugging Face folder with its tokenizer.json; research/interop/evaluator.py does the work."""

    def __init__(self, checkpoint: str, batch_size: int = 8, max_length: int | None = None, recipe: str | None = None,
                 seed: int = 0, chat: bool = False):
        """recipe: float32 or bfloat16, None as research.generate does; chat: texts are those of the checkpoint's chat
        template; the others are `Evaluator`'s. RequestError."""
        super().__init__()
        if not str(batch_size).isdigit():
            raise RequestError(f"--batch_size={batch_size!r} must be a whole number")
        decoder, tokenizer, first = load(Path(checkpoint).expanduser(), recipe, None)
        if chat:
            template_of(tokenizer)
        self.evaluator = Evaluator(decoder, tokenizer, [] if chat else first, int(batch_size), max_length, seed,
                                   special=chat)

    @property
    def tokenizer_name(self) -> str:
        """What the harness knows the template's texts by, in its cache."""
        return self.evaluator.tokenizer.hash

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.evaluator.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return rendered(self.evaluator.tokenizer, chat_history, add_generation_prompt)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        return self._answer("loglikelihood", self.evaluator.loglikelihood, requests, lambda pair: pair)

    def loglikelihood_rolling(self, requests) -> list[float]:
        return self._answer("loglikelihood_rolling", self.evaluator.loglikelihood_rolling, requests, lambda one: one[0])

    def generate_until(self, requests) -> list[str]:
        return self._answer("generate_until", self.evaluator.generate_until, requests, lambda pair: pair)

    def _answer(self, name: str, function, requests, read) -> list:
        """Answers of `function`, each kept in the harness's cache as soon as it is known."""
        arguments = [request.args for request in requests]
        return function([read(one) for one in arguments],
                        lambda number, answer: self.cache_hook.add_partial(name, arguments[number], answer))
