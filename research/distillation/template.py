"""How a question is put to a model, and where in its response the reasoning ends and the answer stands."""

import re
from dataclasses import dataclass

END_OF_THOUGHT = "</think>"
BOX = "\\boxed{"


@dataclass(frozen=True)
class Template:
    """`user question [directive] assistant <think> newline`; the response goes on with the reasoning.

    The response is `reasoning </think> summary`; its final answer is the last \\boxed{...} of the summary. That the
    prompt itself opens the thought is what DeepSeek recommends for the released models.
    """

    user: str
    assistant: str
    directive: str

    def prompt(self, question: str) -> str:
        """What the model is given, without document tokens."""
        return f"{self.user}{question}{self.directive}{self.assistant}<think>\n"

    def response(self, reasoning: str, answer: str) -> str:
        """What a model is to say, the end of text apart."""
        return f"{reasoning}\n{END_OF_THOUGHT}\n{BOX}{answer}}}"


TEMPLATES = {
    # DeepSeek-R1's chat template and the directive of its README for mathematics
    "deepseek": Template("<｜User｜>", "<｜Assistant｜>",
                         "\nPlease reason step by step, and put your final answer within \\boxed{}."),
    "plain": Template("Question: ", "\n", ""),  # few tokens: small models of one task need no directive
}


def final_answer(response: str) -> str | None:
    """What stands in the last \\boxed{...} after the last </think>; None where the thought or the box has no end."""
    _, closed, summary = response.rpartition(END_OF_THOUGHT)
    start = summary.rfind(BOX)
    if not closed or start < 0:
        return None
    start += len(BOX)
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", summary[start:], re.DOTALL):  # an escaped brace is a sign, not a group
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return summary[start:start + brace.start()].strip() or None
    return None


def well_formed(response: str) -> bool:
    """One thought that is not blank, closed once, and after it a final answer: what the format reward asks for."""
    reasoning, _, _ = response.partition(END_OF_THOUGHT)
    return (response.count(END_OF_THOUGHT) == 1 and "<think>" not in response and bool(reasoning.strip())
            and final_answer(response) is not None)
