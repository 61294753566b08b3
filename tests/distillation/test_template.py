import pytest

from research.distillation.template import TEMPLATES, final_answer, well_formed


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_gives_back_its_answer(name):
    template = TEMPLATES[name]
    response = template.response("so 2 + 2 is 4", "\\frac{1}{\\sqrt{2}}")
    assert template.prompt("What?").endswith("<think>\n") and "What?" in template.prompt("What?")
    assert final_answer(response) == "\\frac{1}{\\sqrt{2}}"
    assert well_formed(response)


def test_the_prompt_of_the_released_models():
    assert TEMPLATES["deepseek"].prompt("1 + 1?") == (
        "<｜User｜>1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<｜Assistant｜><think>\n")


@pytest.mark.parametrize(("response", "answer", "good"), [
    ("a </think> \\boxed{1} or rather \\boxed{2}", "2", True),
    ("maybe \\boxed{1}", None, False),  # no end of the thought
    ("maybe \\boxed{1} </think> it is 1", None, False),
    ("a </think> \\boxed{1", None, False),  # cut off
    ("a </think> \\boxed{ }", None, False),
    ("a </think> \\boxed{\\left\\{ 1, 2 \\right.}", "\\left\\{ 1, 2 \\right.", True),  # an escaped brace is a sign
    (" \n</think> \\boxed{3}", "3", False),  # no thought
    ("<think> a </think> \\boxed{3}", "3", False),  # the prompt has opened it already
    ("a </think> b </think> \\boxed{3}", "3", False),
    ("a </think> \\boxed{1} </think> or 2", None, False),
])
def test_where_the_answer_stands(response, answer, good):
    assert final_answer(response) == answer
    assert well_formed(response) == good
