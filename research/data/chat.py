"""What a chat model is given: messages, by the Jinja template that its release carries."""

import functools
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from research.errors import RequestError


def prompt_ids(tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Ids of the messages, each {`role`, `content`}, and of what opens the model's answer to them.

    They are those of `apply_chat_template(messages, add_generation_prompt=True)` in transformers: what spells a special
    token is that token, in a message too. RequestError for a tokenizer without a template, and for messages that its
    template refuses.
    """
    return tokenizer.encode(rendered(tokenizer, messages), special=True).tolist()


def rendered(tokenizer, messages: Sequence[dict[str, str]], open_answer: bool = True) -> str:
    """The text of the messages; open_answer: and of what opens the model's answer."""
    template = template_of(tokenizer)
    try:
        return _compiled(template).render(
            messages=list(messages), tools=None, documents=None, add_generation_prompt=open_answer,
            **tokenizer.special_tokens)
    except Exception as error:  # a template is a program
        kind = "refuses the messages" if isinstance(error, Refused) else "fails"
        said = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"the checkpoint's chat template {kind}: {said}") from None


def template_of(tokenizer) -> str:
    """Its chat template; RequestError where it has none."""
    if not tokenizer.chat_template:
        raise RequestError("the checkpoint has no chat template: neither chat_template in its tokenizer_config.json, "
                           "nor a chat_template.jinja")
    return tokenizer.chat_template


class Refused(jinja2.TemplateError):
    """What a template says with `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` around what the model has said: its body, in a scope of its own, as
    transformers renders it. Which tokens it marks for training is not told."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """With the names and the treatment of white space that templates are written for (those of transformers)."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made.from_string(template)


def _tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
            sort_keys: bool = False) -> str:
    """As JSON says it, with the arguments of transformers: Jinja's own filter also escapes what HTML reserves."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise Refused(message)
